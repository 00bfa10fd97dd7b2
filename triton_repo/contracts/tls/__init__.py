"""TLS: reads and checks certificates and keys, for servers and for clients."""
