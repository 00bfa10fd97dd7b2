"""Families are found by their files, and nothing outside these files names one."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers_models import TRANSFORMERS_MODELS

from export import families as registry
from export.architecture import Architecture, QueryKeyValue, Router, Scales
from export.errors import ConfigError, ExportError
from export.families import families, family_named

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "export" / "families"
# Which models a merge takes and what it makes of them is written there by the families' names.
OF_MERGES = "export/merge/"


def test_every_file_with_a_record_is_a_family_under_its_own_name():
    files = sorted(path.stem for path in FOLDER.rglob("*.py") if "FAMILY = Family(" in path.read_text())
    assert [family.name for family in families()] == files
    assert len(files) >= 4


def test_every_family_has_a_model_of_transformers_that_tests_compare_with():
    assert sorted(TRANSFORMERS_MODELS) == sorted(family.name for family in families())


def test_a_file_more_is_a_family_more(tmp_path, monkeypatch):
    (tmp_path / "another.py").write_text(
        "import dataclasses\nfrom export.families import mixtral\n"
        "FAMILY = dataclasses.replace(mixtral.FAMILY, name='another', matches=lambda raw: 'another' in raw)\n"
    )
    (tmp_path / "no_family.py").write_text("")
    before = [family.name for family in families()]
    monkeypatch.setattr(registry, "__path__", [*registry.__path__, str(tmp_path)])
    families.cache_clear()
    try:
        assert [family.name for family in families()] == sorted([*before, "another"])
        assert registry.detect({"another": 1}, "here").name == "another"
    finally:
        families.cache_clear()
        sys.modules.pop("export.families.another", None)


def test_a_family_that_is_not_there_is_named_beside_those_that_are():
    with pytest.raises(
        ConfigError,
        match=r"looking for the family 'mamba': there are .*olmoe, phi, .*phixtral, qwen2, qwen2_moe, qwen3, qwen3_moe",
    ):
        family_named("mamba")


def test_families_differ_in_the_configs_that_they_match():
    names = [
        registry.detect(config, "here").name
        for config in (
            {"model_type": "phi"}, {"model_type": "phi-msft"}, {"model_type": "phi-msft", "num_local_experts": 4},
            {"model_type": "mixtral"}, {"model_type": "granitemoe"}, {"model_type": "olmoe"}, {"model_type": "gpt_oss"},
            {"model_type": "qwen3_moe"}, {"model_type": "qwen2_moe"}, {"model_type": "phimoe"},
            {"model_type": "mistral"}, {"model_type": "llama"}, {"model_type": "flex_olmo"}, {"model_type": "qwen2"},
            {"model_type": "qwen3"},
        )
    ]  # fmt: skip
    assert names == [
        "phi",
        "phi",
        "phixtral",
        "mixtral",
        "granitemoe",
        "olmoe",
        "gpt_oss",
        "qwen3_moe",
        "qwen2_moe",
        "phimoe",
        "mistral",
        "llama",
        "flex_olmo",
        "qwen2",
        "qwen3",
    ]


def _named_families(path):
    """What of a module names a family: an import of its file, its name or its class as a text."""
    records = [record.model for record in TRANSFORMERS_MODELS.values()]
    names = {family.name for family in families()} | {"phi-msft", *records}
    names |= {family.trtllm.architecture for family in families() if family.trtllm}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            within = {module.rpartition("export.families.")[2] for module in modules if "export.families." in module}
            stems = {stem.removeprefix("dense.") for stem in within}
            yield from stems & ({family.name for family in families()} | {"shared.phi_stack", "shared.llama_stack"})
        elif isinstance(node, ast.Constant) and node.value in names:
            yield node.value


def test_no_module_names_a_family_but_the_familys_own():
    wrong = {}
    for package in ("export", "trt_build", "triton_repo", "clients", "cli"):
        for path in sorted((ROOT / package).rglob("*.py")):
            where = path.relative_to(ROOT).as_posix()
            own = FOLDER in path.parents or path.stem in {family.name for family in families()}
            if not own and not where.startswith(OF_MERGES) and (found := set(_named_families(path))):
                wrong[where] = found
    # The demo's own model bears a family's name. A GGUF file says its architecture in llama.cpp's words, so its reader
    # writes the model_type and the class that transformers has for them, and its tokenizers have names of their own.
    assert set(wrong) == {"cli/demo.py", "export/formats/gguf_model.py", "export/tokenizer/from_gguf.py"}
    assert wrong["cli/demo.py"] == {"phixtral"}


def test_finding_the_families_imports_nothing_heavy():
    code = "import sys; from export.families import families; families(); print(*sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "onnx", "onnxruntime", "tokenizers"} & set(found)


def test_a_family_without_a_network_of_tensorrt_llms_is_refused_by_name():
    alone = dataclasses.replace(family_named("mixtral"), name="alone", trtllm=None)
    with pytest.raises(ExportError, match="builds TensorRT-LLM engines of .*, not of alone; build"):
        alone.trtllm_network()


FACTS = {
    "family": "mixtral", "hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_size": 16,
    "ffn_size": 32, "vocab_size": 300, "num_experts": 4, "experts_per_token": 2, "rotary_dim": 16, "rope_base": 1e4,
    "norm_epsilon": 1e-5, "max_positions": 64, "source_dtype": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"scales": Scales(logits=3.0)}, r"scales is Scales\(.*logits=3.0.*, which TensorRT-LLM's MixtralForCausalLM"),
        ({"router": Router(normalise=False)}, r"router is Router\(.*, which TensorRT-LLM's Mixtral"),
        ({"qkv": QueryKeyValue(norm="width")}, r"qkv is QueryKeyValue\(.*, which TensorRT-LLM's Mixtral"),
        ({"dense_layers": (1,)}, r"dense_layers is \(1,\), which TensorRT-LLM's Mixtral"),
    ],
)
def test_facts_that_tensorrt_llms_network_does_not_compute_are_problems(more, problem):
    network = family_named("mixtral").trtllm_network()
    assert network.problems(Architecture(**FACTS)) == []
    [found] = network.problems(Architecture(**FACTS, **more))
    assert re.search(problem, found)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Router(score="argmax"), "score is 'argmax', expected softmax or sigmoid"),
        (lambda: QueryKeyValue(norm="depth"), "norm is 'depth', expected width"),
        (lambda: QueryKeyValue(clip=-1.0), "clip is -1.0, expected a positive number"),
        (lambda: Router(scale=0.0), "scale is 0.0, expected a positive number"),
        (lambda: Router(groups=0), "groups is 0, which no router has"),
        (lambda: Scales(attention=float("inf")), "attention is inf, expected a positive number"),
        (lambda: Scales(residual=-1.0), "residual is -1.0, expected a positive number"),
        (lambda: Architecture(**FACTS, dense_layers=(3,)), r"dense_layers is \(3,\), expected layers below 3"),
    ],
)
def test_facts_that_no_model_has_are_refused(make, problem):
    with pytest.raises(ValueError, match=problem):
        make()
