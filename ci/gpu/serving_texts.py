"""Greedy texts and speed of an engine through the session that serves it.

    python ci/gpu/serving_texts.py ENGINE-FP32-CPU --write texts.json      where the reference's engine runs
    python ci/gpu/serving_texts.py ENGINE --expect texts.json              on the machine with the GPU

The first writes the texts of eight prompts. The second compares with them, and times prefill and decode. Needs moeship
and the ONNX Runtime of the engine's provider. A text may differ where two tokens were almost equally likely, so the
number of equal texts is printed and not judged. Exit status 0 done, 2 wrong input.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from export.command import run_command
from export.errors import OutputError
from export.tokenizer.loading import load_tokenizer
from triton_repo.runtime.options import GenerationOptions
from triton_repo.runtime.single.generation import generate
from trt_build.ort.engine import open_engine
from trt_build.ort.session import Session

PROMPTS = (
    "def main(", "class Reader:\n", "import os\n", "The module provides", "    def test_", "#include <Python.h>\n",
    "static int\n", "for name in sorted(",
)  # fmt: skip
TEXT_TOKENS = 64
PREFILL_TOKENS, WARM_UP_STEPS, STEPS = 256, 20, 80


def texts(folder: Path, session: Session) -> dict[str, str]:
    """The greedy text after each prompt, by prompt."""
    tokenizer = load_tokenizer(folder)

    def answer(prompt: str) -> str:
        options = GenerationOptions(prompt=prompt, max_tokens=TEXT_TOKENS, temperature=0.0, stream=True)
        return "".join(piece.text for piece in generate(session, tokenizer, options))

    return {prompt: answer(prompt) for prompt in PROMPTS}


def speed(session: Session) -> str:
    """A line with the tokens per second of a prefill, after a warm-up run, and of decoding after it."""
    ids = [index % session.vocab_size for index in range(min(PREFILL_TOKENS, session.max_sequence // 2))]
    cache = session.new_cache()
    for _ in range(2):
        cache.shorten(0, 0)
        started = time.perf_counter()
        session.run(cache, ids)
        prefill_s = time.perf_counter() - started
    steps = []
    for _ in range(WARM_UP_STEPS + STEPS):
        started = time.perf_counter()
        session.run(cache, ids[:1])
        steps.append(time.perf_counter() - started)
    step_s = statistics.median(steps[WARM_UP_STEPS:])
    return f"prefill {len(ids) / prefill_s:.0f} tokens/s, decode {1 / step_s:.1f} tokens/s"


def run(options: argparse.Namespace) -> int:
    session = Session(open_engine(options.engine, check_digests=False))
    if options.write is not None:
        options.write.write_text(json.dumps(texts(options.engine, session), indent=2) + "\n", encoding="utf-8")
    if options.expect is not None:
        try:
            expected = json.loads(options.expect.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(f"reading {options.expect}: no texts there ({error}); write them with --write") from error
        found = texts(options.engine, session)
        equal = sum(found[prompt] == expected.get(prompt) for prompt in PROMPTS)
        print(f"{equal} of {len(PROMPTS)} greedy texts of {TEXT_TOKENS} tokens are equal")
    print(f"{session.engine.manifest.model} {session.engine.manifest.precision.name}: {speed(session)}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path, metavar="ENGINE", help="engine folder")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the texts")
    parser.add_argument("--expect", type=Path, metavar="FILE", help="compare with texts that --write wrote")
    options = parser.parse_args()
    return run_command(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
