"""What ci/overload.py sends to a served model, and what it looks at."""
