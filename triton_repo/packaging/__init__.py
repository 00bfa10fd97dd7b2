"""Engine directory in, models of a Triton model repository out."""
