"""The tables of a plan, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distillkit.planning.blocks import Phase
from distillkit.planning.fit import Fit
from distillkit.planning.timing import PhaseTime
from distillkit.planning.workload import Workload

__all__ = ["Plan"]

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything `distillkit plan` says.

    Attributes:
        load: the step on one rank.
        machine: what it runs on, in words.
        memory: bytes of one accelerator; `limit` of them may be used.
        phases: bytes by phase.
        times: seconds by phase.
        fit: what fits.
        servers: a line per group of servers.
        assumed: a line per assumption.
    """

    load: Workload
    machine: str
    precision: str
    memory: float
    limit: float
    phases: Sequence[Phase]
    times: Sequence[PhaseTime]
    fit: Fit
    servers: Sequence[str]
    assumed: Sequence[str]

    @property
    def seconds(self) -> float:
        """Seconds of a step; phases beside another one take none."""
        return sum(time.seconds for time in self.times if time.beside is None)

    def data(self) -> dict[str, Any]:
        """Return the plan as JSON-able values; bytes, seconds, tokens."""
        return {
            "recipe": self.load.name,
            "machine": self.machine,
            "strategy": self.load.strategy,
            "precision": self.precision,
            "ranks": self.load.ranks,
            "models": {
                "student": {"name": self.load.student.name, "parameters": self.load.student.parameters},
                **{s.role: {"name": s.shape.name, "parameters": s.shape.parameters} for s in self.load.scorers},
            },
            "memory_bytes": {phase.name: {**phase.parts, "sum": phase.total} for phase in self.phases},
            "limit_bytes": self.limit,
            "fits": self._fits,
            "seconds": {time.name: time.seconds for time in self.times} | {"step": self.seconds},
            "largest": asdict(self.fit),
            "servers": list(self.servers),
            "assumed": list(self.assumed),
        }

    @property
    def _fits(self) -> bool:
        return all(phase.total <= self.limit for phase in self.phases)

    def lines(self) -> list[str]:
        """Return the plan as lines of text."""
        blocks = [self._head(), self._memory_table(), self._time_table(), self._largest(), self._assumptions()]
        return [line for block in blocks for line in [*block, ""]][:-1]

    def _head(self) -> list[str]:
        load, how = self.load, self.load.sampling
        lines = [f"{load.name}: {self.machine}, {load.strategy}, {self.precision}"]
        trained = "" if load.trainable == load.student.parameters else f", {_count(load.trainable)} of them trained"
        student = load.student
        lines.append(
            f"  student   {student.name}: {_count(student.parameters)} parameters{trained}, {student.layers} layers"
        )
        for s in load.scorers:
            place = "on every rank" if s.local else "on servers"
            lines.append(f"  {s.role:<9} {s.shape.name}: {_count(s.shape.parameters)} parameters, {place}")
        lines += [f"  servers   {line}" for line in self.servers]
        step = f"{load.prompts_per_step:,} prompts"
        if how.kind != "none":
            step += f" × {how.group} rollouts, {load.rollouts:,} of them on each of {load.ranks} ranks"
        lengths = (
            f"up to {how.prompt_tokens:,} + {how.new_tokens:,} tokens, {how.mean_new_tokens:,.0f} new ones on average"
        )
        return [*lines, f"  step      {step}; {lengths}"]

    def _memory_table(self) -> list[str]:
        kinds = list(dict.fromkeys(kind for phase in self.phases for kind in phase.parts))
        rows = [("memory of a rank, GiB", [phase.name for phase in self.phases])]
        for kind in kinds:
            cells = [phase.parts.get(kind, 0.0) / _GIB for phase in self.phases]
            if max(cells) >= 0.005:
                rows.append((f"  {kind}", [f"{cell:.2f}" if cell else "" for cell in cells]))
        rows.append(("  sum", [f"{phase.total / _GIB:.2f}" for phase in self.phases]))
        table = _aligned(rows)
        limit = f"{self.limit / _GIB:.1f} of {self.memory / _GIB:.1f} GiB"
        over = [phase.name for phase in self.phases if phase.total > self.limit]
        verdict = f"  does not fit in {limit}: {', '.join(over)}" if over else f"  fits in {limit}"
        return [*table, verdict]

    def _time_table(self) -> list[str]:
        width = max(len(f"{time.seconds:,.1f}") for time in self.times)
        lines = ["time of a step, s"]
        for time in self.times:
            beside = "" if time.beside is None else f", beside {time.beside}"
            lines.append(f"  {time.name:<10}  {time.seconds:>{width + 2},.1f}  {time.made_of}{beside}")
        return [*lines, f"  {'step':<10}  {self.seconds:>{width + 2},.1f}"]

    def _largest(self) -> list[str]:
        load, longest = self.load, self.load.longest
        tokens = self.fit.tokens_per_micro_batch
        lines = ["largest that fits"]
        if tokens is None:
            lines.append(f"  micro-batch       none: not even one rollout of {longest:,} tokens")
        else:
            rollouts = tokens // longest
            what = f"{rollouts:,} of the longest rollouts; the recipe has {load.tokens_per_micro_batch:,}"
            lines.append(f"  micro-batch       model.tokens_per_micro_batch: {tokens} ({what})")
        rows, kind = self.fit.rows, load.sampling.kind
        if kind == "hf":
            setting = "none: not even one" if rows is None else f"model.sampler.rows_per_batch: {rows}"
            lines.append(f"  rollouts at once  {setting} (the recipe has {load.sampling.rows:,})")
        elif kind in ("vllm", "vllm_server") and rows is not None:
            lines.append(f"  rollouts at once  {rows:,} of the longest in an engine's cache")
        return lines

    def _assumptions(self) -> list[str]:
        return ["assumed", *(f"  {line}" for line in self.assumed)]


def _count(number: int) -> str:
    """A number of parameters.

    Example:
        >>> _count(8_190_735_360), _count(419_328)
        ('8.19 B', '0.42 M')
    """
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _aligned(rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    first = max(len(name) for name, _ in rows)
    widths = [max(9, *(len(cells[i]) for _, cells in rows)) for i in range(len(rows[0][1]))]
    return [
        f"{name:<{first}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()
        for name, cells in rows
    ]
