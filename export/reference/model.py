"""Computes a model in float32 straight from its checkpoint, one layer's attention or one expert in memory at a time.

    reference = Reference(read_model(open_checkpoint("mlabonne/phixtral-4x2_8")))
    for logits, router_logits in reference.run([[1, 2, 3], [4, 5]]):
        logits.shape           # (3, 51200), then (2, 51200); float32
        router_logits.shape    # (32, 3, 4), then (32, 2, 4); float32, None for a dense model

The windows of a text go through a layer together, so each weight is read once a run. float16 and bfloat16 are converted
as they are read. Every product is one of float32, by the BLAS library that numpy was built with, on its threads.

The tensor table is shared with engines, since both read the checkpoint through it. What is computed comes from the
family's `network`, which reads config.json by itself, and from the code of this folder. The proof is equality with
transformers' own models (tests/export/reference).

Memory, beside the interpreter, in values of 4 bytes, for T tokens of all windows together and S of the longest:
  weights             the larger of (N+2G)*D*H + N*D*H, a layer's attention, and 2*F*H (3*F*H if gated), an expert
  activations         about 6*T*H, and M*T*E of router logits for M layers with experts
  within attention    3*S*(N+2G)*D, and 16 MiB of scores
  within an expert    512*F (1024*F if gated)
  in the head         16 MiB of its weights, and the logits: S*V of a window, or 64 MiB of several short ones
For 2,048 tokens of phixtral-4x2_8 that is 0.5 GB in the layers and 0.7 GB at the end, 0.4 GB of them logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from export.checkpoint.tensor_table import Weights
from export.errors import CheckpointError, named
from export.families import Model
from export.families.shared.network import Layer, Network
from export.reference.attention import Projections
from export.reference.mixture import run_mlp
from export.reference.operations import FloatArray, normalise
from export.reference.reader import Reader

_HEAD_VALUES = 1 << 22  # values of the head's matrix that are held at a time
_LOGITS_VALUES = 1 << 24  # logits that are computed at a time; at least those of one window

Windows = Sequence[Sequence[int]]
Choose = Callable[[int, FloatArray], npt.NDArray[np.int64]]
Adjust = Callable[[int, FloatArray, FloatArray], FloatArray]
ATTENTION, MLP, SUM = "attention", "mlp", "sum"  # the parts of a layer that Observe is told of
Observe = Callable[[int, str, FloatArray], None]


class Reference:
    """A model's reference. It holds no weights: each call reads them again."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._weights = model.weights
        self._network = model.family.network(model.weights.checkpoint.config)

    def run(
        self,
        windows: Windows,
        progress: Callable[[str], None] = lambda _: None,
        choose: Choose | None = None,
        adjust: Adjust | None = None,
    ) -> Iterator[tuple[FloatArray, FloatArray | None]]:
        """Yield for each window of S token ids its logits [S, V] and the router logits [M, S, E] of the M layers that
        have experts (None for a dense model). `progress` is told of each layer. `choose(m, logits)` gives the experts
        [T, K] of the m-th mixture for its router logits [T, E] of all windows (None: those of the largest logits).
        `adjust(m, x, logits)` gives the logits [T, E] by which the m-th mixture routes, from its inputs x [T, H] and
        its router's own logits (None: these); the router logits that are yielded are its own.

        Raises CheckpointError for a token id that the embedding does not have, and for weights that cannot be read or
        are not finite."""
        bounds, routed = bounds_of(windows), list[FloatArray]()
        x = np.empty((0, 0), dtype=np.float32)
        for states, logits in self._layers(windows, progress, choose, adjust):
            x = states
            routed += [] if logits is None else [logits]
            del states
        x = normalise(x, self._network.norm, self._weights)
        for first, last, logits in self._logits(x, bounds):
            yield logits, np.stack([router[first:last] for router in routed]) if routed else None

    def router_logits(
        self, windows: Windows, progress: Callable[[str], None] = lambda _: None, adjust: Adjust | None = None
    ) -> Iterator[FloatArray]:
        """Yield the router logits [T, E] of each mixture, of the tokens of all windows one after the other. The head is
        not computed. `adjust` and errors are those of `run`."""
        for _, logits in self._layers(windows, progress, None, adjust):
            if logits is not None:
                yield logits

    def observe(
        self,
        windows: Windows,
        observe: Observe,
        progress: Callable[[str], None] = lambda _: None,
        choose: Choose | None = None,
        adjust: Adjust | None = None,
    ) -> Iterator[int]:
        """Compute the layers, and yield the number of each once `observe(layer, part, values)` was told what its
        ATTENTION and its MLP (or experts) add to the residual, and the SUM: [T, H] of the tokens of all windows. The
        head is not computed. The rest is that of `run`."""
        for index, _ in enumerate(self._layers(windows, progress, choose, adjust, observe)):
            yield index

    def _layers(
        self,
        windows: Windows,
        progress: Callable[[str], None],
        choose: Choose | None,
        adjust: Adjust | None,
        observe: Observe | None = None,
    ) -> Iterator[tuple[FloatArray, FloatArray | None]]:
        """Yield for each layer the states [T, H] that leave it, and its router's logits [T, E]."""
        x, bounds, reader = self._embedded(windows), bounds_of(windows), Reader(self._weights)
        mixture = 0
        for index, layer in enumerate(self._network.layers):
            progress(f"computing the reference: {index} of {len(self._network.layers)} layers")
            chosen = partial(choose, mixture) if choose else None
            adjusted = partial(adjust, mixture) if adjust else None
            observed = partial(observe, index) if observe else None
            x, logits = self._run_layer(layer, x, bounds, reader, chosen, adjusted, observed)
            mixture += logits is not None
            yield x, logits

    def layer_inputs(self, windows: Windows) -> Iterator[list[FloatArray]]:
        """Yield for each layer the hidden states that enter it: one array [S, H] for each window, [0, H] for an empty
        one. They are transformers' hidden_states[0 .. L-1], without the last one, which comes after the final norm.
        Raises CheckpointError as `run` does."""
        x, bounds, reader = self._embedded(windows), bounds_of(windows), Reader(self._weights)
        for index, layer in enumerate(self._network.layers):
            yield [x[first:last] for first, last in pairwise(bounds)]
            if index + 1 < len(self._network.layers):
                x, _ = self._run_layer(layer, x, bounds, reader)

    def _embedded(self, windows: Windows) -> FloatArray:
        """The states [T, H] that enter the first layer."""
        rows = embedding_rows(self._model, [token for window in windows for token in window])
        return rows * np.float32(self._network.embedding_factor)

    def _run_layer(
        self,
        layer: Layer,
        x: FloatArray,
        bounds: Sequence[int],
        reader: Reader,
        choose: Callable[[FloatArray], npt.NDArray[np.int64]] | None = None,
        adjust: Callable[[FloatArray, FloatArray], FloatArray] | None = None,
        observe: Callable[[str, FloatArray], None] | None = None,
    ) -> tuple[FloatArray, FloatArray | None]:
        """The states [T, H] that leave a layer, and its router's logits [T, E]; `x` stays as it is."""
        normed = normalise(x, layer.norm, self._weights)
        attended = Projections(layer.attention, reader).attended(normed, bounds)
        attended = normalise(attended, layer.attention_output_norm, self._weights)
        attended *= np.float32(layer.factor)
        if observe:
            observe(ATTENTION, attended)
        x = x + attended
        if not layer.parallel:
            normed = normalise(x, layer.mlp_norm, self._weights)
        output, logits = run_mlp(normed, layer.mlp, reader, self._model.architecture.experts_per_token, choose, adjust)
        output = normalise(output, layer.mlp_output_norm, self._weights)
        output *= np.float32(layer.factor)
        if observe:
            observe(MLP, output)
            observe(SUM, x + output)
        return x + output, logits

    def _logits(self, x: FloatArray, bounds: Sequence[int]) -> Iterator[tuple[int, int, FloatArray]]:
        """Yield of each window its first and last row of x [T, H], and its logits [S, V]. Short windows are computed
        together; the head's matrix is read once for each group of windows."""
        vocab = self._weights.table[f"{self._network.head}.weight"].shape[0]
        windows = list(pairwise(bounds))
        while windows:
            start = windows[0][0]
            count = sum(1 for _, last in windows if (last - start) * vocab <= _LOGITS_VALUES) or 1
            group, windows = windows[:count], windows[count:]
            logits = self._head(x[start : group[-1][1]], vocab)
            for first, last in group:
                yield first, last, logits[first - start : last - start]
            del logits  # freed before as much again is taken

    def _head(self, x: FloatArray, vocab: int) -> FloatArray:
        """Logits [rows, V] of [rows, H]; the head's matrix is read in slices of its rows."""
        logits = np.empty((len(x), vocab), dtype=np.float32)
        for columns, matrix, bias in head_slices(self._network, self._weights):
            np.matmul(x, matrix.T, out=logits[:, columns])
            logits[:, columns] += bias
        if self._network.logits_divisor != 1.0:
            logits /= np.float32(self._network.logits_divisor)
        return logits


