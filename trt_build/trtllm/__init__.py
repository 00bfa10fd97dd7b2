"""TensorRT-LLM: the networks that it lacks, and what builds and runs its engines."""
