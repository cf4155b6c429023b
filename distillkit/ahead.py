"""The next step's rollouts, sampled while this step's are learned from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from distillkit.components import RolloutSampler
from distillkit.types import Rollout, RolloutGroup, SampleRequest

__all__ = ["RolloutsAhead"]

_FIELDS = ("completion_ids", "behaviour_logprobs", "loss_mask", "policy_version", "finish_reason", "text")


class RolloutsAhead:
    """Samples in a thread of its own; from `start` on, nothing else may use the sampler before `take` or `wait`."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[dict[int, RolloutGroup]] | None = None
        self._restored: Mapping[int, Sequence[Rollout]] = {}

    def start(
        self, sampler: RolloutSampler, requests: Sequence[SampleRequest], finished: Callable[[RolloutGroup], None]
    ) -> None:
        """Begin to sample `requests` with the weights that the sampler has; `finished` hears of every group."""
        self._thread = self._thread or ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts-ahead")
        self._pending = self._thread.submit(sampled, sampler, tuple(requests), finished)

    def take(self, requests: Sequence[SampleRequest]) -> dict[int, RolloutGroup] | None:
        """Wait for the rollouts of `requests` and return them by group, or None when others or none were sampled.

        Raises:
            Exception: what the sampler raised.
        """
        ids = {request.group_id for request in requests}
        if self._restored:
            restored, self._restored = self._restored, {}
            if ids <= set(restored):
                own = {request.group_id: request for request in requests}
                return {i: RolloutGroup(request=own[i], rollouts=tuple(restored[i])) for i in ids}
        if self._pending is None:
            return None
        groups, self._pending = self._pending.result(), None
        return groups if ids == set(groups) else None

    def wait(self) -> None:
        """Return when nothing is being sampled; the rollouts, or the error, stay for `take`."""
        if self._pending is not None:
            self._pending.exception()

    def close(self) -> None:
        """Forget what was sampled, when it is finished."""
        self.wait()
        self._pending = None
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def state_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Return this rank's rollouts by group id, waiting for them."""
        if self._pending is None:
            return {}
        return {
            str(i): [{name: getattr(rollout, name) for name in _FIELDS} for rollout in group.rollouts]
            for i, group in self._pending.result().items()
        }

    def load_state_dict(self, state: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Restore `state_dict`, of all ranks: each takes what it asks for."""
        self._restored = {int(i): [Rollout(**fields) for fields in rollouts] for i, rollouts in state.items()}


def sampled(
    sampler: RolloutSampler, requests: Sequence[SampleRequest], finished: Callable[[RolloutGroup], None]
) -> dict[int, RolloutGroup]:
    """Return the groups of `requests` by id, telling `finished` of each as soon as it is there."""
    groups: dict[int, RolloutGroup] = {}
    for group in sampler.sample(requests):
        finished(group)
        groups[group.request.group_id] = group
    return groups
