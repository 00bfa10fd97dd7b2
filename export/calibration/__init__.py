"""Calibration: codes that GPTQ solves over a text, layer by layer, with the float32 reference's own activations."""
