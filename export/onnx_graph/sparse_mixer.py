"""The sparse mixer's weights of two experts, in a graph whose kernels know the softmax over the chosen experts alone.

The kernels get other logits in place of the router's: the logarithm of each chosen expert's weight, and a number far
below for the others. Their softmax over the chosen two is then each weight divided by the sum of both, and the output
of the mixture is multiplied by that sum. The rule is that of `export.architecture.Router`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from export.onnx_graph.nodes import Nodes

_FAR_BELOW = -1e4  # of float16's range; exp(_FAR_BELOW) is 0


def sparse_mixer(
    nodes: Nodes, logits: str, path: str, *, num_experts: int, jitter: float, prefers_highest_place: bool
) -> tuple[str, str]:
    """Router logits float32 [..., E] to the logits [..., E] for the kernels, and the sum [..., 1] of both weights. Of
    equal logits the first or, with `prefers_highest_place`, the last is taken."""

    def add(operator: str, inputs: list[str], name: str, **attributes: Any) -> str:  # noqa: ANN401 - ints
        return nodes.add(operator, inputs, f"{path}.mixer/{name}", float_type="float32", **attributes)

    def number(value: float) -> str:
        return nodes.constant(f"number/{value!r}", np.array(value, np.float32))

    def largest(values: str, name: str) -> str:
        """[..., E] to [..., 1]."""
        one, indices = nodes.constant("router/one", np.array([1], np.int64)), f"{path}.mixer/{name}/indices"
        return nodes.add(
            "TopK", [values, one], f"{path}.mixer/{name}", more_outputs=[indices], float_type="float32",
            axis=-1, largest=1, sorted=1,
        )  # fmt: skip

    order = np.arange(num_experts, dtype=np.float32)
    places = nodes.constant("router/places", order if prefers_highest_place else -order)
    last = nodes.constant("router/axis", np.array([-1], np.int64))
    sizes = add("Abs", [logits], "sizes")

    def choose(among: str, turn: str) -> tuple[str, str]:
        """The mask [..., E] of the expert with the largest of the logits `among`, and its weight [..., 1]."""
        most = largest(among, f"{turn}/most")
        equal = add("Equal", [among, most], f"{turn}/is_most")
        place = largest(add("Where", [equal, places, number(-np.inf)], f"{turn}/places"), f"{turn}/place")
        distance = add("Sub", [most, logits], f"{turn}/distance")
        share = add("Div", [distance, add("Max", [sizes, most], f"{turn}/size")], f"{turn}/share")
        is_far = add("Greater", [share, number(2 * jitter)], f"{turn}/is_far")
        near = add("Where", [is_far, number(-np.inf), add("Sub", [among, most], f"{turn}/below")], f"{turn}/near")
        values = add("Exp", [near], f"{turn}/values")
        total = add("ReduceSum", [values, last], f"{turn}/total", keepdims=1, noop_with_empty_axes=0)
        return add("Equal", [places, place], f"{turn}/is_chosen"), add("Reciprocal", [total], f"{turn}/weight")

    first, first_weight = choose(logits, "first")
    others = add("Where", [first, number(-np.inf), logits], "others")
    second, second_weight = choose(others, "second")
    given = add("Where", [second, add("Log", [second_weight], "second/log"), number(_FAR_BELOW)], "second/given")
    given = add("Where", [first, add("Log", [first_weight], "first/log"), given], "given")
    return given, add("Add", [first_weight, second_weight], "sum")
