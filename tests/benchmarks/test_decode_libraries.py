"""llama.cpp and ik_llama.cpp: apart from each other, on the same files, through interfaces that differ."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

from decode import check, contenders, libraries
from decode.contenders import CHOICES, IkLlama, Task
from decode.entrants import gguf_path, prepare
from decode.gguf_model import write_model
from decode.shape import tensors
from export.errors import ConfigError
from synthetic_checkpoint import PHIXTRAL

BENCHMARKS = Path(check.__file__).resolve().parent.parent
SMALL = replace(
    PHIXTRAL, family="mixtral", hidden_size=256, num_layers=1, num_heads=4, num_kv_heads=2, head_size=64, rotary_dim=64,
    ffn_size=256, vocab_size=96, num_experts=3, max_positions=128,
)  # fmt: skip


@pytest.mark.parametrize(
    ("load", "other"), [(libraries.llama_cpp, "ik_llama_cpp"), (libraries.ik_llama_cpp, "llama_cpp")]
)
def test_a_process_that_has_one_library_does_not_load_the_other(monkeypatch, load, other):
    monkeypatch.setitem(sys.modules, other, SimpleNamespace())
    with pytest.raises(AssertionError, match=rf"this process has loaded {other}; load it in another process"):
        load.__wrapped__()


@pytest.mark.parametrize(("info", "refused"), [("AVX2 = 1 | AVX512_VNNI = 0", True), ("AVX512_VNNI = 1", False)])
def test_a_library_compiled_for_a_lesser_processor_is_refused(monkeypatch, info, refused):
    functions = SimpleNamespace(
        llama_log_set=lambda *_: None, llama_batch_get_one=SimpleNamespace(),
        llama_print_system_info=lambda: info.encode(),
    )  # fmt: skip
    monkeypatch.setattr(functions.llama_print_system_info, "restype", None, raising=False)
    package = SimpleNamespace(
        _lib=functions, llama_token_p=ctypes.c_void_p, llama_pos=ctypes.c_int32, llama_batch=ctypes.Structure
    )
    monkeypatch.setattr(libraries.importlib, "import_module", lambda name: package)
    monkeypatch.setattr(libraries.machine, "vector_extensions", lambda: ["avx2", "avx512_vnni"])
    if refused:
        with pytest.raises(ConfigError, match="the library is compiled without.*compile_ik_llama.sh"):
            libraries.ik_llama_cpp.__wrapped__()
    else:
        assert libraries.ik_llama_cpp.__wrapped__() is package


def test_both_read_the_same_file_and_each_tries_its_own_settings(tmp_path):
    kinds = {
        t.name: gguf.GGMLQuantizationType.F32 if t.is_plain else gguf.GGMLQuantizationType.Q4_0 for t in tensors(SMALL)
    }
    path = gguf_path(tmp_path, SMALL, "q4_0")
    write_model(path, SMALL, kinds, lambda rows, kind: gguf.quantize(rows, kind).view(np.uint8), file_type=2)
    theirs, ik = (prepare(name, None, SMALL, tmp_path, scaled_layers=1) for name in ("llama-q4_0", "ik-q4_0"))
    assert theirs.source == ik.source == path
    assert theirs.read_per_token == ik.read_per_token
    assert [dict(choice) for choice in ik.choices] == [
        {"flash_attention": True, "repack": False}, {"flash_attention": False, "repack": False},
        {"flash_attention": True, "repack": True}, {"flash_attention": False, "repack": True},
    ]  # fmt: skip
    assert all("repack" not in choice for choice in theirs.choices)


def ik_of_logits(decoded):
    """ik_llama.cpp's module with a model of 4 logits; what is decoded is kept as (first position, ids)."""
    values = (ctypes.c_float * 4)(0, 3, 1, 2)
    made = {}

    def open_context(model, parameters):
        made["context"] = parameters
        return 2

    def open_model(path, parameters):
        made["model"] = parameters
        return 1

    return made, SimpleNamespace(
        _lib=SimpleNamespace(llama_batch_get_one=lambda ids, count, position, _sequence: (position, list(ids)[:count])),
        llama_token=ctypes.c_int32, llama_backend_init=lambda: None,
        llama_model_default_params=SimpleNamespace, llama_context_default_params=SimpleNamespace,
        llama_model_load_from_file=open_model, llama_init_from_model=open_context,
        llama_decode=lambda _context, batch: decoded.append(batch), llama_kv_cache_clear=decoded.append,
        llama_get_logits_ith=lambda *_: ctypes.cast(values, ctypes.POINTER(ctypes.c_float)),
    )  # fmt: skip


