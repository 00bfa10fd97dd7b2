"""A tokenizer with more ids than the embedding has rows: refused if a text can be encoded to one of them."""

from __future__ import annotations

import json

import pytest
from checkpoints import write_phi_checkpoint
from mixtral_checkpoints import write_mixtral_checkpoint
from transformers import AutoTokenizer

from export.errors import ConfigError
from trt_build.source import open_source

TEXTS = ["the quick brown fox", "naïve café <s> [PAD]", "def main() -> None:\n\treturn 'ünï'", "zz never", ""]


def edit(folder, change):
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def size_of(folder):
    return max(AutoTokenizer.from_pretrained(folder).get_vocab().values()) + 1


def write(folder, **more):
    """A Mixtral whose embedding has as many rows as its tokenizer has ids."""
    size = size_of(write_mixtral_checkpoint(folder, seed=1))
    return write_mixtral_checkpoint(folder, seed=1, vocab_size=size, **more), size


def test_an_entry_that_no_merge_makes_is_taken_out(tmp_path):
    folder, size = write(tmp_path / "c")
    edit(folder, lambda raw: raw["model"]["vocab"].update({"zz never": size}))
    theirs = AutoTokenizer.from_pretrained(folder)
    source = open_source(str(folder), None, None)
    assert source.settings.tokenizer.size == size
    for text in TEXTS:
        assert source.settings.tokenizer.encode_prompt(text) == theirs(text)["input_ids"]
    (tmp_path / "out").mkdir()
    source.settings.write(tmp_path / "out")
    assert size_of(tmp_path / "out") == size


def add_token(raw, size):
    token = {"id": size, "content": "[PAD]", "special": True}
    raw["added_tokens"].append(token | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False))


def add_letter(raw, size):
    raw["model"]["vocab"]["ж"] = size


def add_merge(raw, size):
    raw["model"]["vocab"]["zq"] = size
    raw["model"]["merges"].append(["z", "q"])


@pytest.mark.parametrize(
    ("change", "text"), [(add_token, "'[PAD]'"), (add_letter, "'ж'"), (add_merge, "'zq'")],
    ids=["added token", "letter", "merge"],
)  # fmt: skip
def test_a_token_that_a_prompt_can_hold_is_refused(tmp_path, change, text):
    folder, size = write(tmp_path / "c")
    edit(folder, lambda raw: change(raw, size))
    written = text.strip("'")
    assert size in AutoTokenizer.from_pretrained(folder)(written)["input_ids"]
    with pytest.raises(ConfigError) as caught:
        open_source(str(folder), None, None)
    assert f"it has {size + 1} ids, the model's vocabulary {size}, and a prompt can hold {text} (id {size})" in str(
        caught.value
    )


def test_rows_that_stand_for_no_token_are_padding(tmp_path):
    source = open_source(str(write_phi_checkpoint(tmp_path / "c", seed=1)), None, None)
    assert (source.settings.tokenizer.size, source.model.architecture.vocab_size) == (257, 263)
