"""MLPs and mixtures, with one expert's matrices in memory at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from export.architecture import Router
from export.checkpoint.tensor_table import Weights
from export.errors import ExportError
from export.families.shared.network import Mlp
from export.reference.operations import FloatArray, activate, softmax_in_place
from export.reference.reader import Reader

BLOCK_TOKENS = 512  # tokens whose values between an expert's matrices are held at a time


def run_mlp(
    x: FloatArray,
    mlp: Mlp,
    reader: Reader,
    experts_per_token: int,
    choose: Callable[[FloatArray], npt.NDArray[np.int64]] | None = None,
    adjust: Callable[[FloatArray, FloatArray], FloatArray] | None = None,
) -> tuple[FloatArray, FloatArray | None]:
    """The output [T, H] of an MLP or mixture for [T, H], and a mixture's router logits [T, E]. `adjust(x, logits)`
    gives the logits [T, E] that route in place of the router's own; those that are returned are the router's own.

    Holds one expert and the values of BLOCK_TOKENS tokens between its matrices. An expert that no token chooses is not
    read.
    """
    result = np.zeros_like(x)
    if mlp.gate is None:
        add_expert(result, x, np.arange(len(x)), None, mlp, reader, 0)
        return result, None
    logits = router_logits(x, mlp.gate, reader.weights)
    routing = logits if adjust is None else adjust(x, logits)
    chosen, shares = route(routing, mlp.router, experts_per_token, choose)
    for expert in range(logits.shape[1]):
        tokens, places = np.nonzero(chosen == expert)
        if len(tokens):
            add_expert(result, x, tokens, shares[tokens, places, None], mlp, reader, expert)
    if mlp.shared is not None:
        add_expert(result, x, np.arange(len(x)), share_of_shared(x, mlp, reader.weights), mlp.shared, reader, 0)
    return result, logits


def share_of_shared(x: FloatArray, mlp: Mlp, weights: Weights) -> FloatArray:
    """What the outputs of the MLP beside the experts are multiplied by, [T, 1], for x [T, H]."""
    with np.errstate(over="ignore"):  # the share is 0 where the power is infinite
        shares: FloatArray = 1 / (1 + np.exp(-(x @ weights.load(f"{mlp.share}.weight").T)))
    return shares


def router_logits(x: FloatArray, gate: str, weights: Weights) -> FloatArray:
    """The logits [T, E] of the router's module `gate` for x [T, H]."""
    logits: FloatArray = x @ weights.load(f"{gate}.weight").T
    if f"{gate}.bias" in weights.table:
        logits += weights.load(f"{gate}.bias")
    return logits


def route(
    logits: FloatArray,
    router: Router,
    experts_per_token: int,
    choose: Callable[[FloatArray], npt.NDArray[np.int64]] | None = None,
) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """The K experts of each token, [T, K], and their weights, [T, K], by the router's logits [T, E]. Among equal logits
    the lowest expert index is chosen; with `choose`, the experts [T, K] that it gives for the logits. Raises
    ExportError for a router that is not computed."""
    if router.groups > 1 or router.bias:
        raise ExportError("computing the reference: it has no routers with groups of experts or with a bias of scores")
    chosen = choose(logits) if choose else np.argsort(-logits, axis=-1, kind="stable")[:, :experts_per_token]
    if router.score == "sigmoid":
        scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
        shares = np.take_along_axis(scores, chosen, axis=-1).astype(np.float32)
        shares = shares / shares.sum(axis=-1, keepdims=True) if router.normalise else shares
    elif router.jitter is not None:
        shares = _sparse_mixer(logits, chosen, router.jitter)
    elif router.normalise:  # the quotients of a softmax's values are those of the softmax over the chosen alone
        shares = softmax_in_place(np.take_along_axis(logits, chosen, axis=-1))
    else:
        shares = np.take_along_axis(softmax_in_place(logits.copy()), chosen, axis=-1)
    return chosen, shares * np.float32(router.scale)


