"""Clients of a served model over gRPC, for threads and for asyncio."""
