"""This machine: its GPUs, its memory, how fast that is read, and programs that end with their parent."""
