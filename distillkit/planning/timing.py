"""Time of a step's phases from FLOPs, bytes and rates.

A matrix product of one token costs 2 FLOPs a parameter forward and 4 backward (6 when layers are recomputed), attention
4 · A · (tokens before it) a layer. Decoding is bound by the bytes it reads: the weights and every row's cache, a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from distillkit.planning.layers import cache_bytes
from distillkit.planning.model_shape import ModelShape
from distillkit.planning.workload import Scorer, Workload

__all__ = ["Machine", "PhaseTime", "phase_times"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates of one accelerator as they are assumed to be reached.

    Attributes:
        flops: of the student's matrix products, FLOP/s; `teacher_flops` of bfloat16 ones.
        bandwidth: of memory, bytes/s.
        interconnect: between ranks, bytes/s each way.
        mfu: share of `flops` that forwards and backwards reach.
        bandwidth_share: share of `bandwidth` that decoding and optimizer reach.
        teacher_gpus: accelerators of the teacher's servers.
        sampler_gpus: of the rollouts' servers.
        reward_seconds: of one rollout; `reward_workers` of them at a time on each rank.
    """

    flops: float
    teacher_flops: float
    bandwidth: float
    interconnect: float
    mfu: float = 0.4
    bandwidth_share: float = 0.6
    teacher_gpus: int = 0
    sampler_gpus: int = 0
    reward_seconds: float = 0.005
    reward_workers: int = 2


@dataclass(frozen=True, kw_only=True)
class PhaseTime:
    """Seconds of a phase and what they are made of; `beside` others, named there, it takes no time of its own."""

    name: str
    seconds: float
    made_of: str
    beside: str | None = None


def phase_times(load: Workload, machine: Machine) -> tuple[PhaseTime, ...]:
    """Return the phases of an average step in their order."""
    found = [_sync(load, machine)]
    if load.sampling.kind != "none":
        found.append(_rollout(load, machine))
    found += [_score(load, machine, s) for s in load.scorers if s.role != "reward model"]
    judged = load.rollouts * machine.reward_seconds / machine.reward_workers
    if load.sampling.kind != "none":
        what = f"{load.rollouts:,} rollouts, {machine.reward_seconds:g} s each, {machine.reward_workers} at a time"
        scored = sum(p.seconds for p in found if p.name in ("teacher", "reference"))
        found.append(
            PhaseTime(name="reward", seconds=judged, made_of=what, beside="the teacher" if judged <= scored else None)
        )
    if load.old_pass:
        flops = _forward_flops(load.student, load)
        what = f"{flops / 1e12:,.0f} TFLOP forward"
        found.append(PhaseTime(name="old policy", seconds=flops / (machine.flops * machine.mfu), made_of=what))
    found.append(_update(load, machine))
    return tuple(_ahead(found) if load.one_step_off and load.sampling.kind == "vllm_server" else found)


def _ahead(phases: list[PhaseTime]) -> list[PhaseTime]:
    """The next rollouts are sampled on other GPUs while the rest of the step runs: the shorter of the two is free."""
    [rollout] = [p for p in phases if p.name == "rollout"]
    rest = [p for p in phases if p.name not in ("sync", "rollout")]
    if rollout.seconds <= sum(p.seconds for p in rest if p.beside is None):
        return [replace(p, beside="the rest") if p is rollout else p for p in phases]
    return [replace(p, beside="the next rollouts") if p in rest and p.beside is None else p for p in phases]


def _tokens(load: Workload) -> float:
    """Tokens of this rank's rollouts, prompts included."""
    return load.rollouts * load.mean_tokens


def _forward_flops(shape: ModelShape, load: Workload) -> float:
    attention = 2.0 * shape.query * load.mean_tokens * shape.layers  # 4 · A · L / 2 tokens before it, on average
    return _tokens(load) * (2.0 * shape.matrix_parameters + attention)


