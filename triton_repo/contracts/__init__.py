"""What two sides agree on: tensors between clients and models, parameters and files of a packaged model."""
