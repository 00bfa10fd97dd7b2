"""A checkpoint's tokenizer: what the folder's files say together, checked, built and loaded."""
