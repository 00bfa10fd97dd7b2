"""Batch jobs: a file of requests, sent to one or several endpoints, becomes a file of answers."""
