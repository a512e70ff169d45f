"""Reproducible noise: MurmurHash3 (32 bits) of seed, position and column."""

from types import SimpleNamespace

import torch

_MASK = 0xFFFFFFFF


def register():
    """SGLang takes it from torch.ops, as an operator with overloads."""
    torch.ops.sgl_kernel.murmur_hash32_cpu = SimpleNamespace(default=murmur_hash32)


def murmur_hash32(seed_B, positions_B, columns_V):
    """[B, V] uint32."""
    seed_B1 = seed_B.view(torch.int64).unsqueeze(1)
    hashed = torch.zeros(len(seed_B), len(columns_V), dtype=torch.int64)
    for block in (
        seed_B1 & _MASK,
        (seed_B1 >> 32) & _MASK,
        positions_B.long().unsqueeze(1) & _MASK,
        columns_V.long() & _MASK,
    ):
        mixed = _times(block, 0xCC9E2D51)
        mixed = _times(_rotated(mixed, 15), 0x1B873593)
        hashed = (_times(_rotated(hashed ^ mixed, 13), 5) + 0xE6546B64) & _MASK
    hashed = hashed ^ 16  # bytes hashed
    hashed = _times(hashed ^ (hashed >> 16), 0x85EBCA6B)
    hashed = _times(hashed ^ (hashed >> 13), 0xC2B2AE35)
    return (hashed ^ (hashed >> 16)).to(torch.uint32)


def _times(values, factor):
    """Modulo 2**32: an int64 product wraps, and keeps its lower bits."""
    return (values * factor) & _MASK


def _rotated(values, places):
    return ((values << places) | (values >> (32 - places))) & _MASK
