"""QWenForCausalLM of TensorRT-LLM 1.2 with the epsilon of config.json in the norms of queries and keys.

    trtllm-build --checkpoint_dir CHECKPOINT --model_cls_file qwen3_moe.py --model_cls_name Qwen3MoeForCausalLM ...

The library's class hands no epsilon to its attention, whose norms of queries and keys then add the default of 1e-5 to
the mean square, where published models add 1e-6. All else is the library's. An engine has the number compiled in, so
this file is needed when it is built and never after. Importing it puts the class in the place of the library's own in
MODEL_MAP. trtllm-build loads this file alone, under the module name `models`, so it imports nothing but TensorRT-LLM.
Source: tensorrt_llm/models/qwen/model.py, tensorrt_llm/layers/attention.py.
"""

from __future__ import annotations

from tensorrt_llm.models import MODEL_MAP
from tensorrt_llm.models.qwen.config import QWenConfig
from tensorrt_llm.models.qwen.model import QWenForCausalLM

ARCHITECTURE = "Qwen3MoeForCausalLM"


class Qwen3MoeForCausalLM(QWenForCausalLM):
    """The model of one rank, under the name by which the library has its own."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        for layer in self.transformer.layers:
            for norm in (layer.attention.q_layernorm, layer.attention.k_layernorm):
                norm.eps = config.norm_epsilon


MODEL_MAP[ARCHITECTURE] = Qwen3MoeForCausalLM
