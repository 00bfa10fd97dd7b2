"""Keeps the results of a run on a GPU in one JSON file, by model, engine and step, saved after every step.

    results = open_results(output / "results.json", about, moeship="0.1.0 4f1c2d3")
    results.step(("small", "fp16", "engine"), inputs, work)

A step has a `status` (done, failed, or running if the run was interrupted), the `inputs` that decide its result, the
`moeship` version that ran it, `seconds`, and the results of its work; `failures` lists the checks that failed. A later
run with the same inputs skips steps that are done and passed. The file is replaced by rename, never written in place.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from export.errors import ConfigError, MoeshipError
from export.files.output import replace_file

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
Work = Callable[[dict[str, Any]], None]  # writes its results into the dict that it gets
_NUMBERS = re.compile(r"\[\n([-+.,\deE\s]+?)\n *\]")  # a list of numbers; JSON strings contain no line breaks
_COMPARED = ("gpus", "driver", "packages")  # must be equal in later runs, as a folder has the results of one machine


class Results:
    """The results of the steps in one folder, and the file in which they are kept."""

    def __init__(self, path: Path, data: dict[str, Any], moeship: str) -> None:
        self.path, self.data, self._moeship = path, data, moeship

    def step(self, place: tuple[str, ...], inputs: Mapping[str, Any], work: Work) -> dict[str, Any] | None:
        """Run a step unless it is done and passed; returns its results, None if it failed. `place` is the model, for
        some steps the engine, and the step's name.

        A failure is recorded and the run continues, since other engines may still work.
        """
        name, entries = " ".join(place), self._entries(place)
        wanted, earlier = json.loads(json.dumps(dict(inputs))), entries.get(place[-1])
        if earlier is not None and (earlier["status"], earlier["inputs"]) == ("done", wanted) and _passed(earlier):
            logger.info("%s: done already", name)
            return dict(earlier)
        logger.info("%s ...", name)
        entry: dict[str, Any] = {"status": "running", "inputs": wanted, "moeship": self._moeship, "started": now()}
        entries[place[-1]] = entry
        self.save()
        started = time.monotonic()
        try:
            work(entry)
            entry["status"] = "done"
        except Exception as error:
            entry.update(status="failed", error=_text(error))
            logger.error("%s failed: %s", name, entry["error"])
        entry["seconds"] = round(time.monotonic() - started, 3)
        self.save()
        return entry if entry["status"] == "done" else None

    def _entries(self, place: tuple[str, ...]) -> dict[str, Any]:
        """The dict of the steps of a model or of one of its engines."""
        model: dict[str, Any] = self.data["models"].setdefault(place[0], {"engines": {}})
        return model if len(place) == 2 else model["engines"].setdefault(place[1], {})

    def errors(self) -> list[str]:
        """The errors of the steps that failed, each with the name of its step."""
        return [f"{name}: {entry['error']}" for name, entry in self._all() if entry["status"] == "failed"]

    def failures(self) -> list[str]:
        """The failed checks of the steps that are done."""
        return [f"{name}: {text}" for name, entry in self._all() for text in entry.get("failures", [])]

    def _all(self) -> list[tuple[str, dict[str, Any]]]:
        found = []
        for model, steps in self.data["models"].items():
            found += [(f"{model} {step}", entry) for step, entry in steps.items() if step != "engines"]
            for engine, entries in steps["engines"].items():
                found += [(f"{model} {engine} {step}", entry) for step, entry in entries.items()]
        return found

    def save(self) -> None:
        """Write the results to the file, replacing it by rename."""
        self.data["errors"], self.data["failures"] = self.errors(), self.failures()
        text = json.dumps(self.data, indent=2, allow_nan=True)
        # Put each list of numbers on one line, as there are thousands of samples.
        text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
        replace_file(self.path, text + "\n")


def open_results(path: Path, about: Mapping[str, Any], moeship: str) -> Results:
    """Open the results in a folder, or start new ones. Raises ConfigError if they are of another machine than `about`
    describes."""
    if not path.is_file():
        data = {"format_version": FORMAT_VERSION, "machine": dict(about), "runs": [], "models": {}}
        return Results(path, data, moeship)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        kept, version = data["machine"], data["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version {version}, expected {FORMAT_VERSION}")
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"reading {path}: not the results of an earlier run ({error}); name another --output"
        ) from error
    here = json.loads(json.dumps(dict(about)))
    different = [f"{key} {kept.get(key)}, here {here.get(key)}" for key in _COMPARED if kept.get(key) != here.get(key)]
    if different:
        raise ConfigError(
            f"reading {path}: results of another machine or container ({'; '.join(different)}); name another --output"
        )
    return Results(path, data, moeship)


def summary(results: Results) -> list[str]:
    """The lines of the summary: a few for each engine, then errors and failed checks."""
    lines = []
    for model, steps in results.data["models"].items():
        for engine, entries in steps["engines"].items():
            lines += _engine_lines(f"{model} {engine}", entries)
    lines += [f"FAILED {text.splitlines()[0]}" for text in (*results.errors(), *results.failures())]
    return lines


def _engine_lines(name: str, entries: Mapping[str, dict[str, Any]]) -> list[str]:
    """The lines of the summary for one engine."""
    done = {step: entry for step, entry in entries.items() if entry["status"] == "done"}
    lines = []
    if "engine" in done:
        spent = f"checkpoint {done['checkpoint']['seconds']:.0f} s, engine {done['engine']['seconds']:.0f} s"
        lines.append(f"{name}: {spent}, {done['engine']['bytes'] / 1e6:.1f} MB")
    if "verify" in done:
        found = done["verify"]
        lines.append(
            f"  against the reference: mean KL {found['mean_kl']:.2e} scored and {found['mean_decoded_kl']:.2e} "
            f"decoded, top-1 {found['top1_agreement']:.1%}, perplexity {found['perplexity_increase']:+.2%}"
        )
    served = entries.get("serve", {})
    if "texts" in served:
        same = sum(text["equals_reference"] for text in served["texts"])
        lines.append(f"  greedy texts as the reference's: {same} of {len(served['texts'])}")
    return lines + [_level_line(level) for level in served.get("levels", []) if "error" not in level]


def _level_line(level: Mapping[str, Any]) -> str:
    def milliseconds(found: Mapping[str, Any]) -> str:
        return f"{found['p50'] * 1e3:.2f} ms (p99 {found['p99'] * 1e3:.2f})" if found["n"] else "not measured"

    return (
        f"  {level['concurrency']:>3} streams: {level['tokens_per_s']['median']:.0f} tokens/s; first token "
        f"{milliseconds(level['time_to_first_token_s'])}, then {milliseconds(level['inter_token_s'])}; the client took "
        f"{level['client_busy']:.0%} of a core"
    )


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _passed(entry: Mapping[str, Any]) -> bool:
    return not entry.get("failures")


def _text(error: Exception) -> str:
    """The message of a MoeshipError or OSError; the whole traceback of any other error, for a bug report."""
    if isinstance(error, (MoeshipError, OSError)):
        return f"{type(error).__name__}: {error}"
    return "".join(traceback.format_exception(error)).strip()
