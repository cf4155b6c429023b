"""One row at a time: from columns to a prompt, and from a prompt to the text that is tokenised."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distillkit.data.files import Row
from distillkit.data.sources import DataSource, SourceRows
from distillkit.errors import DataError, did_you_mean, problem
from distillkit.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RowReader"]

_QUESTION_NAMES = ("question", "problem", "instruction", "query", "input", "text", "quiz")
_PROMPT_TYPES = "text, or a list of messages {role: ..., content: text}"
_SHOWN = 60

Message = Mapping[str, Any]


class _RowError(Exception):
    """One row cannot be used."""

    def __init__(self, column: str, got: str) -> None:
        super().__init__(column, got)
        self.column, self.got = column, got


class RowReader:
    """How a row of one source becomes a prompt.

    Args:
        rows: the source's rows.
        source: its settings.
        tokenizer: whose chat template renders messages.
        completions: also read the column `completion`.
        where: YAML path of the source, for messages.

    Raises:
        DataError: a column that is needed does not exist.
    """

    def __init__(
        self,
        rows: SourceRows,
        source: DataSource,
        tokenizer: PreTrainedTokenizerBase,
        *,
        completions: bool,
        where: str,
    ) -> None:
        self._rows, self._source, self._tokenizer = rows, source, tokenizer
        self._completions, self._where = completions, where
        for ours, theirs in source.columns.items():
            _require_column(f"{where}.columns.{ours}", theirs, rows.columns)
        known = tuple(dict.fromkeys((*rows.columns, *source.columns)))
        self._template = None if source.template is None else _parse_template(source.template, where, known)
        needed = ["prompt"] if self._template is None else []
        for name in [*needed, "completion"] if completions else needed:
            _require_our_column(where, name, known)

    def row(self, position: int) -> Row:
        """Return the row with our column names added."""
        row = self._rows[position]
        return {**row, **{ours: row.get(theirs) for ours, theirs in self._source.columns.items()}}

    def prompt(self, row: Row) -> Prompt:
        """Return the text, or the messages that the chat template renders."""
        source = self._source
        value = row.get("prompt") if self._template is None else _fill(self._template, row)
        if isinstance(value, str):
            if not value.strip():
                raise _RowError("prompt", "empty text")
            if source.chat != "always":
                return value
            messages: list[Message] = [{"role": "user", "content": value}]
        else:
            messages = _messages("prompt", value)
        if source.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": source.system_prompt})
        return messages

    def render_all(self) -> tuple[list[tuple[str, bool]], list[str]]:
        """Return per row the prompt's text and whether it is plain (not rendered); and the completions' texts.

        Raises:
            DataError: rows that cannot be prompts, or prompts that do not fit the chat settings.
        """
        texts: list[tuple[str, bool]] = []
        completions: list[str] = []
        bad: dict[int, _RowError] = {}
        for i in range(len(self._rows)):
            row = self.row(i)
            try:
                prompt = self.prompt(row)
                self._check_chat(prompt)
                text = prompt if isinstance(prompt, str) else self._render(prompt)
                texts.append((text, isinstance(prompt, str)))
                if self._completions:
                    completions.append(self._completion(prompt, text, row.get("completion")))
            except _RowError as error:
                bad[i] = error
        if bad:
            self.refuse({i: error.got for i, error in bad.items()}, next(iter(bad.values())).column)
        return texts, completions

    def refuse(self, bad: Mapping[int, str], column: str) -> None:
        """Raise for rows that cannot be used: position -> what came."""
        first, *others = bad
        places = ", ".join(self._rows.place(i) for i in others[:3]) + ", …" * (len(others) > 3)
        more = f" (and {len(others)} more: {places})" if others else ""
        where = f"{self._where}: {self._rows.place(first)}, column {column!r}: unusable{more}"
        expected = _PROMPT_TYPES if column in ("prompt", "completion") else "a value that the template can take"
        raise DataError(problem(where, got=bad[first], expected=expected, hint="repair or remove the row"))

    def _check_chat(self, prompt: Prompt) -> None:
        where, source = self._where, self._source
        if isinstance(prompt, str):
            if source.system_prompt is not None:
                hint = f"set {where}.chat to always, or write the text into {where}.template"
                got = f"text prompts, chat: {source.chat}"
                raise DataError(problem(f"{where}.system_prompt: only for messages", got=got, hint=hint))
        elif source.chat == "never":
            hint = f"set {where}.chat to auto"
            raise DataError(
                problem(f"{where}: the prompts are messages", got="chat: never", expected="text", hint=hint)
            )
        elif not getattr(self._tokenizer, "chat_template", None):
            hint = f"use a student whose tokenizer has one, or text prompts with {where}.chat: never"
            got = getattr(self._tokenizer, "name_or_path", "") or type(self._tokenizer).__name__
            raise DataError(problem(f"{where}: the student's tokenizer has no chat template", got=got, hint=hint))

    def _render(self, messages: Sequence[Message], *, closed: bool = False) -> str:
        role = messages[-1]["role"]
        if role not in ("user", "tool", "assistant") and not closed:
            raise _RowError("prompt", f"messages that end with the role {role!r}, not user, tool or assistant")
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=not closed and role != "assistant",
                continue_final_message=not closed and role == "assistant",
                **self._source.chat_template_kwargs,
            )
        except Exception as error:
            raise _RowError("prompt", f"messages that the chat template refuses ({error})") from error
        return str(rendered)

    def _completion(self, prompt: Prompt, prompt_text: str, value: Any) -> str:
        if isinstance(prompt, str):
            if not isinstance(value, str) or not value:
                raise _RowError("completion", _describe(value))
            return value
        if isinstance(value, str) and value:
            value = [{"role": "assistant", "content": value}]
        whole = self._render([*prompt, *_messages("completion", value)], closed=True)
        if not whole.startswith(prompt_text):
            raise _RowError("completion", "a chat template whose prompt does not begin the whole conversation")
        return whole.removeprefix(prompt_text)


def _messages(column: str, value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise _RowError(column, _describe(value))
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise _RowError(column, f"message {i} is {_describe(message)}")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise _RowError(column, f"message {i} has as content {_describe(message.get('content'))}")
    # The datasets library writes None under every key that another message has; a chat template may test for the key.
    return [{key: part for key, part in message.items() if part is not None} for message in value]


def _describe(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str | list | dict) and not value:
        return f"an empty {type(value).__name__}"
    text = repr(value)
    return f"a {type(value).__name__}: {text if len(text) <= _SHOWN else text[:_SHOWN] + '…'}"


def _require_column(where: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        columns = ", ".join(known) or "none"
        hint = did_you_mean(name, known)
        raise DataError(problem(f"{where}: no column {name!r}", got=f"columns {columns}", hint=hint))


def _require_our_column(where: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        usual = next((n for n in _QUESTION_NAMES if n in known), None) if name == "prompt" else None
        hint = f"{where}.columns: {{{name}: {did_you_mean(name, known) or usual or '<their column>'}}}"
        raise DataError(
            problem(
                f"{where}: no column {name!r}", got=f"columns {', '.join(known) or 'none'}", expected=name, hint=hint
            )
        )


_Template = list[tuple[str, str | None, str | None, str | None]]


def _parse_template(template: str, where: str, known: Sequence[str]) -> _Template:
    path = f"{where}.template"
    braces = "write {{ and }} for braces that are text"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(problem(f"{path}: {error}", got=repr(template), hint=braces)) from error
    for _, name, _, _ in parts:
        if name is not None and name not in known:
            near = did_you_mean(name, known)
            expected = "one of " + ", ".join(known)
            hint = f"{{{near}}}" if near else braces
            raise DataError(problem(f"{path}: no column {name!r}", got=repr(template), expected=expected, hint=hint))
    return parts


def _fill(template: _Template, row: Row) -> str:
    # Not str.format: a field is exactly a column's name, so no text in a config reaches into an object.
    text: list[str] = []
    for literal, name, spec, conversion in template:
        text.append(literal)
        if name is not None:
            value = row.get(name)
            if value is None:
                raise _RowError(name, "nothing")
            try:
                text.append(format(string.Formatter().convert_field(value, conversion), spec or ""))
            except (ValueError, TypeError) as error:
                raise _RowError(name, f"{_describe(value)} ({error})") from error
    return "".join(text)
