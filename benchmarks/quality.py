"""What a bit buys: KL divergence and top-1 agreement against bits, ours and llama.cpp's, of one trained Mixtral.

    python benchmarks/frontier/train.py --output MODEL
    python benchmarks/quality.py --model MODEL --llama FOLDER --work FOLDER [--tokens N] [--output FILE]
    python benchmarks/quality.py --plot benchmarks/results/quality-NAME.json

FOLDER of --llama has llama-quantize and llama-imatrix: benchmarks/servers/compile_llama_server.sh makes a build folder
of llama.cpp, and `make llama-quantize llama-imatrix` in it compiles these two.
Every engine and every quant computes the logits of the same windows of MODEL/held-out.txt, as it serves them, and all
are compared with the float32 reference (export/reference). llama.cpp in float32 comes first: it must agree. The
importance matrix for llama.cpp and the calibration of GPTQ come from the same tokens of the same text. Real bits are
all bytes of weights, scales, sums, router and norms over the number of parameters. Needs the extra `bench`. Exit status
0 done, 1 llama.cpp does not compute the model, 2 wrong input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from decode import machine
from export.calibration.text import own_text
from export.checkpoint.folder import file_digest, open_checkpoint
from export.command import run_command
from export.errors import ConfigError
from export.families import Model, read_model
from export.files.output import replace_file
from export.files.reading import read_json
from export.reference.model import Reference
from export.tokenizer.loading import load_tokenizer
from frontier import ours, peers
from frontier.measures import distance, perplexity
from frontier.plot import draw

RESULTS = Path(__file__).resolve().parent / "results"
WINDOW = 512
PRESETS = ("int4", "int2", "int8", "q2", "q3", "q4", "q5", "q6", "q8")
METHODS = ("nearest", "search", "gptq")
ALIKE = 1e-5  # nats between llama.cpp in float32 and the reference
BAR = 0.8  # of llama.cpp's divergence at the same bits
FloatArray = npt.NDArray[np.float32]


def measure(model_folder: Path, programs: Path, work: Path, num_tokens: int, calibration: int) -> dict[str, Any]:
    """Measure everything. Raises ConfigError for wrong input, AssertionError if llama.cpp computes another model."""
    model = read_model(open_checkpoint(str(model_folder)))
    claim(work, model)
    text = model_folder / "held-out.txt"
    windows = windows_of(model, text, num_tokens)
    reference = np.concatenate([logits.copy() for logits, _ in Reference(model).run(windows)])
    result: dict[str, Any] = {
        "machine": machine.describe(),
        "model": {"held_out": json.loads((model_folder / "training.json").read_text())["held_out"]},
        "tokens": sum(map(len, windows)),
        "perplexity": perplexity(reference, windows),
        "calibration_tokens": calibration,
        "points": [],
    }
    points = result["points"]
    points += _llama(model, programs, work, windows, reference, calibration)
    for method in METHODS:
        for preset in PRESETS:
            solved = f"-{calibration}" if method == "gptq" else ""  # an engine that is there has these tokens
            built = ours.build(model_folder, preset, method, (), calibration, work / f"{preset}-{method}{solved}")
            found = distance(ours.logits_of(built, windows), reference)
            points.append(_point(preset, method, built, asdict(found)))
    result["against_llama"] = compare(points)
    return result


def claim(work: Path, model: Model) -> None:
    """Make the folder for engines and quants of a model, with the digests of the model's files. Raises ConfigError for
    a folder that has another model's, or engines of a model that it does not name."""
    checkpoint, note = model.weights.checkpoint, work / "model.json"
    paths = (*checkpoint.settings_files(), *checkpoint.shards)
    own = {path.name: file_digest(path) for path in paths}
    found = read_json(note, "the digests of a model") if note.is_file() else None
    if found == own:
        return
    if found is not None or any(work.glob("*/engine.json")):
        made = "another model" if found else "a model that it does not name"
        raise ConfigError(
            f"measuring {checkpoint.folder}: the engines in {work} were made of {made}; name another folder with "
            "--work, or remove this one"
        )
    work.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")


