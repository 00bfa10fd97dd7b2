"""The keys of config.json: what transformers does with each, and which of them may stay unread."""
