"""The reference: a model computed in float32 by numpy, layer by layer and expert by expert from its checkpoint."""
