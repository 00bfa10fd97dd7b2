"""Experts against numpy and ONNX Runtime's QMoE; every instruction set gives the same bits."""

import numpy as np
import onnxruntime
import pytest
from kernel_nodes import experts, mixture, product_float, product_int8, random_matrices
from onnx import TensorProto, helper, numpy_helper

from export.quantize.grid import pack

pytestmark = pytest.mark.needs_kernels
ACTIVATIONS = {
    "gelu": {},
    "silu": {},
    "swiglu": {},
    "swiglu with a clamp": {"alpha": 1.702, "beta": 1.0, "limit": 0.7},
}


def random_experts(draw, num, hidden, width, bits=4, block=32, activation="gelu", **how):
    rows = 2 * width if activation == "swiglu" else width
    return (
        random_matrices(draw, num, rows, hidden, bits, block, **how),
        random_matrices(draw, num, hidden, width, bits, block, **how),
    )


@pytest.mark.parametrize("case", ACTIVATIONS)
@pytest.mark.parametrize(("bits", "block"), [(2, 64), (3, 32), (4, 32), (4, 128), (5, 64), (6, 128), (8, 32)])
def test_both_paths_over_odd_shapes(case, bits, block):
    activation, numbers = case.partition(" ")[0], ACTIVATIONS[case]
    draw = np.random.default_rng(bits + block)
    shapes = [(1, 4, 2, 96, 160), (7, 3, 1, 40, 72), (33, 5, 5, 70, 33), (40, 8, 2, 64, 256), (2, 1, 1, 48, 80)]
    equal = 0
    for number, (tokens, num, k, hidden, width) in enumerate(shapes):
        pair = random_experts(
            draw, num, hidden, width, bits, block, activation, zeros=number % 2 == 1, bias=number % 3 != 1,
            half=number % 2 == 0,
        )  # fmt: skip
        x = draw.normal(size=(tokens, hidden)).astype(np.float32)
        logits = draw.normal(size=(tokens, num)).astype(np.float32)
        feeds = {"x": x, "router": logits}
        expected = mixture(x, logits, *pair, k, product_float, activation, **numbers)
        found = experts(*pair, k, activation, "float32", **numbers).run_everywhere(feeds)
        assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()

        # Between the products a value beside a rounding boundary may fall to its other side: one code of 127.
        expected = mixture(x, logits, *pair, k, product_int8, activation, **numbers)
        found = experts(*pair, k, activation, "int8", **numbers).run_everywhere(feeds)
        errors = np.abs(found - expected) / np.abs(expected).max()
        equal += (errors.max(axis=-1) <= 1e-6).sum()
        assert errors.max() <= 1e-2
    assert equal >= 0.75 * sum(tokens for tokens, *_ in shapes)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(("first", "second"), [((3, 128), (6, 32)), ((8, 32), (5, 64)), ((4, 64), (2, 128))])
def test_each_matrix_has_bits_and_blocks_of_its_own(activation, first, second):
    draw = np.random.default_rng(first[0])
    for tokens, num, k, hidden, width in [(1, 4, 2, 96, 160), (33, 5, 2, 70, 200)]:
        rows = 2 * width if activation == "swiglu" else width
        pair = (
            random_matrices(draw, num, rows, hidden, *first, zeros=tokens > 1),
            random_matrices(draw, num, hidden, width, *second),
        )
        x = draw.normal(size=(tokens, hidden)).astype(np.float32)
        logits = draw.normal(size=(tokens, num)).astype(np.float32)
        for activations, product, limit in (("float32", product_float, 2e-6), ("int8", product_int8, 1e-2)):
            expected = mixture(x, logits, *pair, k, product, activation)
            found = experts(*pair, k, activation, activations).run_everywhere({"x": x, "router": logits})
            errors = np.abs(found - expected).max(axis=-1) / np.abs(expected).max()
            assert errors.max() <= limit
            assert np.median(errors) <= 1e-4  # at int8 a value beside a rounding boundary may fall to its other side


def test_a_graph_that_states_one_storage_has_it_for_both_matrices():
    draw = np.random.default_rng(11)
    pair = random_experts(draw, 3, 64, 96, 4, 64)
    feeds = {"x": draw.normal(size=(3, 64)).astype(np.float32), "router": draw.normal(size=(3, 3)).astype(np.float32)}
    node = experts(*pair, 2)
    expected = node.run(feeds)
    del node.attributes["second_bits"], node.attributes["second_block_size"]
    np.testing.assert_array_equal(node.run(feeds), expected)


def test_equal_logits_go_to_the_lowest_experts():
    draw = np.random.default_rng(0)
    pair = random_experts(draw, 6, 64, 64)
    x = draw.normal(size=(4, 64)).astype(np.float32)
    logits = np.array(
        [[1, 1, 1, 1, 1, 1], [0, 2, 1, 2, 2, 1], [-0.0, 0.0, -0.0, 0.0, -1, -1], [3, 4, 5, 5, 4, 3]], np.float32
    )
    # By hand: 0 and 1 of all equals; 1 and 3; a zero's sign makes no difference; 2 and 3.
    chosen = np.array([[0, 1], [1, 3], [0, 1], [2, 3]])
    spread = np.full_like(logits, -1e9)
    np.put_along_axis(spread, chosen, np.zeros(chosen.shape, np.float32), axis=-1)
    node = experts(*pair, 2, activations="float32")
    np.testing.assert_array_equal(node.run_everywhere({"x": x, "router": logits}), node.run({"x": x, "router": spread}))


