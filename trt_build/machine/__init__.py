"""This machine: its GPUs, its memory and memory bandwidth, and child programs that end with their parent."""
