"""llguidance and xgrammar over one vocabulary: masks, compiling, memory, keywords of JSON Schema, bad schemas.

    python benchmarks/guided.py --output benchmarks/results/guided-PROCESSOR.json [--xgrammar FOLDER]

The vocabulary is a byte-level BPE of 50,295 tokens, trained on the sources of Python's standard library and of torch
and transformers where they are installed, in an embedding of 51,200 rows, as phixtral's. The schemas and the values
that are written by them come from schemas/random_schemas.py. Both libraries work in one process and one thread; at each
schema they take turns, the first one alternating, on the same tokens, once cold and once more. Memory, the time to
import, and what bad schemas do are measured in processes of their own. Then a greedy choice among 51,200 logits is
timed with and without a guide, whose mask the thread has computed or not.

xgrammar's package asks for torch, transformers and triton. --xgrammar names a folder that it was put into alone
(pip install --no-deps --target FOLDER xgrammar apache-tvm-ffi).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from decode.machine import describe
from export.tokenizer.loading import Tokenizer
from schemas.features import BAD, FEATURES
from schemas.libraries import LIBRARIES, Library, accepts, load
from schemas.random_schemas import random_schema
from triton_repo.runtime.guided.guides import Guides
from triton_repo.runtime.options import GenerationOptions, SamplingPlan
from triton_repo.runtime.sampling import Sampler

NUM_TOKENS, NUM_ROWS = 50_295, 51_200
PATIENCE_S = 20


def make_tokenizer() -> Tokenizer:
    """The vocabulary, trained in about 10 s."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    folder, packages = (Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib"))
    paths = [path for path in folder.rglob("*.py") if packages not in path.parents]
    paths += [path for name in ("torch", "transformers") for path in (packages / name).rglob("*.py")]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS, show_progress=False, special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator((path.read_text(encoding="utf-8", errors="ignore") for path in sorted(paths)), trainer)
    return Tokenizer(backend=backend, size=backend.get_vocab_size())


def cases(tokenizer: Tokenizer, count: int) -> list[tuple[str, list[int]]]:
    """Schemas, and the tokens of a value of each."""
    found = []
    for number in range(count):
        schema = random_schema(random.Random(number))
        value = schema.value(random.Random(number + 1000))
        texts = json.dumps(schema.json, ensure_ascii=False), json.dumps(value, ensure_ascii=False)
        found.append((texts[0], tokenizer.encode(texts[1])))
    return found


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = call()
    return time.perf_counter() - begun, result


def write(library: Library, schema: str, tokens: Sequence[int], masks: list[float]) -> tuple[float, str]:
    """Compile a schema and write tokens by it. Returns the seconds of compiling, and what went wrong or ""."""
    try:
        compile_s, matcher = timed(lambda: library.schema(schema))
    except Exception as error:  # whatever it is, it is counted
        return 0.0, f"not compiled: {error}"
    for token in tokens:
        seconds, _ = timed(matcher.mask)
        masks.append(seconds)
        if not matcher.take(token):
            return compile_s, "a valid value is refused"
    matcher.mask()
    return compile_s, "" if matcher.may_end() else "a valid value is not taken as whole"


def compare_speed(libraries: dict[str, Library], asked: Sequence[tuple[str, list[int]]]) -> dict[str, Any]:
    """Times of masks and compiling, by library, cold and warm."""
    found: dict[str, Any] = {}
    for run in ("first", "second"):
        masks: dict[str, list[float]] = {name: [] for name in libraries}
        compiling: dict[str, list[float]] = {name: [] for name in libraries}
        wrong: dict[str, list[str]] = {name: [] for name in libraries}
        for place, (schema, tokens) in enumerate(asked):
            for name in sorted(libraries, reverse=bool(place % 2)):
                seconds, problem = write(libraries[name], schema, tokens, masks[name])
                compiling[name].append(seconds)
                wrong[name] += [f"{place}: {problem}"] if problem else []
        found[run] = {
            name: {
                "mask_us": spread(masks[name], 1e6),
                "compile_ms": spread(compiling[name], 1e3),
                "wrong": wrong[name],
            }
            for name in libraries
        }
        found[run]["ratio"] = {
            key: found[run]["xgrammar"][key]["mean"] / found[run]["llguidance"][key]["mean"]
            for key in ("mask_us", "compile_ms")
        } if len(libraries) > 1 else {}  # fmt: skip
    return found


def spread(seconds: Sequence[float], scale: float) -> dict[str, float]:
    values = np.array(seconds) * scale
    return {
        "mean": float(values.mean()), "median": float(np.median(values)), "p99": float(np.percentile(values, 99)),
        "most": float(values.max()), "count": len(values),
    }  # fmt: skip


def keywords(library: Library, tokenizer: Tokenizer) -> dict[str, str]:
    """What a library makes of each keyword: kept, ignored, refused, or too narrow."""
    found = {}
    for name, (schema, valid, invalid) in FEATURES.items():
        taken = []
        try:
            for value in (valid, invalid):
                tokens = tokenizer.encode(json.dumps(value, ensure_ascii=False))
                taken.append(accepts(library.schema(json.dumps(schema)), tokens))
        except Exception:  # whatever it is, the schema is refused
            found[name] = "refused"
            continue
        found[name] = {(True, False): "kept", (True, True): "ignored"}.get(tuple(taken), "too narrow")
    return found


