"""Prompts to token ids, token ids to text, and stop and bad words in both."""
