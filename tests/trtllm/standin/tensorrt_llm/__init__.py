"""A stand-in of TensorRT-LLM 1.2's Python surface: what our network and builder touch of it, run eagerly in torch.

It is no TensorRT: nothing is compiled and no plugin exists. It answers three questions without a GPU. Do our calls fit
the library's signatures (`tests/trtllm/contract.json`)? Do our checkpoints load under the library's names, shapes and
load-time transforms? And do network and bytes together give the reference's logits, on one rank and on several?

Module paths, names, defaults and checks are upstream's; each module names the file it stands for. Arithmetic is
float32 whatever a tensor is stored in, so that a comparison measures what the weights mean and not how half precision
rounds. What moeship does not use is absent, and using it raises.

Put this folder's parent on sys.path to import it; nothing else here does (`tests/trtllm/conftest.py`).

  STANDIN_SM     the GPU architecture that layouts and refusals go by, as an integer; 80 if unset
  STANDIN_GPUS   how many GPUs are visible; 1 if unset
"""

from tensorrt_llm.version import __version__

__all__ = ["__version__"]
