"""Reads a checkpoint folder: its files, the headers of its shards, and its tensors under our names."""
