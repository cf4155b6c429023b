"""Memory of one rank, phase by phase, when every rollout is as long as it may be.

Bytes are counted, not fitted: what autograd keeps of each layer, the cache as its buffers grow, float32 logits of a
head chunk, an optimizer's state and temporaries, what a strategy shards and gathers. On a CPU, `allocator.py` adds what
glibc keeps of freed blocks.
"""

from __future__ import annotations

from distillkit.backbone import chunk_rows
from distillkit.chunks import block_rows
from distillkit.planning.allocator import kept_by_malloc
from distillkit.planning.blocks import Blocks, Phase
from distillkit.planning.layers import cache_bytes, cache_columns, forward_per_token, saved_columns
from distillkit.planning.workload import Scorer, Workload
from distillkit.samplers.decoding import PREFILL_TOKENS

__all__ = ["peak", "phases"]

RUNTIME = {"cuda": 1.0 * 2**30, "cpu": 32 * 2**20}
"""Libraries at first use: CUDA context, cuBLAS and NCCL buffers (assumed); MKL and allocator on a CPU (measured)."""

ZERO_BUCKET = 200_000_000
"""Elements of DeepSpeed's reduce and gather buckets, as Lightning sets them."""

ZERO3_LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at most, as Lightning sets it."""

_SHARDED = ("fsdp2", "deepspeed_stage_2", "deepspeed_stage_3")


def peak(load: Workload) -> float:
    """Return the bytes of the phase that needs most."""
    return max(phase.total for phase in phases(load))


def phases(load: Workload) -> tuple[Phase, ...]:
    """Return the phases of a step, optimizer state there from the start (as it is from the second step on)."""
    moments: list[tuple[str, Blocks]] = []
    if load.sampling.kind != "none":
        moments.append(("rollout", _rollout(load)))
    moments += [(s.role, _scoring(load, s)) for s in load.scorers if s.local]
    moments += [("update", moment) for moment in _update(load)]
    moments.append(("optimizer", _optimizer(load)))
    whole = [(name, _resident(load) + own) for name, own in moments]
    kept = kept_by_malloc([blocks for _, blocks in whole]) if load.device == "cpu" else [0.0] * len(whole)
    found: dict[str, Phase] = {}
    for (name, blocks), extra in zip(whole, kept, strict=True):
        phase = Phase(name=name, parts=blocks.parts | ({"kept by malloc": extra} if extra else {}))
        if name not in found or found[name].total < phase.total:
            found[name] = phase
    return tuple(found.values())


def _resident(load: Workload) -> Blocks:
    """What is there all the time."""
    blocks = Blocks()
    weight, ranks, tensors = load.bytes_per_weight, load.ranks, load.student.tensors
    blocks.add("runtime", RUNTIME[load.device])
    blocks.add_tensors("weights", tensors, weight / (ranks if load.strategy in ("fsdp2", "deepspeed_stage_3") else 1))
    shared = ranks if load.strategy in _SHARDED else 1
    blocks.add_tensors("optimizer", _trained(load), load.optimizer_bytes / shared, pieces=2)
    if load.strategy in ("deepspeed_stage_2", "deepspeed_stage_3"):
        blocks.add("optimizer", 4 * load.trainable / ranks)  # DeepSpeed's float32 copy of what the rank updates
    if load.strategy == "ddp":
        blocks.add_tensors("communication", _trained(load), weight)  # the buckets gradients are reduced in
    for scorer in load.scorers:
        if scorer.local and scorer.own_weights:
            blocks.add_tensors(scorer.role, scorer.shape.tensors, scorer.bytes_per_weight)
    if load.sampling.kind == "vllm":
        blocks.add_tensors("engine weights", tensors, weight)
        blocks.add("KV cache", load.sampling.kv_cache_bytes or 0.0, block=2**40)
    return blocks


def _rollout(load: Workload) -> Blocks:
    student, how, blocks = load.student, load.sampling, Blocks()
    if load.strategy in ("fsdp2", "deepspeed_stage_3"):
        blocks.add_tensors("gathered weights", student.tensors, load.bytes_per_weight)
    if how.kind != "hf":
        return blocks
    rows, columns = min(how.rows, load.rollouts), cache_columns(how.prompt_tokens, how.new_tokens)
    together = min(max(1, PREFILL_TOKENS // how.prompt_tokens), -(-load.rollouts // how.group))
    prefilled = together * how.prompt_tokens
    _copies(load, blocks)  # of weights that take gradients; a gathered copy's are made anew for every product
    cache = cache_bytes(load, columns)
    layer = cache / student.layers  # a buffer that grows stands beside its successor, one layer at a time
    blocks.add("KV cache", rows * (cache + layer), block=rows * layer / 2)
    blocks.add(
        "KV cache", prefilled * cache_bytes(load, 1), block=prefilled * cache_bytes(load, 1) / student.layers / 2
    )
    # Logits, scaled logits and probabilities of every row; prompts ran before that.
    narrow = load.sampling_bytes
    logits = rows * load.vocab_limit * (12 + 2 * (narrow == 2))
    prefill = prefilled * forward_per_token(student, narrow)
    blocks.add("logits", logits, block=4 * rows * load.vocab_limit)
    blocks.add("activations", max(prefill - logits, 0.0), block=prefilled * student.intermediate * narrow)
    blocks.add("grids", rows * how.new_tokens * 20)
    return blocks


def _scoring(load: Workload, scorer: Scorer) -> Blocks:
    rows = max(1, min(scorer.tokens_per_batch // load.longest, load.rollouts))
    tokens, width, blocks = rows * load.longest, scorer.bytes_per_weight, Blocks()
    wide = tokens * scorer.shape.intermediate * width
    states = 2 * tokens * scorer.shape.hidden * width
    blocks.add("activations", tokens * forward_per_token(scorer.shape, width) + states, block=wide)
    if scorer.role != "reward model":
        scored = rows * load.sampling.new_tokens
        chunk, block = _head_sizes(load, scorer.head_chunk, scored)
        blocks.add("logits", chunk, block=chunk)
        blocks.add("logits", (1 + (scorer.topk > 0)) * block, block=block)
    _grids(load, blocks)
    return blocks


def _update(load: Workload) -> list[Blocks]:
    """The moments of forward and backward that may need most: the head, the first layer back, the last one."""
    student, rows = load.student, load.micro_batch_rows
    tokens, scored = rows * load.longest, rows * load.sampling.new_tokens
    residual = 4 if load.autocast else load.compute_bytes
    chunk, block = _head_sizes(load, load.head_chunk, scored)
    several = 4 * load.vocab_limit * scored > chunk
    # A head with hooks is called for each chunk: the gradient of the logits does not take their place, nor where they
    # are kept, and that of the weights is summed over the calls.
    called = load.strategy in ("fsdp2", "deepspeed_stage_3")
    beside = called or not several
    # The head's gradient is added to that of earlier micro-batches or of the embedding.
    trains_head = load.trainable >= student.parameters
    table = student.head_parameters * load.bytes_per_weight if trains_head else 0
    moments = []
    for name in ("head", "first", "last"):
        blocks = Blocks()
        _grids(load, blocks)
        _copies(load, blocks)
        _gathered(load, blocks)
        if name != "last":
            _activations(load, blocks, tokens, student.layers)
            blocks.add("activations", 4 * tokens * student.hidden * residual, block=tokens * student.hidden * residual)
        elif load.checkpointing:
            _activations(load, blocks, tokens, 1)
        if name == "head":
            blocks.add("logits", (load.head_arrays.chunk + beside) * chunk, block=chunk)
            blocks.add("logits", load.head_arrays.block * block, block=block)
            blocks.add("gradients", table * (2 if called and several else 1), block=table)
        else:
            _layer_back(load, blocks, tokens)
            # Tied weights have one gradient of both, unless the head is called or autocast narrows it.
            apart = student.tied and (called or load.autocast)
            tables = 1 if name == "first" else (load.micro_batches > 1) + apart
            blocks.add("gradients", tables * table, block=table)
        if name == "last" or load.micro_batches > 1:
            _gradients(load, blocks)
        moments.append(blocks)
    return moments


def _head_sizes(load: Workload, head_chunk: int | None, positions: int) -> tuple[int, int]:
    """Bytes of a float32 array as large as a head chunk, and of one as large as a block of it."""
    rows = min(chunk_rows(load.vocab_limit, head_chunk, load.device), positions)
    width = 4 * load.vocab_limit
    return width * rows, width * min(rows, block_rows(load.vocab_limit, load.device))


def _activations(load: Workload, blocks: Blocks, tokens: int, layers: int) -> None:
    """What autograd keeps of `layers` layers: everything, or with checkpointing each layer's input."""
    hidden, residual = load.student.hidden, 4 if load.autocast else load.compute_bytes
    if load.checkpointing:
        blocks.add("activations", layers * tokens * hidden * residual, block=tokens * hidden * residual)
        return
    for columns, width, arrays in saved_columns(load.student, load.compute_bytes, autocast=load.autocast):
        blocks.add("activations", layers * arrays * tokens * columns * width, block=tokens * columns * width)


