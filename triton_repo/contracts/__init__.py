"""What two sides agree on: tensors between client, server and models; parameters and files that a package holds."""
