"""What freed memory does: it is kept for the next tensor, and given back where memory is at its highest."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from distillkit.buffers import Scratch, in_pages_of_its_own

FREED_THEN_GRADIENT = """
from pathlib import Path
import torch
from distillkit.buffers import in_pages_of_its_own, keep_freed_pages

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

keep_freed_pages()
weight = torch.zeros(9 * 2**20)
blocks = [torch.ones(2**18) for _ in range(64)]  # 1 MiB each
full = resident()
kept = blocks[-1]
del blocks
freed = resident()
small, after_small = in_pages_of_its_own(weight[: 2**20]), resident()
large, after_large = in_pages_of_its_own(weight), resident()
print(full - freed, freed - after_small, after_small - after_large)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_freed_pages_are_kept_until_a_large_gradient_needs_room() -> None:
    done = subprocess.run([sys.executable, "-c", FREED_THEN_GRADIENT], capture_output=True, text=True, check=True)
    by_freeing, by_small, by_large = map(float, done.stdout.split())
    assert by_freeing < 10 and by_small < 10, "MiB that the kernel had back too early"
    assert by_large > 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_like_the_weights(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 2, dtype=dtype))
    found = in_pages_of_its_own(weight)
    assert (found.shape, found.dtype, found.requires_grad) == (weight.shape, dtype, False)


def test_a_buffer_is_used_again_and_grows() -> None:
    scratch = Scratch()
    first = scratch.rows("own", 2, 3, torch.zeros(0))
    again = scratch.rows("own", 3, 2, torch.zeros(0))
    larger = scratch.rows("own", 4, 2, torch.zeros(0))
    assert first.data_ptr() == again.data_ptr() != larger.data_ptr()
    assert larger.shape == (4, 2) and scratch.rows("own", 1, 1, torch.zeros(0)).data_ptr() == larger.data_ptr()
