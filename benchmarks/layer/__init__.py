"""Parts of kernels.py: one layer's experts by each runtime, in processes of their own, and the processor's limits."""
