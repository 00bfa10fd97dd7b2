"""The house rules that a machine can check: what importing costs, and which way the arrows run."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("export", "trt_build", "triton_repo", "clients", "cli")
HEAVY = (
    "torch",
    "transformers",
    "lm_eval",
    "datasets",
    "onnxruntime",
    "tensorrt_llm",
    "onnx",
    "tritonclient",
    "grpc",
    "tokenizers",
    "cryptography",
    "prometheus_client",
    "llguidance",
)
# Read by no one but the function that asks for the reference, and by Triton's stub; a folder stands for its modules.
IMPORTED_BY_NEED = {
    "trt_build.trtllm.phixtral": {"tensorrt_llm"},
    "trt_build.trtllm.qwen3_moe": {"tensorrt_llm"},
    "triton_repo.evaluation.model": {"lm_eval"},
    "clients.gateway": {"fastapi", "httptools", "starlette", "uvicorn"},
}
# What each package may import of the others.
ARROWS = {
    "export": set(),
    "trt_build": {"export"},
    "triton_repo": {"export", "trt_build"},
    "clients": {"export", "triton_repo"},
    "cli": {"export", "trt_build", "triton_repo", "clients"},
}
# The same between the folders of a package and the modules beside them. The modules in COMMON are for all, and use only
# one another. A folder in a folder belongs to that folder, unless it has a row of its own.
COMMON = {
    "export": {
        *(
            "architecture",
            "blas",
            "command",
            "config_keys",
            "errors",
            "floats",
            "optional",
            "provider",
            "rotary",
            "routing",
        ),
        "rows",
    },
    "trt_build": {"errors"},
    "triton_repo": {"errors"},
}
WITHIN = {
    "export": {
        "files": set(),
        "formats": {"files"},
        "checkpoint": {"files", "formats"},
        "conversion": {"checkpoint", "files"},
        "quantize": {"checkpoint", "files"},
        "onnx_graph": {"checkpoint", "conversion", "formats", "quantize"},
        "families": {"checkpoint", "formats", "onnx_graph"},
        "exporter": {"checkpoint", "conversion", "families", "files", "onnx_graph", "quantize"},
        "inspection": {"checkpoint", "families"},
        "tokenizer": {"checkpoint", "families", "files", "formats"},
        "trtllm": {"checkpoint", "conversion", "families", "files", "formats", "quantize", "tokenizer"},
        "reference": {"checkpoint", "families"},
        "calibration": {"checkpoint", "conversion", "families", "files", "quantize", "reference"},
        "merge": {"checkpoint", "conversion", "families", "files", "reference", "tokenizer"},
    },
    "trt_build": {
        "machine": set(),
        "progress_line": set(),
        "results": set(),
        "comparison": set(),
        "report": {"comparison"},
        "manifest": set(),
        "engine_files": {"manifest"},
        "source": {"manifest"},
        "trtllm_flags": {"manifest"},
        "calibration": {"comparison"},
        "engine_flags": {"calibration", "manifest", "trtllm_flags"},
        # The two backends: what both use is beside them, and neither uses the other.
        "ort": {
            "calibration",
            "comparison",
            "engine_files",
            "engine_flags",
            "machine",
            "manifest",
            "results",
            "source",
        },
        "trtllm": {
            "calibration",
            "comparison",
            "engine_files",
            "engine_flags",
            "machine",
            "manifest",
            "results",
            "source",
            "trtllm_flags",
        },
        "backends": {"manifest", "ort", "results", "trtllm"},
        "build_engine": {"backends", "engine_flags", "progress_line"},
    },
    "triton_repo": {
        "contracts": set(),
        "processes": set(),
        "runtime.text": set(),
        "runtime": {"contracts", "runtime.text"},
        "runtime.batching": {"contracts", "runtime"},
        "runtime.guided": {"contracts", "runtime"},
        "runtime.single": {"contracts", "runtime", "runtime.batching", "runtime.guided", "runtime.text"},
        "runtime.steps": {"contracts", "runtime", "runtime.batching", "runtime.guided", "runtime.text"},
        "runtime.llmapi": {"contracts", "runtime", "runtime.guided", "runtime.text"},
        "runtime.reporting": {"contracts", "runtime.batching"},
        "models": {
            "contracts",
            "processes",
            "runtime",
            "runtime.reporting",
            "runtime.single",
            "runtime.steps",
            "runtime.llmapi",
        },
        "evaluation": {"runtime", "runtime.batching", "runtime.text"},
        "packaging": {"contracts", "runtime.steps"},
        "serving": {"contracts", "packaging", "processes"},
        "supervision": {"contracts", "packaging", "processes", "serving"},
    },
}
MAX_MODULES = 12  # in one folder, so that one look finds the right one


def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def is_imported_by_need(name):
    return any(name == key or name.startswith(f"{key}.") for key in IMPORTED_BY_NEED)


def test_importing_every_module_loads_nothing_heavy():
    modules = [
        module_name(path)
        for package in PACKAGES
        for path in sources(package)
        if not is_imported_by_need(module_name(path)) and "triton_repo.models." not in module_name(path)
    ]
    code = f"""
