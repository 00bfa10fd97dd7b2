"""Dense Phi-2 experts in, one phixtral checkpoint out: merge.py merges, config.py reads mergekit-moe's YAML."""
