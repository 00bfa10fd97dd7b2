"""An engine against its reference: the texts, the reference in torch, and the figures of parity."""
