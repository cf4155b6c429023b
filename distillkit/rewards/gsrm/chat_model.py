"""A local language model asked through its chat template: greedy replies, and how likely given answers are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from distillkit.backbone import LMHead
from distillkit.errors import ModelError, problem
from distillkit.functional.packing import micro_batches
from distillkit.models import Dtype, end_token_ids, load_causal_lm, load_tokenizer

__all__ = ["ChatModel", "Reply"]

_NO_LIMIT = 10**9
"""Tokenizers that know no limit say 1e30."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model answered; `finished`: it ended by itself."""

    text: str
    finished: bool


class ChatModel:
    """A causal language model and its tokenizer, frozen.

    Args:
        path: local checkpoint folder, hub name, or `embedded:` name.
        dtype: of the weights; `auto` is the checkpoint's.
        device: where it lives.
        where: whose argument `path` is, for error texts.
        chat_template_kwargs: passed to the chat template.

    Raises:
        ModelError: it does not load, or its tokenizer has no chat template.
    """

    def __init__(
        self, *, path: str, dtype: Dtype, device: torch.device, where: str, chat_template_kwargs: Mapping[str, Any]
    ) -> None:
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(path, where=where)
        if not self.tokenizer.chat_template:
            hint = "a chat model, or one trained as docs/structure_reward.md shows"
            raise ModelError(problem(f"{where}: the tokenizer has no chat template", got=path, hint=hint))
        model: PreTrainedModel = load_causal_lm(path, where=where, dtype=dtype)
        self.end_ids = end_token_ids(self.tokenizer, model.generation_config)
        assert self.tokenizer.pad_token_id is not None
        self.pad_id = int(self.tokenizer.pad_token_id)
        # The checkpoint's own settings (sampling, a repetition penalty) would make a greedy reply something else.
        model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=list(self.end_ids), pad_token_id=self.pad_id
        )
        self.model = model.eval().requires_grad_(False).to(device)
        self.device = device
        self._kwargs = dict(chat_template_kwargs)

    @property
    def context(self) -> int | None:
        """Tokens of the longest sequence that model and tokenizer are made for; None where neither says."""
        declared = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        limits = [n for n in (declared, self.tokenizer.model_max_length) if n is not None and n < _NO_LIMIT]
        return min(limits, default=None)

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids of a conversation that the model is to continue; as in training, from its template."""
        rendered = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True, **self._kwargs
        )
        return self.ids(str(rendered))

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens around it."""
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    @torch.inference_mode()
    def replies(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, tokens_per_batch: int) -> list[Reply]:
        """Return the greedy reply to each prompt.

        Args:
            prompts: token ids.
            max_new_tokens: of a reply.
            tokens_per_batch: budget of one batch, reply and padding included.
        """
        found: dict[int, Reply] = {}
        lengths = [len(ids) + max_new_tokens for ids in prompts]
        # Every batch takes as many steps as its longest reply: as few as the budget allows, whatever they pad.
        for positions in micro_batches(lengths, tokens_per_batch, overhead=tokens_per_batch):
            ids, mask = _padded([prompts[i] for i in positions], self.pad_id, self.device, left=True)
            generate: Any = self.model.generate
            written = generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens)[:, ids.shape[1] :]
            found |= {i: self._reply(row) for i, row in zip(positions, written.tolist(), strict=True)}
        return [found[i] for i in range(len(prompts))]

    def _reply(self, ids: list[int]) -> Reply:
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Reply(text=str(text), finished=end is not None)

    @torch.inference_mode()
    def next_logprobs(self, prompts: Sequence[Sequence[int]], tokens: Sequence[int], *, budget: int) -> Tensor:
        """Return [n, len(tokens)] float32: log-probability of each token as the next one, in nats."""
        table = torch.empty(len(prompts), len(tokens))
        for positions, hidden in self._hidden(prompts, budget):
            last = torch.tensor([len(prompts[i]) - 1 for i in positions], device=self.device)
            rows = LMHead(self.model)(hidden[torch.arange(len(positions), device=self.device), last])
            table[positions] = rows.log_softmax(-1)[:, list(tokens)].float().cpu()
        return table

    @torch.inference_mode()
    def answer_logprobs(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, budget: int
    ) -> Tensor:
        """Return [n, len(answers)] float32: log-probability of each whole answer after each prompt, in nats."""
        pairs = [(n, a) for n in range(len(prompts)) for a in range(len(answers))]
        rows = [[*prompts[n], *answers[a]] for n, a in pairs]
        table = torch.empty(len(prompts), len(answers))
        for positions, hidden in self._hidden(rows, budget):
            for place, i in enumerate(positions):
                n, a = pairs[i]
                answer = torch.tensor(list(answers[a]), device=self.device)
                start = len(prompts[n]) - 1
                logprobs = LMHead(self.model)(hidden[place, start : start + len(answer)]).log_softmax(-1)
                table[n, a] = logprobs.gather(-1, answer[:, None]).sum().float().cpu()
        return table

    def _hidden(self, rows: Sequence[Sequence[int]], budget: int) -> Iterator[tuple[list[int], Tensor]]:
        """Yield positions into `rows` with the hidden states [n, L, H]; rows are padded on the right."""
        backbone: Any = self.model.base_model
        for positions in micro_batches([len(row) for row in rows], budget):
            # No mask: attention is causal, so no real token sees the padding behind it.
            ids, _ = _padded([rows[i] for i in positions], self.pad_id, self.device, left=False)
            yield positions, backbone(input_ids=ids, use_cache=False).last_hidden_state


def _padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and mask [n, L] of rows of different lengths."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[i, place] = torch.tensor(list(row), dtype=torch.long)
        mask[i, place] = 1
    return ids.to(device), mask.to(device)
