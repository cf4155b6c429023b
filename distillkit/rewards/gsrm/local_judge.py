"""A judge in this process: which of two answers a language model finds likelier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distillkit.errors import ConfigError, ScoringError, problem
from distillkit.models import Dtype
from distillkit.rewards.gsrm.chat_model import ChatModel
from distillkit.rewards.gsrm.judge import StepJudge, StepPair
from distillkit.rewards.gsrm.questions import NO, YES, plainly_equal, question, spellings

__all__ = ["LocalJudge"]

_WHERE = "model.rewards: gsrm.judge"


class LocalJudge(StepJudge):
    """A causal language model of this process that may say `yes` or `no`, and nothing else.

    Nothing is generated: the probabilities of the answers (in lower case, capitalised and in capitals) are added up
    for yes and for no, and the larger sum decides. Where every answer is a token of its own, it is the next token's
    probability that counts. Where one has several tokens, another word may begin like it ("no" and "not"): then whole
    answers count, an end token included. When both sums together are below `floor`, or they are equal, the model said
    neither. Texts that are equal in normal form agree without being asked about.

    Args:
        path: local checkpoint folder or hub name of a chat model.
        dtype: of the weights; `auto` is the checkpoint's.
        yes: the word that says that two steps agree.
        no: the word that says that they do not.
        floor: least probability of yes and no together.
        tokens_per_batch: token budget of one forward, padding included.
        chat_template_kwargs: passed to the chat template, such as `{enable_thinking: false}`.

    Raises:
        ConfigError: an argument out of range.
        ModelError: at setup, when the checkpoint does not load or has no chat template.
    """

    def __init__(
        self,
        *,
        path: str,
        dtype: Dtype = "auto",
        yes: str = YES,
        no: str = NO,
        floor: float = 0.1,
        tokens_per_batch: int = 16384,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not 0 <= floor <= 1:
            raise ConfigError(problem(f"{_WHERE}.floor", got=floor, expected="a probability, 0 to 1"))
        if not yes.strip() or not no.strip() or yes.casefold() == no.casefold():
            raise ConfigError(problem(f"{_WHERE}: yes and no", got=f"{yes!r}, {no!r}", expected="two different words"))
        if tokens_per_batch < 1:
            raise ConfigError(problem(f"{_WHERE}.tokens_per_batch", got=tokens_per_batch, expected="at least 1 token"))
        self.path = path
        self.dtype = dtype
        self.yes, self.no = yes, no
        self.floor = floor
        self.tokens_per_batch = tokens_per_batch
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._model: ChatModel | None = None

    def setup(self, device: torch.device) -> None:
        self._model = ChatModel(
            path=self.path,
            dtype=self.dtype,
            device=device,
            where=f"{_WHERE}.path",
            chat_template_kwargs=self.chat_template_kwargs,
        )

    def teardown(self) -> None:
        self._model = None

    def agree(self, pairs: Sequence[StepPair]) -> list[bool | None]:
        if self._model is None:
            raise ScoringError(problem("LocalJudge.agree", got="called before setup", hint="call setup first"))
        verdicts: list[bool | None] = [True if plainly_equal(pair) else None for pair in pairs]
        limit = self._model.context or math.inf
        longest = max(len(self._model.ids(word)) + 1 for word in (*spellings(self.yes), *spellings(self.no)))
        prompts = {
            i: ids
            for i, pair in enumerate(pairs)
            if verdicts[i] is None
            and len(ids := self._model.prompt(question(pair, self.yes, self.no))) + longest <= limit
        }
        if prompts:
            mass = self._mass(self._model, list(prompts.values()))
            for i, (yes, no) in zip(prompts, mass.tolist(), strict=True):
                verdicts[i] = None if yes + no < self.floor or yes == no else yes > no
        return verdicts

    def _mass(self, model: ChatModel, prompts: list[list[int]]) -> Tensor:
        """[n, 2]: the probability of yes and of no."""
        answers = [{tuple(model.ids(text)) for text in spellings(word)} for word in (self.yes, self.no)]
        if all(len(ids) == 1 for side in answers for ids in side):
            words = [sorted(ids[0] for ids in side) for side in answers]
            logprobs = model.next_logprobs(prompts, [*words[0], *words[1]], budget=self.tokens_per_batch)
            sides = logprobs.split([len(side) for side in words], dim=1)
        else:
            whole = [sorted((*ids, end) for ids in side for end in model.end_ids) for side in answers]
            logprobs = model.answer_logprobs(prompts, [*whole[0], *whole[1]], budget=self.tokens_per_batch)
            sides = logprobs.split([len(side) for side in whole], dim=1)
        return torch.stack([side.exp().sum(dim=1) for side in sides], dim=1)
