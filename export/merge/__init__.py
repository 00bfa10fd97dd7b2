"""Merges dense Phi-2 experts into one phixtral checkpoint: merge.py merges, config.py reads mergekit-moe's YAML."""
