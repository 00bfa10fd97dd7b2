"""Reads files that others wrote, within bounds, and writes outputs that appear whole or can be resumed."""
