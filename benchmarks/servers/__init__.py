"""What benchmarks/serving.py is made of: servers that stay loaded, the loads that they get, and what comes of them."""
