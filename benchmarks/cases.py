"""What both sides of the comparison train: models, prompts, rewards. Nothing of distillkit is needed.

    python benchmarks/cases.py --case fixed --steps 7 FOLDER

writes the inputs of so many steps, for `--inputs FOLDER` of what is measured: what making models leaves in a process's
heap is in no figure then.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHARACTERS = string.digits + string.ascii_letters + "+-*/=>()., :;"
SPECIAL = ("<pad>", "<eos>")
_NEVER = 60.0


@dataclass(frozen=True)
class Shape:
    """Of a Qwen3 with heads of 32 dimensions, half as many for keys and values."""

    hidden: int
    layers: int
    inner: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """One load.

    Attributes:
        vocabulary: rows of the head; the first ones are padding, end token and characters.
        ends: whether the models can emit the end token; from random weights its probability is 1 ÷ vocabulary.
        equal_groups: share of the groups whose rollouts all have one reward.
        masked: distil on wrong answers alone.
        settings: distillkit's own for this load, beside its defaults.
    """

    name: str
    student: Shape
    teacher: Shape
    vocabulary: int = len(SPECIAL) + len(CHARACTERS)
    groups: int = 8
    group_size: int = 8
    prompt_tokens: int = 16
    new_tokens: int = 128
    ends: bool = False
    equal_groups: float = 0.0
    masked: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rollouts(self) -> int:
        """Rollouts of a step."""
        return self.groups * self.group_size

    def batch(self, most: int) -> int:
        """Sequences of a batch: the largest number up to `most` that divides the rollouts."""
        return next(size for size in range(min(most, self.rollouts), 0, -1) if self.rollouts % size == 0)


ONE_M, SIX_M = Shape(128, 4, 512), Shape(256, 6, 1024)
CASES = {
    case.name: case
    for case in (
        Case(name="fixed", student=ONE_M, teacher=SIX_M),
        Case(name="fixed_same", student=ONE_M, teacher=ONE_M),
        Case(
            name="growth", student=ONE_M, teacher=ONE_M, vocabulary=8192, group_size=4, prompt_tokens=64, new_tokens=64
        ),
        Case(
            name="tiny", student=Shape(64, 1, 64), teacher=Shape(64, 2, 64), groups=2, group_size=3, prompt_tokens=5,
            new_tokens=7,
        ),
        Case(name="tail", student=SIX_M, teacher=SIX_M, new_tokens=512, ends=True),
        Case(
            name="vocab", student=Shape(256, 4, 768), teacher=Shape(384, 6, 1152), vocabulary=151_936, groups=2,
            new_tokens=64, ends=True, settings={"gradient_checkpointing": True},
        ),
        Case(name="long", student=SIX_M, teacher=SIX_M, groups=4, prompt_tokens=512),
        Case(
            name="sparse", student=SIX_M, teacher=SIX_M, new_tokens=512, ends=True, equal_groups=0.6, groups=10,
            group_size=6, masked=True,
        ),
    )
}  # fmt: skip
COMPARED = ("fixed", "tail", "vocab", "long", "sparse")
"""The cases that TRL runs too; `growth` is that of growth.py, `tiny` is to see whether everything runs."""


def write_inputs(case: Case, folder: Path, steps: int) -> None:
    """Write `student/`, `teacher/` and `prompts.jsonl`, prompts for so many steps."""
    own = tokenizer(case.vocabulary)
    for seed, (name, shape) in enumerate((("student", case.student), ("teacher", case.teacher))):
        model(case, shape, seed).save_pretrained(folder / name)
        own.save_pretrained(folder / name)
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts(case, steps)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token per character; the rest of the vocabulary is never met in a text."""
    words = [*SPECIAL, *CHARACTERS]
    words += [f"<{i}>" for i in range(len(words), vocabulary)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def model(case: Case, shape: Shape, seed: int) -> Qwen3ForCausalLM:
    """Random weights, float32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=case.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.hidden // 32, head_dim=32,
        num_key_value_heads=shape.hidden // 64, max_position_embeddings=2048, tie_word_embeddings=case.ends,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    made = Qwen3ForCausalLM(config)
    if not case.ends:
        _never_end(made)
    return made


@torch.no_grad()
def _never_end(made: Qwen3ForCausalLM) -> None:
    """Keep one feature constant through all layers; it makes the logits of padding and end large and negative."""
    made.model.embed_tokens.weight[:, 0] = 1.0
    for layer in made.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    made.lm_head.weight[:, 0] = 0.0
    made.lm_head.weight[: len(SPECIAL)] = 0.0
    made.lm_head.weight[: len(SPECIAL), 0] = -_NEVER


def prompts(case: Case, steps: int) -> list[str]:
    """Prompts of `prompt_tokens` characters; those of equal groups begin with an equals sign."""
    generator = random.Random(1)
    letters = string.ascii_letters + string.digits
    equal = round(case.equal_groups * case.groups)
    found = []
    for _ in range(steps):
        heads = ["="] * equal + ["+"] * (case.groups - equal)
        found += [head + "".join(generator.choices(letters, k=case.prompt_tokens - 1)) for head in heads]
    return found


def reward(prompt: str, completion: str) -> float:
    """0 or 1 by chance, fixed by the completion; 0 for all of an equal group."""
    return 0.0 if prompt.startswith("=") else float(zlib.crc32(completion.encode()) % 2)


def main() -> None:
    """Write the inputs of one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    write_inputs(CASES[given.case], given.folder, given.steps)


if __name__ == "__main__":
    main()
