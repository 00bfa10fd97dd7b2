"""What is asked of a TensorRT-LLM engine: are the rank files that it was built from the checkpoint, and what does it
compute of them?

rank_weights.py  the weights in rank files, in the checkpoint's own layout
config_facts.py  config.json of the rank files and of the engine against the checkpoint's
weights.py       first question: are these the checkpoint's weights?
"""
