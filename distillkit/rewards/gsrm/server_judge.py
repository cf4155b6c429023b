"""A judge behind an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from distillkit.errors import ConfigError, problem
from distillkit.rewards.gsrm.chat_client import ChatClient
from distillkit.rewards.gsrm.decomposer import Undecided
from distillkit.rewards.gsrm.judge import StepJudge, StepPair
from distillkit.rewards.gsrm.questions import NO, YES, plainly_equal, question, verdict

__all__ = ["ServerJudge"]

_WHERE = "model.rewards: gsrm.judge"

_CONSTRAINTS: dict[str, dict[str, Any]] = {
    "none": {},
    "structured_outputs": {"structured_outputs": {"choice": [YES, NO]}},
    "guided_choice": {"guided_choice": [YES, NO]},
}


class ServerJudge(StepJudge):
    """Asks a model on an OpenAI-compatible server for one word, `yes` or `no`.

    A reply counts when it *is* the word, whatever its case and punctuation. Everything else, a failed request included,
    is neither. Texts that are equal in normal form agree without being asked about.

    Args:
        base_url: such as `http://localhost:8000/v1`.
        model: name of the model on the server.
        api_key_env: name of the environment variable with the key; null for a server without keys.
        constrained: have the server choose between the two words: `structured_outputs` (vLLM 0.12 and later),
            `guided_choice` (vLLM before that), or `none` for a server that cannot.
        max_new_tokens: of a reply.
        timeout_s: seconds for one answer.
        retries: further tries after a failed one.
        backoff_s: seconds before the first of them, doubled every time.
        concurrency: requests at a time.
        extra_body: merged into every request, such as `{chat_template_kwargs: {enable_thinking: false}}`; null takes an
            entry out.

    Raises:
        ConfigError: an argument out of range; at setup, a key that is not there; in `probe`, a server that nobody runs,
            or that refuses the key, the model or the path.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_env: str | None = None,
        constrained: Literal["none", "structured_outputs", "guided_choice"] = "none",
        max_new_tokens: int = 8,
        timeout_s: float = 60.0,
        retries: int = 3,
        backoff_s: float = 1.0,
        concurrency: int = 32,
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        if constrained not in _CONSTRAINTS:
            where = f"{_WHERE}.constrained"
            raise ConfigError(problem(where, got=repr(constrained), expected=" or ".join(_CONSTRAINTS)))
        if max_new_tokens < 1:
            raise ConfigError(problem(f"{_WHERE}.max_new_tokens", got=max_new_tokens, expected="at least 1 token"))
        self.constrained = constrained
        self.max_new_tokens = max_new_tokens
        self._client = ChatClient(
            base_url=base_url,
            model=model,
            api_key_env=api_key_env,
            timeout_s=timeout_s,
            retries=retries,
            backoff_s=backoff_s,
            concurrency=concurrency,
            extra_body=extra_body,
            where=_WHERE,
        )

    def setup(self, device: torch.device) -> None:
        self._client.open()

    def probe(self) -> None:
        self._client.probe()

    def teardown(self) -> None:
        self._client.close()

    def agree(self, pairs: Sequence[StepPair]) -> list[bool | None]:
        verdicts: list[bool | None] = [True if plainly_equal(pair) else None for pair in pairs]
        asked = [i for i, known in enumerate(verdicts) if known is None]
        replies = self._client.ask(
            [question(pairs[i]) for i in asked],
            max_tokens=self.max_new_tokens,
            body=_CONSTRAINTS[self.constrained],
        )
        for i, reply in zip(asked, replies, strict=True):
            verdicts[i] = None if isinstance(reply, Undecided) else verdict(reply.text)
        return verdicts
