"""The steps of an ensemble: text to tokens, tokens to tokens, tokens to pieces of answers."""
