"""Packaging an ensemble: upstream's configuration read back, what lies where, and what is refused with nothing left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from cli.main import main
from export.errors import OutputError
from triton_repo.contracts.ensemble import STEP_MODELS
from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.contracts.seal import is_sealed
from triton_repo.contracts.trtllm_parameters import TensorrtLlmParameters
from triton_repo.contracts.wire import ADDED_OUTPUTS, COMPATIBILITY_INPUTS, INPUTS, OUTPUTS
from triton_repo.errors import RepositoryError
from triton_repo.packaging.model_config import read_config
from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.serving.repository_check import check_repository
from trt_build.errors import EngineError
from trt_build.ort.engine import open_engine

UPSTREAM = json.loads((Path(__file__).parents[1] / "tensorrt_llm_model.json").read_text(encoding="utf-8"))
NAMES = ("phixtral", "postprocessing", "preprocessing", "tensorrt_llm")
# What upstream's template leaves to whoever fills it in (docs/model_config.md of tensorrtllm_backend).
FILLED = {
    "${logits_datatype}": "TYPE_FP32",
    "${encoder_input_features_data_type}": "TYPE_FP16",
    "${prompt_embedding_table_data_type}": "TYPE_FP16",
}
labels = model_config_pb2.DataType


def package(engine: Path, output: Path, **fields):
    return package_engine(PackageOptions(**{"engine": engine, "name": "phixtral", "output": output, **fields}))


def configs(repository: Path) -> dict[str, model_config_pb2.ModelConfig]:
    return {path.parent.name: read_config(path) for path in repository.glob("*/config.pbtxt")}


def parameters(config) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def tensorrt_llm_repository(tmp_path, trtllm_engine):
    package(trtllm_engine(), tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def onnxruntime_repository(tmp_path, tiny_engine):
    package(tiny_engine, tmp_path / "repository", layout="ensemble", onnxruntime=ModelParameters(slots=2, threads=3))
    return tmp_path / "repository"


def test_an_engine_for_tensorrt_llm_becomes_four_models_without_being_asked(tensorrt_llm_repository):
    assert check_repository(tensorrt_llm_repository) == NAMES
    assert files(tensorrt_llm_repository / "tensorrt_llm") == [
        *(f"1/engine/{name}" for name in ("config.json", "engine.json", "rank0.engine", "rank1.engine")),
        "1/engine/tokenizer.json", "1/engine/tokenizer_config.json", "config.pbtxt",
    ]  # fmt: skip
    for name in ("preprocessing", "postprocessing"):
        assert files(tensorrt_llm_repository / name) == [
            "1/model.py", "1/tokenizer/tokenizer.json", "1/tokenizer/tokenizer_config.json", "config.pbtxt",
        ]  # fmt: skip
    assert files(tensorrt_llm_repository / "phixtral") == ["1/.keep", "config.pbtxt"]


def test_tensorrt_llm_has_upstreams_inputs_and_outputs(tensorrt_llm_repository):
    config = configs(tensorrt_llm_repository)["tensorrt_llm"]
    inputs = [
        [
            item.name, labels.Name(item.data_type), list(item.dims), int(item.optional), int(item.HasField("reshape")),
            int(item.allow_ragged_batch),
        ]
        for item in config.input
    ]  # fmt: skip
    assert inputs == [[name, FILLED.get(kind, kind), *rest] for name, kind, *rest in UPSTREAM["inputs"]]
    assert all(not item.reshape.shape for item in config.input)
    outputs = [[item.name, labels.Name(item.data_type), list(item.dims)] for item in config.output]
    assert outputs == [[name, FILLED.get(kind, kind), dims] for name, kind, dims in UPSTREAM["outputs"]]


def test_tensorrt_llm_says_what_its_backend_reads(tmp_path, trtllm_engine):
    package(
        trtllm_engine(), tmp_path / "repository",
        tensorrt_llm=TensorrtLlmParameters(max_queue_size=16, max_queue_delay_microseconds=7, gpu_device_ids=(0, 1)),
    )  # fmt: skip
    config = configs(tmp_path / "repository")["tensorrt_llm"]
    assert (config.backend, config.max_batch_size) == ("tensorrtllm", 8)
    assert config.model_transaction_policy.decoupled
    [group] = config.instance_group
    assert (group.kind, group.count) == (model_config_pb2.ModelInstanceGroup.KIND_CPU, 1)
    batching = config.dynamic_batching
    assert (list(batching.preferred_batch_size), batching.max_queue_delay_microseconds) == ([8], 7)
    assert batching.default_queue_policy.max_queue_size == 16
    found = parameters(config)
    assert set(found) <= {*UPSTREAM["parameters"], "moeship_world_size"}
    assert found["gpt_model_path"] == str(tmp_path / "repository" / "tensorrt_llm" / "1" / "engine")
    assert found["moeship_world_size"] == "2"
    assert found["kv_cache_free_gpu_mem_fraction"] == "0.85"
    assert found["gpu_device_ids"] == "0,1"


def test_guided_decoding_of_tensorrt_llm_gets_the_tokenizer_and_the_end_tokens(tmp_path, trtllm_engine):
    package(
        trtllm_engine(), tmp_path / "repository",
        tensorrt_llm=TensorrtLlmParameters(guided_decoding_backend="xgrammar"),
    )  # fmt: skip
    version = tmp_path / "repository" / "tensorrt_llm" / "1"
    found = parameters(configs(tmp_path / "repository")["tensorrt_llm"])
    assert found["guided_decoding_backend"] == "xgrammar"
    assert found["xgrammar_tokenizer_info_path"] == str(version / "xgrammar_tokenizer_info.json")
    info = json.loads((version / "xgrammar_tokenizer_info.json").read_text(encoding="utf-8"))
    backend = tokenizers.Tokenizer.from_str(info["tokenizer_str"])
    vocabulary = backend.get_vocab()
    assert info["encoded_vocab"] == sorted(vocabulary, key=vocabulary.get)
    assert info["stop_token_ids"] == [0, 7]
    assert parameters(configs(tmp_path / "repository")["preprocessing"])["moeship_guided"] == "1"
    assert check_repository(tmp_path / "repository") == NAMES


def test_no_configuration_holds_a_placeholder_and_each_parses_back_to_itself(tensorrt_llm_repository):
    for path in tensorrt_llm_repository.glob("*/config.pbtxt"):
        text = path.read_text(encoding="utf-8")
        assert "$" not in text
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
        assert text_format.MessageToString(config, use_short_repeated_primitives=True) == text


def test_empty_parameters_stay_since_the_backend_reads_them_without_a_default(tensorrt_llm_repository):
    text = (tensorrt_llm_repository / "tensorrt_llm" / "config.pbtxt").read_text(encoding="utf-8")
    for key in ("tokenizer_dir", "guided_decoding_backend", "xgrammar_tokenizer_info_path"):
        assert f'key: "{key}"\n  value {{\n    string_value: ""\n' in text or f'key: "{key}"\n  value {{\n  }}' in text


def test_the_texts_side_knows_the_models_limits(tensorrt_llm_repository, tiny_engine):
    size = open_engine(tiny_engine).manifest.tokenizer_size
    for name in ("preprocessing", "postprocessing"):
        assert parameters(configs(tensorrt_llm_repository)[name]) == {
            "tokenizer_dir": "tokenizer", "moeship_max_sequence": "640", "moeship_max_prompt": "512",
            "moeship_end_ids": "0,7", "moeship_num_ids": str(size), "moeship_one_end_id": "1",
            "moeship_echoes_keys": "0", "moeship_guided": "0",
        }  # fmt: skip


def test_a_prompt_may_be_longer_where_it_is_read_in_parts(tmp_path, trtllm_engine):
    package(trtllm_engine(), tmp_path / "repository", tensorrt_llm=TensorrtLlmParameters(enable_chunked_context=True))
    assert parameters(configs(tmp_path / "repository")["preprocessing"])["moeship_max_prompt"] == "639"


def test_ids_that_the_head_does_not_mask_are_told_to_preprocessing(tmp_path, trtllm_engine, tiny_engine):
    package(trtllm_engine(head_masks_unused_ids=False), tmp_path / "repository")
    found = parameters(configs(tmp_path / "repository")["preprocessing"])["moeship_num_ids"]
    assert found == str(open_engine(tiny_engine).manifest.architecture.vocab_size)


@pytest.mark.parametrize("kind", ["tensorrt_llm_repository", "onnxruntime_repository"])
def test_the_ensemble_has_the_wires_tensors_and_fits_its_steps(request, kind):
    found = configs(request.getfixturevalue(kind))
    ensemble = found["phixtral"]
    assert (ensemble.platform, ensemble.backend) == ("ensemble", "")
    inputs = [(item.name, labels.Name(item.data_type), tuple(item.dims), item.optional) for item in ensemble.input]
    assert inputs == [(t.name, f"TYPE_{t.dtype}", t.dims, t.optional) for t in (*INPUTS, *COMPATIBILITY_INPUTS)]
    outputs = [(item.name, labels.Name(item.data_type), tuple(item.dims)) for item in ensemble.output]
    assert outputs == [(t.name, f"TYPE_{t.dtype}", t.dims) for t in (*OUTPUTS, *ADDED_OUTPUTS)]
    steps = ensemble.ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["preprocessing", "postprocessing", "tensorrt_llm", "postprocessing"]
    # The ensemble's tensors have one type each, whichever step gives or takes them.
    types = {item.name: item.data_type for item in (*ensemble.input, *ensemble.output)}
    for step in steps:
        model = found[step.model_name]
        assert model.max_batch_size == ensemble.max_batch_size
        ends = {item.name: item.data_type for item in (*model.input, *model.output)}
        for name, tensor in (*step.input_map.items(), *step.output_map.items()):
            assert types.setdefault(tensor, ends[name]) == ends[name]
        required = {item.name for item in model.input if not item.optional}
        assert required <= set(step.input_map)


def test_one_instance_holds_all_answers_under_way(tensorrt_llm_repository):
    found = configs(tensorrt_llm_repository)
    [group] = found["postprocessing"].instance_group
    assert (group.kind, group.count) == (model_config_pb2.ModelInstanceGroup.KIND_CPU, 1)
    assert found["postprocessing"].model_transaction_policy.decoupled
    # A scheduler with a queue of its own drops cancelled requests, which must be seen to stop the engine.
    assert not found["postprocessing"].HasField("dynamic_batching")
    assert not found["preprocessing"].model_transaction_policy.decoupled


OWN_INPUTS = {"answer_key", "min_p", "num_log_probs", "return_prompt_log_probs", "return_routed_experts"}


def test_with_onnxruntime_the_engine_lies_behind_the_same_tensors(onnxruntime_repository, tiny_engine):
    assert check_repository(onnxruntime_repository) == NAMES
    config = configs(onnxruntime_repository)["tensorrt_llm"]
    assert (config.backend, config.max_batch_size) == ("python", 1)
    assert parameters(config) == ModelParameters(slots=2, threads=3).to_texts()
    upstream = {
        name: [FILLED.get(kind, kind), dims, optional, reshape, ragged]
        for name, kind, dims, optional, reshape, ragged in UPSTREAM["inputs"]
    }
    assert {item.name for item in config.input} - set(upstream) == OWN_INPUTS
    for item in config.input:
        if item.name in OWN_INPUTS:
            continue
        assert upstream[item.name] == [
            labels.Name(item.data_type), list(item.dims), int(item.optional), int(item.HasField("reshape")),
            int(item.allow_ragged_batch),
        ]  # fmt: skip
    engine = onnxruntime_repository / "tensorrt_llm" / "1" / "engine"
    assert (engine / "model.onnx.data").samefile(tiny_engine / "model.onnx.data")
    assert is_sealed(engine)


def test_an_engine_for_cuda_is_run_on_the_first_gpu(tmp_path, tiny_engines):
    package(tiny_engines("int4", "cuda"), tmp_path / "repository", layout="ensemble")
    [group] = configs(tmp_path / "repository")["tensorrt_llm"].instance_group
    assert (group.kind, list(group.gpus)) == (model_config_pb2.ModelInstanceGroup.KIND_GPU, [0])


def test_a_repository_may_be_made_for_another_place(tmp_path, trtllm_engine):
    package(trtllm_engine(), tmp_path / "repository", served_from=Path("/models"))
    found = parameters(configs(tmp_path / "repository")["tensorrt_llm"])["gpt_model_path"]
    assert found == "/models/tensorrt_llm/1/engine"
    with pytest.raises(
        RepositoryError, match="no engine at /models/tensorrt_llm/1/engine, which its config.pbtxt names"
    ):
        check_repository(tmp_path / "repository")


def test_an_ensemble_joins_other_models_and_a_second_one_is_refused_with_the_reason(tmp_path, tiny_engine):
    package(tiny_engine, tmp_path / "repository", name="alone")
    package(tiny_engine, tmp_path / "repository", layout="ensemble")
    assert check_repository(tmp_path / "repository") == ("alone", *NAMES)
    before = files(tmp_path / "repository")
    with pytest.raises(OutputError) as caught:
        package(tiny_engine, tmp_path / "repository", name="second", layout="ensemble")
    assert "it has preprocessing, tensorrt_llm, postprocessing already" in str(caught.value)
    assert "so that a repository holds one ensemble: name another output" in str(caught.value)
    assert files(tmp_path / "repository") == before


@pytest.mark.parametrize("name", STEP_MODELS)
def test_the_ensemble_does_not_bear_the_name_of_a_step(tmp_path, tiny_engine, name):
    with pytest.raises(RepositoryError, match=f"the name is {name}, the name of one of the ensemble's steps"):
        package(tiny_engine, tmp_path / "repository", name=name, layout="ensemble")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"layout": "single"},
            "TensorRT-LLM's backend takes tokens, and only an ensemble takes text; leave the layout out",
        ),
        (
            {"onnxruntime": ModelParameters(slots=2, threads=3)},
            "threads, slots: for ONNX Runtime",
        ),
        ({"served_from": Path("models")}, "to be served from models; expected an absolute path"),
        ({"layout": "double"}, "the layout is 'double'; expected one of single, ensemble"),
        ({"tensorrt_llm": TensorrtLlmParameters(max_queue_size=-1)}, "max_queue_size is -1, expected 0 or more"),
    ],
)
def test_options_that_do_not_go_with_tensorrt_llm_are_refused_and_nothing_is_written(
    tmp_path, trtllm_engine, fields, message
):
    with pytest.raises(RepositoryError) as caught:
        package(trtllm_engine(), tmp_path / "repository", **fields)
    assert message in str(caught.value)
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize(
    "fields", [{"served_from": Path("/models")}, {"tensorrt_llm": TensorrtLlmParameters(max_queue_size=4)}]
)
def test_options_of_tensorrt_llm_are_refused_for_onnxruntime(tmp_path, tiny_engine, fields):
    with pytest.raises(RepositoryError, match="this engine is for onnxruntime, and served_from and the"):
        package(tiny_engine, tmp_path / "repository", **fields)


def test_a_damaged_engine_is_refused_and_nothing_is_written(tmp_path, trtllm_engine):
    engine = trtllm_engine()
    (engine / "rank1.engine").write_bytes(b"x" * 10)
    with pytest.raises(EngineError, match="rank1.engine: found SHA-256"):
        package(engine, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_a_failure_at_the_last_model_leaves_none_of_the_others(tmp_path, tiny_engine, monkeypatch):
    package(tiny_engine, tmp_path / "repository", name="alone")
    rename = Path.rename

    def fail_for_the_ensemble(self, target):
        if Path(target).name == "phixtral":
            raise OSError(28, "No space left on device", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_ensemble)
    with pytest.raises(OutputError, match="writing the model phixtral to .*No space left on device"):
        package(tiny_engine, tmp_path / "repository", layout="ensemble")
    assert [path.name for path in (tmp_path / "repository").iterdir()] == ["alone"]


def test_a_step_that_is_missing_and_an_absent_tokenizer_are_told_before_a_server_starts(onnxruntime_repository):
    (onnxruntime_repository / "postprocessing").rename(onnxruntime_repository / ".away")
    (onnxruntime_repository / "preprocessing" / "1" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(RepositoryError) as caught:
        check_repository(onnxruntime_repository)
    assert "phixtral: its step postprocessing is not in the repository" in str(caught.value)
    assert "preprocessing: no tokenizer at" in str(caught.value)


def test_the_command_takes_the_parameters_as_flags(tmp_path, trtllm_engine, capsys):
    words = [
        "package", str(trtllm_engine()), "--name", "m", "--output", str(tmp_path / "repository"), "--json",
        "--kv-cache-free-gpu-mem-fraction", "0.5", "--max-queue-size", "9", "--batching-strategy", "V1",
        "--batch-scheduler-policy", "max_utilization", "--enable-chunked-context", "--no-enable-kv-cache-reuse",
        "--gpu-device-ids", "2,3", "--max-attention-window-size", "128",
    ]  # fmt: skip
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == list(STEP_MODELS)
    config = configs(tmp_path / "repository")["tensorrt_llm"]
    found = parameters(config)
    assert (found["gpt_model_type"], found["batch_scheduler_policy"]) == ("V1", "max_utilization")
    assert (found["enable_chunked_context"], found["enable_kv_cache_reuse"]) == ("true", "false")
    assert (found["kv_cache_free_gpu_mem_fraction"], found["gpu_device_ids"]) == ("0.5", "2,3")
    assert found["max_attention_window_size"] == "128"
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 9


def test_a_flag_that_is_no_list_of_numbers_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["package", "engine", "--name", "m", "--output", "r", "--gpu-device-ids", "0;1"])
    assert "expected whole numbers between commas, found '0;1'" in capsys.readouterr().err
