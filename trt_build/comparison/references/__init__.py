"""What transformers' classes lack of a family's reference, one module a family; `add(reference, model)` puts it in."""
