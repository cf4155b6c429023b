"""`distillkit plan`: memory of a rank and time of a step, before anything is started."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from distillkit.cli.parsed import parse_recipe, split
from distillkit.errors import ConfigError, problem
from distillkit.planning.fit import largest
from distillkit.planning.hardware import ACCELERATORS, NETWORK
from distillkit.planning.memory import phases
from distillkit.planning.recipe import Assumptions, read_workload
from distillkit.planning.report import Plan
from distillkit.planning.timing import Machine, phase_times
from distillkit.planning.workload import Workload

__all__ = ["main", "make_plan"]

_RESERVE = {"cuda": 0.05, "cpu": 0.0}
"""Share of the memory left free for fragmentation of torch's allocator."""

_SERVER_SHARE = 0.9
"""Share of a server GPU's memory that vLLM takes, weights and cache together."""


def main(argv: Sequence[str]) -> int:
    """Run `distillkit plan`; return the exit code.

    Raises:
        ConfigError: the recipe or an option cannot be used.
        ModelError: a model's config cannot be read.
    """
    options, arguments = split(_parser(), argv)
    plan = make_plan(options, arguments)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    print(json.dumps(plan.data(), indent=2) if options.json else "\n".join(plan.lines()))
    return 0


def make_plan(options: argparse.Namespace, arguments: Sequence[str]) -> Plan:
    """Return the plan of a recipe (`arguments`: `--config` and overrides) under the command's own options."""
    _check(options)
    recipe = parse_recipe(arguments)
    trainer: Any = recipe.trainer_settings
    device: Literal["cpu", "cuda"] = "cpu" if trainer.accelerator == "cpu" else "cuda"
    module: Any = recipe.model
    given = Assumptions(
        ranks=1,
        device=device,
        student_config=options.student_config,
        teacher_config=options.teacher_config,
        prompt_tokens=options.prompt_tokens,
        completion_tokens=options.completion_tokens,
    )
    name = recipe.recipe.name
    read = {"strategy": trainer.strategy, "precision": trainer.precision}
    load = read_workload(name, module, recipe.datamodule, **read, given=given)
    memory = options.gpu_memory * 2**30
    for_teacher, for_sampler, servers = _servers(load, memory, options)
    ranks = options.gpus - for_teacher - for_sampler
    if ranks < 1:
        got = f"{options.gpus} GPUs, {for_teacher + for_sampler} of them for servers"
        raise ConfigError(problem("--gpus: none is left to train", got=got, hint=f"--gpus {options.gpus - ranks + 1}"))
    given = replace(given, ranks=ranks, notes=[])
    load = read_workload(name, module, recipe.datamodule, **read, given=given)
    machine, rates = _machine(load, options, for_teacher, for_sampler, str(trainer.precision))
    limit = memory * (1 - _RESERVE[device])
    notes = [*rates, *given.notes, *_uneven(load)]
    if device == "cuda":
        notes.append(f"{_RESERVE[device]:.0%} of the memory is left to the allocator, 1 GiB to CUDA and NCCL")
    if options.completion_tokens is None:
        notes.append("time: completions half as long as they may be (--completion-tokens); memory: all of the longest")
    notes.append("prompts as long as they may be (--prompt-tokens)")
    plural = "" if options.gpus == 1 else "s" if device == "cuda" else "es"
    where = f"CPU process{plural}" if device == "cpu" else f"GPU{plural} ({options.gpu})"
    return Plan(
        load=load,
        machine=f"{options.gpus} {where} of {options.gpu_memory:g} GiB",
        precision=str(trainer.precision or "32-true"),
        memory=memory,
        limit=limit,
        phases=phases(load),
        times=phase_times(load, machine),
        fit=largest(load, limit),
        servers=servers,
        assumed=notes,
    )


