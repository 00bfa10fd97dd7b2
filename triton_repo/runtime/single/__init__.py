"""The model without steps: wire tensors in, pieces of text out."""