def test_ik_llama_is_told_where_a_batch_begins_and_how_to_keep_its_weights(monkeypatch):
    decoded: list[object] = []
    made, library = ik_of_logits(decoded)
    monkeypatch.setattr(contenders, "ik_llama_cpp", lambda: library)
    model = replace(SMALL, vocab_size=4)
    settings = CHOICES["ik"][-1]
    ik = IkLlama(
        Task(contender="ik-q4_0", source=Path("x"), model=model, positions=9, threads=2, settings=settings)
    )  # fmt: skip
    assert [ik.run([7, 8, 9]), ik.run([5])] == [1, 1]
    ik.forget()
    ik.run([6])
    assert decoded == [(0, [7, 8, 9]), (3, [5]), 2, (0, [6])]
    assert (made["model"].repack_tensors, made["context"].flash_attn) == (True, False)
    assert (made["context"].n_ctx, made["context"].n_threads) == (9, 2)


def test_what_a_library_writes_to_the_standard_output_does_not_reach_the_answer():
    code = """
import atexit, os, sys
from decode import worker
class Loud:
    def forget(self): os.write(1, b"forgotten\\n")
    def run(self, tokens): return 1
    def facts(self): return {"version": "loud"}
worker.load = lambda task: Loud()
atexit.register(lambda: os.write(1, b"goodbye\\n"))
worker.main()
"""
    task = {
        "contender": "ours", "source": None, "model": asdict(SMALL), "positions": 100, "threads": 1, "settings": {},
    }  # fmt: skip
    lengths = {"first": 2, "short_context": 12, "long_context": 20, "decode": 4, "prefill": 8}
    order = json.dumps({"task": task, "lengths": lengths, "started": 0.0})
    done = subprocess.run(
        [sys.executable, "-c", code, order], cwd=BENCHMARKS, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["facts"] == {"version": "loud"}
    assert done.stderr.count("forgotten") == 3
    assert done.stderr.endswith("goodbye\n")


def test_a_layer_whose_experts_join_the_normalised_input_is_the_one_worked_by_hand():
    model = contenders.mixtral(replace(SMALL, hidden_size=8, head_size=2, rotary_dim=2, ffn_size=4), "fp32", "eager")
    with torch.no_grad():
        contenders._fill(model)
    layer, given = model.model.layers[0], {}
    layer.post_attention_layernorm.weight.data.fill_(3.0)  # so that normalising is no unit step
    layer.post_attention_layernorm.register_forward_hook(lambda _, inputs, output: given.update(after=output))
    layer.mlp.register_forward_hook(lambda _module, _inputs, output: given.update(experts=output))
    layer.register_forward_hook(lambda _module, _inputs, output: given.update(layer=output))
    check._join_normalised(layer)
    with torch.no_grad():
        model(torch.tensor([[1, 5, 9]]))
    torch.testing.assert_close(given["layer"], given["after"] + given["experts"])


def test_a_difference_is_the_median_of_the_positions():
    expected = np.ones((5, 4), dtype=np.float32)
    found = expected + np.array([[0.1], [0.2], [0.3], [9.0], [0.1]], dtype=np.float32)
    assert check._difference(found, expected) == pytest.approx(0.2)
    found[1, 1] = np.nan
    assert check._difference(found, expected) == np.inf


@pytest.mark.parametrize("facts", check.OTHERS, ids=lambda facts: facts.family)
def test_transformers_model_of_a_family_takes_every_tensor_of_the_file(facts):
    """The comparison of logits with llama.cpp's reads the files so; strict, in names and shapes."""
    drawn = np.random.default_rng(0)
    weights = {tensor.name: drawn.standard_normal(tensor.shape, np.float32) for tensor in tensors(facts)}
    model = check.transformers_model(facts)
    state = {name: torch.from_numpy(np.array(value)) for name, value in check.state_of(facts, weights, pairs=False)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if facts.tied_head else [], [])
    first = model.model.layers[0]
    if facts.family == "gpt_oss":
        # An even column of an expert is gate, an odd one up.
        experts = first.mlp.experts
        np.testing.assert_array_equal(experts.gate_up_proj[1, :, 7].detach(), weights["blk.0.ffn_up_exps.weight"][1, 3])
        np.testing.assert_array_equal(
            experts.gate_up_proj_bias[2, ::2].detach(), weights["blk.0.ffn_gate_exps.bias"][2]
        )
