"""Tokenizers made in place, a session that says what it is told to, and one live server for the whole run."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from live_requests import slow_down
from live_triton import LiveTriton
from tokenizers import decoders, models, pre_tokenizers, trainers

from export.checkpoint.file_table import SETTINGS_FILE, TOKENIZER_FILE
from export.tokenizer.loading import Tokenizer
from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.serving.server import ServerOptions, running_server
from trt_build.engine_files import record_files
from trt_build.manifest import TRTLLM_BACKEND
from trt_build.ort.engine import open_engine
from trt_build.trtllm.engine import (
    FORMAT_VERSION,
    GpuRecord,
    ParallelRecord,
    TrtllmManifest,
    TrtllmPrecisionRecord,
    write_trtllm_manifest,
)

END = "<|end|>"
CORPUS = [
    "def main() -> None:\n    print('hello')\n    return hello\n" * 4,
    "smile 😀 and 😀😁, then 👩‍👩‍👧 and 🏳️‍🌈 again 😀",
    "日本語の文章と漢字、日本語の文章と漢字",
    "cafe\u0301 nai\u0308ve Ångström ñandú übermäßig",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndedTokenizer(Tokenizer):
    """A tokenizer, and the id that ends a text in these tests."""

    eos_token_id: int


@pytest.fixture(scope="session")
def byte_level() -> EndedTokenizer:
    """A trained byte-level BPE, so that tokens end inside characters and characters inside tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, show_progress=False, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(CORPUS, trainer)
    size = backend.get_vocab_size()
    return EndedTokenizer(backend=backend, size=size, eos_token_id=backend.token_to_id(END))