def _rollout(load: Workload, machine: Machine) -> PhaseTime:
    how, student = load.sampling, load.student
    engines = machine.sampler_gpus if how.kind == "vllm_server" else load.ranks
    mine = load.rollouts * load.ranks / engines
    each = cache_bytes(load, int(how.prompt_tokens + how.mean_new_tokens))
    rows = min(float(how.rows), mine) if how.kind == "hf" else mine
    if how.kind != "hf" and how.kv_cache_bytes:
        rows = min(mine, max(1.0, how.kv_cache_bytes / each))
    # The longest rollout needs all its steps; with more rollouts than rows, finished ones make room.
    steps = max(how.new_tokens, mine * how.mean_new_tokens / rows)
    busy = mine * how.mean_new_tokens / steps  # rows alive on average
    narrow = load.sampling_bytes
    read = student.active_parameters * narrow + busy * each / 2
    per_step = max(
        read / (machine.bandwidth * machine.bandwidth_share),
        2.0 * student.matrix_parameters * busy / (machine.flops * machine.mfu),
    )
    prompts = mine / how.group * how.prompt_tokens * 2.0 * student.matrix_parameters / (machine.flops * machine.mfu)
    what = f"{steps:,.0f} tokens in a row, {busy:,.0f} rows alive on average, {read / 2**30:,.1f} GiB read a token"
    return PhaseTime(name="rollout", seconds=steps * per_step + prompts, made_of=what)


def _score(load: Workload, machine: Machine, scorer: Scorer) -> PhaseTime:
    flops = _forward_flops(scorer.shape, load)
    rate, where = machine.teacher_flops if scorer.bytes_per_weight == 2 else machine.flops, "on every rank"
    if not scorer.local:
        flops *= load.ranks / machine.teacher_gpus
        where = f"on each of {machine.teacher_gpus} server GPUs"
    seconds = flops / (rate * machine.mfu)
    return PhaseTime(name=scorer.role, seconds=seconds, made_of=f"{flops / 1e12:,.0f} TFLOP forward {where}")


def _update(load: Workload, machine: Machine) -> PhaseTime:
    student, times = load.student, 4 if load.checkpointing else 3
    flops = load.passes * times * _forward_flops(student, load)
    computing = flops / (machine.flops * machine.mfu)
    # Reading weight, gradient and two moments, writing weight and moments; the rank's share of them.
    shared = load.ranks if load.strategy in ("fsdp2", "deepspeed_stage_2", "deepspeed_stage_3") else 1
    moved = load.updates * load.trainable * 7 * 4.0 / shared
    stepping = moved / (machine.bandwidth * machine.bandwidth_share)
    weight, others = load.bytes_per_weight, (load.ranks - 1) / load.ranks
    gradients, weights = load.trainable * weight * others, student.parameters * load.compute_bytes * others
    batches = load.updates * load.micro_batches
    sent = {
        "single": 0.0,
        "ddp": 2 * gradients * load.updates,
        "deepspeed_stage_2": gradients * batches + load.trainable * weight * others * load.updates,
        "fsdp2": 2 * weights * batches + gradients * batches,
        "deepspeed_stage_3": 2 * weights * batches + gradients * batches,
    }[load.strategy]
    talking = sent / machine.interconnect
    what = f"{flops / 1e12:,.0f} TFLOP {computing:,.1f} s, optimizer {stepping:.2f} s, exchange {talking:,.1f} s"
    return PhaseTime(name="update", seconds=computing + stepping + talking, made_of=what)


def _sync(load: Workload, machine: Machine) -> PhaseTime:
    whole = load.student.parameters * load.bytes_per_weight
    gather = whole / machine.interconnect if load.strategy in ("fsdp2", "deepspeed_stage_3") else 0.0
    size = f"{whole / 2**30:,.1f} GiB"
    copy, what = 0.0, "same weights"
    if load.sampling.kind == "vllm":
        copy, what = 2 * whole / (machine.bandwidth * machine.bandwidth_share), f"{size} copied to the engine"
    elif load.sampling.kind == "vllm_server":
        copy, what = whole / machine.interconnect, f"{size} sent to the servers"
    if gather:
        what = f"{size} gathered, {what}"
    return PhaseTime(name="sync", seconds=gather + copy, made_of=what)
