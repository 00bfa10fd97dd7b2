"""Reads YAML files within bounds: no tags that run code, no duplicate keys, a limit on what aliases expand to.

    values = read_yaml(folder / "merge.yml", "the merge configuration")

PyYAML's own constructors raise different errors for bad scalars (KeyError for `!!bool x`, IndexError for `!!int ''`).
Here each becomes a YAML error that names the place. Nodes are counted as if every alias were written out, and may be
at most MAX_NODES: ten lines of aliases can expand to billions.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from export.errors import ConfigError, MoeshipError, named, names, shown
from export.files.reading import read_text

MAX_YAML_BYTES = 256 << 10  # enough for some thousand prompts
MAX_NODES = 20_000
MAX_DEPTH = 32
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_MAX_BITS = 64  # most bits of a whole number: no setting needs a larger one


def read_yaml(path: Path, what: str, error: type[MoeshipError] = ConfigError) -> Any:  # noqa: ANN401 - YAML value
    """Read the one document of a YAML file. Raises `error` if the file is missing, not YAML, or beyond the bounds."""
    return parse_yaml(read_text(path, what, most=MAX_YAML_BYTES, error=error), path, what, error)


def parse_yaml(text: str, path: Path, what: str, error: type[MoeshipError] = ConfigError) -> Any:  # noqa: ANN401
    """Parse the one document of a YAML text that was read from `path`. Raises `error`."""
    try:
        return yaml.load(text, Loader=_BoundedLoader)
    except (yaml.YAMLError, RecursionError) as reason:
        words = "it is nested too deeply" if isinstance(reason, RecursionError) else " ".join(str(reason).split())
        raise error(f"reading {what}: {named(path)} is not readable YAML ({named(words, 400)})") from reason


class _BoundedLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the bounds of this module."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes = 0
        self._sizes: dict[int, int] = {}  # id of a finished node -> number of nodes in it, with aliases written out

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401 - as the base's
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise yaml.composer.ComposerError(None, None, "an alias is inside the value that it refers to", mark)
            self._count(self._sizes[id(node)], mark)
            return node
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {MAX_DEPTH} levels", mark)
        before = self._nodes
        self._count(1, mark)
        node = super().compose_node(parent, index)
        self._sizes[id(node)] = self._nodes - before
        self._depth -= 1
        return node

    def _count(self, nodes: int, mark: Any) -> None:  # noqa: ANN401 - yaml.Mark
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MAX_NODES} values, counting aliases as often as they are used", mark
            )

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ANN401 - YAML value
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            text = f"{shown(node.value)} is no {named(node.tag).removeprefix('tag:yaml.org,2002:')}"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark) from error
        if isinstance(value, str) and _SURROGATE.search(value):
            text = f"{shown(value)} holds half of a surrogate pair, which is no character"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            text = f"a whole number of {value.bit_length()} bits"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
        return value

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: ANN401 - a name or None
        node = super().compose_mapping_node(anchor)
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = sorted(key for key, count in counts.items() if count > 1)
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{names(twice)} stands twice", node.start_mark)
        return node
