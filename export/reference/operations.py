"""The operations of a decoder in numpy, float32, on the last axis of their arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from export.checkpoint.tensor_table import Weights
from export.families.shared.network import Activation, Norm

FloatArray = npt.NDArray[np.float32]

_SLICE_VALUES = 1 << 16  # values of a slice of an elementwise function: it and its temporaries stay in a core's cache


def layer_norm(x: FloatArray, weight: FloatArray, bias: FloatArray | float, epsilon: float) -> FloatArray:
    """LayerNorm of [T, H] over H: (x - mean) / sqrt(variance + epsilon) * weight + bias. The variance is the mean of
    the squared differences. Source: Ba et al., Layer Normalization, 2016, as in torch.nn.LayerNorm."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return rms_norm(centred, weight, epsilon) + bias


def rms_norm(x: FloatArray, weight: FloatArray, epsilon: float) -> FloatArray:
    """RMSNorm of [T, H] over H: x / sqrt(mean of squares + epsilon) * weight. Source: Zhang and Sennrich, Root Mean
    Square Layer Normalization, 2019, with epsilon where transformers' Llama adds it."""
    squares = np.square(x).mean(axis=-1, keepdims=True)
    result: FloatArray = x / np.sqrt(squares + np.float32(epsilon)) * weight
    return result


def normalise(x: FloatArray, norm: Norm | None, weights: Weights) -> FloatArray:
    """A norm of [T, n] over n with the factors that `weights` hold; `x` itself without a norm."""
    if norm is None:
        return x
    weight = weights.load(f"{norm.name}.weight")
    if not norm.centred:
        return rms_norm(x, weight, norm.epsilon)
    return layer_norm(x, weight, weights.load(f"{norm.name}.bias"), norm.epsilon)


def softmax_in_place(x: FloatArray, sink: FloatArray | None = None) -> FloatArray:
    """The softmax of x [..., n] over its last axis, written into x; returns x. `sink` [..., 1] is one more logit, whose
    share is not returned. Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023."""
    largest = x.max(axis=-1, keepdims=True)
    if sink is not None:
        largest = np.maximum(largest, sink)
    x -= largest
    np.exp(x, out=x)
    total = x.sum(axis=-1, keepdims=True)
    x /= total if sink is None else total + np.exp(sink - largest)
    return x


def _gelu_tanh(x: FloatArray) -> None:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))), written into x. Source: Hendrycks and Gimpel, Gaussian
    Error Linear Units, 2016. Where x^3 is infinite, tanh is 1 or -1."""
    with np.errstate(over="ignore"):
        inner = x * x
        inner *= np.float32(0.044715)
        inner += 1
        inner *= x
        inner *= np.float32(np.sqrt(2 / np.pi))
    np.tanh(inner, out=inner)
    inner += 1
    inner *= np.float32(0.5)
    x *= inner


def _silu(x: FloatArray, alpha: float) -> None:
    """x / (1 + exp(-alpha * x)), written into x. Where the power is infinite, the result is 0."""
    with np.errstate(over="ignore"):
        inner = np.exp(np.float32(-alpha) * x)
    inner += 1
    x /= inner


def activate(x: FloatArray, activation: Activation, alpha: float = 1.0) -> None:
    """Apply an activation to each value of x [T, F], in place. `alpha` is the factor in a SiLU's sigmoid."""
    functions: dict[Activation, Callable[[FloatArray], None]] = {
        Activation.GELU_TANH: _gelu_tanh,
        Activation.SILU: partial(_silu, alpha=alpha),
    }
    function = functions[activation]
    step = max(1, _SLICE_VALUES // x.shape[-1])
    for start in range(0, len(x), step):
        function(x[start : start + step])
