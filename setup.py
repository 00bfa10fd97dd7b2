"""The one thing that pyproject.toml cannot say: how the CPU kernels are compiled.

They are a plain shared library that ONNX Runtime loads, one file of it for each instruction set. Where there is no
C++17 compiler, or it fails, the install goes on without the library. pip hides why: `pip install -v --no-deps -e .`
shows what the compiler said, and `python -m trt_build.ort.kernels` whether there is a library.
"""

import os
import runpy
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = Path("trt_build/ort/kernels")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
INSTRUCTIONS = {
    "level_plain": (),
    "level_avx2": AVX2,
    "level_avx512bw": AVX512,
    "level_avx512vnni": (*AVX512, "-mavx512vnni"),
    "level_amx": (*AVX512, "-mavx512vnni"),
}
# No product and sum are contracted that the source does not fuse: every instruction set has to give the same bits.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-fno-math-errno", "-g0", "-w")
X86 = ("x86_64", "amd64")
# This build has no moeship to import from.
with_digest = runpy.run_path(str(KERNELS / "library_file.py"))["with_digest"]


class BuildKernels(build_ext):
    """Compiles each source with its own instructions, and names the library without Python's version.

    A library is there whole or not at all: a failure leaves neither half a file nor that of an earlier install.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def run(self) -> None:
        if self.inplace:
            for ext in self.extensions:
                Path(self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        built = Path(self.get_ext_fullpath(ext.name))
        built.unlink(missing_ok=True)
        sources = [Path(source) for source in ext.sources]
        if not any(self.plat_name.endswith(name) for name in X86):
            sources = [source for source in sources if not INSTRUCTIONS.get(source.stem)]

        def compiled(source: Path) -> str:
            flags = [*FLAGS, *INSTRUCTIONS.get(source.stem, ())]
            [compiled] = self.compiler.compile(
                [str(source)], output_dir=self.build_temp, extra_postargs=flags, depends=ext.depends
            )
            return compiled

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # a compiler a source, as each takes seconds of one core
            objects = list(pool.map(compiled, sources))
        linked = Path(self.build_temp, built.name)
        self.compiler.link_shared_object(objects, str(linked), target_lang="c++")
        linked.write_bytes(with_digest(linked.read_bytes()))
        _copy(linked, built)

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            name = self.get_ext_filename(ext.name)
            if Path(self.build_lib, name).is_file():  # it is not where the compiler failed
                _copy(Path(self.build_lib, name), Path(name))


def _copy(source: Path, to: Path) -> None:
    """Copy a file to a place where it appears whole."""
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(f"{to.name}.partial-{os.getpid()}")
    shutil.copy(source, partial)
    partial.replace(to)


class PlatformWheel(bdist_wheel):
    """One wheel a platform: the library is compiled for a processor, and knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "trt_build.ort.kernels.moeship_kernels",
            sources=sorted(map(str, KERNELS.glob("*.cpp"))),
            depends=sorted(map(str, [*KERNELS.glob("*.h"), *KERNELS.glob("third_party/*.h")])),
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