def _llama(
    model: Model, programs: Path, work: Path, windows: list[list[int]], reference: FloatArray, calibration: int
) -> list[dict[str, Any]]:
    exact, importance, text = work / "f32.gguf", work / "importance.gguf", own_text()
    peers.write_gguf(model, exact)
    logits, tokens = peers.logits_of(exact, windows, text)
    off = distance(logits, reference)
    if off.kl > ALIKE:
        raise AssertionError(f"llama.cpp in float32 is {off.kl:.2g} nats from the reference, expected {ALIKE}")
    same = load_tokenizer(model.weights.checkpoint.folder).encode_prompt(text)
    if tokens != list(same):
        raise AssertionError("llama.cpp makes other tokens of the calibration text than the tokenizer")
    (work / "calibration.txt").write_text(text, encoding="utf-8")
    peers.make_importance(programs, exact, work / "calibration.txt", importance, calibration)
    points = []
    for kind in peers.TYPES:
        path = work / f"{kind}.gguf"
        peers.quantise(programs, exact, kind, importance, path)
        found = distance(peers.logits_of(path, windows)[0], reference)
        peer = peers.describe(path, model.architecture)
        points.append({**_point(kind, "llama.cpp", peer, asdict(found)), "types": peers.types_of(path)})
    return points


def _point(name: str, method: str, found: Any, figures: dict[str, float]) -> dict[str, Any]:  # noqa: ANN401
    point = {
        "name": name, "method": method, "bits": found.bits_per_weight, "bytes_per_token": found.bytes_per_token,
        **figures,
    }  # fmt: skip
    print(f"{method:10s} {name:8s} {point['bits']:.3f} bits  KL {point['kl']:.5f}  top-1 {point['top1']:.2%}",
          file=sys.stderr, flush=True)  # fmt: skip
    return point


def windows_of(model: Model, text: Path, num_tokens: int) -> list[list[int]]:
    """Windows of a text, each after the start token. Raises ConfigError if the text does not fill them."""
    ids = list(load_tokenizer(model.weights.checkpoint.folder).encode_prompt(text.read_text(encoding="utf-8")))
    start, body = ids[:1], ids[1:]
    found = [[*start, *body[at : at + WINDOW - 1]] for at in range(0, len(body) - WINDOW + 2, WINDOW - 1)]
    if num_tokens < WINDOW:
        raise ConfigError(f"measuring on {text}: asked for {num_tokens} tokens, expected {WINDOW} or more, a window")
    if len(found) * WINDOW < num_tokens:
        raise ConfigError(f"measuring on {text}: it has {len(found)} windows of {WINDOW} tokens; ask for fewer tokens")
    return found[: num_tokens // WINDOW]


def compare(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each of our GPTQ points: its divergence as a part of llama.cpp's at the same bits and at the same bytes a
    token, by straight lines between the logarithms of llama.cpp's frontier. A point that is smaller than all of
    llama.cpp's is compared with the smallest of them, and one that is larger than all by more than 0.5 % with none."""
    theirs = [point for point in points if point["method"] == "llama.cpp"]
    found = []
    for point in (point for point in points if point["method"] == "gptq"):
        parts = {axis: _part(point, theirs, axis) for axis in ("bits", "bytes_per_token")}
        found.append({"name": point["name"], **parts, "kept": all(p is not None and p <= BAR for p in parts.values())})
    return found


def _part(point: dict[str, Any], theirs: Sequence[dict[str, Any]], axis: str) -> float | None:
    """Quants that another one beats in both respects are not on the frontier."""
    line = [
        peer
        for peer in sorted(theirs, key=lambda peer: peer[axis])
        if not any(other[axis] <= peer[axis] and other["kl"] < peer["kl"] for other in theirs)
    ]
    places = [peer[axis] for peer in line]
    if point[axis] > 1.005 * places[-1]:
        return None
    expected = np.exp(np.interp(point[axis], places, [np.log(peer["kl"]) for peer in line]))
    return float(point["kl"] / expected)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder that frontier/train.py made")
    parser.add_argument("--llama", type=Path, help="folder of llama-quantize and llama-imatrix")
    parser.add_argument("--work", type=Path, help="folder for engines and quants; what is there is used again")
    parser.add_argument("--tokens", type=int, default=8192, help="scored tokens (default 8192)")
    parser.add_argument("--calibrate-tokens", type=int, default=14336, help="of moeship's calibration text")
    parser.add_argument("--output", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--plot", type=Path, metavar="RESULT", help="only draw the picture of a result")
    options = parser.parse_args()

    def run() -> int:
        if options.plot:
            draw(read_json(options.plot, "a result of this program"), options.plot.with_suffix(".svg"))
            return 0
        if not (options.model and options.llama and options.work):
            raise ConfigError("measuring: --model, --llama and --work are needed")
        result = measure(options.model, options.llama, options.work, options.tokens, options.calibrate_tokens)
        replace_file(options.output, json.dumps(result, indent=1) + "\n")
        draw(result, options.output.with_suffix(".svg"))
        return 0

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