@pytest.fixture(scope="session")
def byte_fallback() -> EndedTokenizer:
    """A tokenizer as Llama's and Mixtral's: words with a marked space, and bytes as tokens of their own."""
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "b", "▁b", "é"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)}, merges=[("▁", "a"), ("▁", "b")],
            unk_token="<unk>", fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    backend.add_special_tokens(["</s>"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return EndedTokenizer(backend=backend, size=len(tokens), eos_token_id=1)


class ScriptedCache:
    """Stands for trt_build's Cache: it only counts positions."""

    def __init__(self, slots: int, positions: int) -> None:
        self.num_slots, self.positions = slots, positions
        self.lengths, self.produced = [0] * slots, [0] * slots

    can_copy = True

    def bytes_of(self, positions):
        return positions

    def shorten(self, slot, length):
        self.lengths[slot] = length
        self.produced[slot] = 0

    def release(self, slot, length=0):
        self.shorten(slot, length)

    def copy(self, source, target, length=None):
        self.lengths[target], self.produced[target] = self.lengths[source], self.produced[source]


class ScriptedSession:
    """Stands for trt_build's Session: its logits make the script's tokens the likeliest, one after the other."""

    routing = None
    mixes_lengths = False
    vocab_padding = 7  # rows past the tokenizer, which score highest of all

    def __init__(self, tokenizer: Tokenizer, script: list[int], max_sequence: int = 512) -> None:
        self.max_sequence = max_sequence
        manifest = SimpleNamespace(eos_token_ids=(tokenizer.eos_token_id,), tokenizer_size=tokenizer.size)
        self.engine = SimpleNamespace(manifest=manifest, resident_bytes=0, folder="scripted")
        self.script, self.size, self.fed = script, tokenizer.size, []

    def new_cache(self, slots=1):
        return ScriptedCache(slots, self.max_sequence)

    def step(self, cache, rows):
        logits = [self._append(cache, row) for row in rows]
        return np.concatenate(logits)

    def _append(self, cache, row):
        assert cache.lengths[row.slot] + len(row.token_ids) <= self.max_sequence
        self.fed.append(list(row.token_ids))
        cache.lengths[row.slot] += len(row.token_ids)
        logits = np.zeros((row.num_logits, self.size + self.vocab_padding), dtype=np.float32)
        if row.num_logits:
            logits[:, self.size :] = 50
            logits[:, self.script[min(cache.produced[row.slot], len(self.script) - 1)]] = 9
            cache.produced[row.slot] += 1
        return logits


@pytest.fixture
def scripted(byte_level):
    """Makes a ScriptedSession that writes a text, then an end token."""

    def make(text: str, **settings) -> ScriptedSession:
        return ScriptedSession(byte_level, [*byte_level.encode(text), byte_level.eos_token_id], **settings)

    return make


@pytest.fixture
def scripted_with():
    """Makes a ScriptedSession that writes a text in a tokenizer's tokens, then its end token."""
    return lambda tokenizer, text: ScriptedSession(tokenizer, [*tokenizer.encode(text), tokenizer.eos_token_id])


def damage(engine: Path) -> None:
    """Flip one bit in the middle of an engine's weights; the size stays."""
    path = engine / "model.onnx.data"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def trtllm_engine(tmp_path, tiny_engine):
    """Makes the directory of an engine for TensorRT-LLM: a true manifest and tokenizer around files of a few bytes."""

    def make(**fields) -> Path:
        folder, tiny = tmp_path / "trtllm-engine", open_engine(tiny_engine).manifest
        folder.mkdir()
        parallel = ParallelRecord(tp_size=2, pp_size=1, moe_tp_size=2, moe_ep_size=1)
        (folder / "config.json").write_text("{}")
        for rank in range(parallel.world_size):
            (folder / f"rank{rank}.engine").write_bytes(bytes([rank]) * 10)
        for name in (TOKENIZER_FILE, SETTINGS_FILE):
            shutil.copyfile(tiny_engine / name, folder / name)
        precision = TrtllmPrecisionRecord(
            name="int4", quant_algo="W4A16", dtype="float16", group_size=None, average_bits_per_weight=4.5
        )
        manifest = TrtllmManifest(
            format_version=FORMAT_VERSION, model="tiny", family=tiny.family, backend=TRTLLM_BACKEND,
            precision=precision, architecture=tiny.architecture, parallel=parallel,
            gpu=GpuRecord(name="NVIDIA A100", sm=80), max_sequence=640, max_batch=8, max_num_tokens=512,
            kv_cache_fraction=0.85, use_paged_context_fmha=True, tokenizer_size=tiny.tokenizer_size,
            head_masks_unused_ids=True, eos_token_ids=(0, 7), tokenizer=tiny.tokenizer,
            source=tiny.source, routing=None, left_out_experts=(),
            libraries={"tensorrt_llm": "1.2.0"}, flags=(), settings={}, files=record_files(folder),
        )  # fmt: skip
        write_trtllm_manifest(folder, dataclasses.replace(manifest, **fields))
        return folder

    return make


@pytest.fixture(scope="session")
def repository(tmp_path_factory, tiny_engine) -> Path:
    """A repository of one sound model; of the same whose steps take 10 ms more, with one slot; and of one whose engine
    was damaged after it was packaged."""
    folder = tmp_path_factory.mktemp("serving")
    package_engine(
        PackageOptions(
            engine=tiny_engine, name="tiny", output=folder / "repository", onnxruntime=ModelParameters(threads=1)
        )
    )
    package_engine(
        PackageOptions(
            engine=tiny_engine, name="slow", output=folder / "repository",
            onnxruntime=ModelParameters(threads=1, slots=1),
        )
    )  # fmt: skip
    slow_down(folder / "repository" / "slow")
    # A copy, since the packaged files are links to the engine that other tests use.
    shutil.copytree(tiny_engine, folder / "copy")
    package_engine(PackageOptions(engine=folder / "copy", name="damaged", output=folder / "repository"))
    damage(folder / "repository" / "damaged" / "1" / "engine")
    return folder / "repository"


@pytest.fixture(scope="session")
def live(repository):
    """The live server on `repository`."""
    with running_server(ServerOptions(repository=repository)) as server, LiveTriton(server) as triton:
        yield triton
