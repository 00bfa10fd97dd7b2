"""The endpoints: what each takes, and how its answers look."""
