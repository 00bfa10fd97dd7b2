"""Clients of a served model: gRPC streaming, sync and async."""
