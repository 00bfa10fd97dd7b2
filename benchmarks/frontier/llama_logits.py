"""Computes llama.cpp's logits of all positions of a few windows: `python -m frontier.llama_logits ORDER ANSWER`."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from decode.libraries import llama_cpp, log_tail

FLOAT32 = 0  # ggml's number of the type


def main() -> None:
    order: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    library = llama_cpp()
    library.llama_backend_init()
    model = library.llama_model_load_from_file(order["model"].encode(), library.llama_model_default_params())
    if not model:
        raise AssertionError(f"llama.cpp refuses {order['model']}: {log_tail()}")
    vocabulary = library.llama_model_get_vocab(model)
    size = library.llama_vocab_n_tokens(vocabulary)
    longest = max(map(len, order["windows"]))
    parameters = library.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = longest
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.type_k = parameters.type_v = FLOAT32
    context = library.llama_init_from_model(model, parameters)
    if not context:
        raise AssertionError(f"llama.cpp makes no context: {log_tail()}")
    found = []
    for window in order["windows"]:
        library.llama_memory_clear(library.llama_get_memory(context), True)
        batch = library.llama_batch_init(len(window), 0, 1)
        batch.n_tokens = len(window)
        for place, token in enumerate(window):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        status = library.llama_decode(context, batch)
        if status:
            raise AssertionError(f"llama_decode ended with status {status}")
        pointer = ctypes.cast(library.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        found.append(np.ctypeslib.as_array(pointer, (len(window), size)).copy())
        library.llama_batch_free(batch)
    text = order["text"].encode()
    tokens = (library.llama_token * (len(text) + 8))()
    count = library.llama_tokenize(vocabulary, text, len(text), tokens, len(tokens), True, False) if text else 0
    np.savez(sys.argv[2], logits=np.concatenate(found), tokens=np.array(tokens[:count], dtype=np.int64))


if __name__ == "__main__":
    main()
