"""The parts of cpu_decode.py: the peer's model, the contenders, what they read, and the report."""
