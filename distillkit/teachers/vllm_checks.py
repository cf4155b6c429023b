"""What is asked of a vLLM server before it is trusted: its model, vocabulary, and the same scores twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from distillkit.errors import ConfigError, ModelError, ScoringError, problem
from distillkit.teachers.vllm_answer import PATH, read_scores, scoring_entries
from distillkit.teachers.vllm_client import Server, ServerPool
from distillkit.teachers.vllm_request import Failure

__all__ = ["ServerChecks"]

_MODELS = "/v1/models"
_PROBE_TOKENS = 32
_FEW = 64
_TEXT = "Let x = 3*(4+5) - 7.\nThen x > 19, Straße, 你好: {a_b}"
_PADDING_MASS = 1e-3
"""Probability of ids beyond the vocabulary limit above which they are not padding."""
_SAME_SCORES = 0.2
"""Mean distance in nats/token above which two answers are not of the same model: kernels in bfloat16 differ by less."""


class ServerChecks:
    """Compares what servers say about one probe, at start-up and when one was away.

    Args:
        wanted: name of the model; None takes each server's own.
        vocab_size: V of the teacher's head.
        limit: ids below it are shared with the student.
        max_logprobs: the most that will be asked for.
        tokenizer: the student's, whose ids are the teacher's.
    """

    def __init__(
        self,
        *,
        wanted: str | None,
        vocab_size: int,
        limit: int,
        max_logprobs: int,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._tokenizer = tokenizer
        self._wanted = wanted
        self._vocab_size, self._limit = vocab_size, limit
        self._max_logprobs = min(max_logprobs, vocab_size)
        self._first: list[float] | None = None

    def start(self, pool: ServerPool) -> None:
        """Ask every server, and compare the second answer with the first, and each server with the others.

        Raises:
            ConfigError: a wrong address, another model, or fewer log-probs than `max_logprobs`.
            ModelError: another tokenizer or vocabulary, or the teacher uses ids that the student does not have.
            ScoringError: an answer that is none, or another answer to the same question.
        """
        for server in pool.servers:
            try:
                self._choose_model(server, pool.send(server, _MODELS))
            except Failure as failure:
                key = "HTTP 401" in failure.reason or "HTTP 403" in failure.reason
                where, got = f"{server.where}: no server", f"{server.url} ({failure.reason})"
                hint = "model.teacher.api_key_env" if key else "vllm serve MODEL --port PORT, or another address"
                raise ConfigError(
                    problem(where, got=got, expected="a vLLM server that answers", hint=hint)
                ) from failure
            self._check_tokenizer(pool, server)
            found, again = self._ask(pool, server), self._ask(pool, server)
            if (gap := _gap(found, again)) > _SAME_SCORES:
                raise _differ(f"{server.where}: {server.url} scores the same tokens differently each time", gap)
            if self._first is None:
                self._first = found
            elif (gap := _gap(found, self._first)) > _SAME_SCORES:
                raise _differ(f"{server.where}: {server.url} and {pool.servers[0].url} serve different models", gap)
        self._check_padding(pool, pool.servers[0])

    def again(self, pool: ServerPool, server: Server) -> None:
        """Check a server that was away.

        Raises:
            Failure: it does not answer yet.
            ScoringError: it is not the one that left.
        """
        where = f"{server.where}: {server.url} came back as another server"
        try:
            self._choose_model(server, pool.send(server, _MODELS))
            found = self._probe(pool, server)
        except (ConfigError, ModelError) as error:
            raise ScoringError(f"{where}\n{error}") from error
        except Failure as failure:
            if failure.fault == "request":
                raise ScoringError(problem(where, got=failure.reason)) from failure
            raise
        if self._first is not None and (gap := _gap(found, self._first)) > _SAME_SCORES:
            raise _differ(where, gap)

    def _choose_model(self, server: Server, listed: Any) -> None:
        """Set what `server` says of the model that is wanted, or of its own."""
        try:
            models = {str(entry["id"]): entry for entry in listed["data"]}
            own = [name for name, entry in models.items() if not entry.get("parent")]
        except (KeyError, TypeError, AttributeError) as error:
            where, got = (
                f"{server.where}: not a server of the OpenAI kind",
                f"{server.url}{_MODELS}: {str(listed)[:200]}",
            )
            raise ConfigError(problem(where, got=got, expected="a list of models")) from error
        name = self._wanted if self._wanted is not None else next(iter(own), None)
        if name is None or name not in models:
            where = f"model.teacher.model: {server.url} serves another model"
            known = ", ".join(models) or "none"
            raise ConfigError(problem(where, got=repr(name), expected=known, hint="null takes the one that is served"))
        length = models[name].get("max_model_len")
        server.model, server.max_model_len = name, length if isinstance(length, int) else None

    def _check_tokenizer(self, pool: ServerPool, server: Server) -> None:
        """Compare the ids of a text, where the server tokenizes: scores of another tokenizer's ids mean nothing."""
        own = list(self._tokenizer(_TEXT, add_special_tokens=False)["input_ids"])
        try:
            found = pool.send(server, "/tokenize", {"prompt": _TEXT, "add_special_tokens": False})["tokens"]
        except (Failure, KeyError, TypeError):  # it only scores
            return
        if found != own:
            where = f"{server.where}: the model behind it has another tokenizer than model.teacher.path"
            got = f"{server.url}: {_TEXT[:12]!r}… is {str(found)[:120]}"
            hint = "serve the model of model.teacher.path"
            raise ModelError(problem(where, got=got, expected=str(own)[:120], hint=hint))

    def _ask(self, pool: ServerPool, server: Server) -> list[float]:
        try:
            return self._probe(pool, server)
        except Failure as failure:
            raise _no_scores(server, failure) from failure

    def _probe(self, pool: ServerPool, server: Server) -> list[float]:
        ids, k = self._probe_ids(server), self._max_logprobs
        try:
            answer = pool.send(server, PATH, scoring_entries(ids, k))
            return read_scores(answer, ids, range(1, len(ids)), asked=k, limit=self._limit).sampled
        except Failure as failure:
            got = f"{server.url}: {failure.reason}"
            if "max allowed" in failure.reason:
                where = f"model.teacher.max_logprobs: the server gives fewer than {k} log-probs per token"
                hint = f"vllm serve MODEL --max-logprobs {k}, or a smaller model.teacher.max_logprobs"
                raise ConfigError(problem(where, got=got, hint=hint)) from failure
            if "vocabulary" in failure.reason:
                where = f"{server.where}: the model behind it has another vocabulary than model.teacher.path"
                raise ModelError(problem(where, got=got, expected=f"token ids up to {max(ids)}")) from failure
            raise

    def _probe_ids(self, server: Server) -> list[int]:
        """Ids spread over the shared vocabulary, the highest last."""
        count = min(_PROBE_TOKENS, self._limit)
        if server.max_model_len is not None:
            count = max(min(count, server.max_model_len - 1), 2)
        return [round(i * (self._limit - 1) / (count - 1)) for i in range(count)]

    def _check_padding(self, pool: ServerPool, server: Server) -> None:
        """Measure how much probability the teacher gives, after the probe's first tokens, to ids beyond the limit."""
        beyond = self._vocab_size - self._limit
        if beyond <= 0:
            return
        prefix, asked = self._probe_ids(server)[:8], min(beyond, _FEW)
        total = 0.0
        for i in range(asked):
            ids = [*prefix, self._limit + i * beyond // asked]
            try:
                answer = pool.send(server, PATH, scoring_entries(ids, 0))
                own = read_scores(answer, ids, [len(prefix)], asked=0, limit=self._vocab_size).sampled[0]
            except Failure as failure:
                raise _no_scores(server, failure) from failure
            total += math.exp(own) * beyond / asked
        if total > _PADDING_MASS:
            where = (
                f"model.teacher.path: the teacher uses some of its {beyond} token ids that the student does not have"
            )
            expected = f"padding, of probability at most {_PADDING_MASS}: a server cannot leave them out of its softmax"
            hint = "model.teacher: {name: local, path: ...} leaves them out"
            raise ModelError(problem(where, got=f"probability {total:.3g}", expected=expected, hint=hint))


def _no_scores(server: Server, failure: Failure) -> ScoringError:
    return ScoringError(problem(f"{server.where}: {server.url} does not score token ids", got=failure.reason))


def _differ(where: str, gap: float) -> ScoringError:
    expected = f"at most {_SAME_SCORES}: the same model, with the same settings"
    return ScoringError(problem(where, got=f"{gap:.3g} nats/token apart", expected=expected))


def _gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Mean distance in nats/token, of the tokens that both find possible."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if math.isfinite(a) and math.isfinite(b)]
    return sum(abs(a - b) for a, b in pairs) / max(len(pairs), 1)
