"""Opens the device of an engine's provider, checks that it works before weights are loaded, and loads graphs on it.

There is no fallback to another provider: an engine for CUDA runs on CUDA, or the error says what is missing.
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
from trt_build.errors import EngineError
from trt_build.machine.cores import physical_cores, usable_cores
from trt_build.ort.engine import Engine
from trt_build.ort.kernels import library
from trt_build.ort.old_formats.graphs import check_packed_form, old_graph

if TYPE_CHECKING:
    import onnxruntime

_FATAL, _ERROR = 4, 3  # log severities of ONNX Runtime
_HUGE_PAGE_BYTES = 1 << 21
# Operators that ONNX Runtime places on the CPU for every provider, because they compute shapes.
_SHAPE_OPERATORS = frozenset({"Cast", "Gather", "Shape"})


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device of a provider; `kind` and `index` are its name and number in ONNX Runtime's I/O bindings."""

    provider: Provider
    kind: str
    index: int = 0

    def zeros(self, shape: tuple[int, ...]) -> Any:  # noqa: ANN401 - an onnxruntime.OrtValue
        """A buffer of zeros on the device, in the provider's float type."""
        return self.place(np.zeros(shape, dtype=self.provider.float_type))

    def place(self, values: npt.NDArray[Any]) -> Any:  # noqa: ANN401 - an onnxruntime.OrtValue
        """Copy an array to the device. On the CPU the result refers to the array without a copy."""
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(values, self.kind, self.index)


def open_device(engine: Engine, index: int = 0) -> Device:
    """Open a device of an engine's provider. Raises MissingPackageError or EngineError if it cannot be used, or if the
    engine needs moeship's CPU kernels and they cannot be used."""
    provider = PROVIDERS[engine.manifest.provider]
    with onnx_runtime(provider.package, "running an engine", provider.extra):
        import onnxruntime
    device = Device(provider=provider, kind=provider.name, index=index)
    if engine.old:
        check_packed_form(engine.folder, engine.old, engine.manifest.libraries.get("onnxruntime", "unknown"))
    if engine.has_own_kernels:
        library(_loading_kernels(engine))
    if provider.name == "cpu":
        return device
    have = onnxruntime.get_available_providers()
    if provider.runtime_name not in have:
        raise EngineError(
            f"loading the engine {engine.folder}: it is built for {provider.runtime_name}, this ONNX Runtime "
            f"{onnxruntime.__version__} has {', '.join(have)}; on a machine with such a device run: pip uninstall "
            f"onnxruntime && pip install 'moeship[{provider.extra}]', or build the engine with {_flags_for_cpu(engine)}"
        )
    missing = io.StringIO()  # preload_dlls prints which of the libraries that pip installs it did not find
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
            f"engine with {_flags_for_cpu(engine)}"
        ) from error
    finally:
        # Warnings stay off: at each load ONNX Runtime would warn that the device is not that of a plugin provider.
        onnxruntime.set_default_logger_severity(_ERROR)
    return device


def _flags_for_cpu(engine: Engine) -> str:
    """The flags that build the engine for the CPU, which lacks some precisions of other providers."""
    precision = engine.manifest.precision.name
    return "--provider cpu" if precision in PROVIDERS["cpu"].precisions else "--provider cpu --precision fp32"


def _set_threads(options: onnxruntime.SessionOptions, threads: int | None) -> None:
    """Left to itself, ONNX Runtime takes every core of the machine and binds a thread to each, whatever this process
    may use (onnxruntime/core/util/thread_utils.cc). Here these are the cores that it may use. Threads are bound where
    the process has all of these cores' time: with a part of it, others beside it would be bound to the same cores."""
    cores = physical_cores()
    options.intra_op_num_threads = threads or usable_cores(cores)
    if threads is None and 1 < options.intra_op_num_threads == len(cores):
        # The thread that calls is not bound; CPUs count from 1 there.
        own = (",".join(str(cpu + 1) for cpu in core) for core in cores[1:])
        options.add_session_config_entry("session.intra_op_thread_affinities", ";".join(own))


def load_graph(
    engine: Engine, name: str, device: Device, threads: int | None, content: bytes | None = None
) -> onnxruntime.InferenceSession:
    """Load one of an engine's graphs on a device, or `content`, a graph over the same data file. `threads` None takes
    each physical core that this process may use. Raises EngineError if ONNX Runtime refuses the graph or would run part
    of it on another device."""
    import onnxruntime

    path = engine.folder / name
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Between two steps tokens are chosen, written and sent. Threads that spin meanwhile take the cores from that.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    _set_threads(options, threads)
    runtime_name = device.provider.runtime_name
    settings = dict(device.provider.options)
    if device.kind != "cpu":
        settings["device_id"] = str(device.index)
    if engine.has_own_kernels:
        _add_kernels(options, engine)
        read_in_huge_pages(engine.folder / DATA_FILE)
    source: str | bytes = str(path) if content is None else content
    values = {}  # kept alive, as the session reads these buffers while it loads the graph
    if engine.old and engine.old.is_packed:
        old = old_graph(path, engine.old)
        source = old.content
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(engine.folder))
        values = {key: onnxruntime.OrtValue.ortvalue_from_numpy(array) for key, array in old.weights.items()}
        for key, value in values.items():
            options.add_initializer(key, value)
    elif content is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(engine.folder))
    try:
        graph = onnxruntime.InferenceSession(source, options, providers=[(runtime_name, settings)], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise EngineError(
            f"loading {path}: ONNX Runtime {onnxruntime.__version__} refuses it ({error}); `moeship doctor "
            f"{path.parent}` tells whether its files are damaged"
        ) from error
    elsewhere = _placed_elsewhere(graph, runtime_name)
    if elsewhere:
        raise EngineError(
            f"loading {path}: ONNX Runtime {onnxruntime.__version__} has no kernels of {runtime_name} for "
            f"{', '.join(sorted(elsewhere))} and would run them on another device; build the engine again with this "
            "version's moeship"
        )
    return graph


def _add_kernels(options: onnxruntime.SessionOptions, engine: Engine) -> None:
    """Register moeship's CPU kernels with a session. Raises EngineError if they cannot be used or ONNX Runtime refuses
    them."""
    import onnxruntime

    kernels = library(_loading_kernels(engine))
    try:
        options.register_custom_ops_library(str(kernels))
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise EngineError(
            f"{_loading_kernels(engine)}: ONNX Runtime {onnxruntime.__version__} refuses the library {kernels} "
            f"({error}); install moeship again, which compiles it"
        ) from error


def _loading_kernels(engine: Engine) -> str:
    return f"loading the CPU kernels for the engine {engine.folder}"


def read_in_huge_pages(path: Path) -> None:
    """Read a file into the page cache, in huge pages where the system supports them and a page is not cached yet.

    Kernels read a mapping in huge pages an eighth faster than one in 4 kB pages. Plain reads cache 4 kB pages.
    Does nothing to a file that is gone or empty: ONNX Runtime refuses it when it loads the graph.
    """
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        with contextlib.suppress(AttributeError, OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, len(pages), _HUGE_PAGE_BYTES):
            pages[offset]  # a page fault reads the page from the file


def _placed_elsewhere(graph: onnxruntime.InferenceSession, name: str) -> Collection[str]:
    """Operators that are placed on another provider than `name`, except those that compute shapes."""
    return {
        node.op_type
        for part in graph.get_provider_graph_assignment_info()
        if part.ep_name != name
        for node in part.get_nodes()
    } - _SHAPE_OPERATORS
