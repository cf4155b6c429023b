"""Real models whose every reply is known: the next token depends on the last one, by a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from distillkit.testing import char_tokenizer

END = "<eos>"
_IMPOSSIBLE = -60.0


def tokenizer(phrases: Sequence[str] = (), limit: int | None = None) -> PreTrainedTokenizerFast:
    """One token per character, and one per phrase."""
    made = char_tokenizer()
    made.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    if limit is not None:
        made.model_max_length = limit
    return made


def save(
    folder: Path,
    table: Mapping[str, Mapping[str, float]],
    *,
    phrases: Sequence[str] = (),
    context: int = 2048,
    limit: int | None = None,
) -> str:
    """Write a model that continues token `a` with token `b` with probability `table[a][b]`; others end the reply.

    Layers pass their input through, embeddings are unit vectors, and the output head holds the table's logarithms.
    """
    words = tokenizer(phrases, limit)
    size = len(words)
    config = Qwen3Config(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=context, tie_word_embeddings=False,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = Qwen3ForCausalLM(config)
    logits = torch.full((size, size), _IMPOSSIBLE)  # [next, last]
    for token in range(size):
        last = words.convert_ids_to_tokens(token)
        row = table.get(last, {END: 1.0})
        assert math.isclose(sum(row.values()), 1.0)
        for following, probability in row.items():
            logits[words.convert_tokens_to_ids(following), token] = math.log(probability)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(logits / math.sqrt(size))  # the last norm scales a unit vector by √size
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def decomposer(folder: Path, replies: Mapping[str, str], **options: int) -> str:
    """A model that answers a conversation whose last character is `c` with `replies[c]`."""
    table = {last: {reply: 1.0} for last, reply in replies.items()}
    return save(folder, table, phrases=list(dict.fromkeys(replies.values())), **options)  # type: ignore[arg-type]
