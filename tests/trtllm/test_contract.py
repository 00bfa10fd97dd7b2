"""The stand-in against the library's facts, and our network against both: names, parameters, defaults, attributes.

contract.json holds the facts with their upstream sources. A stand-in that drifted from them would prove nothing.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
NETWORK_FILE = FOLDER.parent.parent / "trt_build/trtllm/phixtral.py"
CONTRACT = json.loads((FOLDER / "contract.json").read_text(encoding="utf-8"))
CONSTRUCTORS = CONTRACT["constructors"]
pytestmark = pytest.mark.usefixtures("tensorrt_llm")


def module_of(source: str):
    """The stand-in's module of an upstream file."""
    name = source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return importlib.import_module("tensorrt_llm.plugin" if name.startswith("tensorrt_llm.plugin") else name)


def named(name: str, source: str) -> Any:
    value = module_of(source)
    for part in name.split("."):
        value = getattr(value, part)
    return value


def expected_parameters(entry: dict[str, Any], namespace: dict[str, Any]) -> list[tuple[str, Any, bool]]:
    """(name, default or Parameter.empty, whether it may be given by position)."""
    after = entry.get("keyword_only_after")
    by_position, found = not entry["keyword_only"], []
    for name, *default in entry["params"]:
        value = default[0] if default else inspect.Parameter.empty
        if isinstance(value, dict):
            value = eval(value["expr"], namespace)
        found.append((name, value, by_position))
        by_position = by_position and name != after
    return found


def found_parameters(function: Any) -> list[tuple[str, Any, bool]]:
    kinds = inspect.Parameter
    found = []
    signature = inspect.signature(function.__init__ if inspect.isclass(function) else function)
    for parameter in signature.parameters.values():
        default = parameter.default
        if default is not kinds.empty and type(default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
            default = function.__dataclass_fields__[parameter.name].default_factory()
        if parameter.kind is not kinds.VAR_KEYWORD and parameter.name != "self":
            found.append((parameter.name, default, parameter.kind is kinds.POSITIONAL_OR_KEYWORD))
    return found


def namespace_of(entry: dict[str, Any]) -> dict[str, Any]:
    from tensorrt_llm.functional import AttentionMaskType, LayerNormType, PositionEmbeddingType
    from tensorrt_llm.mapping import Mapping
    from tensorrt_llm.quantization import QuantMode

    return {**vars(module_of(entry["source"])), "AttentionMaskType": AttentionMaskType, "QuantMode": QuantMode,
            "LayerNormType": LayerNormType, "PositionEmbeddingType": PositionEmbeddingType,
            "Mapping": Mapping}  # fmt: skip


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_a_constructor_has_exactly_the_librarys_parameters_and_defaults(name):
    entry = CONSTRUCTORS[name]
    assert found_parameters(named(name, entry["source"])) == expected_parameters(entry, namespace_of(entry))


def test_a_changed_default_is_noticed():
    from tensorrt_llm.layers import MOE

    entry = CONSTRUCTORS["MixtureOfExperts"]
    changed = {**entry, "params": [["bias", False] if row[0] == "bias" else row for row in entry["params"]]}
    assert found_parameters(MOE) == expected_parameters(entry, namespace_of(entry))
    assert found_parameters(MOE) != expected_parameters(changed, namespace_of(entry))


def test_a_parameter_given_by_position_where_the_library_wants_keywords_is_noticed():
    from tensorrt_llm.layers import Attention

    entry = CONSTRUCTORS["Attention"]
    loose = {**entry, "keyword_only": False}
    assert found_parameters(Attention) != expected_parameters(loose, namespace_of(entry))


def test_bases_are_the_librarys():
    for name, entry in CONSTRUCTORS.items():
        if entry.get("base") and entry["base"] not in ("ModelRunnerMixin", "LinearBase"):
            assert entry["base"] in [base.__name__ for base in named(name, entry["source"]).__mro__], name


@pytest.mark.parametrize(
    ("what", "names", "skipped"),
    [
        ("model.forward", "DecoderModelForCausalLM", ()),
        ("MOE.forward", "MOE", ()),
        ("Attention.forward", "Attention", ()),
        ("ModelRunnerCpp.generate", "ModelRunnerCpp", ("kwargs",)),
    ],
)
def test_forward_functions_take_the_librarys_arguments(what, names, skipped):
    entry = CONTRACT["forward_contracts"][what]
    function = getattr(named(names, entry["source"]), what.rpartition(".")[2])
    found = [name for name in inspect.signature(function).parameters if name not in ("self", *skipped)]
    assert found == entry["args"]


def test_every_name_lives_where_the_library_has_it():
    for name, source in CONTRACT["names"].items():
        assert hasattr(module_of(source), name), (name, source)


def test_trtllm_build_takes_the_librarys_flags_with_their_defaults():
    from tensorrt_llm.commands.build import parse_arguments
    from tensorrt_llm.plugin import flag_defaults

    table = {flag.removeprefix("--"): default for flag, default in CONTRACT["trtllm_build"]["flags"].items()}
    table["kv_cache_type"] = None  # suppressed: paged where it is not given
    plugins = {name: value for name, value in CONTRACT["trtllm_build"]["plugin_flags"].items() if name != "source"}
    plugins["paged_state"] = "enable"
    parser = parse_arguments()
    found = {action.dest: action.default for action in parser._actions if action.dest != "help"}
    found["kv_cache_type"] = None
    assert flag_defaults() == plugins
    assert found == table | plugins
    for flag in CONTRACT["trtllm_build"]["absent"]:
        with pytest.raises(SystemExit):
            parser.parse_args([flag, "1"])


def test_activations_are_the_plugins():
    from tensorrt_llm.functional import MOE_ACTIVATIONS

    assert set(MOE_ACTIVATIONS) <= set(CONTRACT["activation_names"]["accepted_by_moe"])
    assert not set(MOE_ACTIVATIONS) & set(CONTRACT["activation_names"]["rejected_by_key_error"])


def test_the_standin_is_gone_when_its_tests_are(tensorrt_llm):
    from trtllm.library import standin

    assert tensorrt_llm.__version__ == "1.2.0"
    with standin() as other:
        assert sys.modules["tensorrt_llm"] is other is not tensorrt_llm
    assert sys.modules["tensorrt_llm"] is tensorrt_llm
    assert "trt_build.trtllm.phixtral" not in sys.modules


# What our network file may name -----------------------------------------------------------------------------------


class Uses(ast.NodeVisitor):
    """What a network file takes from the library: names with their modules, keywords of calls, attributes read."""

    def __init__(self) -> None:
        self.imports: list[tuple[str, str]] = []
        self.keywords: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, str]] = []

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.imports += [(node.module or "", alias.name) for alias in node.names]

    def visit_Import(self, node: ast.Import) -> None:
        self.imports += [(alias.name, "") for alias in node.names]

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        self.keywords += [(name, keyword.arg or "**") for keyword in node.keywords]
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.attributes.append((ast.unparse(node.value), node.attr))
        self.generic_visit(node)


