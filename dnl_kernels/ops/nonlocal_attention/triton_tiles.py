"""The tiles of nonlocal_attention's Triton kernels: data, by the compile report (docs/gpu/triton-compile.md)."""

from __future__ import annotations

from typing import NamedTuple

from ..._triton import architecture


class Config(NamedTuple):
    """Tile of queries, tile of keys, warps, stages of the loop's loads."""

    queries: int
    keys: int
    warps: int
    stages: int


HALF, FULL = 2, 4  # bytes of an element
# (kernel, bytes of an element) -> the largest max(D, E) -> tiles: large ones that do not spill, within 99 KiB of shared
# memory, with 8 warps or more resident. Without tensor cores a product's operands fill the registers, so float32 tiles
# are smaller.
TILES = {
    ("forward", HALF): {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 3), 256: Config(64, 32, 8, 2)},
    ("forward", FULL): {64: Config(64, 32, 8, 1), 128: Config(32, 16, 8, 1), 256: Config(32, 16, 8, 1)},
    ("query", HALF): {64: Config(128, 64, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 1)},
    ("query", FULL): {64: Config(32, 32, 4, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    ("key", HALF): {64: Config(64, 64, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 1)},
    ("key", FULL): {64: Config(32, 64, 8, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
}
# Anything but softmax without masks needs more registers; tried on a causal, masked, channels-first Gaussian.
TILES_GENERAL = {
    ("forward", HALF): {64: Config(128, 32, 8, 3), 128: Config(64, 16, 8, 3), 256: Config(32, 32, 8, 2)},
    ("forward", FULL): {64: Config(32, 16, 8, 1), 128: Config(32, 16, 8, 1), 256: Config(16, 16, 8, 1)},
    ("query", HALF): {64: Config(128, 16, 8, 2), 128: Config(64, 32, 8, 2), 256: Config(32, 16, 8, 1)},
    ("query", FULL): {64: Config(16, 32, 8, 1), 128: Config(32, 16, 8, 1), 256: Config(16, 16, 8, 1)},
    ("key", HALF): {64: Config(64, 32, 8, 2), 128: Config(32, 32, 8, 2), 256: Config(16, 16, 8, 1)},
    ("key", FULL): {64: Config(16, 64, 8, 1), 128: Config(16, 32, 8, 1), 256: Config(16, 16, 8, 1)},
}
# What is larger with 163 KiB of shared memory or more, or would spill: (architecture, kernel, bytes, plain).
TILES_OF = {
    (80, "query", HALF, True): {256: Config(64, 32, 8, 1)},
    (90, "query", FULL, False): {64: Config(32, 16, 8, 1)},
    (100, "query", HALF, True): {256: Config(64, 32, 8, 1)},
}


def config(kernel: str, element: int, width: int, plain: bool = True) -> Config:
    """plain: softmax without masks."""
    table = (TILES if plain else TILES_GENERAL)[kernel, element]
    table = {**table, **TILES_OF.get((architecture(), kernel, element, plain), {})}
    return table[next(most for most in sorted(table) if width <= most)]
