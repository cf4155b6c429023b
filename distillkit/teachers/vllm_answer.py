"""What a vLLM server says about the tokens of one rollout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distillkit.teachers.vllm_request import Failure

__all__ = ["PATH", "RolloutScores", "read_scores", "scoring_entries"]

PATH = "/v1/completions"
_IMPOSSIBLE = -9999.0
"""What vLLM writes for −∞."""
_ROUNDING = 1e-3


@dataclass(frozen=True, kw_only=True)
class RolloutScores:
    """Per asked position, in order: nats of the token there (−∞: impossible), and of the most likely ones.

    The rows of `topk_ids` and `topk` are by falling log-prob, and of different lengths where some of the most likely
    ids lay at or beyond the vocabulary limit.
    """

    sampled: list[float]
    topk_ids: list[list[int]]
    topk: list[list[float]]


def scoring_entries(ids: Sequence[int], k: int) -> dict[str, Any]:
    """Return the request that scores `ids`: the model reads them as a prompt, and the one token it adds is ignored."""
    return {
        "prompt": list(ids),
        "max_tokens": 1,
        "temperature": 1.0,
        "prompt_logprobs": k,
        "return_token_ids": True,
    }


def read_scores(answer: Any, ids: Sequence[int], positions: Sequence[int], *, asked: int, limit: int) -> RolloutScores:
    """Read the scores at `positions` of `ids` (each at least 1: position 0 has no prefix).

    Entry t of the answer belongs to the token at t, given those before it: its log-prob, and those of the `asked` most
    likely tokens. Ids at or beyond `limit` are dropped from these, and the others are divided by 1 − (the probability
    dropped there).

    Raises:
        Failure: the answer has no scores, fewer than were asked for, or those of other tokens.
    """
    try:
        choice = answer["choices"][0]
        echoed, entries = choice.get("prompt_token_ids"), choice["prompt_logprobs"]
        count = len(entries)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise Failure(f"an answer without choices[0].prompt_logprobs: {str(answer)[:200]}", fault="request") from error
    if (echoed is not None and echoed != list(ids)) or count != len(ids):
        sent = f"{len(ids)} tokens {str(list(ids))[:200]}"
        got = f"{count} tokens" if echoed is None else f"{count} tokens {str(echoed)[:200]}"
        raise Failure(f"scores of {got}, for the {sent} that were sent", fault="request")
    rows = [_position(entries[t], ids[t], t, asked, limit) for t in positions]
    return RolloutScores(
        sampled=[own for own, _ in rows],
        topk_ids=[[token for _, token in best] for _, best in rows],
        topk=[[-cost for cost, _ in best] for _, best in rows],
    )


def _position(entry: Any, token: int, t: int, asked: int, limit: int) -> tuple[float, list[tuple[float, int]]]:
    """The log-prob of `token`, and (−log-prob, id) of the most likely ids below `limit`, best first."""
    try:
        nats = {int(key): float(value["logprob"]) for key, value in entry.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Failure(f"no log-probs at position {t}: {str(entry)[:200]}", fault="request") from error
    if token not in nats:
        raise Failure(f"no log-prob of token {token} at position {t}, but of {list(nats)[:5]}", fault="request")
    if len(nats) < asked:
        raise Failure(f"{len(nats)} log-probs at position {t}, fewer than the {asked} asked for", fault="request")
    if any(math.isnan(value) or value > _ROUNDING for value in nats.values()):
        raise Failure(f"values at position {t} that are no log-probs: {str(entry)[:200]}", fault="request")
    dropped = sum(math.exp(value) for key, value in nats.items() if key >= limit)
    rest = math.log1p(-dropped) if dropped < 1 else 0.0
    # The token of the rollout comes on top of the most likely ones, where it is none of them.
    best = sorted((rest - value, key) for key, value in nats.items())[:asked]
    own = nats[token]
    return (own - rest if own > _IMPOSSIBLE else -math.inf), [pair for pair in best if pair[1] < limit]
