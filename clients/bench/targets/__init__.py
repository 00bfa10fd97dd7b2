"""The servers that the load generator knows: each is a target that sends one request and yields what arrives."""
