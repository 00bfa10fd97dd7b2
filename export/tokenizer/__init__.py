"""Builds, checks and loads a checkpoint's tokenizer from all files of the folder that describe it."""
