"""Quantisation as data: the integer grid and the recipe that says which tensor gets how many bits."""
