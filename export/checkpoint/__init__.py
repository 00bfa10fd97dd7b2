"""A checkpoint folder: which files it has, what their headers say, and its tensors under our names."""
