"""Load students and teachers, and compare their vocabularies."""

from __future__ import annotations

import filecmp
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from distillkit import embedded
from distillkit.backbone import LMHead
from distillkit.errors import ModelError, problem
from distillkit.packed import enable_packing

__all__ = [
    "Dtype",
    "enable_gradient_checkpointing",
    "end_token_ids",
    "fingerprint",
    "load_causal_lm",
    "load_tokenizer",
    "model_vocab_size",
    "prepared",
    "same_tokenizer_files",
    "vocab_mismatch",
]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_TOKENIZER_FILES = ("*token*.json", "*.model", "vocab*", "merges.txt", "*chat_template*", "*chat_templates/*")


def load_tokenizer(path: str, *, where: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local checkpoint folder, a hub name, or an `embedded:` model.

    Raises:
        ModelError: there is none, it has no end token, or it needs code from the checkpoint.
    """
    source = embedded.resolve(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise ModelError(_not_loadable(where, path, "a tokenizer", error)) from error
    if tokenizer.eos_token_id is None:
        hint = "set eos_token in its tokenizer_config.json"
        raise ModelError(problem(f"{where}: the tokenizer has no end token", got=path, hint=hint))
    if tokenizer.pad_token_id is None:
        # Padding is recognised by the attention mask, never by id, so the end token can pad.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def same_tokenizer_files(one: str, other: str) -> bool:
    """Return whether two local checkpoints say the same of their tokenizer, byte by byte.

    False where that is not all there is to it: a hub name, or a tokenizer whose class follows from the model's config.
    """
    folders = [Path(embedded.resolve(path)) for path in (one, other)]
    settings = [folder / "tokenizer_config.json" for folder in folders]
    if not all(path.is_file() for path in settings):
        return False
    names = [{str(f.relative_to(d)) for pattern in _TOKENIZER_FILES for f in d.glob(pattern)} for d in folders]
    if names[0] != names[1] or "tokenizer_class" not in json.loads(settings[0].read_text()):
        return False
    _, differ, unread = filecmp.cmpfiles(folders[0], folders[1], sorted(names[0]), shallow=False)
    return not differ and not unread


def load_causal_lm(path: str, *, where: str, dtype: Dtype = "auto") -> PreTrainedModel:
    """Load a causal language model from safetensors, with dropout 0; remote code is never run.

    Raises:
        ModelError: nothing there, not a causal language model, or a head that this module cannot reproduce.
    """
    source = embedded.resolve(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:
        raise ModelError(_not_loadable(where, path, "a causal language model in safetensors", error)) from error
    return prepared(model, where=where)


def prepared(model: PreTrainedModel, *, where: str) -> PreTrainedModel:
    """Return the model with dropout 0, its head checked, able to run packed rows if it can: see `load_causal_lm`."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            vars(module)["attention_dropout"] = 0.0
    _check_head(model, where)
    enable_packing(model)
    return model


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute the layers' activations in the backward pass (non-reentrant)."""
    # transformers 5.20 renamed the method and warns about the old name.
    name = "activation_checkpointing_enable"
    enable: Any = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": False})


def model_vocab_size(path: str, *, where: str) -> int:
    """Return V of a checkpoint's output head, read from its config alone."""
    try:
        config = AutoConfig.from_pretrained(embedded.resolve(path), trust_remote_code=False)
    except Exception as error:
        raise ModelError(_not_loadable(where, path, "a model config", error)) from error
    return int(config.get_text_config().vocab_size)


def fingerprint(path: str) -> str:
    """Return a digest of a checkpoint folder: names, sizes and the first and last MiB of every file.

    A hub name that is not a local folder is its own digest.
    """
    folder = Path(embedded.resolve(path))
    if not folder.is_dir():
        return f"name:{path}"
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".jinja", ".model"}):
        size = file.stat().st_size
        digest.update(json.dumps([file.name, size]).encode())
        with file.open("rb") as stream:
            digest.update(stream.read(2**20))
            stream.seek(max(size - 2**20, 0))
            digest.update(stream.read())
    return f"sha256:{digest.hexdigest()}"


def _not_loadable(where: str, path: str, wanted: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return problem(
        f"{where}: cannot load {wanted}",
        got=f"{path} ({reason})",
        expected="a local Hugging Face checkpoint folder, a hub name, or embedded:student / embedded:teacher",
    )


@torch.no_grad()
def _check_head(model: PreTrainedModel, where: str) -> None:
    ids = torch.arange(4, device=model.device).unsqueeze(0)
    was_training = model.training
    model.eval()
    try:
        whole = model(input_ids=ids, use_cache=False).logits.float()
        ours = LMHead(model)(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    except Exception as error:
        what = f"{type(model).__name__} ({type(error).__name__}: {error})"
        raise ModelError(problem(f"{where}: cannot run the model's backbone and head apart", got=what)) from error
    finally:
        model.train(was_training)
    if not torch.allclose(whole, ours, rtol=1e-3, atol=1e-3):
        gap = f"{type(model).__name__}: logits differ by up to {(whole - ours).abs().max().item():.3g}"
        expected = "a linear head, optionally with bias, logit_scale, logits_scaling or final_logit_softcapping"
        raise ModelError(problem(f"{where}: unsupported output head", got=gap, expected=expected))


def vocab_mismatch(student: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> list[str]:
    """Return what differs between two tokenizers: `ids`, `eos`, `chat_template` with a description each, or nothing.

    Padding of the embedding matrices does not count: only tokens that the tokenizers name are compared.
    """
    ours, theirs = student.get_vocab(), other.get_vocab()
    found = []
    moved = [(t, i, theirs.get(t)) for t, i in sorted(ours.items(), key=lambda item: item[1]) if theirs.get(t) != i]
    if moved:
        token, i, j = moved[0]
        found.append(f"ids: {len(moved)} tokens differ, the first is {token!r}: student {i}, teacher {j}")
    if student.eos_token_id != other.eos_token_id:
        our_end, their_end = (f"{t.eos_token!r} ({t.eos_token_id})" for t in (student, other))
        found.append(f"eos: student {our_end}, teacher {their_end}")
    if student.chat_template != other.chat_template:
        found.append("chat_template: the student's prompts would look unfamiliar to the teacher")
    return found


def end_token_ids(tokenizer: PreTrainedTokenizerBase, config: Any) -> tuple[int, ...]:
    """Return the ids that end a completion: the tokenizer's end token and the generation config's, in order."""
    declared = getattr(config, "eos_token_id", None)
    more: Sequence[int] = [declared] if isinstance(declared, int) else declared or []
    return tuple(dict.fromkeys([int(tokenizer.eos_token_id), *more]))
