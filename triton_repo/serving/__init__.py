"""Model repository in, running tritonserver out: checks what would fail, starts the server, waits until it is ready."""
