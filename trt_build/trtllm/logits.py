"""A program that runs a TensorRT-LLM engine on prompts and writes the logits: numpy files in and out.

    python -m trt_build.trtllm.logits ENGINE REQUESTS.npz ANSWERS.npz [MODULE]      (under mpirun, one process a rank)

MODULE is the file of trt_build/trtllm that defines the engine's network if the library lacks it.

It runs in a separate process, so that the library, MPI and the GPU's memory are released when it ends. The logits are
those of generated positions, which any engine returns, so verification needs no engine built with other outputs.
Source of the calls: tensorrt_llm/runtime/model_runner_cpp.py.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
KV_CACHE_FRACTION = 0.5  # share of the free GPU memory for keys and values; enough for a few short sequences


def ask(
    engine: Path,
    prompts: list[npt.NDArray[np.int32]],
    decoded: npt.NDArray[np.int32],
    steps: int,
    module: str | None,
) -> dict[str, Any]:
    """The logits [len(prompts), V] after each prompt; the ids [n] and logits [n, V] of `steps` tokens that the engine
    generates after the prompt `decoded`; and the logits [n, V] after the same tokens when each is the end of a prompt.
    Empty on ranks other than the first."""
    import importlib

    import torch

    config = json.loads((engine / "config.json").read_text())
    if module is not None:
        importlib.import_module(
            f"trt_build.trtllm.{module}"
        )  # the library looks the architecture up in this process too
    from tensorrt_llm.runtime import ModelRunnerCpp

    runner = ModelRunnerCpp.from_dir(
        str(engine),
        rank=int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")),
        kv_cache_free_gpu_memory_fraction=KV_CACHE_FRACTION,
        gather_generation_logits=True,
    )

    def generate(batch: list[npt.NDArray[np.int32]], new_tokens: int) -> Any:  # noqa: ANN401 - a dict, or [] on other ranks
        return runner.generate(
            [torch.from_numpy(prompt) for prompt in batch], max_new_tokens=new_tokens, end_id=-1, pad_id=0, top_k=1,
            return_dict=True, output_sequence_lengths=True, output_generation_logits=True,
        )  # fmt: skip

    size = config["build_config"]["max_batch_size"]

    def score(batch: list[npt.NDArray[np.int32]]) -> FloatArray:
        found = []
        for start in range(0, len(batch), size):
            answer = generate(batch[start : start + size], 1)
            found.append(_rows(answer["generation_logits"])[:, 0, 0])  # [batch, sequences, new tokens, V]
        return np.concatenate(found)

    answer = generate([decoded], steps)
    if not answer:
        return {}
    ids = answer["output_ids"].cpu().numpy()[0, 0, len(decoded) : len(decoded) + steps].astype(np.int32)
    prefixes = [np.concatenate([decoded, ids[:step]]) for step in range(steps)]
    return {
        "scored": score(prompts),
        "decoded_ids": ids,
        "decoded_logits": _rows(answer["generation_logits"])[0, 0, :steps],
        "context_logits": score(prefixes),
    }


def _rows(logits: Any) -> FloatArray:  # noqa: ANN401 - a torch.Tensor
    found: FloatArray = logits.float().cpu().numpy()
    return found


def main() -> int:
    engine, requests, answers = map(Path, sys.argv[1:4])
    module = sys.argv[4] if len(sys.argv) > 4 else None
    with np.load(requests) as asked:
        ends = np.cumsum(asked["lengths"])
        prompts = [asked["tokens"][end - length : end] for end, length in zip(ends, asked["lengths"], strict=True)]
        found = ask(engine, prompts, asked["decoded"], int(asked["steps"]), module)
    if found:
        np.savez(answers, **found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
