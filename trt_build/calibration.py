"""Calibration as a build asks for it: the text, the rows that GPTQ solves, and what engine.json says of it.

Both backends solve codes by `export/calibration`, each for the bits and blocks of its own plan, and carry them over.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.calibration.layers import FEWEST_TOKENS, Wanted
from export.calibration.store import CalibrationText, solve_codes
from export.calibration.text import DEFAULT_TOKENS, OWN_TEXT, own_text, windows_of
from export.calibration.work import Work
from export.errors import ConfigError, names
from export.families import Model
from export.files.resume import discard_interrupted
from export.quantize.gptq import LEAST_DAMPING
from export.quantize.recipe import GPTQ, METHODS
from export.quantize.solved import CODES_FILE, SolvedCodes, checksum_text
from export.rows import Rows, in_units
from export.tokenizer.loading import Tokenizer
from trt_build.comparison.evaluation_text import EvaluationText, read_texts

logger = logging.getLogger(__name__)

# Products up to which GPTQ is the default: about four minutes of one core. The small examples take 3e11 and less,
# phixtral-4x2_8 1.3e14, which is an hour on two cores.
MOST_PRODUCTS = 10**13
SOLVED_SCALES = "float16"  # the type of solved scales where a record does not name one


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a build says of its method. `method` None: the recipe's, and GPTQ where texts are named. `texts` are files;
    without any GPTQ takes moeship's own. `codes` is a folder that keeps the solved codes; None: one beside the engine,
    which is removed when the engine is whole. With `automatic`, a recipe that states no method gets GPTQ where that
    takes at most MOST_PRODUCTS."""

    method: str | None = None
    texts: tuple[Path, ...] = ()
    num_tokens: int | None = None
    codes: Path | None = None
    automatic: bool = False

    def chosen(self) -> str | None:
        """The method in place of the recipe's; None: the recipe's own. Raises ConfigError for a name that is none, and
        for a text that would not be used."""
        if self.method is not None and self.method not in METHODS:
            raise ConfigError(f"choosing the method: found {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.method not in (None, GPTQ) and (self.texts or self.codes or self.num_tokens is not None):
            raise ConfigError(
                f"choosing the method: {self.method} takes no calibration text; leave out --calibrate, "
                "--calibrate-tokens and --codes, or take --method gptq"
            )
        return self.method or (GPTQ if self.texts else None)

    @property
    def is_nobodys_wish(self) -> bool:
        """Whether a build may search codes that GPTQ cannot solve: no flag says how it should solve them."""
        return self.is_open and self.num_tokens is None and self.codes is None

    @property
    def is_open(self) -> bool:
        """Whether the method may be chosen by the work that it takes."""
        return self.automatic and self.chosen() is None

    def flags(self) -> list[str]:
        """The flags of a command line that say the same."""
        words = [] if self.method is None else ["--method", self.method]
        words += ["--calibrate", *(str(path.resolve()) for path in self.texts)] if self.texts else []
        words += [] if self.num_tokens is None else ["--calibrate-tokens", str(self.num_tokens)]
        return words + ([] if self.codes is None else ["--codes", str(self.codes.resolve())])

    @property
    def most_tokens(self) -> int:
        """The tokens that are used of a text that is long enough."""
        return DEFAULT_TOKENS if self.num_tokens is None else self.num_tokens

    def text(self, tokenizer: Tokenizer, longest: int) -> CalibrationText:
        """The text as windows of tokens. Raises ConfigError for a file that cannot be read, and for too little text."""
        text = read_texts(self.texts) if self.texts else EvaluationText(names=(OWN_TEXT,), content=own_text())
        windows = windows_of(tokenizer.encode_prompt(text.content), self.most_tokens, longest, names(text.names))
        return CalibrationText(windows=windows, record=text.to_json())


def text_record(text: CalibrationText) -> dict[str, Any]:
    """What decides codes beside the model and their bits: the text and the solver's settings."""
    return {
        "text": dict(text.record),
        "tokens": text.num_tokens,
        "least_damping": LEAST_DAMPING,
        "fewest_tokens": FEWEST_TOKENS,
    }


@contextmanager
def solved(
    calibration: Calibration, output: Path, model: Model, wanted: Mapping[str, Wanted], text: CalibrationText | None
) -> Iterator[SolvedCodes | None]:
    """The solved codes of the rows `wanted`, while an engine is made of them; None if there are none. When the block
    ends well, the folders beside `output` are removed: that of this build's codes, and what an interrupted build of the
    same output left, whatever its method."""
    beside = output.resolve().with_name(f".{output.resolve().name}.codes")
    folder = calibration.codes or beside
    yield None if not wanted or text is None else _solved(folder, calibration, model, wanted, text)
    if calibration.codes is None or calibration.codes.resolve() != beside:
        shutil.rmtree(beside, ignore_errors=True)
        discard_interrupted(beside)


def _solved(
    folder: Path, calibration: Calibration, model: Model, wanted: Mapping[str, Wanted], text: CalibrationText
) -> SolvedCodes:
    """The codes, solved into `folder` or read from it."""
    try:
        codes = solve_codes(folder, model, wanted, text)
    except ConfigError as error:
        if calibration.codes is not None or not (folder / CODES_FILE).is_file():
            raise
        logger.warning("solving the codes from the beginning: those of an interrupted build do not fit (%s)", error)
        shutil.rmtree(folder)
        codes = solve_codes(folder, model, wanted, text)
    fallen = fallen_back(codes)
    if fallen:
        logger.warning("%s", fallen)
    return codes


def method_rows(gptq: Work, *, solves: bool) -> Rows:
    """What a plan says of finding the codes: `gptq` is what GPTQ takes, and `solves` whether the build uses it. Nothing
    for a build without codes that GPTQ can solve."""
    if not gptq.products:
        return []
    said = (
        f"over {gptq.num_tokens:,} tokens, {duration(gptq.seconds)} of one core and {in_units(gptq.memory)} of memory"
    )
    if solves:
        return [("codes", f"by gptq {said}; --method search takes no text and seconds")]
    return [("codes", f"without a text; --method gptq solves them {said}")]


def duration(seconds: float) -> str:
    """An estimate in words. Of small models it counts too little, since what numpy adds to each call weighs more."""
    if seconds < 10:
        return "under 20 s"
    if seconds < 100:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} minutes" if seconds < 6000 else f"about {seconds / 3600:.1f} hours"


