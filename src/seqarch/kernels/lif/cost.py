"""What the spiking neuron must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations


def bytes(B: int, C: int, N: int, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory at least: read x, write spikes; backward reads the gradient and a voltage, writes one."""
    return (3 if backward else 2) * B * C * N * itemsize


def flops(B: int, C: int, N: int, backward: bool = False) -> int:
    """Operations of the definition: two differences, a division, a sum and a comparison; about eight backward."""
    return (8 if backward else 5) * B * C * N
