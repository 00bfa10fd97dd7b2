"""What transformers' save_pretrained writes, for tokenizers and models: every file is in the table and ends where the
table says, in an engine, a merged checkpoint, TensorRT-LLM's checkpoint, an LLM API's package and a download."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_standin import COMMIT, hub_of
from merging import run
from mixtral_checkpoints import write_llama_tokenizer, write_mixtral_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    CodeGenTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

from export.checkpoint.file_table import DOWNLOAD_PATTERNS, FILE_RULES, Fate, rule_of
from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.tokenizer.loading import load_tokenizer
from export.trtllm.checkpoint import CheckpointOptions, write_checkpoint
from triton_repo.packaging.llmapi_package import LlmApiOptions, package_llmapi
from triton_repo.packaging.package import PackageOptions, package_engine
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine

ONE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SEVERAL = {"default": ONE, "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
TEMPLATES = {"none": None, "one": ONE, "several": SEVERAL}
END_OF_TEXT = "<|endoftext|>"
PROMPTS = ("def main():", "<|endoftext|>x <|im_start|>user", " naïve </s>")


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def byte_level(tokenizer_class, template, *, bos=END_OF_TEXT):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(["def main() -> None: hello the quick brown fox jumps over "] * 3, trainer)
    content = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in content["merges"]]
    tokenizer = tokenizer_class(vocab=content["vocab"], merges=merges, bos_token=bos)
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def llama(folder: Path, tokenizer_class, template):
    backend = write_llama_tokenizer(folder)
    content = json.loads(backend.to_str())["model"]
    if tokenizer_class is LlamaTokenizer:
        merges = [tuple(merge) for merge in content["merges"]]
        tokenizer = LlamaTokenizer(vocab=content["vocab"], merges=merges)
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def phi(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = PhiConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, partial_rotary_factor=0.5, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = PhiForCausalLM(config)
    model.generation_config.eos_token_id = [0, 299]
    model.save_pretrained(folder, max_shard_size="100KB")


def mixtral(folder: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module", params=[*TEMPLATES, "inside settings"])
def saved_phi(request, tmp_path_factory) -> Path:
    """A Phi and a CodeGen tokenizer as save_pretrained writes them, with chat templates of every kind."""
    folder = tmp_path_factory.mktemp("phi") / "e0"
    phi(folder, 0)
    template = TEMPLATES.get(request.param, SEVERAL)
    tokenizer = byte_level(CodeGenTokenizer, template)
    tokenizer.save_pretrained(folder, save_jinja_files=request.param != "inside settings")
    (folder / "modeling_phi.py").write_text("raise SystemExit('code of a checkpoint was run')")
    return folder


def expect_taken(source: Path, made: Path) -> None:
    """Every file that the table takes is there with its bytes, every refused one is not."""
    for name in names_in(source):
        rule = rule_of(name)
        assert rule is not None, name
        if rule.fate is Fate.TAKEN:
            assert (made / name).read_bytes() == (source / name).read_bytes(), name
        elif rule.fate is Fate.REFUSED:
            assert not (made / name).exists(), name
    theirs, ours = AutoTokenizer.from_pretrained(source), load_tokenizer(made)
    for prompt in PROMPTS:
        assert ours.backend.encode(prompt).ids == theirs(prompt)["input_ids"]


def templates_of(source: Path):
    template = AutoTokenizer.from_pretrained(source).chat_template
    return {} if template is None else {"default": template} if isinstance(template, str) else template


def test_every_file_that_is_written_has_a_rule(tmp_path):
    for name, template in TEMPLATES.items():
        for tokenizer_class in (GPT2Tokenizer, CodeGenTokenizer):
            byte_level(tokenizer_class, template).save_pretrained(tmp_path / f"{tokenizer_class.__name__}-{name}")
        for tokenizer_class in (LlamaTokenizer, PreTrainedTokenizerFast):
            folder = tmp_path / f"{tokenizer_class.__name__}-{name}"
            llama(tmp_path / "trained", tokenizer_class, template).save_pretrained(folder)
    phi(tmp_path / "phi", 0)
    mixtral(tmp_path / "mixtral")
    names = {name for folder in tmp_path.iterdir() for name in names_in(folder)}
    expected = {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/rag.jinja",
        "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
    }  # fmt: skip
    assert expected <= names
    assert [name for name in names if rule_of(name) is None or rule_of(name).fate is Fate.REFUSED] == []


def test_an_engine_and_its_package_have_what_was_saved(saved_phi, tmp_path):
    engine = build_engine(BuildOptions(checkpoint=str(saved_phi), output=tmp_path / "engine", precision="fp32"))
    expect_taken(saved_phi, engine.folder)
    facts = engine.manifest.tokenizer
    assert facts.chat_templates == templates_of(saved_phi)
    assert engine.manifest.eos_token_ids == engine.manifest.architecture.eos_token_ids == (0, 299)
    assert facts.special_tokens == AutoTokenizer.from_pretrained(saved_phi).special_tokens_map
    for layout in ("single", "ensemble"):
        options = PackageOptions(engine=engine.folder, name="phi", output=tmp_path / layout, layout=layout)
        package_engine(options)
    served = tmp_path / "single" / "phi" / "1" / "engine"
    assert names_in(served) == names_in(engine.folder)
    assert open_engine(served).manifest == engine.manifest
    expect_taken(saved_phi, tmp_path / "ensemble" / "tensorrt_llm" / "1" / "engine")
    for step in ("preprocessing", "postprocessing"):
        expect_taken(saved_phi, tmp_path / "ensemble" / step / "1" / "tokenizer")


def test_a_merged_checkpoint_has_the_bases_settings_and_is_tokenised_alike(saved_phi, tmp_path):
    phi(tmp_path / "e1", 1)
    byte_level(GPT2Tokenizer, "another").save_pretrained(tmp_path / "e1")
    experts = [{"source_model": name, "positive_prompts": [name]} for name in (str(saved_phi), "./e1")]
    values = {"base_model": str(saved_phi), "gate_mode": "cheap_embed", "experts": experts}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(values))
    merged = run(tmp_path / "merge.yml").folder
    expect_taken(saved_phi, merged)
    config = json.loads((merged / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == ([0, 299], 0)
    assert templates_of(merged) == templates_of(saved_phi)
    theirs, again = AutoTokenizer.from_pretrained(saved_phi), AutoTokenizer.from_pretrained(merged)
    assert theirs.special_tokens_map == again.special_tokens_map
    for prompt in PROMPTS:
        assert again(prompt)["input_ids"] == theirs(prompt)["input_ids"]


def test_tensorrt_llms_checkpoint_has_what_was_saved(saved_phi, tmp_path):
    model = read_model(open_checkpoint(saved_phi))
    write_checkpoint(model, CheckpointOptions(precision="fp16"), tmp_path / "ranks")
    expect_taken(saved_phi, tmp_path / "ranks")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_package_for_the_llm_api_has_what_was_saved(tmp_path, template):
    sizes = {"num_heads": 6, "num_kv_heads": 2, "num_experts": 4, "max_positions": 640}
    source = write_mixtral_checkpoint(tmp_path / "mixtral", seed=5, **sizes)
    llama(tmp_path / "trained", PreTrainedTokenizerFast, TEMPLATES[template]).save_pretrained(source)
    options = LlmApiOptions(checkpoint=str(source), name="mixtral", output=tmp_path / "repository")
    made = package_llmapi(options).folder / "1" / "checkpoint"
    expect_taken(source, made)
    assert {name for name in names_in(source) if rule_of(name).fate is not Fate.REFUSED} == names_in(made)


def test_a_mixtral_that_transformers_saved_becomes_an_engine(tmp_path):
    mixtral(tmp_path / "mixtral")
    llama(tmp_path / "trained", LlamaTokenizer, SEVERAL).save_pretrained(tmp_path / "mixtral")
    options = BuildOptions(checkpoint=str(tmp_path / "mixtral"), output=tmp_path / "engine", precision="fp32")
    engine = build_engine(options)
    expect_taken(tmp_path / "mixtral", engine.folder)
    assert engine.manifest.tokenizer.chat_templates == SEVERAL


def test_a_download_fetches_what_the_table_takes_or_derives_and_nothing_else(saved_phi, tmp_path):
    for name in ("pytorch_model.bin", "consolidated.00.safetensors", "original.pth", "tekken.json"):
        (saved_phi / name).write_bytes(b"not asked for")
    try:
        with hub_of({"owner/model": saved_phi}) as hub:
            script = (
                "import sys; from export.checkpoint.folder import open_checkpoint; c = open_checkpoint('owner/model'); "
            )
            words = [sys.executable, "-c", script + "print(c.folder, c.revision)"]
            environment = {**os.environ, **hub.environment(tmp_path / "home")}
            result = subprocess.run(
                words, env=environment, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False
            )
    finally:
        for name in ("pytorch_model.bin", "consolidated.00.safetensors", "original.pth", "tekken.json"):
            (saved_phi / name).unlink()
    assert result.returncode == 0, result.stderr
    folder, revision = result.stdout.split()
    expected = {name for name in names_in(saved_phi) if rule_of(name).fate is not Fate.REFUSED}
    assert (set(hub.downloads), revision) == (expected, COMMIT)
    assert names_in(Path(folder)) == expected


def test_the_patterns_of_a_download_are_the_tables(tmp_path):
    assert {rule.pattern for rule in FILE_RULES if rule.fate is not Fate.REFUSED} == set(DOWNLOAD_PATTERNS)
    for name in ("modeling_phi.py", "pytorch_model.bin", "model.pt", "tokenizer.pkl", "custom_generate/generate.py"):
        assert rule_of(name).fate is Fate.REFUSED


def test_a_build_that_is_interrupted_after_the_settings_is_resumed(saved_phi, tmp_path, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    options = BuildOptions(checkpoint=str(saved_phi), output=tmp_path / "engine", precision="fp32")
    with monkeypatch.context() as patch:
        patch.setattr("trt_build.ort.build.write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            build_engine(options)
    expect_taken(saved_phi, build_engine(options).folder)
    untouched = build_engine(BuildOptions(checkpoint=str(saved_phi), output=tmp_path / "other", precision="fp32"))
    assert names_in(tmp_path / "engine") == names_in(untouched.folder)
    assert (tmp_path / "engine" / "engine.json").read_bytes() == (untouched.folder / "engine.json").read_bytes()
