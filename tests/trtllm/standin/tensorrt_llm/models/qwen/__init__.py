"""Stands for tensorrt_llm/models/qwen: the class of Qwen's models, as its mixtures use it."""
