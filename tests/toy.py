"""Tiny models, tokenizers and rollouts that tests build on the spot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from distillkit.components import RolloutSampler, StudentInfo
from distillkit.packed import enable_packing
from distillkit.scorer import StudentScorer
from distillkit.types import Rollout, RolloutBatch, RolloutGroup, SampleRequest, SamplingSettings

VOCABULARY = ["<pad>", "<eos>", *"0123456789+-*=>"]


def tokenizer(vocabulary: Sequence[str] = VOCABULARY) -> PreTrainedTokenizerFast:
    """A character tokenizer: one token per character."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def model(seed: int = 0, *, vocabulary: int = len(VOCABULARY), tied: bool = True, layers: int = 2) -> PreTrainedModel:
    """A random Qwen3 of a few thousand parameters, float32, which runs packed rows as a loaded one does."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=128, tie_word_embeddings=tied,
        pad_token_id=0, eos_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    made = Qwen3ForCausalLM(config)
    assert enable_packing(made)
    return made


def info(vocab_limit: int = len(VOCABULARY)) -> StudentInfo:
    """The student of these tests, as its parts see it."""
    return StudentInfo(
        tokenizer=tokenizer(), vocab_limit=vocab_limit, eos_token_ids=(1,), pad_token_id=0, device=torch.device("cpu")
    )


def scorer(seed: int = 0, *, head_chunk: int | None = None, tied: bool = True) -> StudentScorer:
    """A random student."""
    return StudentScorer(model(seed, tied=tied), vocab_limit=len(VOCABULARY), head_chunk=head_chunk)


def requests(prompts: Sequence[Sequence[int]], *, group_size: int = 4, max_new_tokens: int = 8) -> list[SampleRequest]:
    """One request per list of prompt ids; the gold answer of prompt i is str(i)."""
    settings = SamplingSettings(group_size=group_size, max_new_tokens=max_new_tokens)
    return [
        SampleRequest(
            prompt_ids=tuple(ids), prompt=f"p{i}", row={"answer": str(i)}, group_id=100 + i, seed=i, settings=settings
        )
        for i, ids in enumerate(prompts)
    ]


class RandomSampler(RolloutSampler):
    """Uniformly random completions of random lengths, from the seeds alone; behaviour log-probs are unknown."""

    same_engine = True

    def sync(self, student: StudentScorer) -> None:
        pass

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        for request in requests:
            generator = torch.Generator().manual_seed(request.seed)
            yield RolloutGroup(
                request=request,
                rollouts=tuple(self._rollout(request.settings, generator) for _ in range(request.settings.group_size)),
            )

    def _rollout(self, settings: SamplingSettings, generator: torch.Generator) -> Rollout:
        length = int(torch.randint(1, settings.max_new_tokens + 1, (), generator=generator))
        ids = torch.randint(2, len(VOCABULARY), (length,), generator=generator)
        return Rollout(
            completion_ids=ids,
            behaviour_logprobs=torch.full((length,), float("nan")),
            loss_mask=torch.ones(length, dtype=torch.bool),
            policy_version=torch.zeros(length, dtype=torch.long),
            finish_reason="length" if length == settings.max_new_tokens else "stop",
            text="".join(VOCABULARY[i] for i in ids.tolist()),
        )


def batch(prompts: Sequence[Sequence[int]], *, group_size: int = 4, max_new_tokens: int = 8) -> RolloutBatch:
    """Random rollouts, padded."""
    sampler = RandomSampler(group_size=group_size, max_new_tokens=max_new_tokens)
    groups = sampler.sample(requests(prompts, group_size=group_size, max_new_tokens=max_new_tokens))
    return RolloutBatch.from_groups(list(groups), pad_id=0)