import importlib, json, sys
for name in {modules!r}:
    importlib.import_module(name)
print(json.dumps(sorted(set(sys.modules) & set({HEAVY!r}))))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(modules) > 30
    assert json.loads(found.stdout) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_run_one_way(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imported_names(path)
        if name.split(".")[0] in PACKAGES and name.split(".")[0] not in ARROWS[package] | {package}
    ]
    assert wrong == []


def place_of(package, name):
    """The key of WITHIN that a module belongs to, the name of a module that is for all, or None for neither."""
    parts = name.split(".")[1:]
    if parts and parts[0] in COMMON[package]:
        return parts[0]
    return next((key for n in (2, 1) if (key := ".".join(parts[:n])) in WITHIN[package]), None)


def imported_modules(path):
    """As imported_names, with `from package import module` as the module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            folder = ROOT.joinpath(*node.module.split("."))
            inner = [alias.name for alias in node.names if (folder / f"{alias.name}.py").exists()]
            yield from (f"{node.module}.{name}" for name in inner)
            if len(inner) < len(node.names):
                yield node.module


@pytest.mark.parametrize("package", WITHIN)
def test_arrows_run_one_way_within_a_package(package):
    wrong = []
    for path in sources(package):
        name = module_name(path)
        own = place_of(package, name)
        if own is None and name != package:
            wrong.append(f"{path.relative_to(ROOT)} has no row in WITHIN")
        allowed = WITHIN[package].get(own, set()) | {own} | COMMON[package]
        wrong += [
            f"{path.relative_to(ROOT)} imports {imported}"
            for imported in imported_modules(path)
            if imported.split(".")[0] == package and place_of(package, imported) not in allowed
        ]
    assert wrong == []


@pytest.mark.parametrize("package", WITHIN)
def test_the_order_within_a_package_has_no_circle(package):
    left = {key: set(uses) for key, uses in WITHIN[package].items()}
    while free := [key for key, uses in left.items() if not uses & set(left)]:
        for key in free:
            del left[key]
    assert left == {}


@pytest.mark.parametrize("package", ["export", "trt_build", "triton_repo", "clients"])
def test_a_folder_has_few_modules(package):
    folders = {path.parent for path in sources(package)}
    counts = {folder: len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) for folder in folders}
    assert {str(folder): count for folder, count in counts.items() if count > MAX_MODULES} == {}


def test_clients_use_of_triton_repo_only_the_contracts():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("clients")
        for name in imported_names(path)
        if name.startswith("triton_repo") and not name.startswith("triton_repo.contracts.")
    ]
    assert wrong == []


def test_the_serving_path_never_names_torch():
    serving = [*sources("triton_repo"), *sources("trt_build/ort")]
    assert [path for path in serving for name in imported_names(path) if name.split(".")[0] == "torch"] == []


def test_python_sources_name_no_library_that_the_first_import_path_would_shadow():
    # `python trt_build/build_engine.py` puts trt_build/ first on the path.
    names = {path.stem for path in (ROOT / "trt_build").iterdir()}
    assert names & {*HEAVY, "numpy", "yaml", "rich", "json", "logging", "argparse"} == set()
