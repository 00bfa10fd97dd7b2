"""Converts a checkpoint to GGUF with llama.cpp's own converter, and quantises it with llama.cpp's own quantiser.

    LLAMA_CPP=llama.cpp python ci/packers/gguf_model.py convert CHECKPOINT FILE
    python ci/packers/gguf_model.py quantize FILE TYPE...        # needs llama-cpp-python; writes FILE's stem-TYPE.gguf

The vocabulary is left out: the examples' tokenizers are none that llama.cpp knows, and moeship takes none from a GGUF.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path


def convert(checkpoint: Path, output: Path) -> None:
    root = Path(os.environ["LLAMA_CPP"])
    sys.path[:0] = [str(root), str(root / "gguf-py")]
    import conversion.llama
    import conversion.phi

    for model in (conversion.llama.LlamaModel, conversion.phi.Phi2Model):
        model.set_vocab = lambda self: self._set_vocab_none()
    sys.argv = ["convert_hf_to_gguf.py", str(checkpoint), "--outfile", str(output), "--outtype", "f32"]
    runpy.run_path(str(root / "convert_hf_to_gguf.py"), run_name="__main__")


def quantize(source: Path, types: list[str]) -> None:
    import ctypes

    import llama_cpp

    for name in types:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
        output = source.with_name(f"{source.stem}-{name}.gguf")
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(params))
        if status:
            raise SystemExit(f"llama.cpp could not quantise {source} to {name}: status {status}")


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        quantize(Path(sys.argv[2]), sys.argv[3:])
