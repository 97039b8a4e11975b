"""GPUs, as their makers' data sheets have them."""

from dataclasses import dataclass


@dataclass
class Card:
    """Limits of a GPU."""

    tera: float  # operations per second in bfloat16, without sparsity, 1e12
    bandwidth: float  # GB/s
    memory: float  # GB
    link: float  # GB/s from another GPU of the host: one direction of NVLink, or of PCIe


CARDS = {
    "b200": Card(2250, 8000, 180, 900),
    "h200": Card(989, 4800, 141, 450),
    "h100": Card(989, 3350, 80, 450),
    "a100": Card(312, 2039, 80, 300),
    "a100-40gb": Card(312, 1555, 40, 300),
    "l40s": Card(362, 864, 48, 32),
    "a10": Card(125, 600, 24, 32),
    "l4": Card(121, 300, 24, 32),
    "a6000": Card(155, 768, 48, 32),
    "rtx5090": Card(209.5, 1792, 32, 64),
    "rtx4090": Card(165, 1008, 24, 32),
    "rtx3090": Card(71, 936, 24, 32),
}
