"""Print what a bug report needs: versions, the CPU and its kernels, memory, disks, GPUs, and an engine's facts.

The report holds no host name and no user name, and the home folder is written as ~. An engine's digests are checked,
which reads the whole engine; --quick compares sizes alone.
Exit status: 0 no problem found, 1 a problem found, 2 wrong input.
"""

from __future__ import annotations

import argparse
import getpass
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.rows import print_rows
from export import blas
from export.errors import MoeshipError
from export.files.reading import is_there
from export.rows import in_units
from trt_build.errors import EngineError

PACKAGES = (
    "numpy", "ml-dtypes", "tokenizers", "huggingface-hub", "onnx", "onnxruntime", "onnxruntime-gpu",
    "onnxruntime-genai", "llguidance", "tritonclient", "grpcio", "protobuf", "nvidia-pytriton", "tensorrt_llm",
    "lm_eval",
)  # fmt: skip
# The flags of /proc/cpuinfo that decide which kernels run.
CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx_vnni", "amx_int8",
)  # fmt: skip
# Variables that change what moeship or its libraries do. None of them holds a secret.
VARIABLES = (
    "MOESHIP_KERNELS_LEVEL", "MOESHIP_HEARTBEATS", "ORT_DISABLE_TELEMETRY", "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "OPENBLAS_CORETYPE",
    "LD_LIBRARY_PATH", "PYTHONPATH",
    "TRITON_SERVER_VERSION", "NVIDIA_TRITON_SERVER_VERSION", "TRTLLM_ORCHESTRATOR",
)  # fmt: skip
Facts = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The facts by section, in the order in which they are printed, and the problems, each with a remedy."""

    sections: dict[str, Facts] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        nargs="?",
        type=Path,
        metavar="ENGINE|REPOSITORY",
        help="an engine or a model repository to check as well",
    )
    parser.add_argument(
        "--quick", action="store_true", help="compare the sizes of an engine's files, not their digests"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; returns 1 if it names a problem. Raises EngineError for a path that is neither an engine nor a
    repository."""
    report = Report()
    _add_installation(report)
    _add_kernels(report)
    _add_machine(report)
    _add_server(report)
    report.sections["environment variables"] = _variables()
    if arguments.path is not None:
        _add_path(report, arguments.path, check_digests=not arguments.quick)
    _print(report, as_json=arguments.json)
    return 1 if report.problems else 0


def _variables() -> Facts:
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if blas.is_chosen_here():
        found[blas.VARIABLE] += " (chosen by moeship for this CPU)"
    return found


def _add_installation(report: Report) -> None:
    from cli.main import version

    found = {name: _version(name) for name in PACKAGES}
    report.sections["versions"] = {
        "moeship": version(),
        "installed in": str(Path(__file__).resolve().parent.parent),
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{_system_name()}, {platform.platform()}",
        **{name: number or "not installed" for name, number in found.items()},
    }
    if found["nvidia-pytriton"] and (found["numpy"] or "").split(".")[0] not in ("", "0", "1"):
        report.problems.append(
            f"numpy {found['numpy']}: the Triton of nvidia-pytriton {found['nvidia-pytriton']} works only with "
            "numpy 1; pip install 'numpy<2'"
        )
    if found["onnxruntime"] and found["onnxruntime-gpu"]:
        report.problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; pip uninstall "
            "onnxruntime onnxruntime-gpu, then install moeship[cpu] or moeship[cuda]"
        )
    report.problems.extend(_unmet_requirements(found))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unmet_requirements(found: Mapping[str, str | None]) -> Iterator[str]:
    """Messages about installed packages whose version moeship does not support. numpy is checked elsewhere, since its
    bound depends on nvidia-pytriton. Packages that only tests need are not checked."""
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(line) for line in importlib.metadata.requires("moeship") or ()]
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return
    for wanted in requirements:
        number, range_ = found.get(wanted.name), str(wanted.specifier)
        for_tests = any(f'extra == "{extra}"' in str(wanted.marker) for extra in ("dev", "bench"))
        if number and wanted.name != "numpy" and not for_tests and not wanted.specifier.contains(number, True):
            yield f"{wanted.name} {number}: moeship needs {range_}; pip install '{wanted.name}{range_}'"


def _system_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return platform.system()


