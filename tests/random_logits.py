"""Sessions whose logits are random, for tests of guides: only the guide keeps an answer in form."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np


class RandomCache:
    """Stands for trt_build's Cache: it only counts positions."""

    can_copy = True

    def __init__(self, slots: int, positions: int) -> None:
        self.num_slots, self.positions, self.lengths = slots, positions, [0] * slots

    def bytes_of(self, positions):
        return positions

    def shorten(self, slot, length):
        self.lengths[slot] = length

    def release(self, slot, length=0):
        self.lengths[slot] = length

    def copy(self, source, target, length=None):
        self.lengths[target] = self.lengths[source] if length is None else length


class RandomSession:
    """Logits that are random, and always the same behind a token at its position; rows past the tokenizer score highest
    of all. `bias` is added: by it a test makes some ids likelier."""

    routing = None
    mixes_lengths = True
    vocab_padding = 9

    def __init__(self, tokenizer, *, seed: int = 0, max_sequence: int = 4096, folder="random", bias=None) -> None:
        self.max_sequence = max_sequence
        manifest = SimpleNamespace(eos_token_ids=(tokenizer.eos_token_id,), tokenizer_size=tokenizer.size)
        self.engine = SimpleNamespace(manifest=manifest, resident_bytes=0, folder=folder)
        self._size, self._seed = tokenizer.size, seed
        self._bias = np.zeros(tokenizer.size, np.float32) if bias is None else bias

    def new_cache(self, slots=1):
        return RandomCache(slots, self.max_sequence)

    def step(self, cache, rows):
        logits = []
        for row in rows:
            for token in row.token_ids:
                logits.append(self._behind(token, cache.lengths[row.slot]))
                cache.lengths[row.slot] += 1
            del logits[len(logits) - len(row.token_ids) : len(logits) - row.num_logits]
        return np.array(logits, dtype=np.float32).reshape(-1, self._size + self.vocab_padding)

    def _behind(self, token, position):
        found = np.full(self._size + self.vocab_padding, 50, dtype=np.float32)
        found[: self._size] = np.random.default_rng([self._seed, token, position]).normal(0, 3, self._size) + self._bias
        return found
