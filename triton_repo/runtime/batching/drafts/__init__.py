"""Drafts of the next tokens from a sequence's own text, so that one step computes several of its tokens."""
