"""A decomposer behind an OpenAI-compatible server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distillkit.decomposition import Decomposition, DecompositionError, messages, parse, render
from distillkit.errors import ConfigError, DataError, problem
from distillkit.rewards.gsrm.chat_client import ChatClient
from distillkit.rewards.gsrm.decomposer import Decomposer, Item, Undecided, grammar_digest, read_reply

__all__ = ["ServerDecomposer", "read_examples"]

_WHERE = "model.rewards: gsrm.decomposer"


class ServerDecomposer(Decomposer):
    """Asks a model on an OpenAI-compatible server (vLLM, SGLang, llama.cpp, a hosted one) for decompositions.

    Requests are those of `distillkit.decomposition.messages` at temperature 0. What fails is tried again a bounded
    number of times, see `ChatClient`, and is then `Undecided`: the run goes on, and counts it.

    Args:
        base_url: such as `http://localhost:8000/v1`.
        model: name of the model on the server. With `extra_body` and the examples it identifies the decomposer in
            caches, the address does not: the same name elsewhere is taken for the same model.
        api_key_env: name of the environment variable with the key; null for a server without keys.
        max_new_tokens: longest decomposition, in tokens.
        timeout_s: seconds for one answer.
        retries: further tries after a failed one.
        backoff_s: seconds before the first of them, doubled every time.
        concurrency: requests at a time.
        examples: JSONL file with `problem`, `trace` and `decomposition` (text in the grammar), shown before every
            question to a model that was not trained for this.
        extra_body: merged into every request, such as `{chat_template_kwargs: {enable_thinking: false}}`; null takes an
            entry out (`{max_tokens: null, max_completion_tokens: 8192}`).

    Raises:
        ConfigError: an argument out of range; at setup, a key that is not there; in `probe`, a server that nobody runs,
            or that refuses the key, the model or the path.
        DataError: at setup, when an example cannot be used.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_env: str | None = None,
        max_new_tokens: int = 8192,
        timeout_s: float = 300.0,
        retries: int = 3,
        backoff_s: float = 1.0,
        concurrency: int = 16,
        examples: str | None = None,
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise ConfigError(problem(f"{_WHERE}.max_new_tokens", got=max_new_tokens, expected="at least 1 token"))
        self.max_new_tokens = max_new_tokens
        self.examples = examples
        self._shown: list[dict[str, str]] = []
        self._client = ChatClient(
            base_url=base_url,
            model=model,
            api_key_env=api_key_env,
            timeout_s=timeout_s,
            retries=retries,
            backoff_s=backoff_s,
            concurrency=concurrency,
            extra_body=extra_body,
            where=_WHERE,
        )

    def setup(self, device: torch.device) -> None:
        if self.examples is not None:
            self._shown = read_examples(Path(self.examples), f"{_WHERE}.examples")
        self._client.open()

    def probe(self) -> None:
        self._client.probe()

    def teardown(self) -> None:
        self._client.close()

    def identity(self) -> str:
        facts = [self._client.model, self.max_new_tokens, self._client.extra_body, self._shown]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        return f"server:{digest}:{grammar_digest()}"

    def decompose(self, items: Sequence[Item]) -> list[Decomposition | Undecided]:
        conversations = [self._conversation(*item) for item in items]
        replies = self._client.ask(conversations, max_tokens=self.max_new_tokens)
        return [
            reply
            if isinstance(reply, Undecided)
            else read_reply(reply.text, finished=reply.finished, limit=self.max_new_tokens)
            for reply in replies
        ]

    def _conversation(self, problem_text: str, trace: str) -> list[dict[str, str]]:
        system, asked = messages(problem_text, trace)
        return [system, *self._shown, asked]


def read_examples(file: Path, where: str) -> list[dict[str, str]]:
    """Return the examples of a file as turns of a conversation, question and decomposition by turns.

    Raises:
        DataError: no such file, or a line that is no example; it is named.
    """
    expected = '{"problem": text, "trace": text, "decomposition": text in the grammar}'
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(problem(f"{where}: cannot be read", got=f"{file} ({error})", expected="JSONL")) from error
    turns: list[dict[str, str]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{where}: {file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(problem(f"{place}: not JSON", got=str(error), expected=expected)) from error
        names = ("problem", "trace", "decomposition")
        if not isinstance(row, Mapping) or not all(isinstance(row.get(n), str) and row[n].strip() for n in names):
            raise DataError(problem(f"{place}: not an example", got=f"{line:.80}", expected=expected))
        try:
            target = render(parse(row["decomposition"]))
        except DecompositionError as error:
            raise DataError(f"{place}: {error}") from error
        turns += [messages(row["problem"], row["trace"])[-1], {"role": "assistant", "content": target}]
    if not turns:
        raise DataError(problem(f"{where}: no examples", got=str(file), expected=expected))
    return turns
