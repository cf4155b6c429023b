"""Fakes for tests: rollouts by hand, a teacher and a sampler that need no model, and a tiny model made on the spot.

Token ids are characters: 0 is padding, 1 the end token, 2 unknown, then newline and printable ASCII in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distillkit.components import RolloutSampler, StudentInfo, TeacherScorer
from distillkit.types import (
    RewardOutput,
    Rollout,
    RolloutBatch,
    RolloutGroup,
    SampleRequest,
    SamplingSettings,
    ScoreRequest,
    TeacherScores,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from distillkit.scorer import StudentScorer

__all__ = [
    "VOCABULARY",
    "FakeSampler",
    "FakeTeacher",
    "char_tokenizer",
    "encode",
    "reward_output",
    "rollout_batch",
    "sample_requests",
    "student_info",
    "tiny_model",
    "tiny_student",
]

PAD, END, UNKNOWN_ID = 0, 1, 2
VOCABULARY: tuple[str, ...] = ("<pad>", "<eos>", "<unk>", "\n", *(chr(c) for c in range(32, 127)))
_IDS = {token: i for i, token in enumerate(VOCABULARY)}

_GROUPS: dict[str, tuple[str, ...]] = {
    "1+1=": ("2", "3", "2", "11"),
    "2+2+1=": ("5", "#5", "4", "22#2"),
    "5+4=": ("9", "nine", "5+4=9.", "8"),
}


def encode(text: str) -> tuple[int, ...]:
    """Return one id per character.

    Example:
        >>> encode("1 a")
        (21, 4, 69)
    """
    return tuple(_IDS.get(character, UNKNOWN_ID) for character in text)


def sample_requests(
    prompts: Sequence[str] = tuple(_GROUPS),
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    group_size: int = 4,
    max_new_tokens: int = 6,
    temperature: float = 1.0,
) -> list[SampleRequest]:
    """Return one request per prompt; group ids are neither positions nor in order, all seeds differ.

    Without `rows`, a row holds the sum of the prompt's digits as `answer`.
    """
    settings = SamplingSettings(group_size=group_size, max_new_tokens=max_new_tokens, temperature=temperature)
    return [
        SampleRequest(
            prompt_ids=encode(prompt),
            prompt=prompt,
            row={"answer": _answer(prompt)} if rows is None else rows[i],
            group_id=11 - 5 * i,
            seed=100 + i,
            settings=settings,
            policy_version=3,
        )
        for i, prompt in enumerate(prompts)
    ]


def _answer(prompt: str) -> str:
    digits = [int(c) for c in prompt if c.isdigit()]
    return str(sum(digits)) if digits else "0"


def _rollout(text: str, request: SampleRequest, observation: str, end: bool = True) -> Rollout:
    ids = [*encode(text), END] if end and len(text) < request.settings.max_new_tokens else list(encode(text))
    ids = ids[: request.settings.max_new_tokens]
    count = len(ids)
    return Rollout(
        completion_ids=torch.tensor(ids),
        behaviour_logprobs=-0.1 * torch.arange(1, count + 1),
        loss_mask=torch.tensor([t >= len(text) or text[t] not in observation for t in range(count)]),
        policy_version=torch.full((count,), request.policy_version),
        finish_reason="stop" if ids[-1] == END else "length",
        text=text,
    )


def rollout_batch(
    groups: Mapping[str, Sequence[str]] | None = None,
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    max_new_tokens: int = 6,
    observation: str = "",
) -> RolloutBatch:
    """Return the batch of these completions, of different lengths, some cut at `max_new_tokens`.

    Args:
        groups: completions of each prompt; the default has three prompts with four completions each.
        rows: dataset row of each prompt; the default is the sum of its digits as `answer`.
        max_new_tokens: a completion of that many characters or more has no end token.
        observation: characters that count as tool output: attended, not trained.

    Example:
        >>> batch = rollout_batch({"1+1=": ["2", "3!"]}, rows=[{"answer": "2"}])
        >>> batch.tokens.shape, batch.completion_lengths.tolist(), batch.rows[1]
        (torch.Size([2, 7]), [2, 3], {'answer': '2'})
    """
    groups = _GROUPS if groups is None else groups
    requests = sample_requests(tuple(groups), rows=rows, group_size=4, max_new_tokens=max_new_tokens)
    made = [
        RolloutGroup(request=request, rollouts=tuple(_rollout(text, request, observation) for text in texts))
        for request, texts in zip(requests, groups.values(), strict=True)
    ]
    return RolloutBatch.from_groups(made, PAD)


def reward_output(
    n: int, values: Sequence[float | None] | None = None, correct: Sequence[bool | None] | None = None
) -> RewardOutput:
    """Return the rewards of `n` rollouts; None is not scored, or of unknown correctness.

    The default repeats right, wrong, wrong with a little reward, and one that timed out.
    """
    values = [(1.0, 0.0, 0.25, None)[i % 4] for i in range(n)] if values is None else values
    correct = [None if v is None else v == 1.0 for v in values] if correct is None else correct
    status = tuple("timed_out" if v is None else "scored" for v in values)
    return RewardOutput.single("fake", values, status=status, correct=correct)  # type: ignore[arg-type]


class FakeTeacher(TeacherScorer):
    """Says the same at every position: softmax of `logits`, which a person can check by hand.

    Args:
        logits: of token ids 0, 1, 2, ... ; those beyond have 0. None rises gently with the id.
        blind_to: characters whose positions are not valid.
    """

    def __init__(self, *, logits: tuple[float, ...] | None = None, blind_to: str = "") -> None:
        self.logits = logits
        self.blind_to = blind_to

    @property
    def offers(self) -> ScoreRequest:
        """Everything."""
        return ScoreRequest(sampled=True, topk=len(VOCABULARY), student_topk=len(VOCABULARY), full=True, entropy=True)

    @property
    def vocab_size(self) -> int:
        """The size of the fakes' vocabulary."""
        return len(VOCABULARY)

    def identity(self) -> str:
        """Return the arguments."""
        return f"fake:{self.logits}:{self.blind_to}"

    def _logits(self) -> Tensor:
        if self.logits is None:
            return 0.02 * torch.arange(len(VOCABULARY))
        return torch.tensor([*self.logits, *[0.0] * (len(VOCABULARY) - len(self.logits))])

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        """Score every `loss_mask` position with the one distribution."""
        logits, mask = self._logits(), rollouts.loss_mask
        logprobs = (logits / request.temperature).log_softmax(-1)
        blind = torch.isin(rollouts.tokens, torch.tensor(encode(self.blind_to), dtype=torch.long))
        best = logprobs.topk(request.topk)
        shape = (*mask.shape, request.topk)
        full = request.needs_distribution
        return TeacherScores(
            valid=mask & ~blind,
            sampled=logprobs[rollouts.tokens].masked_fill(~mask, 0.0) if request.sampled else None,
            topk_ids=best.indices.expand(shape).clone() if request.topk else None,
            topk=best.values.expand(shape).clone() if request.topk else None,
            entropy=(-(logprobs.exp() * logprobs).sum() * mask).float() if request.entropy else None,
            hidden=tuple(torch.ones(int(row.sum()), 1) for row in mask) if full else None,
            head=(lambda states: states * logits) if full else None,
        )


