"""What nodes agree on without a server: who is here, who coordinates, who hosts the broker. Pure cores."""
