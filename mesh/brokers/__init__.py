"""The brokers a node can host. ``mesh.broker.start_broker`` chooses one and imports only that one."""
