"""The parts of cpu_decode.py: the model for llama.cpp, the contenders, the bytes that they read, and the report."""
