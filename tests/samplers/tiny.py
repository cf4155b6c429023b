"""Tiny random-weight students, built on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from distillkit.components import StudentInfo
from distillkit.samplers.hf import HFSampler
from distillkit.types import Rollout, RolloutGroup, SampleRequest, SamplingSettings

VOCABULARY = 48
WINDOW = 6
PAD, EOS = 0, 1

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}

CONFIGS = {
    "qwen3": lambda: Qwen3Config(**_SHAPE, num_hidden_layers=2),
    "llama": lambda: LlamaConfig(**_SHAPE, num_hidden_layers=2),
    "llama-eager": lambda: LlamaConfig(**_SHAPE, num_hidden_layers=2, attn_implementation="eager"),
    "mistral": lambda: MistralConfig(**_SHAPE, num_hidden_layers=2, sliding_window=WINDOW),
    "gemma3": lambda: Gemma3TextConfig(
        **_SHAPE,
        num_hidden_layers=3,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=8,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.15
    ),
}
ARCHITECTURES = sorted(CONFIGS)


def student(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A float32 model in train mode, dropout 0; `changes` go into its config."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character: id 0 pads, id 1 ends, ids 2.. are the printable characters from `!` on."""
    vocabulary = {"<pad>": PAD, "<eos>": EOS} | {chr(33 + i): i + 2 for i in range(VOCABULARY - 2)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def info(*, stop: Sequence[int] = (EOS,), vocab_limit: int = VOCABULARY, pad: int = PAD) -> StudentInfo:
    return StudentInfo(
        tokenizer=tokenizer(),
        vocab_limit=vocab_limit,
        eos_token_ids=tuple(stop),
        pad_token_id=pad,
        device=torch.device("cpu"),
    )


def sampler(model: PreTrainedModel, *, rows_per_batch: int = 256, off: Sequence[str] = (), **about: Any) -> HFSampler:
    made = HFSampler(rows_per_batch=rows_per_batch, **dict.fromkeys(off, False))
    made.setup(info(**about))
    made.sync(SimpleNamespace(model=model))
    return made


def requests(
    lengths: Sequence[int],
    *,
    group_size: int = 1,
    max_new_tokens: int = 12,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 100,
) -> list[SampleRequest]:
    """One request per prompt length, prompts random, seeds `seed`, `seed` + 1, …"""
    settings = SamplingSettings(
        group_size=group_size, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
    )
    generator = torch.Generator().manual_seed(5)
    return [
        SampleRequest(
            prompt_ids=tuple(torch.randint(2, 30, (length,), generator=generator).tolist()),
            prompt=f"prompt {i}",
            row={"number": i},
            group_id=50 + i,
            seed=seed + i,
            settings=settings,
            policy_version=3,
        )
        for i, length in enumerate(lengths)
    ]


def by_group(groups: Sequence[RolloutGroup]) -> dict[int, tuple[Rollout, ...]]:
    return {group.request.group_id: group.rollouts for group in groups}


def ids(groups: Sequence[RolloutGroup]) -> dict[int, list[list[int]]]:
    return {i: [r.completion_ids.tolist() for r in rollouts] for i, rollouts in by_group(groups).items()}


@torch.no_grad()
def generate(model: PreTrainedModel, prompt: Sequence[int], stop: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy tokens of `model.generate` for one unpadded prompt, the end token included."""
    model.eval()
    tokens = torch.tensor([prompt])
    out = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop) or None,
        pad_token_id=PAD,
    )
    return out[0, len(prompt) :].tolist()


def stops_at_several_times(free: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Two end ids under which completions that go on freely as `free` get at least three different lengths."""

    def length(row: Sequence[int], stop: tuple[int, ...]) -> int:
        return next((t for t, token in enumerate(row, start=1) if token in stop), len(row))

    pairs = combinations(sorted({token for row in free for token in row}), 2)
    return next(stop for stop in pairs if len({length(row, stop) for row in free}) >= 3)


@torch.no_grad()
def full_logprobs(
    model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int], *, temperature: float, limit: int
) -> torch.Tensor:
    """Log-probs of a completion from one forward over the whole sequence, without cache or padding."""
    model.eval()
    logits = model(torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0, :, :limit].double()
    logprobs = torch.log_softmax(logits / temperature, dim=-1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0]
