"""The one thing that pyproject.toml cannot say: how the CPU kernels are compiled.

They are a plain shared library that ONNX Runtime loads, one file of it for each instruction set. Where there is no
C++17 compiler the install goes on without it, and loading it says what is missing.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("trt_build/ort/kernels")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
INSTRUCTIONS = {
    "level_plain": (),
    "level_avx2": AVX2,
    "level_avx512bw": AVX512,
    "level_avx512vnni": (*AVX512, "-mavx512vnni"),
}
# No product and sum are contracted that the source does not fuse: every instruction set has to give the same bits.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-fno-math-errno", "-g0", "-w")
X86 = ("x86_64", "amd64")


class BuildKernels(build_ext):
    """Compiles each source with its own instructions, and names the library without Python's version."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        sources = [Path(source) for source in ext.sources]
        if not any(self.plat_name.endswith(name) for name in X86):
            sources = [source for source in sources if not INSTRUCTIONS.get(source.stem)]
        objects = []
        for source in sources:
            flags = [*FLAGS, *INSTRUCTIONS.get(source.stem, ())]
            objects += self.compiler.compile(
                [str(source)], output_dir=self.build_temp, extra_postargs=flags, depends=ext.depends
            )
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(ext.name), target_lang="c++")


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
    cmdclass={"build_ext": BuildKernels},
)
