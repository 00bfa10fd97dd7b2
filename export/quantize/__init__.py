"""Quantises weights: the rounding and packing of values, and the recipe that says which role gets how many bits."""
