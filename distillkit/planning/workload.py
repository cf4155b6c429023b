"""What one step of a run asks of one rank, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distillkit.planning.head_arrays import HeadArrays
from distillkit.planning.model_shape import ModelShape

__all__ = ["Sampling", "Scorer", "Strategy", "Workload"]

Strategy = Literal["single", "ddp", "fsdp2", "deepspeed_stage_2", "deepspeed_stage_3"]
SamplerKind = Literal["hf", "vllm", "vllm_server", "none"]


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A frozen model.

    Attributes:
        role: whose it is: `teacher`, `reference`, or `reward model`.
        shape: its sizes.
        bytes_per_weight: of its dtype.
        local: in the trainer's process, else on servers.
        tokens_per_batch: of one forward.
        head_chunk: positions per head call; None near 64 MiB on a CPU, 256 MiB elsewhere.
        keeps_hidden: hidden states of all completions are kept, for a divergence over the whole vocabulary.
        topk: K log-probs and ids are kept per token.
        own_weights: False for the student's, adapters off.
    """

    role: str
    shape: ModelShape
    bytes_per_weight: int
    local: bool
    tokens_per_batch: int = 16384
    head_chunk: int | None = None
    keeps_hidden: bool = False
    topk: int = 0
    own_weights: bool = True


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How rollouts are drawn: `rows` decoded at once by `hf`; `kv_cache_bytes` of a vLLM engine, None unknown.

    `group` completions per prompt; `prompt_tokens` of the longest prompt; `new_tokens` of the longest completion and
    `mean_new_tokens` of an average one.
    """

    kind: SamplerKind
    group: int
    prompt_tokens: int
    new_tokens: int
    mean_new_tokens: float
    rows: int = 256
    kv_cache_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One step on one rank of `ranks`.

    Attributes:
        name: of the recipe.
        student: its sizes.
        strategy: how the ranks share weights, gradients and optimizer.
        ranks: that train.
        device: `cuda` or `cpu`: allocators and optimizers differ.
        bytes_per_weight: of the student's own dtype.
        autocast: forwards run in bfloat16 over float32 weights.
        compute_bytes: per weight and activation of the wrapped student's forward, where it is not autocast that narrows
            them: FSDP2 gathers bfloat16 weights out of float32 shards.
        checkpointing: layers are recomputed in the backward pass.
        trainable: parameters with a gradient.
        optimizer_bytes: state per trainable parameter.
        optimizer_fused: one kernel updates weights and state, without temporaries.
        sampling: of the rollouts.
        prompts_per_step: over all ranks.
        tokens_per_micro_batch: budget of one forward and backward, padding included.
        head_chunk: positions per head call; None near 64 MiB on a CPU, 256 MiB elsewhere.
        head_arrays: float32 [positions, V] arrays alive at once while a head chunk is scored.
        vocab_limit: ids that take part in a softmax.
        passes: forward and backward passes over the rollouts (`inner_epochs`).
        updates: optimizer steps.
        old_pass: an extra forward of the policy that sampled.
        one_step_off: the next step's rollouts are sampled while this one's are learned from.
        scorers: teacher, reference and models of rewards.
    """

    name: str
    student: ModelShape
    strategy: Strategy
    ranks: int
    device: Literal["cuda", "cpu"]
    bytes_per_weight: int
    autocast: bool
    compute_bytes: int
    checkpointing: bool
    trainable: int
    optimizer_bytes: float
    optimizer_fused: bool
    sampling: Sampling
    prompts_per_step: int
    tokens_per_micro_batch: int
    head_chunk: int | None
    head_arrays: HeadArrays
    vocab_limit: int
    passes: int = 1
    updates: int = 1
    old_pass: bool = False
    one_step_off: bool = False
    scorers: tuple[Scorer, ...] = ()

    @property
    def rollouts(self) -> int:
        """Rollouts of this rank in one step."""
        return -(-self.prompts_per_step // self.ranks) * self.sampling.group

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and completion together."""
        return self.sampling.prompt_tokens + self.sampling.new_tokens

    @property
    def mean_tokens(self) -> float:
        """Tokens of a rollout of average length, with the longest prompt."""
        return self.sampling.prompt_tokens + self.sampling.mean_new_tokens

    @property
    def sampling_bytes(self) -> int:
        """Bytes per activation while `hf` decodes: over a gathered float32 copy autocast narrows them too."""
        return 2 if self.autocast else self.compute_bytes

    @property
    def rotary_keys(self) -> int:
        """Bytes per element of a cached key: rotary embedding leaves float32 under autocast."""
        return 4 if self.sampling_bytes == 2 and self.bytes_per_weight == 4 else self.sampling_bytes

    @property
    def micro_batch_rows(self) -> int:
        """Rollouts of the longest kind in one micro-batch; one that is over the budget still goes alone."""
        per_update = -(-self.rollouts * self.passes // self.updates)
        return max(1, min(self.tokens_per_micro_batch // self.longest, per_update))

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one update when every rollout is as long as it may be."""
        return -(-(self.rollouts * self.passes) // (self.updates * self.micro_batch_rows))
