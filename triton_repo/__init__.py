"""Engine directory in, Triton model repository and running server out."""
