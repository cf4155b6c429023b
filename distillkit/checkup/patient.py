"""The recipe under examination: student, tokenizer, prompts and rollouts, each made when it is first asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from distillkit.components import StudentInfo
from distillkit.data import PromptData
from distillkit.data.prompts import PreparedPrompt
from distillkit.errors import ModelError, problem
from distillkit.lora import apply_lora, student_base
from distillkit.scorer import StudentScorer
from distillkit.training.base import StudentModule
from distillkit.types import Rollout, RolloutBatch, RolloutGroup, SampleRequest, SamplingSettings

__all__ = ["Patient"]

_PROMPTS, _PROBE_TOKENS = 4, 16


class Patient:
    """One recipe.

    Args:
        module: built, not set up.
        data: built, not read.
        device: where its models run.
        precision: `trainer.precision`.
        strategy: `trainer.strategy`.
        ranks: processes on this machine.
        name: of the recipe.
        seed: of the run.
    """

    def __init__(
        self,
        module: StudentModule,
        data: PromptData,
        *,
        device: torch.device,
        precision: str,
        strategy: str = "auto",
        ranks: int = 1,
        name: str = "recipe",
        seed: int = 1,
    ) -> None:
        self.module: Any = module
        self.data = data
        self.device = device
        self.precision = precision
        self.strategy = strategy
        self.ranks = ranks
        self.name = name
        self.seed = seed
        self.too_large: str | None = None
        """Why no model can be loaded here, once the memory was looked at."""

    @cached_property
    def info(self) -> StudentInfo:
        """What parts may know of the student; a teacher whose vocabulary cannot be told does not limit it."""
        tokenizer = self.module.tokenizer
        sizes = [self.module.student_vocab_size()]
        for part in self.module.frozen.values():
            with contextlib.suppress(Exception):  # said by the vocabulary's own check
                sizes += [part.vocab_size] if part.vocab_size is not None else []
        return StudentInfo(
            tokenizer=tokenizer,
            vocab_limit=min(sizes),
            eos_token_ids=self.module.student_end_tokens(),
            pad_token_id=int(tokenizer.pad_token_id),
            device=self.device,
            base=student_base(
                self.module.lora,
                self.module.student,
                self.module.dtype_name,
                lambda: contextlib.nullcontext(self.scorer),
            ),
        )

    @cached_property
    def scorer(self) -> StudentScorer:
        """The student.

        Raises:
            ModelError: it cannot be loaded, or is too large for this machine.
        """
        self.check_size()
        model = self.module.load_student()
        if self.module.lora is not None:
            model = apply_lora(model, self.module.lora, seed=self.seed)
        torch.nn.Module.to(model, self.device)
        model.eval()
        return StudentScorer(model, vocab_limit=self.info.vocab_limit, head_chunk=self.module.head_chunk)

    @cached_property
    def prompts(self) -> list[PreparedPrompt]:
        """The first ten prompts of `data.train`, tokenised.

        Raises:
            DataError: rows that cannot be read or used.
        """
        source = replace(self.data.train, limit=10) if self.data.train is not None else None
        few = PromptData(
            train=source,
            prompts_per_step=1,
            max_prompt_tokens=self.data.max_prompt_tokens,
            max_completion_tokens=self.data.max_completion_tokens,
        )
        few.prepare(self.module.tokenizer, "fit", completions=self.module.needs_completions)
        assert few.train_prompts is not None
        return list(few.train_prompts[:10])

    @cached_property
    def probe(self) -> RolloutBatch:
        """A few prompts with random completions of ordinary tokens: rollouts that need no sampler."""
        generator = torch.Generator().manual_seed(self.seed)
        special = set(self.info.tokenizer.all_special_ids)
        known = set(self.info.tokenizer.get_vocab().values())
        usual = torch.tensor(sorted(i for i in known - special if i < self.info.vocab_limit))
        groups = []
        for request in self.requests(SamplingSettings(group_size=1, max_new_tokens=_PROBE_TOKENS)):
            picks = torch.randint(len(usual), (_PROBE_TOKENS,), generator=generator)
            groups.append(RolloutGroup(request=request, rollouts=(self.rollout(usual[picks]),)))
        return RolloutBatch.from_groups(groups, self.info.pad_token_id).to(self.device)

    def requests(self, settings: SamplingSettings) -> list[SampleRequest]:
        """Return requests for a few prompts of the data, cut to a probe's length; ordinary ones if there is no data."""
        try:
            found = [(p.prompt_ids[-256:], p.prompt, p.row) for p in self.prompts[:_PROMPTS]]
        except Exception:  # said by the verifier's check
            ids = tuple(self.info.tokenizer("1 + 1 = 2", add_special_tokens=False)["input_ids"])
            found = [(ids or self.info.eos_token_ids[:1], "", {})]
        return [
            SampleRequest(prompt_ids=ids, prompt=prompt, row=row, group_id=i, seed=self.seed + i, settings=settings)
            for i, (ids, prompt, row) in enumerate(found)
        ]

    def rollout(self, ids: Tensor, text: str | None = None) -> Rollout:
        """Return a completion that nobody sampled."""
        return Rollout(
            completion_ids=ids,
            behaviour_logprobs=torch.full(ids.shape, float("nan")),
            loss_mask=torch.ones_like(ids, dtype=torch.bool),
            policy_version=torch.full_like(ids, -1),
            finish_reason="length",
            text=str(self.info.tokenizer.decode(ids)) if text is None else text,
        )

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """No gradient, and the autocast that training has."""
        mixed = self.precision == "bf16-mixed"
        with torch.no_grad(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=mixed):
            yield

    def check_size(self) -> None:
        """Raise ModelError where the memory's check found that the weights alone do not fit."""
        if self.too_large is not None:
            raise ModelError(problem("not looked at: the models would not fit", got=self.too_large))
