"""Where a session runs: the engine's provider, proven usable before anything is loaded, and graphs opened on it.

There is no falling back: an engine built for CUDA runs there or is refused with what is missing.
"""

from __future__ import annotations

import contextlib
import io
import mmap
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from export.exporter import DATA_FILE
from export.optional import onnx_runtime
from export.provider import PROVIDERS, Provider
from trt_build.engine import Engine
from trt_build.errors import EngineError
from trt_build.old_formats.graphs import check_packed_form, old_graph
from trt_build.ort.kernels import library

if TYPE_CHECKING:
    import onnxruntime

_FATAL, _ERROR = 4, 3  # ONNX Runtime's severities of its log
_HUGE_PAGE_BYTES = 1 << 21
# What ONNX Runtime keeps on the CPU beside any provider: the arithmetic of shapes.
_SHAPE_OPERATORS = frozenset({"Cast", "Gather", "Shape"})


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device of a provider; `kind` and `index` as ONNX Runtime's bindings name it."""

    provider: Provider
    kind: str
    index: int = 0

    def zeros(self, shape: tuple[int, ...]) -> Any:  # noqa: ANN401 - an onnxruntime.OrtValue
        """A buffer of the provider's float type on the device."""
        return self.place(np.zeros(shape, dtype=self.provider.float_type))

    def place(self, values: npt.NDArray[Any]) -> Any:  # noqa: ANN401 - an onnxruntime.OrtValue
        """The values on the device; on the CPU the array itself, which the result keeps."""
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(values, self.kind, self.index)


def open_device(engine: Engine, index: int = 0) -> Device:
    """The device of an engine's provider. Raises MissingPackageError or EngineError where it cannot be used."""
    provider = PROVIDERS[engine.manifest.provider]
    with onnx_runtime(provider.package, "running an engine", provider.extra):
        import onnxruntime
    device = Device(provider=provider, kind=provider.name, index=index)
    if engine.old:
        check_packed_form(engine.folder, engine.old, engine.manifest.libraries.get("onnxruntime", "unknown"))
    if provider.name == "cpu":
        return device
    have = onnxruntime.get_available_providers()
    if provider.runtime_name not in have:
        raise EngineError(
            f"loading the engine {engine.folder}: it is built for {provider.runtime_name}, this ONNX Runtime "
            f"{onnxruntime.__version__} has {', '.join(have)}; on a machine with such a device run: pip uninstall "
            f"onnxruntime && pip install 'moeship[{provider.extra}]', or build the engine with --provider cpu"
        )
    missing = io.StringIO()  # libraries that ONNX Runtime looks for where pip puts them, and says so if it finds none
    with contextlib.redirect_stdout(missing):
        onnxruntime.preload_dlls()
    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        device.zeros((1,))
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        reason = missing.getvalue().partition("\n")[0] or str(error).strip()
        raise EngineError(
            f"loading the engine {engine.folder}: it is built for {provider.runtime_name}, and ONNX Runtime "
            f"{onnxruntime.__version__} cannot use {provider.name} device {index} ({reason}); see that nvidia-smi "
            f"lists the device, install its libraries with: pip install 'moeship[{provider.extra}]', or build the "
            "engine with --provider cpu"
        ) from error
    finally:
        # Its warnings stay off: it would warn at each load that the device is not that of a plugin, which it is not.
        onnxruntime.set_default_logger_severity(_ERROR)
    return device


def load_graph(engine: Engine, name: str, device: Device, threads: int | None) -> onnxruntime.InferenceSession:
    """Load one of an engine's graphs on a device. Raises EngineError where ONNX Runtime refuses it or would run it
    elsewhere."""
    import onnxruntime

    path = engine.folder / name
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    runtime_name = device.provider.runtime_name
    settings = dict(device.provider.options)
    if device.kind != "cpu":
        settings["device_id"] = str(device.index)
    if engine.has_own_kernels:
        _add_kernels(options, path)
        read_in_huge_pages(engine.folder / DATA_FILE)
    source: str | bytes = str(path)
    values = {}  # which the session reads while it is made
    if engine.old and engine.old.is_packed:
        old = old_graph(path, engine.old)
        source = old.content
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(engine.folder))
        values = {key: onnxruntime.OrtValue.ortvalue_from_numpy(array) for key, array in old.weights.items()}
        for key, value in values.items():
            options.add_initializer(key, value)
    try:
        graph = onnxruntime.InferenceSession(source, options, providers=[(runtime_name, settings)], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise EngineError(f"loading {path}: ONNX Runtime {onnxruntime.__version__} refuses it ({error})") from error
    elsewhere = _placed_elsewhere(graph, runtime_name)
    if elsewhere:
        raise EngineError(
            f"loading {path}: ONNX Runtime {onnxruntime.__version__} has no kernels of {runtime_name} for "
            f"{', '.join(sorted(elsewhere))} and would run them on another device; build the engine again with this "
            "version's moeship"
        )
    return graph


def _add_kernels(options: onnxruntime.SessionOptions, path: Path) -> None:
    """Give a session moeship's CPU kernels. Raises EngineError where they are not compiled or not taken."""
    import onnxruntime

    kernels = library()
    try:
        options.register_custom_ops_library(str(kernels))
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise EngineError(
            f"loading {path}: ONNX Runtime {onnxruntime.__version__} does not take the CPU kernels {kernels} "
            f"({error}); install moeship again, which compiles them"
        ) from error


def read_in_huge_pages(path: Path) -> None:
    """Bring a file into the page cache: in huge pages what is not there yet, where the kernel has them.

    A mapping of huge pages is read an eighth faster than one of 4 kB, which is what a read leaves in the cache.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        with contextlib.suppress(AttributeError, OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, len(pages), _HUGE_PAGE_BYTES):
            pages[offset]  # a fault, which reads the page


def _placed_elsewhere(graph: onnxruntime.InferenceSession, name: str) -> Collection[str]:
    """Operators that did not go to the provider of that name, shape arithmetic aside."""
    return {
        node.op_type
        for part in graph.get_provider_graph_assignment_info()
        if part.ep_name != name
        for node in part.get_nodes()
    } - _SHAPE_OPERATORS
