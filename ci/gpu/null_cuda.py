"""Give CUDA engines to ONNX Runtime's real CUDA provider on a machine without a GPU, over a runtime of no computation.

    pip install onnxruntime-gpu==1.31.* nvidia-cuda-runtime numpy      # in an environment without onnxruntime
    python ci/gpu/null_cuda.py ENGINE... [--capability 90]

Shows what the provider decides before a kernel computes: that it takes every node, that every kernel's constructor,
weight layout and input check accept the graph, and which kernels a prefill and a decode step launch. It cannot
check the numbers. Needs a C compiler and nm. Exit status 0 done, 2 an engine is refused or something is missing.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from device_engine import SCORING_GRAPH, SERVING_GRAPH, Decoder, UsageError, open_graph, read_facts

SOURCE = Path(__file__).with_name("null_cuda.c")
# The libraries that the provider links to, and patterns of the functions in each.
LIBRARIES = {
    "libcudart.so.13": re.compile(r"_*cuda[A-Z]"),
    "libcublasLt.so.13": re.compile("cublasLt"),
    "libcublas.so.13": re.compile("cublas(?!Lt)"),
    "libcuda.so.1": re.compile("cu[A-Z]"),
    "libcurand.so.10": re.compile("curand"),
}
PROMPT_TOKENS, BATCH = 5, 2
# Definitions that driver_types.h needs from a header that its package does not contain.
HOST_DEFINES = "\n".join(
    f"#define {name}"
    for name in ("__device_builtin__", "__host__", "__device__", "__cudart_builtin__", "CUDARTAPI", "__CUDA_DEPRECATED",
                 "__builtin_align__(n)", "__align__(n)")
)  # fmt: skip


def package_folder(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise UsageError(f"looking for the package {name}: not installed; see this script's first lines")
    return Path(next(iter(found.submodule_search_locations)))


def undefined_functions(library: Path) -> list[str]:
    """The symbols that a shared library imports from other libraries."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    return [line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()]


def compile_libraries(folder: Path) -> None:
    """Compile the libraries of LIBRARIES into `folder`."""
    provider = package_folder("onnxruntime") / "capi" / "libonnxruntime_providers_cuda.so"
    if not provider.is_file():
        raise UsageError(f"looking for {provider.name}: this onnxruntime has none; install onnxruntime-gpu")
    [types] = list(package_folder("nvidia").rglob("driver_types.h"))[:1] or [None]
    if types is None:
        raise UsageError("looking for driver_types.h: not installed; pip install nvidia-cuda-runtime")
    wanted = undefined_functions(provider)
    written = set(re.findall(r"^[\w ]+?\**(\w+)\(", SOURCE.read_text(encoding="utf-8"), re.MULTILINE))
    (folder / "crt").mkdir()
    (folder / "crt" / "host_defines.h").write_text(HOST_DEFINES)
    for name, pattern in LIBRARIES.items():
        main = name == "libcudart.so.13"
        source = folder / f"{name}.c"
        rest = [f"int {function}(void) {{ return 0; }}" for function in wanted
                if pattern.match(function) and not (main and function in written)]  # fmt: skip
        source.write_text("\n".join([SOURCE.read_text() if main else "", *rest, ""]))
        versions = folder / f"{name}.map"
        versions.write_text(f"{name} {{ global: *; }};\n")
        script = [] if name == "libcuda.so.1" else [f"-Wl,--version-script={versions}"]
        command = ["cc", "-shared", "-fPIC", "-w", f"-I{folder}", f"-I{types.parent}", "-o", folder / name, source]
        subprocess.run([*command, f"-Wl,-soname,{name}", *script], check=True)


def walk(folder: Path) -> None:
    """Load both graphs of an engine and run a prefill and decode steps, in a process that uses the null libraries."""
    facts = read_facts(folder, golden=False)
    open_graph(folder / SCORING_GRAPH, "cuda")
    session = open_graph(folder / SERVING_GRAPH, "cuda")
    decoder = Decoder(session, facts, "cuda", batch=BATCH, capacity=facts.max_sequence)
    for count in (PROMPT_TOKENS, 1, 1):  # the first step times candidate kernels, the second runs the chosen ones
        sys.stderr.write(f"running {count}\n")
        decoder.run(np.zeros((BATCH, count), np.int64))


def report(folder: Path, log: str) -> str:
    """The kernels that the last decode step launched, the most frequent first."""
    step = log.rpartition("running 1\n")[2].replace("launched ", "")
    names = subprocess.run(["c++filt"], input=step, capture_output=True, text=True, check=True).stdout
    kernels = collections.Counter(short_name(line) for line in names.splitlines())
    rows = [f"  {count:>4} {name}" for name, count in kernels.most_common()]
    return "\n".join([f"{folder}: taken whole; a decode step launches {sum(kernels.values())} kernels", *rows])


def short_name(kernel: str) -> str:
    """A kernel's name without template arguments, except the activation in the epilogue of a matrix product."""
    if "MoeFCGemm" in kernel:
        activation = re.search("GELU_taylor|GELU|SiLu", kernel)
        return f"cutlass MoeFCGemm{', ' + activation[0] if activation else ''}"
    kernel = re.sub("^_ZN7cutlass13device_kernel.*", "cutlass::device_kernel", kernel)  # too long for c++filt
    return re.split(r"[<(]", kernel.removeprefix("void ").replace("(anonymous namespace)::", ""))[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+", type=Path, metavar="ENGINE")
    parser.add_argument(
        "--capability",
        type=int,
        default=90,
        metavar="SM",
        help="compute capability of the device (default: %(default)s)",
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.inside:
            walk(options.engines[0])
            return 0
        with tempfile.TemporaryDirectory() as folder:
            compile_libraries(Path(folder))
            for engine in options.engines:
                environment = {**os.environ, "LD_LIBRARY_PATH": folder, "NULL_CUDA_TRACE": "1",
                               "NULL_CUDA_SM": str(options.capability)}  # fmt: skip
                command = [sys.executable, __file__, engine, "--inside"]
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
                if done.returncode:
                    words = [line for line in done.stderr.splitlines() if not line.startswith("launched ")]
                    raise UsageError(f"giving {engine} to the CUDA provider: " + "\n".join(words[-5:]))
                print(report(engine, done.stderr), flush=True)
    except (UsageError, OSError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
