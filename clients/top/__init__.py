"""A live view of a server's metrics: reads them, computes rates and percentiles, draws one frame."""
