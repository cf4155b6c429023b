"""The next step's rollouts, sampled while this step's are learned from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from distillkit.components import RolloutSampler
from distillkit.engine_gap import EngineProbe
from distillkit.errors import RolloutError, problem
from distillkit.types import Rollout, RolloutGroup, SampleRequest

__all__ = ["RolloutsAhead"]

_FIELDS = ("completion_ids", "behaviour_logprobs", "loss_mask", "policy_version", "finish_reason", "text")


class RolloutsAhead:
    """Samples in a thread of its own; from `start` on, nothing else may use the sampler before `take` or `wait`.

    `probe` is what was sampled beside the rollouts by `start`, None when it has been compared or was not asked for;
    `stale` says whether the last `take` had rollouts to give, of older weights than its step's.
    """

    def __init__(self) -> None:
        self.probe: EngineProbe | None = None
        self.stale = False
        self._thread: ThreadPoolExecutor | None = None
        self._sampler: RolloutSampler | None = None
        self._pending: Future[dict[int, RolloutGroup]] | None = None
        self._unwanted = threading.Event()
        self._restored: Mapping[int, Sequence[Rollout]] = {}

    def start(
        self,
        sampler: RolloutSampler,
        requests: Sequence[SampleRequest],
        finished: Callable[[RolloutGroup], None],
        probe: EngineProbe | None = None,
    ) -> None:
        """Begin to sample `requests` with the weights that the sampler has; `finished` hears of every group."""

        def heard(group: RolloutGroup) -> None:
            if self._unwanted.is_set():
                raise RolloutError(problem("model.sampler: not sampled", got="sampling was ended"))
            if probe is not None and group.request.group_id == probe.request.group_id:
                probe.answer(group)
            else:
                finished(group)

        self._thread = self._thread or ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts-ahead")
        self._unwanted.clear()
        self._sampler, self.probe = sampler, probe
        wanted = (*requests,) if probe is None else (probe.request, *requests)
        self._pending = self._thread.submit(sampled, sampler, wanted, heard)
        if probe is not None:
            self._pending.add_done_callback(probe.ended)

    def take(self, requests: Sequence[SampleRequest]) -> dict[int, RolloutGroup] | None:
        """Wait for the rollouts of `requests` and return them by group, or None when others or none were sampled.

        Raises:
            Exception: what the sampler raised.
        """
        groups = self._given(requests)
        self.stale = groups is not None
        return groups

    def _given(self, requests: Sequence[SampleRequest]) -> dict[int, RolloutGroup] | None:
        ids = {request.group_id for request in requests}
        if self._restored:
            restored, self._restored = self._restored, {}
            if ids <= set(restored):
                own = {request.group_id: request for request in requests}
                return {i: RolloutGroup(request=own[i], rollouts=tuple(restored[i])) for i in ids}
        if self._pending is None:
            return None
        groups, self._pending = self._rollouts(self._pending), None
        return groups if ids == set(groups) else None

    def wait(self) -> None:
        """Return when nothing is being sampled; the rollouts, or the error, stay for `take`."""
        if self._pending is not None and not self._pending.cancelled():
            self._pending.exception()

    def close(self) -> None:
        """Break off what is being sampled, and forget it."""
        if self._pending is not None and self._sampler is not None and not self._pending.done():
            self._unwanted.set()
            if not self._pending.cancel():
                self._sampler.break_off()
        self.wait()
        self._pending = self._sampler = self.probe = None
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def state_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Return this rank's rollouts by group id, waiting for them; none when they could not be sampled."""
        rollouts = self._restored
        if self._pending is not None:
            failed = self._pending.exception() is not None  # `take` raises it: a checkpoint is no place for it
            groups = {} if failed else self._rollouts(self._pending)
            rollouts = {i: group.rollouts for i, group in groups.items()}
        return {
            str(i): [{name: getattr(rollout, name) for name in _FIELDS} for rollout in own]
            for i, own in rollouts.items()
        }

    def load_state_dict(self, state: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Restore `state_dict`, of all ranks: each takes what it asks for."""
        self._restored = {int(i): [Rollout(**fields) for fields in rollouts] for i, rollouts in state.items()}

    def _rollouts(self, pending: Future[dict[int, RolloutGroup]]) -> dict[int, RolloutGroup]:
        return {i: group for i, group in pending.result().items() if i != EngineProbe.GROUP}


def sampled(
    sampler: RolloutSampler, requests: Sequence[SampleRequest], finished: Callable[[RolloutGroup], None]
) -> dict[int, RolloutGroup]:
    """Return the groups of `requests` by id, telling `finished` of each as soon as it is there."""
    groups: dict[int, RolloutGroup] = {}
    for group in sampler.sample(requests):
        finished(group)
        groups[group.request.group_id] = group
    return groups
