"""The `moeship` command: one module a command."""
