"""How bytes travel: the bus over a broker, the peers' data plane, discovery, keys. One library per file."""
