"""Writes export/config_keys/transformers_keys.py: what transformers does with the keys of each family's config.json.

    python ci/transformers_keys.py           # write the table
    python ci/transformers_keys.py --check   # exit with 1 if the table differs from the installed transformers

For each configuration class the program makes small random models, saves them, and records every name that transformers
looks up in the configuration while it loads a model, computes logits, and generates tokens with a cache. A key of
config.json becomes an attribute of the configuration. A key that is neither a field of the class nor among these names
can therefore change nothing that transformers computes.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

TABLE = Path(__file__).parents[1] / "export" / "config_keys" / "transformers_keys.py"
FAMILIES = (
    "flex_olmo",
    "gpt_oss",
    "granitemoe",
    "llama",
    "mistral",
    "mixtral",
    "olmoe",
    "phi",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
)
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": None,  # the default of some classes is above the vocabulary
}  # fmt: skip
FACTORS = {
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 32,
    "short_mscale": 1.0,  # of phimoe, as is the next
    "long_mscale": 1.0,
}
# What the code looks up depends on what it finds.
SCALED = ({"rope_type": "linear"}, {"rope_type": "dynamic"}, {"rope_type": "yarn"}, {"rope_type": "longrope"})
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"sliding_window": None},
    {"sliding_window": 2},
    *({"rope_parameters": {**kind, "factor": 2.0, **FACTORS}, "head_dim": 8} for kind in SCALED),
    {"tie_word_embeddings": True},
)
NEEDS_A_WINDOW = ("gpt_oss",)  # classes that do not compute without one
HEAD = '''"""What transformers {version} does with the keys of config.json. Written by ci/transformers_keys.py.

FIELDS: class -> key -> default in the configuration class. LOOKED_UP: names that transformers looks up in a
configuration of any of these classes while it loads a model, computes and generates. ATTRIBUTES: names of the classes
themselves, which a key of config.json would overwrite. ALIASES: class -> key -> the field that transformers sets
instead. GENERATION: keys of generation_config.json, which older files have in config.json.
"""
# ruff: noqa: SIM905

from __future__ import annotations

from typing import Any

VERSION = "{version}"
'''


@contextmanager
def recorded(names: set[str]) -> Iterator[None]:
    """Collect the names that are looked up in any configuration."""
    original = PreTrainedConfig.__getattribute__

    def look_up(self: PreTrainedConfig, name: str) -> object:
        names.add(name)
        return original(self, name)

    PreTrainedConfig.__getattribute__ = look_up
    try:
        yield
    finally:
        PreTrainedConfig.__getattribute__ = original


def keys_of(family: str) -> dict[str, Any]:
    """The row of a family's configuration class."""
    kind = type(AutoConfig.for_model(family))
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    names: set[str] = set()
    prompt = torch.tensor([[1, 2, 3]])
    for variant in VARIANTS:
        if family in NEEDS_A_WINDOW and variant == {"sliding_window": None}:
            continue
        config = AutoConfig.for_model(family, **SIZES, **variant)
        with tempfile.TemporaryDirectory() as folder:
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            with recorded(names):
                model = AutoModelForCausalLM.from_pretrained(folder).eval()
                model(prompt)
                model.generate(prompt, max_new_tokens=3, do_sample=False)
    public = {name for name in dir(kind) if not name.startswith("__")} - fields.keys()
    looked_up = {name for name in names if not name.startswith("__")} - fields.keys() - public
    return {
        "class": kind.__name__,
        "fields": fields,
        "looked_up": looked_up,
        "attributes": public,
        "aliases": dict(kind.attribute_map),
    }


def names_text(name: str, values: set[str]) -> str:
    """An assignment of a set of names."""
    lines = textwrap.fill(" ".join(sorted(values)), 116, initial_indent="    ", subsequent_indent="    ")
    return f'{name} = frozenset(\n    """\n{lines}\n    """.split()\n)\n'


def table() -> str:
    """The text of the module."""
    rows = {row["class"]: row for row in map(keys_of, FAMILIES)}
    looked_up = set.union(*(row["looked_up"] for row in rows.values()))
    # Properties of a field's name are attributes of the class in some families and fields in others.
    attributes = set.intersection(*(row["attributes"] for row in rows.values()))
    fields = {name: dict(sorted(row["fields"].items())) for name, row in rows.items()}
    aliases = {name: row["aliases"] for name, row in rows.items()}
    text = HEAD.format(version=transformers.__version__)
    text += names_text("GENERATION", set(vars(GenerationConfig()))) + names_text("LOOKED_UP", looked_up)
    text += names_text("ATTRIBUTES", attributes)
    text += f"ALIASES: dict[str, dict[str, str]] = {aliases!r}\nFIELDS: dict[str, dict[str, Any]] = {fields!r}\n"
    command = ["ruff", "format", "-", "--config", str(TABLE.parents[2] / "pyproject.toml")]
    return subprocess.run(
        [sys.executable, "-m", *command], input=text, text=True, check=True, capture_output=True
    ).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    text = table()
    if not parser.parse_args().check:
        TABLE.write_text(text)
        return 0
    if TABLE.read_text() == text:
        return 0
    print(f"{TABLE} differs from transformers {transformers.__version__}: run python ci/transformers_keys.py")
    return 1


if __name__ == "__main__":
    sys.exit(main())