def fallen_back(codes: SolvedCodes) -> str | None:
    """A sentence that names the experts whose codes were rounded without the calibration text; None without any."""
    found = [
        f"{name} of expert{'s' if len(matrix.fallen_back) > 1 else ''} {', '.join(map(str, matrix.fallen_back))} "
        f"({', '.join(str(matrix.tokens[expert]) for expert in matrix.fallen_back)} tokens)"
        for name, matrix in codes.matrices.items()
        if matrix.fallen_back
    ]
    if not found:
        return None
    return (
        f"too few tokens of the calibration text reach {names(found)}: their codes were searched without it; more "
        "text, or text of another kind, reaches more experts"
    )


def calibration_record(codes: SolvedCodes) -> dict[str, Any]:
    """What engine.json says of solved codes: text, tokens and settings, tokens of each expert and those that fell back,
    the digest of the codes, the checksum of each matrix, and the type of scales where it is not float16."""
    settings = codes.origin.settings
    types = {one.get("scale_type", SOLVED_SCALES) for one in settings["matrices"].values()}
    experts = {name: matrix for name, matrix in codes.matrices.items() if len(matrix.tokens) > 1}
    return {
        "text": settings["text"],
        "tokens": sum(settings["windows"]),
        "least_damping": LEAST_DAMPING,
        "fewest_tokens": FEWEST_TOKENS,
        "checksums": {name: dict(matrix.checksums) for name, matrix in sorted(codes.matrices.items())},
        "tokens_by_expert": {name: list(matrix.tokens) for name, matrix in experts.items()},
        "fallen_back": {name: list(one.fallen_back) for name, one in codes.matrices.items() if one.fallen_back},
        "codes": codes.digest,
        **({} if types <= {SOLVED_SCALES} else {"scale_type": names(sorted(types))}),
    }


def planned_record(model: Model, wanted: Mapping[str, Wanted], text: CalibrationText) -> dict[str, Any]:
    """What `calibration_record` gives before the codes are solved, with zeros in place of digests and checksums. Which
    experts a text reaches is not known: each is taken to get an equal share of the tokens, and none to fall back."""
    facts, checksums, tokens = model.architecture, {}, {}
    for name, one in wanted.items():
        spec = model.weights.table[name]
        groups = one.experts if spec.stacks_experts else range(len(spec.groups))
        places = [f"{group}.{turn}" for group in groups for turn in range(len(spec.groups[group]))]
        checksums[name] = dict.fromkeys(places, checksum_text(0))
        if spec.stacks_experts and spec.shape[0] > 1:
            share = text.num_tokens * facts.experts_per_token // spec.shape[0]
            tokens[name] = [share if place in one.experts else 0 for place in range(spec.shape[0])]
    return {
        **text_record(text),
        "checksums": checksums,
        "tokens_by_expert": tokens,
        "fallen_back": {},
        "codes": "0" * 64,
    }


def checksums_of(record: Mapping[str, Any] | None) -> Mapping[str, Mapping[str, str]]:
    """The checksums of a record, by row; empty without one. Raises ValueError for a record that is none."""
    found = {} if record is None else record.get("checksums")
    if not isinstance(found, Mapping) or not all(isinstance(one, Mapping) for one in found.values()):
        raise ValueError("calibration.checksums is no table of checksums")
    return found