def _add_kernels(report: Report) -> None:
    from trt_build.ort.kernels import COMPILERS, chosen_level, found_fault

    info = _proc("cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.M)
    flags = re.search(r"^flags\s*:\s*(.+)$", info, re.M)
    has = set(flags[1].split()) if flags else set()
    compiler = next((name for name in COMPILERS if shutil.which(name)), None)
    fault = found_fault()
    facts: Facts = {
        "processor": f"{model[1] if model else platform.machine()}, {len(os.sched_getaffinity(0))} core(s) for moeship",
        "instructions": " ".join(flag for flag in CPU_FLAGS if flag in has) or "none of those that kernels use",
        "kernels library": "compiled" if fault is None else "cannot be used",
        "C++ compiler": compiler or "none on PATH",
    }
    report.sections["CPU"] = facts
    if fault is not None:
        report.problems.append(f"moeship's CPU kernels are not used: {fault.reason}; {fault.remedy}")
        return
    try:
        facts["kernels run with"] = chosen_level()
    except EngineError as error:
        report.problems.append(str(error))


def _proc(name: str) -> str:
    try:
        return (Path("/proc") / name).read_text(errors="replace")
    except OSError:
        return ""


def _add_machine(report: Report) -> None:
    from trt_build.machine.memory import available_memory
    from trt_build.machine.readings import read_machine

    total = re.search(r"^MemTotal:\s*(\d+) kB$", _proc("meminfo"), re.M)
    machine = read_machine()
    gpus = [f"{gpu.index}: {gpu.name}, SM {gpu.sm}" for gpu in machine.gpus or ()]
    report.sections["machine"] = {
        "memory": f"{in_units(available_memory())} available"
        + (f" of {in_units(int(total[1]) * 1024)}" if total else ""),
        **{f"free in {path}": in_units(shutil.disk_usage(path).free) for path in _folders()},
        "GPUs": "; ".join(gpus) or ("none" if machine.gpus is not None else "no nvidia-smi on PATH"),
        "TensorRT-LLM": machine.tensorrt_llm or "not installed",
    }


def _folders() -> list[str]:
    """The folders for outputs, working files and Triton's shared memory."""
    return [path for path in (str(Path.cwd()), tempfile.gettempdir(), "/dev/shm") if Path(path).is_dir()]


def _add_server(report: Report) -> None:
    """Add the tritonserver that `moeship serve` would run. A missing one is no problem, since clients need none."""
    from export.errors import MissingPackageError
    from triton_repo.serving.installation import find_installation

    facts: Facts = {}
    report.sections["tritonserver"] = facts
    with tempfile.TemporaryDirectory(prefix="moeship-doctor-") as workspace:
        try:
            found = find_installation(Path(workspace))
        except MissingPackageError as error:
            facts["program"] = f"none: {error}"
            return
        except MoeshipError as error:
            facts["program"] = "cannot be used"
            report.problems.append(str(error))
            return
        from_wheel = found.backends is not None and found.backends.is_relative_to(workspace)
        facts["program"] = str(found.program)
        facts["from"] = f"nvidia-pytriton {_version('nvidia-pytriton')}" if from_wheel else "PATH"
        if found.backends is not None:
            facts["backends"] = ", ".join(sorted(path.name for path in found.backends.iterdir()))


def _add_path(report: Report, path: Path, *, check_digests: bool) -> None:
    from export.exporter import DATA_FILE
    from trt_build.manifest import MANIFEST_FILE
    from trt_build.trtllm.engine import rank_engine

    # The weights show an engine that has lost its engine.json.
    if any(is_there(path / name) for name in (MANIFEST_FILE, DATA_FILE, rank_engine(0))):
        _add_engine(report, "engine", path, check_digests=check_digests)
    elif any(path.glob("*/config.pbtxt")):
        _add_repository(report, path, check_digests=check_digests)
    else:
        raise EngineError(
            f"looking at {path}: found neither an engine ({MANIFEST_FILE}) nor a model repository (folders with a "
            "config.pbtxt); check the path"
        )


def _add_repository(report: Report, path: Path, *, check_digests: bool) -> None:
    from triton_repo.serving.repository_check import check_repository
    from trt_build.manifest import MANIFEST_FILE

    facts: Facts = {"path": str(path)}
    report.sections["repository"] = facts
    try:
        facts["models"] = ", ".join(check_repository(path))
    except MoeshipError as error:
        report.problems.append(str(error))
    for manifest in sorted(path.glob(f"*/*/*/{MANIFEST_FILE}")):
        engine = manifest.parent
        _add_engine(report, f"engine of {engine.parent.parent.name}", engine, check_digests=check_digests)


def _add_engine(report: Report, title: str, folder: Path, *, check_digests: bool) -> None:
    """Add the facts in engine.json of an engine for any backend, even if other files are missing or damaged."""
    from triton_repo.contracts.seal import is_sealed
    from triton_repo.packaging.engine_facts import read_engine_facts
    from trt_build.manifest import read_manifest

    facts: Facts = {"path": str(folder)}
    report.sections[title] = facts
    try:
        facts |= _manifest_facts(read_manifest(folder, f"opening the engine {folder}"))
        engine = read_engine_facts(folder, check_digests)
    except MoeshipError as error:
        facts["files"] = "damaged, or written by another version of moeship"
        report.problems.append(str(error))
        return
    checked = "digests checked" if check_digests else "sizes checked"
    sealed = ", as sealed when it was packaged" if is_sealed(folder) else ""
    facts["files"] = f"{len(engine.records)} of {in_units(engine.num_bytes)}, {checked}{sealed}"
    report.problems.extend(_what_it_lacks(folder, facts))


def _manifest_facts(manifest: Mapping[str, Any]) -> Facts:
    """The facts of a report from the values that engine.json has."""
    precision = manifest.get("precision")
    values = {
        "format": manifest.get("format_version"),
        "family": manifest.get("family"),
        "precision": precision.get("name") if isinstance(precision, dict) else None,
        "backend": manifest.get("backend"),
        "provider": manifest.get("provider"),
        "kernels": manifest.get("kernels"),
        "context": manifest.get("max_sequence"),
        "built with": _listed(manifest.get("libraries")),
        "built for": _listed(manifest.get("gpu")),
        "verified": _verified(manifest.get("verification")),
    }
    return {name: value for name, value in values.items() if value is not None}


def _listed(values: object) -> str | None:
    return ", ".join(f"{name} {value}" for name, value in values.items()) if isinstance(values, dict) else None


def _verified(verification: object) -> str:
    from trt_build.manifest import failed_verification

    if not isinstance(verification, dict):
        return "not yet"
    increase = verification.get("perplexity_increase")
    figure = f"perplexity {increase:+.3%}" if isinstance(increase, float) else "yes"
    failure = failed_verification(verification)
    return figure if failure is None else f"failed: {failure}"


def _what_it_lacks(folder: Path, facts: Facts) -> Iterator[str]:
    """Reasons why this machine cannot load an undamaged engine for ONNX Runtime."""
    from trt_build.manifest import ORT_BACKEND
    from trt_build.ort.engine import open_engine
    from trt_build.ort.kernels import is_usable
    from trt_build.ort.memory import require_memory

    if facts.get("backend") != ORT_BACKEND:
        return
    if facts.get("kernels") == "moeship" and not is_usable():
        yield f"{folder} is for moeship's CPU kernels, which cannot be used here"
    try:
        require_memory(open_engine(folder, check_digests=False))
    except MoeshipError as error:
        yield str(error)


def _print(report: Report, *, as_json: bool) -> None:
    hide = _Hidden()
    if as_json:
        whole = {**report.sections, "problems": report.problems}
        print(json.dumps(hide.value(whole), indent=2))
        return
    for title, facts in report.sections.items():
        print_rows(title, [(name, hide.text(str(value))) for name, value in facts.items()])
    print_rows("problems", [("", hide.text(problem)) for problem in report.problems] or [("", "none found")])


class _Hidden:
    """Removes what identifies the user from texts: the path of the home folder, the user name and the host name."""

    def __init__(self) -> None:
        home, user, host = str(Path.home()), _user_name(), socket.gethostname()
        # The longest text first, since the path of the home folder contains the user's name. A name is replaced only if
        # it is a whole word of a path.
        self._rules: list[tuple[re.Pattern[str], str]] = []
        if len(home) > 1:
            self._rules.append((re.compile(rf"{re.escape(home)}(?=/|$|[^\w.-])"), "~"))
        if user:
            self._rules.append((re.compile(rf"(?<=/){re.escape(user)}(?=/|$|[^\w.-])"), "USER"))
        if host and host != "localhost":
            self._rules.append((re.compile(rf"(?<![\w-]){re.escape(host)}(?![\w-])"), "HOST"))

    def text(self, text: str) -> str:
        for pattern, name in self._rules:
            text = pattern.sub(name, text)
        return text

    def value(self, value: Any) -> Any:  # noqa: ANN401 - JSON value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {name: self.value(item) for name, item in value.items()}
        return [self.value(item) for item in value] if isinstance(value, Sequence) else value


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
