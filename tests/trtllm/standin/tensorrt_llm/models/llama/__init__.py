"""Stands for tensorrt_llm/models/llama: the class of Llama and Mixtral."""
