"""Makes the requests of a load. Request number `index` depends only on the seed and the index, so loads with one seed
are equal, whatever server answers and in whatever order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from clients.bench.load import Lengths, Sampling, Work
from export.errors import ConfigError
from export.files.reading import parse_json, read_text
from export.optional import optional_package

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_PROMPTS_BYTES = 1 << 30
# Words of synthetic prompts: short, frequent, different in their first letters.
_TEXT = (
    "a about all as at be but by can day do each first for from get go good have he how if in is it know like long "
    "look make man many may more my new no not now of on one or out over part people see she so some take than that "
    "the their them then there these they think this time to two up use very was water way we what when which who "
    "will with word work would write year you"
)
WORDS = tuple(_TEXT.split())
_MOST_TRIALS = 64  # attempts at a text with an exact number of tokens


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt of a file. `max_tokens` None takes the load's."""

    text: str
    max_tokens: int | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file with one JSON object a line: "prompt", and if need be "max_tokens". Raises ConfigError."""
    prompts = []
    for number, line in enumerate(read_text(path, "prompts", most=MAX_PROMPTS_BYTES).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise ConfigError(f"reading {path}, line {number}: {error}; expected one JSON object a line") from error
        text = value.get("prompt") if isinstance(value, dict) else None
        most = value.get("max_tokens") if isinstance(value, dict) else None
        if not isinstance(text, str) or not text or not (most is None or (type(most) is int and most >= 1)):
            raise ConfigError(
                f'reading {path}, line {number}: expected {{"prompt": TEXT}}, and if need be "max_tokens": N with N '
                "of 1 or more"
            )
        prompts.append(Prompt(text=text, max_tokens=most))
    if not prompts:
        raise ConfigError(f"reading {path}: found no prompt, expected one JSON object a line")
    return prompts


class Source(Protocol):
    """Where the generator gets its requests from."""

    def prepare(self, first: int, count: int) -> None:
        """Make requests ahead of time, so that making them takes no time while others are measured."""

    def work(self, index: int) -> Work:
        """Request number `index`."""


@dataclass(frozen=True)
class Listed:
    """Requests that the caller has made."""

    works: Sequence[Work]

    def prepare(self, first: int, count: int) -> None:
        """There is nothing to make."""

    def work(self, index: int) -> Work:
        """Request number `index`."""
        return self.works[index]


@dataclass(kw_only=True)
class Works:
    """Makes requests by number.

    `prompts` are drawn at random; if there are none, prompts are synthetic, of `prompt_tokens` tokens. `counter` counts
    the tokens of a text; without it a synthetic prompt has as many words. `early_share` of the requests are ended by
    the client after a random part of their tokens. Raises ConfigError for a share that is none.
    """

    max_tokens: Lengths
    prompt_tokens: Lengths
    prompts: Sequence[Prompt] = ()
    counter: Callable[[str], int] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    early_share: float = 0.0
    seed: int = 0
    _ready: dict[int, Work] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.early_share <= 1:
            raise ConfigError(f"planning a load: the share of early ends is {self.early_share}, expected 0 to 1")

    def describe(self) -> dict[str, Any]:
        """What is sent, as JSON values."""
        prompts = f"{len(self.prompts)} of a file" if self.prompts else "synthetic"
        unit = "tokens" if self.counter else "words"
        return {
            "prompts": prompts,
            **({} if self.prompts else {f"prompt_{unit}": str(self.prompt_tokens)}),
            "max_tokens": str(self.max_tokens),
            "early_share": self.early_share,
            "sampling": vars(self.sampling),
            "seed": self.seed,
        }

    def prepare(self, first: int, count: int) -> None:
        """Make requests ahead of time, so that making them takes no time while others are measured."""
        for index in range(first, first + count):
            self._ready[index] = self._make(index)

    def work(self, index: int) -> Work:
        """Request number `index`."""
        ready = self._ready.pop(index, None)
        return self._make(index) if ready is None else ready

    def _make(self, index: int) -> Work:
        source = random.Random(f"request/{self.seed}/{index}")
        if self.prompts:
            chosen = self.prompts[source.randrange(len(self.prompts))]
        else:
            chosen = Prompt(text=synthetic(source, self.prompt_tokens.draw(source), self.counter))
        most = chosen.max_tokens or self.max_tokens.draw(source)
        early = source.random() < self.early_share and most > 1
        return Work(
            prompt=chosen.text,
            max_tokens=most,
            early_after=source.randint(1, most - 1) if early else None,
            seed=source.getrandbits(31),
            sampling=self.sampling,
        )


def synthetic(source: random.Random, num_tokens: int, counter: Callable[[str], int] | None) -> str:
    """A text of random words: of `num_tokens` tokens by `counter`, or of as many words without one. Where no text of
    exactly that number is found, it has a few tokens less."""
    words = source.choices(WORDS, k=num_tokens)
    if counter is None:
        return " ".join(words)
    text, count = " ".join(words), 0
    for _ in range(_MOST_TRIALS):
        count = counter(text)
        if count >= num_tokens:
            break
        text = f"{text} {' '.join(source.choices(WORDS, k=num_tokens - count))}"
    while count > num_tokens and len(text) > 1:
        # A token of these words has at most as many characters as the longest word and its space.
        text = text[: -max(1, (count - num_tokens) // 2)]
        count = counter(text)
    return text


def token_counter(path: Path) -> Callable[[str], int]:
    """A function that counts a text's tokens with a tokenizer.json, with the tokens that it adds to every prompt.
    Raises ConfigError, MissingPackageError."""
    with optional_package("tokenizers", "counting the tokens of prompts", "client"):
        from tokenizers import Tokenizer
    path = path / "tokenizer.json" if path.is_dir() else path
    text = read_text(path, "a tokenizer")
    try:
        tokenizer: Tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # of the library's own kind
        raise ConfigError(f"reading {path}: {error}; expected a tokenizer.json") from error
    return lambda words: len(tokenizer.encode(words).ids)