def _layer_back(load: Workload, blocks: Blocks, tokens: int) -> None:
    """The backward pass of one layer: gradients of the MLP's arrays, and the layer itself where it is recomputed."""
    student, narrow = load.student, 2 if load.autocast else load.compute_bytes
    blocks.add("activations", 3 * tokens * student.intermediate * narrow, block=tokens * student.intermediate * narrow)
    blocks.add("activations", 2 * tokens * student.hidden * narrow, block=tokens * student.hidden * narrow)
    if load.checkpointing:
        for columns, width, arrays in saved_columns(student, load.compute_bytes, autocast=load.autocast):
            blocks.add("activations", arrays * tokens * columns * width, block=tokens * columns * width)


def _optimizer(load: Workload) -> Blocks:
    blocks, trained = Blocks(), _trained(load)
    _gradients(load, blocks)
    if not load.optimizer_fused:
        _optimizer_temporaries(load, blocks, trained)
    _copies(load, blocks)
    _grids(load, blocks)
    return blocks


def _optimizer_temporaries(load: Workload, blocks: Blocks, trained: tuple[int, ...]) -> None:
    if load.device == "cuda":  # all tensors at once: one more copy
        shared = load.ranks if load.strategy in _SHARDED else 1
        blocks.add_tensors("optimizer temporaries", trained, 4 / shared)
    else:  # tensor by tensor
        blocks.add_tensors("optimizer temporaries", trained[:1] * 2, load.bytes_per_weight)