def _sparse_mixer(logits: FloatArray, chosen: npt.NDArray[np.int64], jitter: float) -> FloatArray:
    """The weights [T, 2] of the sparse mixer of `Router` for the experts `chosen` [T, 2], by the logits [T, E]."""
    shares, among = np.empty(chosen.shape, np.float32), logits.copy()
    for turn in range(2):
        most = np.take_along_axis(among, chosen[:, turn : turn + 1], axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is not far
            is_far = (most - logits) / np.maximum(np.abs(logits), most) > np.float32(2 * jitter)
        values = np.exp(np.where(is_far, -np.inf, among - most))
        shares[:, turn] = 1 / values.sum(axis=-1)
        np.put_along_axis(among, chosen[:, turn : turn + 1], -np.inf, axis=-1)
    return shares


class Expert:
    """An expert of a mixture, or an MLP, which is the expert 0, with its matrices in float32, each read once when it is
    needed. They are in slots of `reader`, so they are valid until it reads another expert's."""

    def __init__(self, mlp: Mlp, reader: Reader, expert: int) -> None:
        self._mlp, self._reader, self._expert = mlp, reader, expert
        self._first = _gate_and_up(mlp, reader.expert("input", f"{mlp.first}.weight", expert))
        if mlp.up is not None:
            self._first += reader.expert("up", f"{mlp.up}.weight", expert)
        self._biases = _gate_and_up(mlp, _biases("input bias", reader, mlp.first, expert))
        self._second: FloatArray | None = None

    def inner(self, inputs: FloatArray) -> FloatArray:
        """What enters the second matrix, [n, F], for inputs [n, H]; valid until the next call."""
        inner = []
        for turn, matrix in enumerate(self._first):
            space = self._reader.space(("inner", turn), (len(inputs), len(matrix)))
            inner.append(np.matmul(inputs, matrix.T, out=space))
            if self._biases:
                inner[-1] += self._biases[turn]
        swiglu = self._mlp.swiglu
        if swiglu.limit is not None:
            np.minimum(inner[0], np.float32(swiglu.limit), out=inner[0])
            np.clip(inner[1], np.float32(-swiglu.limit), np.float32(swiglu.limit), out=inner[1])
        activate(inner[0], self._mlp.activation, swiglu.alpha)
        if self._mlp.gated:
            if swiglu.beta:
                inner[1] += np.float32(swiglu.beta)
            inner[0] *= inner[1]
        return inner[0]

    def output(self, inner: FloatArray) -> FloatArray:
        """The expert's output [n, H] for what enters the second matrix."""
        if self._second is None:
            self._second = self._reader.expert("output", f"{self._mlp.second}.weight", self._expert)[0]
        outputs: FloatArray = inner @ self._second.T
        biases = _biases("output bias", self._reader, self._mlp.second, self._expert)
        return outputs + biases[0] if biases else outputs


def add_expert(
    result: FloatArray,
    x: FloatArray,
    tokens: npt.NDArray[np.int64],
    shares: FloatArray | None,
    mlp: Mlp,
    reader: Reader,
    expert: int,
) -> None:
    """Add an expert's outputs for the rows `tokens` [n] of x [T, H] to the same rows of `result`, times `shares`
    [n, 1]. An MLP is the expert 0."""
    own = Expert(mlp, reader, expert)
    for start in range(0, len(tokens), BLOCK_TOKENS):
        rows = tokens[start : start + BLOCK_TOKENS]
        outputs = own.output(own.inner(x[rows]))
        result[rows] += outputs if shares is None else outputs * shares[start : start + BLOCK_TOKENS]


def _gate_and_up(mlp: Mlp, found: list[FloatArray]) -> list[FloatArray]:
    """What a row has of an expert, as gate and up where the checkpoint stores their alternating rows as one matrix or
    vector."""
    if mlp.gated and mlp.up is None and len(found) == 1:
        return [found[0][0::2], found[0][1::2]]
    return found


def _biases(slot: str, reader: Reader, name: str, expert: int) -> list[FloatArray]:
    """An expert's biases of a module, [out] for each of its matrices; none if the table has no row for them."""
    bias = f"{name}.bias"
    return reader.expert(slot, bias, expert) if bias in reader.weights.table else []
