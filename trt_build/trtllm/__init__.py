"""Plans, builds and verifies engines for TensorRT-LLM, and defines the networks that the library lacks."""
