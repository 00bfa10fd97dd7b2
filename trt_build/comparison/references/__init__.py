"""Modules that transformers' classes lack, one file for each family; `add(reference, model)` puts them into a model."""
