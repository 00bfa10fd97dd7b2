"""Guided decoding: answers that keep to a JSON schema, a regular expression or a grammar."""
