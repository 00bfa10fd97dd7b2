"""Merges dense models into a mixture: merge.py merges, config.py reads mergekit-moe's YAML."""
