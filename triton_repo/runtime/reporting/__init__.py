"""What a served engine tells an operator."""
