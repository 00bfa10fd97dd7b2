"""How a model is distributed over GPUs: the sizes of tensor, pipeline and expert parallelism, and each rank's share.

Ranks are numbered over tensor and pipeline parallelism together: rank = pp_rank * tp_size + tp_rank. A tensor-parallel
rank holds, of the experts, the slice moe_tp_rank = tp_rank div moe_ep_size of each expert's width and the block
moe_ep_rank = tp_rank mod moe_ep_size of experts. Layers are distributed evenly; if they do not divide, the first
pipeline ranks get one more. Source: tensorrt_llm/mapping.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from export.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """Sizes of parallelism, under TensorRT-LLM's names. If one of `moe_tp_size` and `moe_ep_size` is None, it is
    `tp_size` divided by the other. If both are None, moe_tp_size is `tp_size` and moe_ep_size is 1, as in the
    library."""

    tp_size: int = 1
    pp_size: int = 1
    moe_tp_size: int | None = None
    moe_ep_size: int | None = None

    @property
    def world_size(self) -> int:
        """The number of ranks, which is the number of GPUs."""
        return self.tp_size * self.pp_size

    @property
    def moe_tp(self) -> int:
        """The number of slices that each expert's width is cut into."""
        if self.moe_tp_size is not None:
            return self.moe_tp_size
        return self.tp_size if self.moe_ep_size is None else max(1, self.tp_size // max(1, self.moe_ep_size))

    @property
    def moe_ep(self) -> int:
        """The number of blocks that the experts are distributed in."""
        if self.moe_ep_size is not None:
            return self.moe_ep_size
        return 1 if self.moe_tp_size is None else max(1, self.tp_size // max(1, self.moe_tp_size))

    def mapping(self) -> dict[str, int]:
        """The object `mapping` of config.json."""
        return {
            "world_size": self.world_size,
            "gpus_per_node": max(8, self.world_size),
            "cp_size": 1,
            "tp_size": self.tp_size,
            "pp_size": self.pp_size,
            "moe_tp_size": self.moe_tp,
            "moe_ep_size": self.moe_ep,
        }

    def layers(self, pp_rank: int, num_layers: int) -> range:
        """The layers of a pipeline rank."""
        share, more = divmod(num_layers, self.pp_size)
        first = pp_rank * share + min(pp_rank, more)
        return range(first, first + share + (pp_rank < more))

    def pp_rank_of(self, layer: int, num_layers: int) -> int:
        """The pipeline rank that holds a layer."""
        return next(rank for rank in range(self.pp_size) if layer in self.layers(rank, num_layers))

    def rank(self, pp_rank: int, tp_rank: int) -> int:
        """The number of a rank, as in the name of its file."""
        return pp_rank * self.tp_size + tp_rank

    def problems(self, architecture: Architecture, *, pipeline: bool) -> list[str]:
        """The reasons why this model cannot be distributed in these sizes; empty if it can. `pipeline` tells whether
        its network supports pipeline parallelism."""
        sizes = {"tp_size": self.tp_size, "pp_size": self.pp_size, "moe_tp_size": self.moe_tp,
                 "moe_ep_size": self.moe_ep}  # fmt: skip
        wrong = [f"{name} is {value}, expected 1 or more" for name, value in sizes.items() if value < 1]
        if wrong:
            return wrong
        facts, found = architecture, []
        heads, keys, experts = facts.num_heads, facts.num_kv_heads, facts.num_experts

        def indivisible(what: str, number: int, size_name: str, size: int) -> None:
            if number % size:
                found.append(f"{number} {what} cannot be divided evenly by {size_name} {size}")

        if self.pp_size > facts.num_layers:
            found.append(f"pp_size is {self.pp_size}, expected at most the number of layers, {facts.num_layers}")
        if self.pp_size > 1 and not pipeline:
            found.append(
                f"pp_size is {self.pp_size}: TensorRT-LLM's Phi networks cannot be cut between layers; use tp_size"
            )
        indivisible("attention heads", heads, "tp_size", self.tp_size)
        if keys % self.tp_size and self.tp_size % keys:
            found.append(
                f"{keys} key/value heads can be neither divided among nor repeated over tp_size {self.tp_size}"
            )
        if not facts.is_moe:
            if self.moe_tp_size not in (None, 1) or self.moe_ep_size not in (None, 1):
                found.append("moe_tp_size and moe_ep_size are for mixtures; this model is dense")
            indivisible("rows of the MLP", facts.ffn_size, "tp_size", self.tp_size)
            return found
        if self.moe_tp * self.moe_ep != self.tp_size:
            found.append(f"moe_tp_size {self.moe_tp} times moe_ep_size {self.moe_ep} is not tp_size {self.tp_size}")
        indivisible("experts", experts, "moe_ep_size", self.moe_ep)
        indivisible("rows of an expert", facts.ffn_size, "moe_tp_size", self.moe_tp)
        if facts.shared_ffn_size is not None:
            indivisible("rows of the expert beside the others", facts.shared_ffn_size, "tp_size", self.tp_size)
        return found
