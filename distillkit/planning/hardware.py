"""Rates of accelerators, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ACCELERATORS", "Accelerator"]


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """Rates of one accelerator, dense and without sparsity.

    Attributes:
        name: as in `--gpu`.
        tflops_bf16: bfloat16 matrix products, TFLOP/s.
        tflops_fp32: float32 ones, TFLOP/s (torch's default precision: no TF32).
        bandwidth: of its memory, GB/s.
        interconnect: to its neighbours in one node, GB/s each way.
        source: where the numbers stand.
    """

    name: str
    tflops_bf16: float
    tflops_fp32: float
    bandwidth: float
    interconnect: float
    source: str


ACCELERATORS = {
    "h100": Accelerator(
        name="h100",
        tflops_bf16=989,
        tflops_fp32=67,
        bandwidth=3350,
        interconnect=450,
        source="NVIDIA H100 data sheet, SXM",
    ),
    "h200": Accelerator(
        name="h200",
        tflops_bf16=989,
        tflops_fp32=67,
        bandwidth=4800,
        interconnect=450,
        source="NVIDIA H200 data sheet, SXM",
    ),
    "a100": Accelerator(
        name="a100",
        tflops_bf16=312,
        tflops_fp32=19.5,
        bandwidth=2039,
        interconnect=300,
        source="NVIDIA A100 80GB data sheet, SXM",
    ),
}
"""Name -> rates. Others: `--gpu-tflops`, `--bandwidth` and `--interconnect`."""

NETWORK = 50.0
"""GB/s per accelerator between nodes: 400 Gb/s, one network card each."""
