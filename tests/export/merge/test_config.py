"""mergekit-moe's YAML: what is accepted, and every refusal by its text."""

from __future__ import annotations

import pytest

from export.errors import ConfigError
from export.merge.config import GateMode, ModelSource, read_merge_config

# As published on the card of mlabonne/phixtral-4x2_8.
PHIXTRAL_YAML = """
base_model: cognitivecomputations/dolphin-2_6-phi-2
gate_mode: cheap_embed
experts:
  - source_model: cognitivecomputations/dolphin-2_6-phi-2
    positive_prompts: [""]
  - source_model: lxuechen/phi-2-dpo
    positive_prompts: [""]
  - source_model: Yhyu13/phi-2-sft-dpo-gpt4_en-ep1
    positive_prompts: [""]
  - source_model: mrm8488/phi-2-coder
    positive_prompts: [""]
"""
PLAIN = """
base_model: ./a
experts:
  - source_model: ./a
    positive_prompts: [x]
  - source_model: ./b
    positive_prompts: [y]
"""


def read(tmp_path, text):
    path = tmp_path / "merge.yml"
    path.write_text(text)
    return read_merge_config(path)


def refusal(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    return str(caught.value)


def test_phixtrals_own_yaml_is_accepted(tmp_path):
    config = read(tmp_path, PHIXTRAL_YAML)
    assert config.gate_mode is GateMode.CHEAP_EMBED
    assert config.experts_per_token == 2
    assert config.dtype is None
    assert [expert.model.location for expert in config.experts][1:3] == [
        "lxuechen/phi-2-dpo",
        "Yhyu13/phi-2-sft-dpo-gpt4_en-ep1",
    ]
    assert config.experts[0].positive_prompts == ("",)


def test_every_key_is_read(tmp_path):
    config = read(
        tmp_path,
        """
base_model: ./a
gate_mode: uniform_random
dtype: bfloat16
experts_per_token: 1
architecture: phixtral
tokenizer_source: base
shared_experts: []
experts:
  - source_model: ./a
    positive_prompts: [p, q]
    negative_prompts: [n]
    noise_scale: 0.25
    residual_scale: 2
  - {source_model: /abs/b}
""",
    )
    first, second = config.experts
    assert (config.gate_mode, config.dtype, config.experts_per_token) == (GateMode.UNIFORM_RANDOM, "BF16", 1)
    assert (first.positive_prompts, first.negative_prompts) == (("p", "q"), ("n",))
    assert (first.noise_scale, first.residual_scale) == (0.25, 2.0)
    assert (second.noise_scale, second.residual_scale, second.positive_prompts) == (0.0, 1.0, ())
    assert second.model.location == "/abs/b"


def test_the_gate_mode_is_hidden_when_absent(tmp_path):
    assert read(tmp_path, PLAIN).gate_mode is GateMode.HIDDEN


def test_paths_are_seen_from_the_yaml_and_not_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "deep" / "experts" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep" / "m.yml").write_text(PLAIN.replace("./a", "experts/a"))
    config = read_merge_config(tmp_path / "deep" / "m.yml")
    assert config.base.location == str(tmp_path / "deep" / "experts" / "a")
    assert config.experts[1].model.location == str(tmp_path / "deep" / "b")


def test_all_problems_stand_in_one_error(tmp_path):
    text = refusal(
        tmp_path,
        """
base_model: ./a
gate_mode: hiden
dtype: fp16
experts_per_token: 3
positive_prompt: x
shared_experts: [{source_model: ./c}, {source_model: ./d}]
architecture: deepseek
tokenizer_source: union
merge_method: slerp
experts:
  - source_model: ./a
    positive_prompt: [x]
  - positive_prompts: [yes, on]
    noise_scale: -1
    residual_scale: big
""",
    )
    for part in (
        "gate_mode is 'hiden', expected one of hidden, hidden_last, hidden_avg, cheap_embed, random, uniform_random "
        "(did you mean hidden?)",
        "dtype is 'fp16', expected one of float16, bfloat16, float32",
        "experts_per_token is 3, expected 1 to 2, the number of experts",
        "positive_prompt: no such key; there are: base_model",
        "shared_experts: found 2, expected a list of one: every token goes through it; other models go under experts",
        "architecture is 'deepseek'; moeship merges into mixtral or phixtral or qwen2_moe or qwen3_moe",
        "tokenizer_source is 'union'; the base's tokenizer is kept: base",
        "merge_method: it belongs to mergekit-yaml",
        "experts[0].positive_prompt: no such key (did you mean positive_prompts?)",
        "experts[0].positive_prompts is empty, but gate_mode hidden makes the expert's row from them",
        "experts[1].positive_prompts holds True, which YAML does not read as a text; put it in quotes",
        "experts[1].source_model is None, expected a folder or a hub id",
        "experts[1].noise_scale is -1, expected a finite number of at least 0",
        "experts[1].residual_scale is 'big', expected a finite number",
    ):
        assert part in text, text


SHARED = "shared_experts:\n  - {source_model: ./b, positive_prompts: [x], residual_scale: 0.1}\n"


def test_a_shared_expert_comes_after_the_others(tmp_path):
    config = read(tmp_path, PLAIN + SHARED)
    assert config.shared is not None
    assert (config.shared.model.location, config.shared.residual_scale) == (str(tmp_path / "b"), 0.1)
    assert config.all_experts == (*config.experts, config.shared)
    assert [config.name_of(index) for index in range(3)] == ["expert 0", "expert 1", "the shared expert"]
    assert read(tmp_path, PLAIN).all_experts == config.experts


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        ("./b", "shared_experts: found './b', expected a list of one"),
        ("[./b]", "shared_experts[0] is './b', expected keys such as source_model and positive_prompts"),
        ("[{source_model: ./b, weight: 1}]", "shared_experts[0].weight: no such key"),
        ("[{source_model: ./b}]", "shared_experts[0].positive_prompts is empty, but gate_mode hidden makes"),
    ],
)
def test_a_shared_expert_that_is_none_is_refused(tmp_path, shared, message):
    assert message in refusal(tmp_path, f"{PLAIN}shared_experts: {shared}\n")


