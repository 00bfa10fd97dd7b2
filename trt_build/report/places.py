"""Where engines and the reference differ: positions of the text, and tokens of greedy text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from export.reference.model import Reference
from export.tokenizer.loading import Tokenizer
from trt_build.comparison.parity import Positions
from trt_build.report.contents import Choice, GreedyText, Place, Token

MOST_PLACES = 12
APART = 16  # positions between two places, so that one odd word is not all that is shown
CONTEXT_TOKENS = 40
_BEFORE = 8  # tokens that a token is decoded behind


def differing_places(positions: Sequence[Positions | None], tokenizer: Tokenizer) -> tuple[Place, ...]:
    """The MOST_PLACES positions with the largest KL divergence of any engine, APART from each other, the worst first.
    An engine that scored other windows than the first engine has no part in them."""
    scored = next((one for one in positions if one is not None), None)
    if scored is None:
        return ()
    own = [one if one is not None and one.windows == scored.windows else None for one in positions]
    largest = np.max([np.nan_to_num(one.kl, nan=np.inf) for one in own if one is not None], axis=0)
    starts = [0, *accumulate(map(len, scored.windows))]
    chosen: list[int] = []
    for place in np.argsort(-largest, kind="stable").tolist():
        if len(chosen) == MOST_PLACES or not largest[place] > 0:
            break
        if all(abs(place - other) >= APART for other in chosen):
            chosen.append(place)
    return tuple(_place(place, starts, own, scored, tokenizer) for place in chosen)


def _place(
    number: int, starts: Sequence[int], positions: Sequence[Positions | None], scored: Positions, tokenizer: Tokenizer
) -> Place:
    window = next(index for index, start in enumerate(starts[1:]) if number < start)
    ids = list(scored.windows[window])
    end = number - starts[window] + 1
    context = ids[max(0, end - CONTEXT_TOKENS) : end]

    def choice(one: Positions, who: int) -> Choice:
        text = token_behind(tokenizer, context, int(one.choices[who, number]))
        return Choice(text=text, probability=float(one.probabilities[who, number]))

    return Place(
        number=number,
        before=tokenizer.decode(context),
        following=token_behind(tokenizer, context, ids[end]) if end < len(ids) else "",
        reference=choice(scored, 1),
        engines=tuple(None if one is None else choice(one, 0) for one in positions),
        kl=tuple(None if one is None else float(one.kl[number]) for one in positions),
    )


def token_behind(tokenizer: Tokenizer, before: Sequence[int], token: int) -> str:
    """The text of one token behind others. A special token has its name, and bytes that are no character alone are
    U+FFFD."""
    start = list(before[-_BEFORE:])
    head, whole = tokenizer.decode(start), tokenizer.decode([*start, token])
    if whole.startswith(head) and len(whole) > len(head):
        return whole[len(head) :]
    return tokenizer.decode([token]) or tokenizer.backend.id_to_token(token) or ""


def greedy_texts(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]] | None],
    reference: Reference,
    tokenizer: Tokenizer,
) -> tuple[GreedyText, ...]:
    """Each prompt with the answers of all engines: `answers` has for each engine the token ids behind each prompt, None
    for an engine that cannot run. All are read by the reference in one pass, which says where it would choose
    otherwise."""
    runs = list(
        dict.fromkeys(
            (*prompt, *own[turn]) for turn, prompt in enumerate(prompts) for own in answers if own is not None
        )
    )
    choices: dict[tuple[int, ...], npt.NDArray[np.int64]] = {
        run: logits[:, : tokenizer.size].argmax(axis=-1)
        for run, (logits, _) in zip(runs, reference.run(runs), strict=True)
    }

    def tokens(prompt: Sequence[int], answer: Sequence[int]) -> tuple[Token, ...]:
        run = (*prompt, *answer)
        found = []
        for place in range(len(prompt), len(run)):
            other = int(choices[run][place - 1])
            found.append(
                Token(
                    text=token_behind(tokenizer, run[:place], run[place]),
                    instead=None if other == run[place] else token_behind(tokenizer, run[:place], other),
                )
            )
        return tuple(found)

    return tuple(
        GreedyText(
            prompt=tokenizer.decode(list(prompt)),
            engines=tuple(None if own is None else tokens(prompt, own[turn]) for own in answers),
        )
        for turn, prompt in enumerate(prompts)
    )
