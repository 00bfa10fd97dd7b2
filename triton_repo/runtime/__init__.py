"""What runs inside the server: request options, sampling, incremental detokenising, the generation loop."""