class FakeSampler(RolloutSampler):
    """Says the given completions in turn, beginning at the request's seed; its log-probs are unknown (NaN).

    Args:
        completions: what it says.
        group_size: G, completions per prompt.
        max_new_tokens: longest completion, in tokens.
        temperature: kept in the settings, and otherwise without effect.
        top_p: likewise.
    """

    def __init__(
        self,
        *,
        completions: tuple[str, ...] = ("2", "4", "11", "too long"),
        group_size: int = 4,
        max_new_tokens: int = 6,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> None:
        super().__init__(group_size=group_size, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        self.completions = tuple(completions)

    def sync(self, student: StudentScorer) -> None:
        """Take nothing over."""

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        """Yield a group per request, in order."""
        for request in requests:
            turns = range(request.seed, request.seed + request.settings.group_size)
            texts = [self.completions[turn % len(self.completions)] for turn in turns]
            yield RolloutGroup(request=request, rollouts=tuple(_unknown(_rollout(t, request, "")) for t in texts))


def _unknown(rollout: Rollout) -> Rollout:
    fields = {**vars(rollout), "behaviour_logprobs": torch.full_like(rollout.behaviour_logprobs, torch.nan)}
    return Rollout(**fields)


def char_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of the fakes: one token per character, a chat template that writes contents in a row."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(_IDS, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


def tiny_model(seed: int = 0) -> PreTrainedModel:
    """Return a random Qwen3 of a few thousand parameters over the fakes' vocabulary, float32, on the CPU."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=END,
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = Qwen3ForCausalLM(config)
    model.train(False)
    return model


def tiny_student(seed: int = 0) -> StudentScorer:
    """Return `tiny_model` as the student of a step."""
    from distillkit.scorer import StudentScorer

    return StudentScorer(tiny_model(seed), vocab_limit=len(VOCABULARY))


def student_info() -> StudentInfo:
    """Return what a part is told of `tiny_student` at set-up."""
    return StudentInfo(
        tokenizer=char_tokenizer(),
        vocab_limit=len(VOCABULARY),
        eos_token_ids=(END,),
        pad_token_id=PAD,
        device=torch.device("cpu"),
    )
