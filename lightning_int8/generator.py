"""Random bits for stochastic rounding: a hash of (key, element index), the same in every backend."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

RANDOM_BITS = 16
"""Hash bits that one stochastic rounding consumes; one 32-bit word feeds two elements."""

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
HASH_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
"""Multipliers of a 32-bit integer hash with low avalanche bias (C. Wellons, "Hash Prospector", 2018)."""


def _splitmix64(value: int) -> int:
    """Finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def mix_key(seed: int, rank: int, call: int) -> tuple[int, int]:
    """Two 32-bit hash keys; different (seed, rank, call) give unrelated streams, not shifted ones."""
    mixed = _splitmix64(_mix_stream(seed, rank) ^ (call & _MASK64))
    return mixed & _MASK32, mixed >> 32


@lru_cache(maxsize=4096)
def _mix_stream(seed: int, rank: int) -> int:
    return _splitmix64(_splitmix64(seed & _MASK64) ^ (rank & _MASK64))


def random_bits(key: Tensor, count: int, device: torch.device) -> Tensor:
    """``RANDOM_BITS`` uniform bits per element, float32 ``(count,)``, by canonical element index.

    Element ``i`` takes the lower (even ``i``) or upper half of ``hash(i // 2)``, so the draw depends on the key and the
    index alone: not on the launch shape, the thread or the memory format.
    """
    k0, k1 = mix_key(*key.tolist())
    h = torch.arange((count + 1) // 2, dtype=torch.int64, device=device) & _MASK32
    h ^= k0
    h ^= h >> 16
    h = (h * HASH_MULTIPLIERS[0]) & _MASK32
    h ^= h >> 15
    h = (h + k1) & _MASK32
    h = (h * HASH_MULTIPLIERS[1]) & _MASK32
    h ^= h >> 16
    return torch.stack((h & 0xFFFF, h >> 16), dim=1).reshape(-1)[:count].float()
