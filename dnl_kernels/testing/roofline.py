"""The time below which no kernel can stay on a GPU: a roofline of data-sheet numbers, computed and never measured."""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """Memory bandwidth in GB/s, dense multiplication in TFLOP/s: half types with float32 sums, float32 by FMA."""

    bandwidth: float
    half: float
    single: float


DEVICES = {  # NVIDIA's data sheets
    "RTX 3090": Device(936, 71, 35.6),
    "A100": Device(1555, 312, 19.5),
    "H100": Device(3350, 989, 67),
}
SOURCE = (
    "max(bytes / bandwidth, FLOPs / rate), from the data sheets (936, 1555, 3350 GB/s; 71, 312, 989 TFLOP/s for half "
    "types; 35.6, 19.5, 67 for float32 by FMA)"
)


def floors(moved: float, flops: float, single: bool) -> dict[str, float]:
    """Microseconds by device for bytes that must move and operations that must be done; single: in float32."""
    return {
        name: max(moved / d.bandwidth / 1e3, flops / (d.single if single else d.half) / 1e6)
        for name, d in DEVICES.items()
    }
