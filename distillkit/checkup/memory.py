"""Free memory against the plan."""

from __future__ import annotations

from pathlib import Path

import torch

from distillkit.checkup.checks import Finding
from distillkit.checkup.patient import Patient
from distillkit.planning.memory import phases
from distillkit.planning.recipe import Assumptions, read_workload

__all__ = ["free_memory", "memory"]

_GIB = 2**30
_CLOSE = 0.9
"""Share of the free memory from which on a plan is close."""


def memory(patient: Patient) -> Finding:
    """Compare what is free on the device with the plan's largest phase."""
    name, on_gpu = "memory", patient.device.type == "cuda"
    given = Assumptions(ranks=patient.ranks, device="cuda" if on_gpu else "cpu")
    load = read_workload(
        patient.name,
        patient.module,
        patient.data,
        strategy=patient.strategy,
        precision=patient.precision,
        given=given,
    )
    planned = phases(load)
    largest = max(planned, key=lambda phase: phase.total)
    # Ranks share a CPU's memory; each GPU has its own.
    together = 1 if on_gpu else patient.ranks
    need, free = largest.total * together, free_memory(patient.device)
    models = sum(largest.parts.get(kind, 0.0) for kind in ("weights", "teacher", "reference", "engine weights"))
    if models * together > free:
        patient.too_large = f"{models * together / _GIB:.1f} GiB of weights, {free / _GIB:.1f} GiB free"
    text = f"{need / _GIB:.2f} GiB planned for the largest phase ({largest.name}), {free / _GIB:.1f} GiB free"
    if need > free:
        advice = "distillkit plan, which says what takes it and what would fit"
        return Finding(name=name, verdict="fail", text=text, advice=advice)
    return Finding(name=name, verdict="warn" if need > _CLOSE * free else "pass", text=text)


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a GPU, or of this machine for a CPU (Linux: what can be had without swapping)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    available = next(line for line in lines if line.startswith("MemAvailable:"))
    return int(available.split()[1]) * 1024