def uses_of(text: str) -> Uses:
    uses = Uses()
    uses.visit(ast.parse(text))
    return uses


def strangers(text: str) -> list[str]:
    """Everything in a network file that the contract does not name."""
    uses, sources = uses_of(text), {**CONTRACT["names"], **{name: row["source"] for name, row in CONSTRUCTORS.items()}}
    own = {"moe", "rotary_pct", "rotary_base", "rotary_scaling"}
    base = {row[0] for row in CONSTRUCTORS["PretrainedConfig"]["params"]}
    config = base | own | set(CONTRACT["attributes"]["PretrainedConfig"]["names"])
    mapping = {row[0] for row in CONSTRUCTORS["Mapping"]["params"]} | set(CONTRACT["attributes"]["Mapping"]["names"])
    calls = {name: {row[0] for row in entry["params"]} for name, entry in CONSTRUCTORS.items()}
    calls["MOE"] = calls["MixtureOfExperts"]
    calls["self.attention"] = set(CONTRACT["forward_contracts"]["Attention.forward"]["args"])
    calls["self.layers"] = set(CONTRACT["forward_contracts"]["transformer.forward"]["always"])
    calls["super().__init__"] = {"rotary_pct", "**"}
    found = []
    for module, name in uses.imports:
        expected = sources.get(name, "").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if module not in ("__future__", "typing", "collections.abc") and module != expected:
            found.append(f"import of {name} from {module}")
    for name, keyword in uses.keywords:
        if keyword not in calls.get(name, set()):
            found.append(f"keyword {keyword} of {name}")
    allowed = {"config": config, "mapping": mapping, "config.mapping": mapping}
    found += [
        f"attribute {owner}.{name}"
        for owner, name in uses.attributes
        if owner in allowed and name not in allowed[owner]
    ]
    return found


@pytest.mark.parametrize(("network", "keywords"), [("phixtral", 50), ("qwen3_moe", 0)])
def test_a_network_names_nothing_outside_the_contract(network, keywords):
    text = NETWORK_FILE.with_name(f"{network}.py").read_text(encoding="utf-8")
    assert strangers(text) == []
    assert len(uses_of(text).keywords) >= keywords
    assert uses_of(text).imports


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("bias=True,\n            dense_bias", "biases=True,\n            dense_bias", "keyword biases of Attention"),
        ("config.rotary_pct", "config.partial_rotary_factor", "attribute config.partial_rotary_factor"),
        ("mapping.tp_rank", "mapping.tensor_rank", "attribute mapping.tensor_rank"),
        ("layers.moe import MOE", "layers import MOE", "import of MOE from tensorrt_llm.layers"),
        ("norm_before_bmm1", "norm_before_bmm2", "keyword norm_before_bmm2 of self.attention"),
        ("from typing import Any", "from typing import Any\nimport numpy", "import of  from numpy"),
    ],
)
def test_a_stranger_in_the_network_is_noticed(old, new, told):
    text = NETWORK_FILE.read_text(encoding="utf-8")
    assert old in text
    assert told in strangers(text.replace(old, new))


def test_the_network_calls_nothing_by_position_that_the_library_wants_by_keyword():
    calls = [node for node in ast.walk(ast.parse(NETWORK_FILE.read_text())) if isinstance(node, ast.Call)]
    by_position = {ast.unparse(call.func): len(call.args) for call in calls if call.args}
    assert not set(by_position) & {name for name, row in CONSTRUCTORS.items() if row["keyword_only"]}
    assert "Attention" in {ast.unparse(call.func) for call in calls}
