"""Stands for tensorrt_llm/mapping.py: which rank has which part.

rank = pp_rank * tp_size + tp_rank; tp_rank = moe_tp_rank * moe_ep_size + moe_ep_rank. Layers and experts lie in
blocks, the first pipeline ranks taking what does not divide.
"""

from __future__ import annotations

from typing import Any


class Mapping:
    def __init__(
        self,
        world_size: int = 1,
        rank: int = 0,
        gpus_per_node: int = 8,
        *,
        cp_size: int = 1,
        cp_config: dict[str, Any] | None = None,
        tp_size: int = 1,
        pp_size: int = 1,
        moe_cluster_size: int = -1,
        moe_tp_size: int = -1,
        moe_ep_size: int = -1,
        attn_tp_size: int = -1,
        attn_cp_size: int = -1,
        enable_attention_dp: bool = False,
        enable_lm_head_tp_in_adp: bool = False,
    ) -> None:
        clusters = 1 if moe_cluster_size == -1 else moe_cluster_size
        if moe_tp_size == -1 and moe_ep_size == -1:
            moe_tp_size, moe_ep_size = tp_size // clusters, 1
        elif moe_tp_size == -1:
            moe_tp_size = tp_size // (moe_ep_size * clusters)
        elif moe_ep_size == -1:
            moe_ep_size = tp_size // (moe_tp_size * clusters)
        if tp_size * pp_size * cp_size != world_size:
            raise ValueError(
                "world_size must equal to tp_size * pp_size * cp_size, "
                f"but got {world_size} != {tp_size} * {pp_size} * {cp_size}."
            )
        if moe_tp_size * moe_ep_size * clusters != tp_size:
            raise ValueError(
                "tp_size must equal to moe_tp_size * moe_ep_size * moe_cluster_size, "
                f"but got {tp_size} != {moe_tp_size} * {moe_ep_size} * {clusters}"
            )
        self.world_size, self.gpus_per_node = world_size, gpus_per_node
        self.tp_size, self.pp_size, self.cp_size = tp_size, pp_size, cp_size
        self.cp_config = cp_config or {}
        self.moe_tp_size, self.moe_ep_size, self.moe_cluster_size = moe_tp_size, moe_ep_size, clusters
        self.attn_tp_size = tp_size * cp_size if attn_tp_size == -1 else attn_tp_size
        self.attn_cp_size = 1 if attn_cp_size == -1 else attn_cp_size
        self.enable_attention_dp = enable_attention_dp
        self.enable_lm_head_tp_in_adp = enable_lm_head_tp_in_adp
        self.rank = rank

    @property
    def rank(self) -> int:
        return self._rank

    @rank.setter
    def rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"Rank should be an integer between 0 and {self.world_size - 1}, but got {rank}.")
        self._rank = rank

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and vars(self) == vars(other)

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.tp_size * self.cp_size)

    @property
    def moe_tp_rank(self) -> int:
        return self.tp_rank // (self.moe_ep_size * self.moe_cluster_size)

    @property
    def moe_ep_rank(self) -> int:
        return self.tp_rank % self.moe_ep_size

    @property
    def tp_group(self) -> list[int]:
        first = self.rank - self.tp_rank
        return list(range(first, first + self.tp_size))

    def has_moe_tp(self) -> bool:
        return self.moe_tp_size > 1

    def has_moe_ep(self) -> bool:
        return self.moe_ep_size > 1

    def has_pp(self) -> bool:
        return self.pp_size > 1

    def is_first_pp_rank(self) -> bool:
        return self.pp_rank == 0

    def is_last_pp_rank(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def prev_pp_rank(self) -> int:
        return (self.rank - self.tp_size * self.cp_size) % self.world_size

    def next_pp_rank(self) -> int:
        return (self.rank + self.tp_size * self.cp_size) % self.world_size

    def pp_layers(self, num_layers: int) -> list[int]:
        """Indices of this rank's layers, counted over the whole model."""
        assert self.pp_size <= num_layers, "pp size cannot be larger than num_hidden_layers"
        share, more = divmod(num_layers, self.pp_size)
        first = self.pp_rank * share + min(self.pp_rank, more)
        return list(range(first, first + share + (self.pp_rank < more)))

    def ep_experts(self, num_experts: int) -> list[int]:
        """Indices of this rank's experts."""
        share = num_experts // self.moe_ep_size
        return list(range(self.moe_ep_rank * share, (self.moe_ep_rank + 1) * share))

    @classmethod
    def from_dict(cls, mapping: dict[str, Any]) -> Mapping:
        return cls(**mapping)

    def to_dict(self) -> dict[str, Any]:
        names = (
            "world_size", "rank", "gpus_per_node", "cp_size", "cp_config", "tp_size", "pp_size", "moe_tp_size",
            "moe_cluster_size", "moe_ep_size", "attn_tp_size", "attn_cp_size", "enable_attention_dp",
            "enable_lm_head_tp_in_adp",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}
