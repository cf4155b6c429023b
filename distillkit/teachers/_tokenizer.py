"""Whether a teacher reads the student's token ids as the student does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from distillkit.components import StudentInfo
from distillkit.errors import ModelError, problem
from distillkit.models import load_tokenizer, same_tokenizer_files, vocab_mismatch

__all__ = ["Tolerated", "tokenizer_digest", "uncounted_end_ids"]

Tolerated = Literal["eos", "chat_template"]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of what every token id stands for."""
    named = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def uncounted_end_ids(path: str, student: StudentInfo, tolerate: Sequence[Tolerated]) -> tuple[int, ...]:
    """Compare the tokenizer at `path` with the student's; return the end tokens to leave out of the teacher's signal.

    Raises:
        ModelError: there is none, or it differs in something that is not tolerated.
    """
    if same_tokenizer_files(path, student.tokenizer.name_or_path):
        return ()
    tokenizer = load_tokenizer(path, where="model.teacher.path")
    found = vocab_mismatch(student.tokenizer, tokenizer)
    refused = [text for text in found if text.split(":")[0] not in tolerate]
    if refused:
        hint = "a teacher of the same tokenizer family"
        if not any(text.startswith("ids") for text in refused):
            hint = f"model.teacher.tolerate: [{', '.join(text.split(':')[0] for text in refused)}]"
        where = f"model.teacher.path: the tokenizer of {path} does not fit the student's"
        raise ModelError(problem(where, got="; ".join(refused), expected="the same token ids and markers", hint=hint))
    if any(text.startswith("eos") for text in found):
        return *student.eos_token_ids, int(tokenizer.eos_token_id)
    return ()
