"""TensorRT-LLM: the networks that it lacks, and what builds and runs its engines."""

NETWORKS = {"PhixtralForCausalLM": "phixtral"}  # that the library lacks: architecture to module here