def _gradients(load: Workload, blocks: Blocks) -> None:
    """Gradients of the rank, and what exchanging them takes."""
    weight = load.bytes_per_weight
    shared = load.ranks if load.strategy in _SHARDED else 1
    blocks.add_tensors("gradients", _trained(load), weight / shared)
    if load.strategy == "fsdp2":
        blocks.add("communication", load.student.layer_parameters * weight)
    elif load.strategy in ("deepspeed_stage_2", "deepspeed_stage_3"):
        blocks.add("communication", 2 * min(ZERO_BUCKET, load.trainable) * weight)


def _gathered(load: Workload, blocks: Blocks) -> None:
    """What a sharding strategy holds beside its shard while layers run."""
    student, weight = load.student, load.compute_bytes
    if load.strategy == "fsdp2":  # embedding and head stay, a layer runs while the next is fetched
        tables = student.head_parameters * (1 if student.tied else 2)
        blocks.add("gathered weights", (tables + 2 * student.layer_parameters) * weight)
    elif load.strategy == "deepspeed_stage_3":
        blocks.add("gathered weights", min(student.parameters, ZERO3_LIVE) * weight)


def _copies(load: Workload, blocks: Blocks) -> None:
    """The bfloat16 copies of float32 matrices that autocast keeps."""
    if load.autocast:
        tensors = load.student.tensors if load.student.tied else load.student.tensors[1:]
        blocks.add_tensors("bfloat16 copies", tensors, 2)


def _grids(load: Workload, blocks: Blocks) -> None:
    """Per-token grids [N, L]: ids, masks, log-probs, weights, advantages, coefficients, what the scorers said."""
    batch, own, each = 22, 40, 8
    scorers = [s for s in load.scorers if s.role != "reward model"]
    kept = sum(each + 12 * s.topk for s in scorers) + batch + own
    hidden = sum(s.shape.hidden * s.bytes_per_weight for s in scorers if s.keeps_hidden)
    blocks.add("grids", load.rollouts * (load.longest * kept + load.sampling.new_tokens * hidden))


def _trained(load: Workload) -> tuple[int, ...]:
    """Elements of each tensor that has a gradient; adapters are small."""
    return load.student.tensors if load.trainable >= load.student.parameters else (load.trainable,)
