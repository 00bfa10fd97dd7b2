"""Parts of kernels.py: the experts of one layer in each runtime, in separate processes, and the processor's limits."""
