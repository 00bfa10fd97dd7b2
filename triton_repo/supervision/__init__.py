"""Keeps a server running: watches its processes and starts it again."""
