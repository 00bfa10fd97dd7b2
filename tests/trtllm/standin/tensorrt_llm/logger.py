"""Stands for tensorrt_llm/logger.py: the one logger, here of the standard library."""

import logging

logger = logging.getLogger("tensorrt_llm")
