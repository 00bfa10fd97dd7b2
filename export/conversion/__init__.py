"""Converts weights part by part, in processes of their own; an interrupted conversion can be resumed."""
