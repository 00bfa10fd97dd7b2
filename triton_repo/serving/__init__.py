"""Model repository in, running tritonserver out: checks before the start, the start, the wait until it is ready."""
