"""Build TensorRT-LLM engines on a GPU, compare them with the reference, serve them with Triton, and measure.

    python ci/gpu/run_tensorrt_llm.py --output DIR [--full] [--precisions fp16,int4] [--tp-size N]

Runs in TensorRT-LLM's Triton container, where ci/gpu/tensorrt_llm.sh starts it. The model is the phixtral of
examples/tiny-phixtral; with --full another too, of phixtral-4x2_8's size and random weights. What cannot run here is
refused in one sentence first. DIR/results.json is written after every step, and the same command continues from the
finished steps.
Exit status 0 all is well, 1 a step failed or an engine differs from the reference, 2 it cannot run here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from gpu_machine import Readings, problems, read_readings
from trial_options import ROOT, Model, Options, read_arguments, read_options

if TYPE_CHECKING:
    from gpu_results import Results
    from serving_steps import Serving

RESULTS_FILE = "results.json"
EXIT_FAILED, EXIT_REFUSED = 1, 2
FLOATS = ("fp32", "fp16", "bf16")  # precisions whose texts must equal the reference's except for rounding
PROMPTS = ("def main(", "import os\n", "class Reader:\n    def __init__(self, path):\n", "The following example")


def run(options: Options, readings: Readings, serving: Serving | None = None) -> int:
    """Try every engine; returns the exit status. `serving` starts a server for an engine, by default Triton on its
    repository. Raises ConfigError if the results are of another machine."""
    from gpu_results import now, open_results, summary

    options.output.mkdir(parents=True, exist_ok=True)
    results = open_results(options.output / RESULTS_FILE, readings.to_json(), moeship_revision())
    results.data["runs"].append({"time": now(), "command": shlex.join(sys.argv)})
    results.save()
    for model in options.models:
        try_model(options, model, results, serving)
    sys.stdout.write("\n".join([*summary(results), str(results.path)]) + "\n")
    return EXIT_FAILED if results.errors() or results.failures() else 0


def try_model(options: Options, model: Model, results: Results, serving: Serving | None) -> None:
    """Try every engine of a model; none if the checkpoint cannot be made."""
    from engine_steps import answer_prompts, make_checkpoint

    log = log_file(options, model.name)
    made = results.step(
        (model.name, "checkpoint"), {"folder": str(model.folder), "command": model.command},
        partial(make_checkpoint, model.command, model.folder, log),
    )  # fmt: skip
    if made is None:
        return
    texts = results.step(
        (model.name, "reference"), {"prompts": PROMPTS, "tokens": options.text_tokens, "bytes": made["bytes"]},
        partial(answer_prompts, model.folder, PROMPTS, options.text_tokens, log),
    )  # fmt: skip
    for precision in options.precisions:
        try_engine(options, model, precision, results, texts["answers"] if texts else [], serving)


def try_engine(
    options: Options, model: Model, precision: str, results: Results, answers: Sequence[dict[str, Any]],
    serving: Serving | None,
) -> None:  # fmt: skip
    """Write the checkpoint of an engine, then build, compare and serve it. An engine that differs from the reference is
    served too."""
    from engine_steps import Build, build_engine, verify_engine, write_checkpoint
    from serving_load import Load
    from serving_steps import Trial, served_by_triton, try_serving

    name = precision if options.tp_size == 1 else f"{precision}-tp{options.tp_size}"
    engines = options.output / "engines"
    engines.mkdir(exist_ok=True)
    build = Build(
        checkpoint=model.folder,
        engine=engines / f"{model.name}-{name}",
        precision=precision,
        log=log_file(options, f"{model.name}-{name}"),
        options=("--tp-size", str(options.tp_size), "--max-batch-size", str(max(options.concurrency))),
    )
    for stage, work in (("checkpoint", write_checkpoint), ("engine", build_engine)):
        done = results.step((model.name, name, stage), {"command": build.command(stage)}, partial(work, build))
        if done is None:
            return
    parity = results.step(
        (model.name, name, "verify"), {"tokens": options.verify_tokens},
        partial(verify_engine, build, options.verify_tokens),
    )  # fmt: skip
    load = Load(
        prompt_tokens=options.prompt_tokens, output_tokens=options.output_tokens, concurrency=options.concurrency,
        rounds=options.rounds,
    )  # fmt: skip
    trial = Trial(
        engine=build.engine,
        repository=options.output / "repositories" / build.engine.name,
        log=log_file(options, f"{build.engine.name}-triton"),
        answers=answers,
        text_tokens=options.text_tokens,
        judged=parity is not None and precision in FLOATS,
        # Each of the two compared logits may differ by the largest difference found.
        rounding=2 * max(parity["max_logit_difference"], parity["max_decoded_difference"]) if parity else 0.0,
        load=load,
    )
    inputs = {"load": vars(load), "texts": len(answers), "rounding": trial.rounding}
    work = partial(try_serving, trial, serving or served_by_triton, results.save)
    results.step((model.name, name, "serve"), inputs, work)


def log_file(options: Options, name: str) -> Path:
    """The log file for the programs of a step; its folder is made."""
    folder = options.output / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.log"


def moeship_revision() -> str:
    """moeship's version, followed by the commit of this clone if git reports it, and a mark if files differ from it."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        version = str(tomllib.load(file)["project"]["version"])
    # In a container the folder belongs to another user; git refuses it unless it is named as safe.
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return version
    return f"{version} {answer.stdout.strip()}"


def give_back(folder: Path) -> None:
    """Give files that root made in a container to the user who owns the folder."""
    if os.geteuid() or not folder.is_dir() or not folder.stat().st_uid:
        return
    owner = folder.stat()
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    arguments = read_arguments(__doc__)
    options = read_options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    wrong = list(options.problems())
    readings = None if wrong else read_readings()
    if readings is not None:
        wrong = problems(readings, options.needs())
    if wrong or readings is None:
        sys.stderr.write(f"cannot run here: {'; '.join(wrong)}\n")
        return EXIT_REFUSED
    if arguments.check:
        gpus = ", ".join(f"{gpu.name} (SM {gpu.sm})" for gpu in readings.machine.gpus or ())
        sys.stdout.write(f"can run here: {gpus}; TensorRT-LLM {readings.packages['tensorrt_llm']}\n")
        return 0
    from export.command import run_command

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run_command(lambda: run(options, readings))
    finally:
        give_back(options.output)


if __name__ == "__main__":
    sys.exit(main())
