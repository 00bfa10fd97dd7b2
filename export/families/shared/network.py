"""The record of what a family's network computes. `export.reference` computes the reference from it.

A family makes the record of config.json as it stands, and not of the `Architecture` that engines are built from: so a
fact that the reader of the Architecture gets wrong shows in a comparison of an engine with the reference. Sizes that
the tensors' shapes show are not in the record. Names are those of modules in the tensor table, without ".weight" and
".bias"; a bias is added wherever the table has one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from export.architecture import Router, SwiGlu
from export.rotary import RotaryScaling


class Activation(Enum):
    """The function between the two matrices of an MLP."""

    GELU_TANH = "gelu_tanh"  # GELU in its tanh form, which Phi-2's config calls gelu_new
    SILU = "silu"


@dataclass(frozen=True, kw_only=True)
class Norm:
    """The normalisation of a vector: with `centred` a LayerNorm, which subtracts the mean, else an RMSNorm.
    `epsilon` is added to the variance, or to the mean of the squares. The module `name` holds the factors."""

    name: str
    centred: bool
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Causal attention. The outputs of the modules `inputs`, one after the other, are all queries, then all keys,
    then all values; the module `output` follows the heads. `query_norm` and `key_norm` normalise a token's queries and
    its keys (None: not at all), as many neighbours together as the norm has factors: one head's, or those of all heads.
    Then queries, keys and values are held within -`clip` and `clip` (None: they stay). The first `rotary_dim` values of
    each head of queries and keys are turned, in half-split order, by frequencies that `rotary_scaling` scales. The
    products of query and key are multiplied by `factor` (None: 1/sqrt(D)). A token attends to `window` positions, its
    own included (None: to all). With `sinks` the table has a row of one logit for each query head, which takes part in
    the softmax over the positions and gives nothing to the output."""

    inputs: tuple[str, ...]
    output: str
    num_heads: int
    num_kv_heads: int
    rotary_dim: int
    rotary_base: float
    rotary_scaling: RotaryScaling | None = None
    factor: float | None = None
    window: int | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    clip: float | None = None
    sinks: str | None = None


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """An MLP, or a mixture of several if `gate` names a router's module. It computes second(activation(first(x))).

    If `gated`, the MLP computes second(activation(gate(x)) * up(x)). The module `first` then has two matrices, gate and
    up, whose rows alternate in the table; or it is gate alone, and the module `up` is the other one. `swiglu` says more
    of a gated SiLU. `router` says how a mixture chooses. To a mixture's output that of the MLP `shared` is added, times
    the sigmoid of the module `share`, which gives one value a token.
    """

    first: str
    second: str
    activation: Activation
    gated: bool = False
    up: str | None = None
    gate: str | None = None
    router: Router = field(default_factory=Router)
    swiglu: SwiGlu = field(default_factory=SwiGlu)
    shared: Mlp | None = None
    share: str | None = None

    @property
    def matrices(self) -> tuple[str, ...]:
        """The modules of all matrices but a router's and a share's."""
        own = (self.first, *([] if self.up is None else [self.up]), self.second)
        return own if self.shared is None else (*own, *self.shared.matrices)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer: y = x + attention(x), then y + mlp(y). `norm` normalises attention's input, `mlp_norm` the MLP's,
    `attention_output_norm` and `mlp_output_norm` their outputs (None: no norm). Outputs are multiplied by `factor`
    before they are added. In a `parallel` layer both have the same input: x + attention(norm(x)) + mlp(norm(x))."""

    attention: Attention
    mlp: Mlp
    norm: Norm | None = None
    mlp_norm: Norm | None = None
    attention_output_norm: Norm | None = None
    mlp_output_norm: Norm | None = None
    parallel: bool = False
    factor: float = 1.0

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms of the layer, those of queries and keys among them."""
        own = (self.norm, self.attention.query_norm, self.attention.key_norm, self.attention_output_norm)
        return tuple(norm for norm in (*own, self.mlp_norm, self.mlp_output_norm) if norm is not None)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A decoder: rows of the embedding, times `embedding_factor`, go through the layers, the norm and the head; the
    logits are divided by `logits_divisor`."""

    embedding: str
    layers: tuple[Layer, ...]
    norm: Norm
    head: str
    embedding_factor: float = 1.0
    logits_divisor: float = 1.0