def head_slices(network: Network, weights: Weights) -> Iterator[tuple[slice, FloatArray, FloatArray | float]]:
    """Yield the head in slices of its rows, which are columns of the logits: which, their matrix [n, H] and their bias
    [n] (0 without)."""
    name = f"{network.head}.weight"
    vocab, hidden = weights.table[name].shape
    biases = Reader(weights).bias(network.head)
    step = max(1, _HEAD_VALUES // hidden)
    for row in range(0, vocab, step):
        rows = slice(row, min(row + step, vocab))
        yield rows, weights.load_rows(name, rows), biases if isinstance(biases, float) else biases[rows]


def embedding_rows(model: Model, token_ids: Sequence[int], weights: Weights | None = None) -> FloatArray:
    """The embedding's rows of token ids, float32 [len(token_ids), H]; no other rows are read. `weights` are those of
    `model` unless they are given. Raises CheckpointError for a token id that the embedding does not have."""
    weights = weights or model.weights
    network = model.family.network(model.weights.checkpoint.config)
    name = f"{network.embedding}.weight"
    vocab, hidden = weights.table[name].shape
    distinct, places = np.unique(np.asarray(token_ids, dtype=np.int64), return_inverse=True)
    if len(distinct) and not 0 <= distinct[0] <= distinct[-1] < vocab:
        raise CheckpointError(
            f"computing {named(model.weights.checkpoint.identity)}: the text holds token {distinct[-1]}, the "
            f"embedding has {vocab} rows; the tokenizer is from another model: put the checkpoint's own beside it"
        )
    rows = np.empty((len(distinct), hidden), dtype=np.float32)
    for index, token in enumerate(distinct.tolist()):
        rows[index] = weights.load_rows(name, slice(token, token + 1))[0]
    found: FloatArray = rows[places]
    return found


def bounds_of(windows: Windows) -> list[int]:
    """The first row of each window in the tokens of all windows, and the number of all tokens."""
    return np.cumsum([0, *map(len, windows)]).tolist()