@pytest.mark.parametrize(
    ("word", "family"),
    [("qwen", "qwen"), ("Qwen MoE", "qwen2_moe"), ("qwen3", "qwen3_moe"), ("Qwen3 MoE", "qwen3_moe")],
)
def test_mergekits_words_for_a_qwen_are_read(tmp_path, word, family):
    assert read(tmp_path, f"{PLAIN}architecture: {word}\n").architecture == family


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ("[]", "experts: found 0, expected a list of at least 2"),
        ("null", "experts: found none, expected a list of at least 2"),
        ("[{source_model: a, positive_prompts: [x]}]", "experts: found 1, expected a list of at least 2"),
        ("[a/b, {source_model: a, positive_prompts: [x]}]", "experts[0] is 'a/b', expected keys such as source_model"),
    ],
)
def test_expert_lists_that_are_none_are_refused(tmp_path, experts, message):
    assert message in refusal(tmp_path, f"base_model: ./a\nexperts_per_token: 1\nexperts: {experts}\n")


def test_a_prompt_outside_a_list_is_refused(tmp_path):
    assert "experts[0].positive_prompts is 'x', expected a list of texts: ['x']" in refusal(
        tmp_path, PLAIN.replace("[x]", "x")
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name@v1", ModelSource("owner/name", "v1")),
        ("owner/name+other/adapter", ModelSource("owner/name", None, ModelSource("other/adapter"))),
        ("owner/name@v1+other/adapter@v2", ModelSource("owner/name", "v1", ModelSource("other/adapter", "v2"))),
    ],
)
def test_revisions_and_adapters_are_read(tmp_path, text, expected):
    found = read(tmp_path, PLAIN.replace("./b", text)).experts[1].model
    assert found == expected
    assert str(found) == text


def test_adapters_are_folders_seen_from_the_yaml_and_a_folders_name_may_hold_a_plus(tmp_path):
    for name in ("a+b", "c@d"):
        (tmp_path / name).mkdir()
    text = (
        PLAIN.replace("base_model: ./a", "base_model: ./a+b").replace("./b\n", "./c@d\n").replace("./a\n", "./a+./c\n")
    )
    config = read(tmp_path, text)
    assert config.base == ModelSource(str(tmp_path / "a+b"))
    assert config.experts[0].model == ModelSource(str(tmp_path / "a"), None, ModelSource(str(tmp_path / "c")))
    assert config.experts[1].model == ModelSource(str(tmp_path / "c@d"))


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("./b@main", "only a hub id has a revision (owner/name@revision)"),
        ("owner/name@", "only a hub id has a revision (owner/name@revision)"),
        ("a+b+c", "expected one model and one adapter: model+adapter"),
        ("+b", "expected one model and one adapter: model+adapter"),
        ("b+", "expected one model and one adapter: model+adapter"),
    ],
)
def test_revisions_and_adapters_that_are_none_are_refused(tmp_path, location, message):
    text = refusal(tmp_path, PLAIN.replace("./b", location))
    assert "experts[1].source_model is " in text
    assert message in text


def test_a_key_that_stands_twice_is_refused(tmp_path):
    assert "base_model stands twice" in refusal(tmp_path, PLAIN + "base_model: ./c\n")


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yml does not exist"):
        read_merge_config(tmp_path / "absent.yml")


def test_broken_yaml_is_told_with_its_place(tmp_path):
    assert "is not readable YAML" in refusal(tmp_path, "experts: [\n")


def test_a_yaml_without_keys_is_refused(tmp_path):
    assert "holds a list, expected keys" in refusal(tmp_path, "- a\n")


def test_yaml_cannot_make_python_objects(tmp_path):
    assert "is not readable YAML" in refusal(tmp_path, "base_model: !!python/object/apply:os.getcwd []\n")


@pytest.mark.parametrize("scale", [".nan", ".inf", "true"])
def test_a_scale_that_is_no_finite_number_is_refused(tmp_path, scale):
    text = PLAIN.replace("[y]", f"[y]\n    residual_scale: {scale}")
    assert "experts[1].residual_scale is" in refusal(tmp_path, text)


def test_a_scale_may_be_any_finite_number(tmp_path):
    largest = 1.7976931348623157e308  # of IEEE 754's binary64
    for scale in (-0.5, largest):
        config = read(tmp_path, PLAIN.replace("[y]", f"[y]\n    residual_scale: {scale!r}"))
        assert config.experts[1].residual_scale == scale
