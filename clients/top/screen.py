"""Draws what was found of a server as lines of text for a terminal of a given size."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.text import Text

from clients.top.figures import SHARES, Figures
from clients.top.live import Look

_LABEL, _LEAST_BAR, _MOST_BAR = 15, 8, 40
_SPARK = 60  # rates that are remembered
_NEXT_UNIT = 999.5  # from which on three digits are those of the next unit
_MOST_LEVEL = 8  # of an expert's load; half of it is an equal share


@dataclass(frozen=True)
class Glyphs:
    """The characters that a terminal can show."""

    levels: str
    full: str
    empty: str
    ellipsis: str


UNICODE = Glyphs("·▁▂▃▄▅▆▇█", "█", "░", "…")
ASCII = Glyphs("012345678", "#", ".", ">")


class Screen:
    """Draws looks. It remembers rates for the lines that show how they went, and which engine is shown."""

    def __init__(self, glyphs: Glyphs = UNICODE) -> None:
        self._glyphs = glyphs
        self._chosen = 0
        self._rates: dict[tuple[str, str], deque[float]] = {}

    def next_engine(self) -> None:
        self._chosen += 1

    def draw(self, look: Look, width: int, height: int, keys: str = "") -> Text:
        """Lines for a terminal of this size, the last one without a line break."""
        lines = list(self._head(look, width, keys))
        if look.engines:
            engine = look.engines[self._chosen % len(look.engines)]
            if not look.fault:
                self._remember(engine)
            body = [*self._body(engine, width)]
            experts = list(self._experts(engine, width, height - len(lines) - len(body) - 1))
            lacks = [_line("not published", ", ".join(engine.lacks), "dim")] if engine.lacks else []
            lines += [*body, *experts, *lacks]
        elif not look.fault:
            lines.append(Text("This server has no model with metrics yet.", "dim"))
            lines.append(Text("Is the address the one that moeship serve prints as metrics?", "dim"))
        shown = lines[:height]
        for line in shown:
            if line.cell_len > width:
                line.truncate(width - 1, overflow="crop")
                line.append(self._glyphs.ellipsis, "dim")
        return Text("\n").join(shown)

    def _head(self, look: Look, width: int, keys: str) -> Iterator[Text]:
        time = f"{look.time.astimezone():%H:%M:%S}"
        head = Text.assemble(("moeship top", "bold"), "  ", (look.url, "cyan"))
        right = f"{keys}  {time}" if keys else time
        head.append(" " * max(2, width - head.cell_len - len(right)))
        yield head.append(right, "dim")
        if look.fault:
            since = f"no answer for {look.silent_s:.0f} s, trying again: "
            yield Text(since + look.fault.partition("; ")[0].rpartition(": ")[2], "bold red")
        elif look.restarts:
            yield Text(f"the server has begun anew {look.restarts} times since this view began", "yellow")
        else:
            yield Text()

    def _body(self, engine: Figures, width: int) -> Iterator[Text]:
        size = min(_MOST_BAR, max(_LEAST_BAR, (width - _LABEL) // 4))
        yield _line("model", f"{engine.model} ({engine.kind})", "bold")
        requests = f", {engine.requests_running:.0f} requests" if engine.requests_running is not None else ""
        if engine.streams is not None:
            yield self._bar("streams", engine.streams, engine.slots, size, f" slots{requests}", warns=False)
        if engine.waiting is not None:
            yield self._bar("queue", engine.waiting, engine.waiting_limit, size, "")
        yield from self._cache(engine, size)
        yield from self._tokens(engine, width)
        yield from _percentiles(engine)
        yield from _requests(engine)

    def _bar(self, label: str, value: float, most: float | None, size: int, behind: str, *, warns: bool = True) -> Text:
        of = f" of {most:.0f}" if most else ""
        return self._gauge(label, value / most if most else None, size, f"{value:.0f}{of}{behind}", warns=warns)

    def _gauge(self, label: str, share: float | None, size: int, behind: str, *, warns: bool = True) -> Text:
        line = Text(f"{label:<{_LABEL}}")
        if share is not None:
            filled = min(size, math.ceil(min(1.0, max(0.0, share)) * size))
            style = "green" if not warns or share < 0.7 else "yellow" if share < 0.9 else "red"
            line.append(self._glyphs.full * filled, style).append(self._glyphs.empty * (size - filled), "dim")
            line.append("  ")
        return line.append(behind)

    def _cache(self, engine: Figures, size: int) -> Iterator[Text]:
        budget, held = engine.cache_budget_bytes, engine.cache_held_bytes
        if budget and held is not None:
            behind = f"{_bytes(held)} of {_bytes(budget)}, {_bytes(engine.cache_reserved_bytes)} reserved"
            yield self._gauge("cache", held / budget, size, behind)
        elif engine.cache_used_share is not None:
            tokens = f" of {engine.cache_max_tokens:,.0f} tokens" if engine.cache_max_tokens else " of its blocks"
            yield self._gauge("cache", engine.cache_used_share, size, f"{engine.cache_used_share:.0%}{tokens}")
        if engine.prefix_kept_tokens is not None:
            hit = "no prompts" if engine.prefix_hit_share is None else f"{engine.prefix_hit_share:.0%} of prompt tokens"
            kept = f"keeps {engine.prefix_kept_tokens:,.0f} ({_bytes(engine.prefix_kept_bytes)})"
            yield self._gauge("prefix hits", engine.prefix_hit_share or 0.0, size, f"{hit}; {kept}", warns=False)
        if engine.drafts_per_s is not None:
            share = engine.drafts_accepted_share
            accepted = "none drafted" if share is None else f"{share:.0%} accepted"
            behind = f"{accepted}; {engine.drafts_per_s:.1f} tokens/s drafted"
            yield self._gauge("drafts", share or 0.0, size, behind, warns=False)

    def _tokens(self, engine: Figures, width: int) -> Iterator[Text]:
        found = {"output": engine.output_tokens_per_s, "prompt": engine.prompt_tokens_per_s}
        if all(value is None for value in found.values()):
            if engine.counts_tokens:
                yield _line("tokens/s", "a rate needs two readings", "dim")
            return
        line, size = Text(f"{'tokens/s':<{_LABEL}}"), max(6, (width - _LABEL - 36) // 2)
        for name, value in found.items():
            line.append(f"{name} ").append(f"{_number(value):>7} ", "bold")
            line.append(self._spark(engine.model, name, size), "green").append("  ")
        yield line

    def _spark(self, model: str, name: str, size: int) -> str:
        rates = list(self._rates.get((model, name), ()))[-size:]
        most = max(rates, default=0.0) or 1.0
        levels = self._glyphs.levels
        return "".join(levels[math.ceil(rate / most * (len(levels) - 1))] for rate in rates).ljust(size)

    def _remember(self, engine: Figures) -> None:
        for name, value in (("output", engine.output_tokens_per_s), ("prompt", engine.prompt_tokens_per_s)):
            if value is not None:
                self._rates.setdefault((engine.model, name), deque(maxlen=_SPARK)).append(value)

    def _experts(self, engine: Figures, width: int, room: int) -> Iterator[Text]:
        """A strip for each layer, as many as there is room for. Each character is an expert's load."""
        if not engine.expert_load:
            return
        equal, most = self._glyphs.levels[_MOST_LEVEL // 2], self._glyphs.levels[_MOST_LEVEL]
        yield _line("expert load", f"by layer; {equal} is an equal share, {most} twice that or more", "dim")
        strips = [self._strip(layer, load) for layer, load in engine.expert_load.items()]
        # Strips that are longer than a line are cut.
        columns = max(1, width // (strips[0].cell_len + 2))
        lines = [strips[at : at + columns] for at in range(0, len(strips), columns)]
        rows = max(1, room - 1)
        for row in lines if len(lines) <= rows else lines[: rows - 1]:
            yield Text("  ").join(row)
        if len(lines) > rows:
            left = sum(map(len, lines[rows - 1 :]))
            yield Text(f"{self._glyphs.ellipsis} {left} more layers: make the terminal larger", "dim")

    def _strip(self, layer: int, load: tuple[float, ...]) -> Text:
        strip = Text().append(f"{layer:>3} ", "dim")
        for share in load:
            level = min(_MOST_LEVEL, round(share * _MOST_LEVEL / 2))
            level = max(1, level) if share else 0
            strip.append(self._glyphs.levels[level], _load_style(share))
        return strip


def _load_style(share: float) -> str:
    bounds = ((0.0, "dim"), (0.5, "blue"), (1.5, "green"), (2.0, "yellow"))
    return next((style for bound, style in bounds if share <= bound), "red")


def _percentiles(engine: Figures) -> Iterator[Text]:
    times: dict[str, Mapping[str, float | None]] = {
        "first token": engine.first_token_s,
        "between tokens": engine.between_tokens_s,
        "queue": engine.queue_s,
        "step": engine.step_s,
    }
    if not any(times.values()):
        return
    over = "since its start" if engine.window_s is None else f"last {engine.window_s:.0f} s"
    yield Text(f"{'times':<{_LABEL}}" + "".join(f"{name:>10}" for name in SHARES) + f"   {over}", "dim")
    for name, found in times.items():
        if found:
            cells = "".join(f"{_seconds(found[share]):>10}" for share in SHARES)
            yield Text(f"{name:<{_LABEL}}").append(cells)


def _requests(engine: Figures) -> Iterator[Text]:
    if engine.ended_per_s:
        ended = ", ".join(f"{name} {_number(rate)}" for name, rate in engine.ended_per_s.items() if rate)
        yield Text(f"{'requests/s':<{_LABEL}}{ended or 'none ended'}")
    refused = ", ".join(f"{name} {_number(rate)}" for name, rate in engine.refused_per_s.items() if rate)
    if engine.refused_total is not None:
        total = f"{engine.refused_total:,.0f} since the server's start"
        restarts = f"; {engine.restarts:.0f} restarts" if engine.restarts else ""
        line = Text(f"{'refused/s':<{_LABEL}}").append(refused or "none", "bold red" if refused else "")
        yield line.append(f"  ({total}{restarts})", "dim")


def _line(label: str, text: str, style: str) -> Text:
    return Text(f"{label:<{_LABEL}}").append(text, style)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _seconds(value: float | None) -> str:
    """Seconds with three digits."""
    if value is None:
        return "-"
    return f"{value * 1e3:.3g} ms" if value < _NEXT_UNIT / 1e3 else f"{value:.3g} s"


def _bytes(value: float | None) -> str:
    """Bytes with three digits."""
    if value is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if value < _NEXT_UNIT:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
