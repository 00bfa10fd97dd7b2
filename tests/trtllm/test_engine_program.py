"""The stand-in's trtllm-build and its runtime: our class file, rank files in, an engine directory, answers out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_reference import load_reference
from trtllm.library import ROOT
from trtllm.ranks import Ranks, largest_difference, understood
from trtllm.references import logits_of

from export.trtllm.parallel import Parallelism

CLASS_FILE = ROOT / "trt_build/trtllm/phixtral.py"
CLASS_FLAGS = ["--model_cls_file", str(CLASS_FILE), "--model_cls_name", "PhixtralForCausalLM"]
PROMPTS = [list(range(3, 40, 3)), [250, 7, 7, 19], list(range(60, 20, -2))]
pytestmark = pytest.mark.usefixtures("tensorrt_llm")


@pytest.fixture
def build(monkeypatch, tmp_path):
    """trtllm-build with these flags, in this process, which is as new to it as another; returns its output folder."""
    from tensorrt_llm.commands.build import main
    from tensorrt_llm.models import MODEL_MAP

    def build(checkpoint: Path, *flags: str, name: str = "engine") -> Path:
        MODEL_MAP.pop("PhixtralForCausalLM", None)
        arguments = ["--checkpoint_dir", str(checkpoint), "--output_dir", str(tmp_path / name)]
        timing = ["--output_timing_cache", str(tmp_path / "model.cache")]
        monkeypatch.setattr(sys, "argv", ["trtllm-build", *arguments, *timing, *flags])
        main()
        return tmp_path / name

    yield build
    MODEL_MAP.pop("PhixtralForCausalLM", None)


@pytest.fixture
def checkpoint(rank_files, packable_phixtral):
    """(CheckpointOptions' fields) -> rank files of the random phixtral."""
    return lambda **options: rank_files(packable_phixtral, **options)


@pytest.fixture
def processes(monkeypatch):
    """(number) -> this process is the first of so many that mpirun started."""

    def processes(number: int, rank: int = 0) -> None:
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", str(number))
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", str(rank))

    return processes


def prompts():
    return [torch.tensor(ids, dtype=torch.int32) for ids in PROMPTS]


def test_the_program_builds_every_rank_with_our_class_file(trtllm_build, tmp_path, checkpoint):
    source = checkpoint(precision="int4", parallel=Parallelism(tp_size=2))
    limits = ["--max_batch_size", "4", "--max_input_len", "64", "--max_seq_len", "96"]
    command = ["trtllm-build", "--checkpoint_dir", source, "--output_dir", "engine", *CLASS_FLAGS, *limits]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    config = json.loads((tmp_path / "engine/config.json").read_text())
    assert sorted(config) == ["build_config", "pretrained_config", "version"]
    assert config["version"] == "1.2.0"
    pretrained, build_config = config["pretrained_config"], config["build_config"]
    assert (pretrained["architecture"], pretrained["rotary_pct"]) == ("PhixtralForCausalLM", 0.375)
    assert pretrained["moe"]["top_k"] == 2
    assert (build_config["max_batch_size"], build_config["kv_cache_type"]) == (4, "PAGED")
    plugins = build_config["plugin_config"]
    assert (plugins["moe_plugin"], plugins["gpt_attention_plugin"], plugins["gemm_plugin"]) == (
        "float16",
        "float16",
        None,
    )
    names = {path.name for path in (tmp_path / "engine").iterdir()}
    assert names == {"config.json", "rank0.engine", "rank1.engine"}


def test_the_programs_and_the_package_tell_what_they_stand_for(trtllm_build, monkeypatch, tensorrt_llm):
    monkeypatch.setenv("STANDIN_SM", "103")
    monkeypatch.setenv("STANDIN_GPUS", "2")
    question = ["nvidia-smi", "--query-gpu=index,compute_cap,uuid,name", "--format=csv,noheader"]
    answer = subprocess.run(question, capture_output=True, text=True, check=True).stdout
    assert [line.split(", ")[:2] for line in answer.splitlines()] == [["0", "10.3"], ["1", "10.3"]]
    code = "import importlib.metadata as m; print(m.version('tensorrt_llm'))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == tensorrt_llm.__version__ == "1.2.0"
    ranks = ["mpirun", "--allow-run-as-root", "-n", "2", "sh", "-c", "exit $((OMPI_COMM_WORLD_RANK * 3))"]
    assert subprocess.run(ranks, check=False).returncode == 3


def test_every_key_that_the_runtime_requires_is_in_an_engines_config(build, checkpoint):
    contract = json.loads((Path(__file__).parent / "contract.json").read_text(encoding="utf-8"))
    config = json.loads((build(checkpoint(precision="fp16"), *CLASS_FLAGS) / "config.json").read_text())
    for path in contract["config_json"]["required_for_cpp_runtime"]["keys"]:
        found = config
        for key in path.split("."):
            assert key in found, path
            found = found[key]


def test_an_engines_answers_are_those_of_its_rank_files(build, checkpoint, packable_phixtral, processes):
    from tensorrt_llm.runtime import ModelRunnerCpp

    processes(4)
    source = checkpoint(precision="fp32", parallel=Parallelism(tp_size=4, moe_ep_size=2))
    engine = build(source, *CLASS_FLAGS, "--max_batch_size", "4", "--gather_context_logits")
    runner = ModelRunnerCpp.from_dir(str(engine), max_output_len=10, max_input_len=40)
    results = runner.generate(
        prompts(), max_new_tokens=10, end_id=256, return_dict=True, output_sequence_lengths=True,
        output_generation_logits=True,
    )  # fmt: skip
    assert sorted(results) == ["context_logits", "generation_logits", "output_ids", "sequence_lengths"]
    assert results["output_ids"].shape == (3, 1, 50)
    assert results["generation_logits"].shape == (3, 1, 10, 280)  # 277, filled up to a multiple of four
    reference, ranks = load_reference(understood(packable_phixtral)), Ranks(source)
    for row, ids in enumerate(PROMPTS):
        context = results["context_logits"][row].numpy()[:, :277]
        assert largest_difference(context, logits_of(reference, ids)) <= 1e-4
        tokens, logits = ranks.greedy(ids, 10)
        length = int(results["sequence_lengths"][row, 0])
        answer = results["output_ids"][row, 0].tolist()
        assert answer[:length] == [*ids, *tokens][:length]
        assert set(answer[length:]) <= {256}
        produced = length - len(ids)
        assert np.array_equal(results["generation_logits"][row, 0, :produced, :277].numpy(), logits[:produced])


def test_context_logits_need_a_build_flag_and_generation_logits_none(build, checkpoint):
    from tensorrt_llm.runtime import ModelRunnerCpp

    engine = str(build(checkpoint(precision="fp16"), *CLASS_FLAGS))
    settings = {"max_new_tokens": 2, "end_id": 256, "return_dict": True}
    assert sorted(ModelRunnerCpp.from_dir(engine).generate(prompts(), **settings)) == ["output_ids"]
    gathering = ModelRunnerCpp.from_dir(engine, gather_generation_logits=True)
    assert sorted(gathering.generate(prompts(), **settings)) == ["generation_logits", "output_ids"]


def test_mixtral_is_built_without_a_class_file_and_runs_over_pipeline_ranks(
    build, rank_files, trained_mixtral, processes
):
    from tensorrt_llm.runtime import ModelRunnerCpp

    processes(4)
    source = rank_files(trained_mixtral, precision="fp32", parallel=Parallelism(tp_size=2, pp_size=2))
    runner = ModelRunnerCpp.from_dir(str(build(source)), max_input_len=32, max_output_len=8)
    found = runner.generate([torch.tensor(PROMPTS[0])], max_new_tokens=8, end_id=-1)[0, 0, len(PROMPTS[0]) :][:8]
    assert found.tolist() == Ranks(source).greedy(PROMPTS[0], 8)[0]


def test_a_checkpoint_of_ours_without_the_class_file_is_a_key_error(build, checkpoint):
    with pytest.raises(KeyError, match="PhixtralForCausalLM"):
        build(checkpoint(precision="fp16"))


def test_a_process_that_did_not_register_the_architecture_cannot_read_the_engine(build, checkpoint):
    from tensorrt_llm.models import MODEL_MAP
    from tensorrt_llm.runtime import ModelRunnerCpp

    engine = build(checkpoint(precision="fp16"), *CLASS_FLAGS)
    MODEL_MAP.pop("PhixtralForCausalLM")
    with pytest.raises(KeyError, match="PhixtralForCausalLM"):
        ModelRunnerCpp.from_dir(str(engine))


def test_an_engine_of_two_ranks_wants_two_processes_and_the_second_gives_nothing(build, checkpoint, processes):
    from tensorrt_llm.runtime import ModelRunnerCpp

    engine = str(build(checkpoint(precision="fp16", parallel=Parallelism(tp_size=2)), *CLASS_FLAGS))
    with pytest.raises(RuntimeError, match=r"mpiSize == tp \* pp \* cp \(1 vs\. 2\)"):
        ModelRunnerCpp.from_dir(engine)
    processes(2, rank=1)
    assert ModelRunnerCpp.from_dir(engine, rank=1).generate(prompts(), max_new_tokens=2, end_id=256) == []


@pytest.mark.parametrize("sm", ["100", "103"])
@pytest.mark.parametrize("precision", ["int8", "int4", "int4_gptq"])
def test_blackwell_refuses_integer_weights(monkeypatch, build, checkpoint, precision, sm):
    source = checkpoint(precision=precision)
    monkeypatch.setenv("STANDIN_SM", sm)
    with pytest.raises(RuntimeError, match=r"INT8/INT4 quantization is not supported on SM>=100\."):
        build(source, *CLASS_FLAGS)
    build(checkpoint(precision="fp16"), *CLASS_FLAGS)


def test_integer_weights_without_the_moe_plugin_are_refused(build, checkpoint):
    with pytest.raises(ValueError, match="OOTB MOE does not support weight only quantization now"):
        build(checkpoint(precision="int4"), *CLASS_FLAGS, "--moe_plugin", "disable")


def test_no_visible_gpu_leaves_no_worker(monkeypatch, build, checkpoint):
    source = checkpoint(precision="fp16")
    monkeypatch.setenv("STANDIN_GPUS", "0")
    with pytest.raises(ValueError, match="max_workers must be greater than 0"):
        build(source, *CLASS_FLAGS)


def test_workers_that_do_not_know_the_class_fail(trtllm_build, monkeypatch, tmp_path, checkpoint):
    source = checkpoint(precision="fp16")  # of one rank, for which one of the workers is started
    command = ["trtllm-build", "--checkpoint_dir", source, "--output_dir", tmp_path / "engine", *CLASS_FLAGS,
               "--workers", "2"]  # fmt: skip
    monkeypatch.setenv("STANDIN_GPUS", "2")
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode != 0
    assert "No module named 'models'" in failed.stderr
    assert not list(tmp_path.glob("engine/rank*"))


def test_an_unknown_flag_is_refused(build, checkpoint, capsys):
    with pytest.raises(SystemExit):
        build(checkpoint(precision="fp16"), *CLASS_FLAGS, "--use_weight_only")
    assert "unrecognized arguments: --use_weight_only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limits", "batch", "told"),
    [
        ({"max_batch_size": 2}, PROMPTS, r"Input batch size \(3\) exceeds the engine or specified limit \(2\)"),
        ({"max_input_len": 12}, PROMPTS, r"Maximum input length \(20\) exceeds the engine or specified limit \(12\)"),
        ({}, [list(range(95))], r"maximum new tokens \(97\) exceeds the engine or specified limit \(96\)"),
    ],
)
def test_requests_beyond_the_engines_limits_are_refused(build, checkpoint, limits, batch, told):
    from tensorrt_llm.runtime import ModelRunnerCpp

    runner = ModelRunnerCpp.from_dir(str(build(checkpoint(precision="fp16"), *CLASS_FLAGS)), **limits)
    with pytest.raises(RuntimeError, match=told):
        runner.generate([torch.tensor(ids) for ids in batch], max_new_tokens=2, end_id=256)
