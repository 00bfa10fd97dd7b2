"""Run the kernels of an installed moeship: a node of each kind on every instruction set that this CPU has. Read the
text that verify measures on, the style of its reports, and the files of the playground.

    python ci/check_wheel.py

Compares with numpy, as the tests do. Refuses the sources' own packages, which are not what is to be checked. Needs
onnx, onnxruntime and pytest. Exit status 0 they are right, 1 else.
"""

import sys
from pathlib import Path

import numpy as np

import trt_build
from clients.gateway.playground.router import files
from export.calibration.text import own_text as calibration_text
from trt_build.comparison.evaluation_text import own_text
from trt_build.report.page import style

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(trt_build.__path__[0]).resolve()
sys.path.append(str(ROOT / "tests"))


def main() -> int:
    if PACKAGE.is_relative_to(ROOT) and "site-packages" not in PACKAGE.parts:
        print(f"checking the wheel: found {PACKAGE}, which is the folder of the sources, expected an installed moeship")
        return 1
    print(f"{len(own_text().content)} characters of held-out text")  # raises where a file is missing
    print(f"{len(calibration_text())} characters of calibration text")  # the same
    print(f"{len(style())} characters of the style of reports")
    print(f"{len(files())} files of the playground")  # the same
    import kernel_nodes
    from kernel_nodes import block_linear, experts, levels, mixture, product_float, product_int8, random_matrices

    kernel_nodes.levels_and_emulations = levels  # the emulations are compiled of the sources, not in the wheel

    draw = np.random.default_rng(0)
    x, logits = draw.normal(size=(5, 96)).astype(np.float32), draw.normal(size=(5, 4)).astype(np.float32)
    differences = []
    for bits in (2, 4, 8):
        matrices = random_matrices(draw, 1, 40, 96, bits, 32)
        pair = random_matrices(draw, 4, 80, 96, bits, 32), random_matrices(draw, 4, 96, 80, bits, 32)
        for found, expected in (
            (block_linear(matrices).run_everywhere({"x": x}), product_int8(x, matrices)),
            (
                experts(*pair, 2, activations="float32").run_everywhere({"x": x, "router": logits}),
                mixture(x, logits, *pair, 2, product_float),
            ),
        ):
            differences.append(np.abs(found - expected).max() / np.abs(expected).max())
    worst = float(np.max(differences))  # NaN if one of them is: Python's max would pass over it
    print(f"{PACKAGE}: instruction sets {', '.join(levels())}; off by {worst:.1e} of the largest value at the most")
    return 0 if worst <= 2e-6 else 1


if __name__ == "__main__":
    sys.exit(main())
