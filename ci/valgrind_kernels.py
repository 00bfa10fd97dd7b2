"""Run some of the CPU kernels' tests on the instruction sets that valgrind has, and read what memcheck found.

    valgrind --xml=yes --xml-file=FILE python ci/valgrind_kernels.py      exit status: pytest's
    python ci/valgrind_kernels.py FILE                                    0 no error is the kernels', 1 else

ci/valgrind_kernels.sh does both. memcheck finds errors of Python and ONNX Runtime, too. The kernels' are those with one
of their functions on the stack, and uninitialised bytes among a node's results, which are written to /dev/null.
"""

from __future__ import annotations

import os
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from kernel_nodes import Node

ROOT = Path(__file__).resolve().parents[1]
LEVELS = ("plain", "avx2")
# Each bit width, block size and kind of zero point once or more, by both operators; odd shapes, more rows than a tile,
# values that are not finite, the activations, and the refusals, which end kernels half made.
CASES = (
    "test_block_linear.py::test_both_paths_over_odd_shapes[False-32-4]",
    "test_block_linear.py::test_both_paths_over_odd_shapes[True-64-8]",
    "test_block_linear.py::test_both_paths_over_odd_shapes[True-128-2]",
    "test_block_linear.py::test_both_paths_over_odd_shapes[False-32-3]",
    "test_block_linear.py::test_both_paths_over_odd_shapes[False-64-5]",
    "test_block_linear.py::test_both_paths_over_odd_shapes[True-32-6]",
    "test_block_linear.py::test_extreme_codes_and_activations_do_not_saturate",
    "test_block_linear.py::test_leading_axes_are_kept_and_no_rows_give_none",
    "test_block_linear.py::test_what_is_not_finite_is_passed_on",
    "test_block_linear.py::test_half_scales_of_every_kind",
    "test_experts.py::test_both_paths_over_odd_shapes[4-32-gelu]",
    "test_experts.py::test_both_paths_over_odd_shapes[8-32-swiglu]",
    "test_experts.py::test_both_paths_over_odd_shapes[2-64-silu]",
    "test_experts.py::test_each_matrix_has_bits_and_blocks_of_its_own[first0-second0-gelu]",
    "test_embedding.py::test_every_row_is_its_codes_times_its_scales[True-32-3]",
    "test_embedding.py::test_every_row_is_its_codes_times_its_scales[False-64-6]",
    "test_embedding.py::test_every_row_is_its_codes_times_its_scales[False-128-8]",
    "test_experts.py::test_equal_logits_go_to_the_lowest_experts",
    "test_experts.py::test_one_expert_needs_no_router",
    "test_experts.py::test_what_is_not_finite_is_passed_on",
    "test_refusals.py::test_attributes_of_one",
    "test_refusals.py::test_activations_of_another_shape",
)

LIBRARY = "moeship_kernels.so"


def run_cases() -> int:
    """Returns pytest's exit status."""
    import pytest

    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import kernel_nodes

    run, nowhere = kernel_nodes.Node.run, os.open(os.devnull, os.O_WRONLY)

    def run_and_write(node: Node, feeds: dict[str, Any], level: str = "", threads: int = 2) -> np.ndarray:
        found = run(node, feeds, level, threads)
        if found.size:
            os.write(nowhere, found)
        return found

    kernel_nodes.levels_and_emulations = lambda: list(LEVELS)
    kernel_nodes.Node.run = run_and_write
    folder = ROOT / "tests/trt_build/kernels"
    words = ["-q", "--noconftest", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    return int(pytest.main([*words, *(f"{folder}/{case}" for case in CASES)]))


def report(path: Path) -> int:
    """Print the kernels' errors. Returns the exit status."""
    errors = ET.parse(path).getroot().findall("error")
    ours = [error for error in errors if _is_ours(error)]
    for error in ours:
        print(error.findtext("what") or error.findtext("xwhat/text"))
        for frame in error.findall("stack/frame"):
            place = frame.findtext("file") or Path(frame.findtext("obj") or "?").name
            print(f"    {frame.findtext('fn') or '?'} ({place})")
    print(f"memcheck: {len(ours)} kinds of error of the kernels, {len(errors) - len(ours)} of Python and ONNX Runtime")
    return 1 if ours else 0


def _is_ours(error: ET.Element) -> bool:
    objects = [frame.findtext("obj") or "" for frame in error.findall("stack/frame")]
    written = error.findtext("kind") == "SyscallParam" and "write(buf)" in (error.findtext("what") or "")
    return written or any(Path(path).name == LIBRARY for path in objects)


if __name__ == "__main__":
    sys.exit(report(Path(sys.argv[1])) if len(sys.argv) > 1 else run_cases())
