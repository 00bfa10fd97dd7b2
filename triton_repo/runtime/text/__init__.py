"""Text to token ids and back, and the words that are looked for in both."""
