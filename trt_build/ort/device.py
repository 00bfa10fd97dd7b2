"""Where a session runs: the engine's provider, proven usable before anything is loaded, and graphs opened on it.

There is no falling back: an engine built for CUDA runs there or is refused with what is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import mmap
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from export.onnx_graph.exporter import DATA_FILE, PROBE_GRAPH
from export.onnx_graph.packing import kernel_layout
from export.optional import onnx_runtime
from export.provider import PROVIDERS, Provider
from trt_build.engine import Engine
from trt_build.errors import EngineError
from trt_build.ort.kernels import library
from trt_build.ort.packed_alone import file_layouts, unpacked_weights

if TYPE_CHECKING:
    import onnxruntime

logger = logging.getLogger(__name__)

_FATAL, _ERROR = 4, 3  # ONNX Runtime's severities of its log
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MAX_ARENAS = -1, -3, -8  # options of glibc's mallopt
_WHILE_LOADING = 1 << 30
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
    _check_kernels(engine)
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


def _check_kernels(engine: Engine) -> None:
    """Raise EngineError where the weights are packed for kernels that this CPU or this ONNX Runtime has not."""
    expected = engine.manifest.kernel_layout
    if expected is None:
        return
    probe = (engine.folder / PROBE_GRAPH).read_bytes()
    if expected not in (file_layouts(probe) if engine.is_packed_alone else (kernel_layout(probe),)):
        built = engine.manifest.libraries.get("onnxruntime", "unknown")
        raise EngineError(
            f"loading the engine {engine.folder}: its weights are packed for the kernels of another CPU or of ONNX "
            f"Runtime {built}, and those of this machine read another layout; build the engine on this machine, or "
            "anywhere with --portable"
        )


def load_graphs(
    engine: Engine, graphs: Sequence[str], device: Device, threads: int | None
) -> list[onnxruntime.InferenceSession]:
    """Load some of an engine's graphs on a device, side by side. Raises EngineError where ONNX Runtime refuses one or
    would run it elsewhere."""

    def load(name: str) -> onnxruntime.InferenceSession:
        weights = unpacked_weights(engine.folder / name) if engine.is_packed_alone else {}
        return _load_graph(engine.folder / name, device, threads, weights, kernels, alone=len(graphs) == 1)

    kernels = library() if engine.has_own_kernels else None

    keeping: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if engine.is_packed_alone:
        logger.warning(
            "%s holds its weights in the packed form alone, which ONNX Runtime takes no more from 1.32 on: they are "
            "unpacked at every start into memory of this process; build the engine again to have them mapped",
            engine.folder,
        )
    elif engine.is_mapped:
        read_in_huge_pages(engine.folder / DATA_FILE, engine.resident_bytes)
        if engine.manifest.kernel_layout:
            keeping = _memory_kept()
    with keeping, ThreadPoolExecutor(max_workers=len(graphs)) as pool:
        return list(pool.map(load, graphs))


def _load_graph(
    path: Path,
    device: Device,
    threads: int | None,
    weights: Mapping[str, npt.NDArray[Any]],
    kernels: Path | None,
    *,
    alone: bool,
) -> onnxruntime.InferenceSession:
    """`weights` take the place of the graph's own under these names; `kernels` is a library of operators."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if not alone:
        # Each graph has threads of its own: those of one must not wait for work on the cores that the other needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}
    for name, value in values.items():
        options.add_initializer(name, value)
    if threads is not None:
        options.intra_op_num_threads = threads
    runtime_name = device.provider.runtime_name
    settings = dict(device.provider.options)
    if device.kind != "cpu":
        settings["device_id"] = str(device.index)
    if kernels is not None:
        try:
            options.register_custom_ops_library(str(kernels))
        except Exception as error:  # as below
            raise EngineError(
                f"loading {path}: ONNX Runtime {onnxruntime.__version__} does not take the CPU kernels {kernels} "
                f"({error}); install moeship again, which compiles them"
            ) from error
    try:
        graph = onnxruntime.InferenceSession(
            str(path), options, providers=[(runtime_name, settings)], enable_fallback=0
        )
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


def read_in_huge_pages(path: Path, num_bytes: int) -> None:
    """Bring the first bytes of a file into the page cache: in huge pages what is not there yet, where the kernel has
    them.

    A mapping of huge pages is read an eighth faster than one of 4 kB, which is what a read leaves in the cache.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        with contextlib.suppress(AttributeError, OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, min(num_bytes, len(pages)), _HUGE_PAGE_BYTES):
            pages[offset]  # a fault, which reads the page


@contextlib.contextmanager
def _memory_kept() -> Iterator[None]:
    """Keep freed memory on the heap in the meantime, where the C library is glibc.

    To find a packed weight ONNX Runtime packs what lies in its place into a buffer, looks its key up and frees the
    buffer. glibc would map and unmap each of them, and the kernel clear as many bytes as the engine has.
    """
    try:
        libc = ctypes.CDLL(None)
        set_option, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    set_option(_MAX_ARENAS, 1)  # the heaps of other threads do not hold buffers of 64 MB
    set_option(_MMAP_THRESHOLD, _WHILE_LOADING)
    set_option(_TRIM_THRESHOLD, _WHILE_LOADING)
    try:
        yield
    finally:
        # Where glibc's own adjustment ends at the most.
        set_option(_MMAP_THRESHOLD, 32 << 20)
        set_option(_TRIM_THRESHOLD, 64 << 20)
        set_option(_MAX_ARENAS, 0)
        trim(0)


def _placed_elsewhere(graph: onnxruntime.InferenceSession, name: str) -> Collection[str]:
    """Operators that did not go to the provider of that name, shape arithmetic aside."""
    return {
        node.op_type
        for part in graph.get_provider_graph_assignment_info()
        if part.ep_name != name
        for node in part.get_nodes()
    } - _SHAPE_OPERATORS
