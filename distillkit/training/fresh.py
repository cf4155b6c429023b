"""A student with random weights, built from the entries of a Hugging Face config."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distillkit.errors import ConfigError, ModelError, did_you_mean, problem
from distillkit.models import Dtype, prepared

__all__ = ["check_entries", "fresh_causal_lm", "fresh_config", "fresh_fingerprint"]

_WHERE = "model.init"


def check_entries(entries: Mapping[str, Any]) -> None:
    """Refuse entries that no causal language model has.

    Args:
        entries: `model_type`, and the fields that differ from the defaults of its config.

    Raises:
        ConfigError: no `model_type`, one without a causal language model, a field it does not know, or a wrong value.

    Example:
        >>> check_entries({"model_type": "qwen3", "hidden_size": 64})
    """
    _config(entries)


def fresh_config(entries: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Return the config; size of the vocabulary and special tokens are the tokenizer's, unless given.

    Raises:
        ConfigError: as `check_entries`, or a vocabulary that is smaller than the tokenizer's.
    """
    tokens = 1 + max(tokenizer.get_vocab().values())
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = _config({"vocab_size": tokens, **special, **entries})
    if config.get_text_config().vocab_size < tokens:
        got = config.get_text_config().vocab_size
        where = f"{_WHERE}.vocab_size: smaller than the tokenizer's vocabulary"
        raise ConfigError(problem(where, got=got, expected=f"at least {tokens}", hint="leave it out"))
    return config


def fresh_causal_lm(config: PreTrainedConfig, *, seed: int, dtype: Dtype) -> PreTrainedModel:
    """Return a model with random weights, which depend on config and seed alone; global random states stay.

    Raises:
        ModelError: sizes that do not fit each other, or a head that cannot be reproduced.
    """
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=False)
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            raise ModelError(problem(f"{_WHERE}: these entries make no model", got=got)) from error
    return prepared(model, where=_WHERE)


def fresh_fingerprint(entries: Mapping[str, Any]) -> str:
    """Return a digest of the entries."""
    return f"init:{hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()}"


def _config(entries: Mapping[str, Any]) -> PreTrainedConfig:
    kind, fields = str(entries.get("model_type")), {k: v for k, v in entries.items() if k != "model_type"}
    if kind not in CONFIG_MAPPING or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        expected = "a model_type of transformers that has a causal language model"
        hint = did_you_mean(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) or "qwen3"
        where, got = f"{_WHERE}.model_type: not a causal language model", repr(kind) if kind != "None" else "nothing"
        raise ConfigError(problem(where, got=got, expected=expected, hint=hint))
    config_class = CONFIG_MAPPING[kind]
    try:
        config: PreTrainedConfig = config_class(**fields)
    except Exception as error:
        got = " ".join(str(error).split())
        raise ConfigError(problem(f"{_WHERE}: not what {config_class.__name__} takes", got=got)) from error
    known = [name for name in inspect.signature(config_class).parameters if name not in ("self", "kwargs")]
    # Older names that a config still understands are taken up under the new name; an unknown one is kept as it is.
    unknown = [name for name in fields if name not in known and name in vars(config)]
    if unknown:
        where = f"{_WHERE}.{unknown[0]}: {config_class.__name__} has no such field"
        near = did_you_mean(unknown[0], known)
        raise ConfigError(problem(where, got=", ".join(unknown), expected=", ".join(sorted(known)), hint=near))
    return config