def _servers(load: Workload, memory: float, options: argparse.Namespace) -> tuple[int, int, list[str]]:
    """GPUs of the teacher's and of the sampler's servers, and a line on each."""
    lines = []
    remote = next((s for s in load.scorers if not s.local), None)
    teacher, sampler = 0, 0
    if remote is not None:
        weights = remote.shape.parameters * remote.bytes_per_weight
        together = _tensor_parallel(weights, memory)
        teacher = options.teacher_gpus or together
        copies = max(1, teacher // together)
        lines.append(
            f"teacher on {teacher} GPUs: {copies} × tensor parallel {together}, {weights / together / 2**30:.1f} GiB "
            "of weights on each"
        )
    if load.sampling.kind == "vllm_server":
        weights = load.student.parameters * 2 if load.autocast else load.student.parameters * load.bytes_per_weight
        together = _tensor_parallel(weights, memory)
        sampler = options.sampler_gpus or together
        lines.append(f"rollouts on {sampler} GPUs: {max(1, sampler // together)} × tensor parallel {together}")
    return teacher, sampler, lines


def _tensor_parallel(weights: float, memory: float) -> int:
    """The smallest power of two whose GPUs hold the weights in two thirds of what the engine takes."""
    together = 1
    while weights / together > _SERVER_SHARE * memory * 2 / 3:
        together *= 2
    return together


def _machine(
    load: Workload, options: argparse.Namespace, teacher_gpus: int, sampler_gpus: int, precision: str
) -> tuple[Machine, list[str]]:
    """The rates to count with, and what to say about them."""
    known = ACCELERATORS[options.gpu]
    narrow = precision == "bf16-mixed" or load.bytes_per_weight == 2
    tflops = options.gpu_tflops or (known.tflops_bf16 if narrow else known.tflops_fp32)
    bandwidth = options.bandwidth or known.bandwidth
    link = options.interconnect or (known.interconnect if load.ranks <= options.gpus_per_node else NETWORK)
    machine = Machine(
        flops=tflops * 1e12,
        teacher_flops=(options.gpu_tflops or known.tflops_bf16) * 1e12,
        bandwidth=bandwidth * 1e9,
        interconnect=link * 1e9,
        mfu=options.mfu,
        bandwidth_share=options.bandwidth_share,
        teacher_gpus=teacher_gpus,
        sampler_gpus=sampler_gpus,
        reward_seconds=options.reward_seconds,
    )
    own = [n for n in ("gpu_tflops", "bandwidth", "interconnect") if getattr(options, n)]
    source = known.source if len(own) < 3 else "options"
    across = "" if load.ranks <= options.gpus_per_node or options.interconnect else " (400 Gb/s a GPU between nodes)"
    lines = [
        f"{tflops:g} TFLOP/s, {bandwidth:g} GB/s of memory, {link:g} GB/s between ranks{across}: {source}",
        f"{options.mfu:.0%} of the FLOP/s and {options.bandwidth_share:.0%} of the memory's GB/s are reached; no time "
        "for launches, Python and waiting",
    ]
    return machine, lines


def _uneven(load: Workload) -> list[str]:
    if load.prompts_per_step % load.ranks == 0:
        return []
    return [f"data.prompts_per_step {load.prompts_per_step} is no multiple of {load.ranks} ranks: fit would refuse it"]


def _check(options: argparse.Namespace) -> None:
    for name in ("gpus", "gpu_memory", "mfu", "bandwidth_share", "gpus_per_node"):
        if getattr(options, name) <= 0:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(problem(flag, got=getattr(options, name), expected="above 0"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distillkit plan",
        allow_abbrev=False,
        description="Memory of a rank and time of a step of a recipe, from sizes alone: no weights are read. Settings "
        "of the recipe can be overridden as in distillkit fit.",
        epilog="example: distillkit plan --config papers/rlad/math_8b_base --gpus 8 --gpu-memory 80 "
        "--trainer.strategy deepspeed_stage_3",
    )
    add = parser.add_argument
    add("--gpus", type=int, required=True, metavar="N", help="accelerators in all; on a CPU, processes")
    add("--gpu-memory", type=float, required=True, metavar="GiB", help="of each")
    add("--gpu", choices=sorted(ACCELERATORS), default="h100", help="whose rates are taken (default: h100)")
    add("--gpu-tflops", type=float, metavar="N", help="TFLOP/s in place of the data sheet's")
    add("--bandwidth", type=float, metavar="GB/s", help="of memory, in place of the data sheet's")
    add("--interconnect", type=float, metavar="GB/s", help="between ranks, each way")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="more ranks than this use the network (default: 8)")
    add("--mfu", type=float, default=0.4, metavar="SHARE", help="of the TFLOP/s that is reached (default: 0.4)")
    add("--bandwidth-share", type=float, default=0.6, metavar="SHARE", help="of the GB/s (default: 0.6)")
    add("--teacher-gpus", type=int, metavar="N", help="of the GPUs, for a teacher on servers (default: one server)")
    add("--sampler-gpus", type=int, metavar="N", help="of the GPUs, for rollouts on servers (default: one server)")
    add("--student-config", metavar="PATH", help="folder, config.json or name whose sizes stand for model.student")
    add("--teacher-config", metavar="PATH", help="the same for the teacher")
    add("--prompt-tokens", type=int, metavar="N", help="of the longest prompt (default: data.max_prompt_tokens)")
    add("--completion-tokens", type=float, metavar="N", help="of an average completion (default: half the longest)")
    add("--reward-seconds", type=float, default=0.005, metavar="S", help="to judge one rollout (default: 0.005)")
    add("--json", action="store_true", help="print JSON: bytes and seconds")
    return parser
