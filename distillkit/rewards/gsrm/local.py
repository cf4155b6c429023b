"""A decomposer in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from distillkit.decomposition import Decomposition, messages
from distillkit.errors import ConfigError, ScoringError, problem
from distillkit.models import Dtype, fingerprint
from distillkit.rewards.gsrm.chat_model import ChatModel
from distillkit.rewards.gsrm.decomposer import Decomposer, Item, Undecided, grammar_digest, read_reply

__all__ = ["LocalDecomposer"]

_WHERE = "model.rewards: gsrm.decomposer"
_MAX_NEW_TOKENS = 1024


class LocalDecomposer(Decomposer):
    """A causal language model of this process that writes decompositions, greedily and all traces at once.

    The prompt is the model's chat template over `distillkit.decomposition.messages`, the same in training and here. A
    trace whose prompt leaves no room for `max_new_tokens` in the model's context, a reply that is cut off or does not
    parse is `Undecided`.

    Args:
        path: local checkpoint folder, hub name, or `embedded:decomposer`.
        dtype: of the weights; `auto` is the checkpoint's.
        max_new_tokens: longest decomposition, in tokens; null is 1024, or half the model's context where that is less.
        tokens_per_batch: token budget of one batch of traces, decompositions and padding included.
        chat_template_kwargs: passed to the chat template, such as `{enable_thinking: false}`.

    Raises:
        ConfigError: an argument out of range; at setup, when `max_new_tokens` fills the whole context.
        ModelError: at setup, when the checkpoint does not load or has no chat template.
    """

    def __init__(
        self,
        *,
        path: str,
        dtype: Dtype = "auto",
        max_new_tokens: int | None = None,
        tokens_per_batch: int = 131072,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        for name, value in (("max_new_tokens", max_new_tokens), ("tokens_per_batch", tokens_per_batch)):
            if value is not None and value < 1:
                raise ConfigError(problem(f"{_WHERE}.{name}", got=value, expected="at least 1 token"))
        self.path = path
        self.dtype = dtype
        self.max_new_tokens = max_new_tokens
        self.tokens_per_batch = tokens_per_batch
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._limit = _MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
        self._model: ChatModel | None = None

    def setup(self, device: torch.device) -> None:
        self._model = ChatModel(
            path=self.path,
            dtype=self.dtype,
            device=device,
            where=f"{_WHERE}.path",
            chat_template_kwargs=self.chat_template_kwargs,
        )
        context = self._model.context
        if context is not None and self.max_new_tokens is None:
            self._limit = min(_MAX_NEW_TOKENS, context // 2)
        elif context is not None and self._limit >= context:
            where = f"{_WHERE}.max_new_tokens: no room for a trace in the context of {self.path}"
            raise ConfigError(problem(where, got=self._limit, expected=f"well below {context} tokens"))

    def teardown(self) -> None:
        self._model = None

    def identity(self) -> str:
        facts = (fingerprint(self.path), self.dtype, self.max_new_tokens, sorted(self.chat_template_kwargs.items()))
        return f"local:{facts}:{grammar_digest()}"

    def decompose(self, items: Sequence[Item]) -> list[Decomposition | Undecided]:
        if self._model is None:
            raise ScoringError(problem("LocalDecomposer.decompose", got="called before setup", hint="call setup first"))
        model, context = self._model, self._model.context
        prompts = [model.prompt(messages(text, trace)) for text, trace in items]
        results: list[Decomposition | Undecided] = [Undecided(reason="not asked")] * len(items)
        fitting = []
        for i, ids in enumerate(prompts):
            if context is not None and len(ids) + self._limit > context:
                detail = f"{len(ids)} tokens, {self._limit} new ones, {context} in all"
                results[i] = Undecided(reason="longer than the decomposer's context", detail=detail)
            else:
                fitting.append(i)
        replies = model.replies(
            [prompts[i] for i in fitting], max_new_tokens=self._limit, tokens_per_batch=self.tokens_per_batch
        )
        for i, reply in zip(fitting, replies, strict=True):
            results[i] = read_reply(reply.text, finished=reply.finished, limit=self._limit)
        return results