def added_time(tokenizer: Tokenizer, asked: Sequence[tuple[str, list[int]]]) -> dict[str, Any]:
    """Microseconds of choosing a token greedily among NUM_ROWS logits: without a guide, with one whose mask was
    computed beside a step (which a sleep of 20 ms stands for), and with one whose mask is waited for."""
    logits = np.random.default_rng(1).normal(0, 3, NUM_ROWS).astype(np.float32)
    plan = SamplingPlan(options=GenerationOptions(prompt="-", max_tokens=1), prompt_ids=(0,), end_ids=(0,))
    guides = Guides(tokenizer)
    found: dict[str, list[float]] = {"without": [], "beside a step": [], "waited for": []}
    for place, (schema, tokens) in enumerate(asked):
        guide = guides.compile("json_schema", schema)
        for kind in found:
            if kind == "beside a step" and place % 10:
                continue
            sampler = Sampler(plan, tokenizer.size, guide=None if kind == "without" else guide.start((0,)))
            for token in tokens:
                likely = logits.copy()
                likely[token] = 40
                seconds, choice = timed(lambda sampler=sampler, likely=likely: sampler.choose(likely))
                found[kind].append(seconds)
                if sampler.is_complete or choice.token_id != token:
                    break
                if kind == "beside a step":
                    time.sleep(0.02)
    return {kind: spread(seconds, 1e6) for kind, seconds in found.items()}


def in_process(task: str, name: str, argument: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run a task in a process of its own. A process that ends or hangs is told of in the result."""
    command = [
        sys.executable,
        __file__,
        "--task",
        task,
        "--library",
        name,
        "--tokenizer",
        str(folder / "tokenizer.json"),
    ]
    command += ["--argument", argument, "--schemas", str(options.schemas)]
    command += ["--xgrammar", options.xgrammar] if options.xgrammar else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S + 10, check=False)
    except subprocess.TimeoutExpired:
        return {"outcome": f"hangs for more than {PATIENCE_S} s"}
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines else {"outcome": f"the process ends with {done.returncode}"}


def run_task(options: argparse.Namespace) -> dict[str, Any]:
    """What a process of `in_process` does."""
    begun = time.perf_counter()
    __import__(options.library)
    import_s = time.perf_counter() - begun
    tokenizer = read_tokenizer(options.tokenizer)
    before = resident_mib()
    setup_s, library = timed(lambda: load(options.library, tokenizer, NUM_ROWS))
    if options.task == "memory":
        ready = resident_mib()
        kept = []
        for schema, tokens in cases(tokenizer, options.schemas):
            with suppress(Exception):  # a schema that is refused takes no memory
                kept.append(library.schema(schema))
            for token in tokens:
                kept[-1].mask()
                if not kept[-1].take(token):
                    break
        most = resident_mib()
        loaded = sorted({"torch", "transformers"} & sys.modules.keys())
        return {
            "import_s": import_s, "setup_s": setup_s, "vocabulary_mib": ready - before,
            "mib_a_schema": (most - ready) / len(kept), "imports": loaded, "resident_mib": most,
        }  # fmt: skip
    cold = time.perf_counter()
    try:
        matcher = library.schema(BAD[options.argument])
        for _ in range(8):  # along the first token that may come
            places = np.flatnonzero(np.unpackbits(matcher.mask(), bitorder="little"))
            if not len(places) or not matcher.take(int(places[0])):
                raise ValueError("stops in the middle of an answer")
    except Exception as error:
        outcome = f"refused: {' '.join(str(error).split())[:160]}"
    else:
        outcome = "served"
    return {"outcome": outcome, "seconds": time.perf_counter() - cold}


def resident_mib() -> float:
    """Memory of this process that is resident."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE") / (1 << 20)


def read_tokenizer(path: str) -> Tokenizer:
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(path)
    return Tokenizer(backend=backend, size=backend.get_vocab_size())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--xgrammar", help="a folder with the packages xgrammar and tvm_ffi")
    parser.add_argument("--schemas", type=int, default=200, metavar="N")
    parser.add_argument("--tokenizer", help="a tokenizer.json in place of the one that is trained")
    for flag in ("--task", "--library", "--argument"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.xgrammar:
        sys.path.append(options.xgrammar)
    if options.task:
        print(json.dumps(run_task(options)))
        return
    tokenizer = read_tokenizer(options.tokenizer) if options.tokenizer else make_tokenizer()
    asked = cases(tokenizer, options.schemas)
    result: dict[str, Any] = {"machine": describe(), "vocabulary": tokenizer.size, "rows": NUM_ROWS}
    result["added_us"] = added_time(tokenizer, asked)
    names = LIBRARIES if options.xgrammar else LIBRARIES[:1]
    libraries = {name: load(name, tokenizer, NUM_ROWS) for name in names}
    result["speed"] = compare_speed(libraries, asked)
    result["keywords"] = {name: keywords(library, tokenizer) for name, library in libraries.items()}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.backend.save(f"{folder}/tokenizer.json")
        result["memory"] = {name: in_process("memory", name, "", options, Path(folder)) for name in names}
        result["bad"] = {
            what: {name: in_process("bad", name, what, options, Path(folder)) for name in names} for what in BAD
        }
    text = json.dumps(result, indent=1, ensure_ascii=False)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