def test_an_expert_that_is_not_chosen_has_no_part():
    draw = np.random.default_rng(1)
    pair = random_experts(draw, 4, 64, 96)
    x = draw.normal(size=(5, 64)).astype(np.float32)
    logits = np.tile(np.array([0.5, -1.0, 2.0, 1.5], np.float32), (5, 1))
    expected = experts(*pair, 2).run_everywhere({"x": x, "router": logits})
    for matrices in pair:
        matrices.scales[:2] = np.nan
    np.testing.assert_array_equal(experts(*pair, 2).run({"x": x, "router": logits}), expected)


def test_one_expert_needs_no_router():
    draw = np.random.default_rng(2)
    pair = random_experts(draw, 1, 64, 128)
    x = draw.normal(size=(3, 64)).astype(np.float32)
    alone = experts(*pair, 1, router=False).run_everywhere({"x": x})
    routed = experts(*pair, 1).run({"x": x, "router": np.full((3, 1), 7, np.float32)})
    np.testing.assert_array_equal(alone, routed)


def test_a_row_gives_the_same_alone_and_among_others():
    draw = np.random.default_rng(3)
    pair = random_experts(draw, 4, 128, 256, block=64, activation="swiglu")
    x = draw.normal(size=(45, 128)).astype(np.float32)
    logits = draw.normal(size=(45, 4)).astype(np.float32)
    session = experts(*pair, 2, "swiglu").session()
    together = session.run(None, {"x": x, "router": logits})[0]
    alone = [session.run(None, {"x": x[i : i + 1], "router": logits[i : i + 1]})[0] for i in range(len(x))]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    shaped = session.run(None, {"x": x.reshape(5, 9, 128), "router": logits})[0]
    np.testing.assert_array_equal(shaped.reshape(45, 128), together)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_passed_on(value):
    draw = np.random.default_rng(4)
    pair = random_experts(draw, 3, 64, 64)
    x, logits = np.ones((3, 64), np.float32), draw.normal(size=(3, 3)).astype(np.float32)
    node = experts(*pair, 2)
    for broken in ("x", "router"):
        feeds = {"x": x.copy(), "router": logits.copy()}
        feeds[broken][1, 2] = value
        found = node.run_everywhere(feeds)
        assert np.isfinite(found[[0, 2]]).all()
        assert not np.isfinite(found[1]).any()


def test_activations_far_from_zero():
    # The first product gives x, the second gives it back: what remains is the activation.
    values = np.array([0, -0.0, 1e-40, -1e-8, 0.1, -0.1, 1, -1, 5, -5, 20, -20, 90, -90, 1e4, -1e4], np.float32)
    x = np.zeros((len(values), 32), np.float32)
    x[:, 0] = values
    draw = np.random.default_rng(5)
    pair = random_experts(draw, 1, 32, 32, 8, 32, bias=False, half=False)
    for matrices in pair:
        matrices.codes[:] = 128
        matrices.codes[0, 0, 0] = 129
        matrices.scales[:] = 1
    for activation in ("gelu", "silu"):
        found = experts(*pair, 1, activation, "float32").run_everywhere(
            {"x": x, "router": np.zeros((16, 1), np.float32)}
        )
        expected = mixture(x, np.zeros((16, 1)), *pair, 1, product_float, activation)
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(("bits", "activation"), [(4, "gelu"), (8, "gelu"), (4, "swiglu"), (4, "clamped swiglu")])
def test_within_the_rounding_of_onnx_runtimes_kernel(bits, activation):
    numbers = {"alpha": 1.702, "beta": 1.0, "limit": 1.5} if activation.startswith("clamped") else {}
    activation = activation.rpartition(" ")[2]
    draw = np.random.default_rng(bits)
    tokens, num, k, hidden, width = 9, 4, 2, 128, 256
    pair = random_experts(draw, num, hidden, width, bits, 32, activation, half=False)
    x = draw.normal(size=(tokens, hidden)).astype(np.float32)
    logits = draw.normal(size=(tokens, num)).astype(np.float32)
    exact = mixture(x, logits, *pair, k, product_float, activation, **numbers)
    theirs = _qmoe(pair, k, activation, x, logits, **numbers)
    ours = experts(*pair, k, activation, **numbers).run({"x": x, "router": logits})
    error = np.sqrt(np.mean((theirs - exact) ** 2))
    assert error < 0.05 * np.sqrt(np.mean(exact**2))
    assert np.sqrt(np.mean((ours - exact) ** 2)) <= max(1.1 * error, 0.01 * np.sqrt(np.mean(exact**2)))


def _qmoe(pair, k, activation, x, logits, alpha=1.0, beta=0.0, limit=np.inf):
    arrays = {}
    for number, matrices in enumerate(pair, start=1):
        arrays[f"codes{number}"] = pack(matrices.codes, matrices.bits)
        arrays[f"scales{number}"] = matrices.scales
        arrays[f"bias{number}"] = matrices.bias
    swiglu = activation == "swiglu"
    attributes = {"activation_alpha": alpha, "activation_beta": beta, "swiglu_limit": float(limit)} if swiglu else {}
    node = helper.make_node(
        "QMoE", ["x", "router", *arrays], ["y"], domain="com.microsoft", k=k, activation_type=activation,
        normalize_routing_weights=1, use_sparse_mixer=0, swiglu_fusion=int(swiglu), expert_weight_bits=pair[0].bits,
        block_size=pair[0].block_size, quant_type="int", accuracy_level=4, **attributes,
    )  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "theirs",
        [value("x", TensorProto.FLOAT, None), value("router", TensorProto.FLOAT, None)],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x, "router": logits})[0]
