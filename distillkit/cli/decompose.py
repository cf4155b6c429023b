"""`distillkit decompose`: traces to a decomposer's training set, by a model that can be told the grammar."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distillkit.data.sources import DataSource, SourceRows, read_source
from distillkit.errors import ConfigError, DataError, ModelError, ScoringError, problem
from distillkit.rewards.gsrm.chat_client import NOT_ASKED
from distillkit.rewards.gsrm.decomposer import Decomposer, Item, Undecided
from distillkit.rewards.gsrm.local import LocalDecomposer
from distillkit.rewards.gsrm.server import ServerDecomposer
from distillkit.rewards.gsrm.training_rows import item_id, problem_text, thoughts, training_rows

__all__ = ["Report", "label", "main"]

_EVERY_S = 5.0


@dataclass
class Report:
    """What became of the traces: `written` of `rows`, `before` in an earlier run, `left_out` by reason."""

    rows: int
    before: int = 0
    repeated: int = 0
    written: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.rows} rows: {self.written} written"]
        counts = {"there before": self.before, "repeated": self.repeated, "left out": self.left_out.total()}
        lines[0] += "".join(f", {count} {what}" for what, count in counts.items() if count)
        return "\n".join([*lines, *(f"  {count:>6}  {reason}" for reason, count in self.left_out.most_common())])


def main(argv: Sequence[str]) -> int:
    """Run `distillkit decompose`; return the exit code.

    Raises:
        ConfigError: arguments that cannot be used together, or a key that is not there.
        DataError: input, examples or an earlier output that cannot be read.
        ScoringError: the server failed for good; what it answered before that is kept.
    """
    options = _parser().parse_args(list(argv))
    if options.chunk < 1:
        raise ConfigError(problem("--chunk", got=options.chunk, expected="at least 1"))
    with _named_by_flag():
        decomposer = _decomposer(options)
    rows = read_source(DataSource(path=options.input, limit=options.limit), "--input")
    items = list(_items(rows, options.problem_column, options.trace_column, options.think_end or None))
    with _named_by_flag():
        decomposer.setup(torch.device("cpu" if not torch.cuda.is_available() else "cuda"))
    try:
        report = label(items, decomposer, Path(options.output), chunk=options.chunk)
    finally:
        decomposer.teardown()
    print(f"{options.output}: {report}")
    return 0


def label(items: Sequence[Item], decomposer: Decomposer, output: Path, *, chunk: int = 64) -> Report:
    """Take traces apart and append those that can be to `output`, as rows for `SupervisedModule`.

    What is in `output` already is not asked again, so a call that was interrupted is continued by the same call. A
    trace that was left out is tried again by the next one.

    Args:
        items: (problem, trace) pairs.
        decomposer: set up.
        output: JSONL file of `training_rows`; made when missing.
        chunk: traces per call of the decomposer, after which their rows are written.

    Raises:
        DataError: `output` is there and is no such file.
        ScoringError: every request of a chunk failed, for reasons that do not lie in the traces.
    """
    done = _done(output)
    report = Report(rows=len(items))
    waiting: list[Item] = []
    seen: set[str] = set()
    for item in items:
        key = item_id(*item)
        report.before += key in done and key not in seen
        report.repeated += key in seen
        if key not in done and key not in seen:
            waiting.append(item)
        seen.add(key)
    told = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    # A lone surrogate of a data file becomes the escape that JSON has for it.
    with output.open("a", encoding="utf-8", errors="backslashreplace") as stream:
        for start in range(0, len(waiting), chunk):
            part = waiting[start : start + chunk]
            askable = [item for item in part if item[1]]
            if len(askable) < len(part):
                report.left_out["the trace is empty"] += len(part) - len(askable)
            results = decomposer.decompose(askable) if askable else []
            good = [(*item, r) for item, r in zip(askable, results, strict=True) if not isinstance(r, Undecided)]
            failed = [r for r in results if isinstance(r, Undecided)]
            for row in training_rows(good):
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
            report.written += len(good)
            report.left_out.update(failure.reason for failure in failed)
            if failed and not good and not any(failure.lasting for failure in failed):
                what = f"distillkit decompose: the server failed for all of {len(failed)} traces"
                cause = next((failure for failure in failed if failure.reason != NOT_ASKED), failed[0])
                expected, hint = _advice(cause.status)
                kept = f"{cause}; {report.written} rows were written before"
                raise ScoringError(problem(what, got=kept, expected=expected, hint=hint))
            if time.monotonic() - told > _EVERY_S:
                told = time.monotonic()
                asked = start + len(part)
                print(f"decompose: {asked} of {len(waiting)} traces, {report.written} written", file=sys.stderr)
    return report


def _items(rows: SourceRows, problem_column: str, trace_column: str, think_end: str | None) -> Iterator[Item]:
    for name, column in (("--problem-column", problem_column), ("--trace-column", trace_column)):
        if column not in rows.columns:
            known = ", ".join(rows.columns)
            raise DataError(problem(f"{name}: {rows.name} has no column {column!r}", got=column, expected=known))
    for i, row in enumerate(rows):
        text, trace = row.get(problem_column), row.get(trace_column)
        if not isinstance(text, str | list) or not text:
            where = f"--input: {rows.place(i)}, column {problem_column!r}: no problem"
            raise DataError(problem(where, got=f"{text!r:.80}", expected="text, or a list of messages"))
        if trace is not None and not isinstance(trace, str):
            where = f"--input: {rows.place(i)}, column {trace_column!r}: no trace"
            raise DataError(problem(where, got=f"{trace!r:.80}", expected="text"))
        yield problem_text(text), thoughts(trace or "", think_end)


def _done(output: Path) -> set[str]:
    """Digests of the items in an earlier output; a last line that was cut off by a kill is taken off."""
    if not output.exists():
        return set()
    content = output.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    done = set()
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            done.add(str(json.loads(line)["id"]))
        except (ValueError, KeyError, TypeError) as error:
            where = f"--output: {output}, line {number}: not a row of distillkit decompose"
            shown = line[:80].decode(errors="replace")
            raise DataError(
                problem(where, got=shown, expected="prompt, completion, id", hint="another file")
            ) from error
    if len(whole) < len(content):
        with output.open("r+b") as stream:
            stream.truncate(len(whole))
    return done


def _advice(status: int | None) -> tuple[str, str]:
    """What is expected of a server that failed with this HTTP status, and what to do."""
    if status in (401, 403):
        return "a key that the server takes", "the right key in the environment variable of --api-key-env"
    if status is not None and (status == 404 or 300 <= status < 400):
        return "a model and an address that the server knows", "check --model and --server"
    if status in (400, 413, 422):
        return "a request that the server takes", "check --model, --max-new-tokens and --extra-body"
    return "a server that answers", "run the same command again: what is written is not asked again"


@contextlib.contextmanager
def _named_by_flag() -> Iterator[None]:
    """Raise the decomposer's errors with the flags of this command in place of a config's arguments."""
    try:
        yield
    except (ConfigError, DataError, ModelError) as error:
        text = re.sub(r"model\.rewards: gsrm\.decomposer\.(\w+)", lambda found: _flag(found[1]), str(error))
        raise type(error)(text) from error


def _flag(argument: str) -> str:
    others = {"base_url": "server", "path": "local", "timeout_s": "timeout", "backoff_s": "backoff"}
    return f"--{others.get(argument, argument).replace('_', '-')}"


def _decomposer(options: argparse.Namespace) -> Decomposer:
    if (options.server is None) == (options.local is None):
        where = "distillkit decompose: who takes the traces apart?"
        got = "neither --server nor --local" if options.server is None else "--server and --local"
        raise ConfigError(problem(where, got=got, expected="--server URL --model NAME, or --local PATH"))
    if options.local is not None:
        for name in ("model", "examples", "api_key_env", "extra_body"):
            if getattr(options, name) is not None:
                what = f"distillkit decompose: {_flag(name)} is for a server"
                raise ConfigError(problem(what, got="--local", hint="--server"))
        return LocalDecomposer(path=options.local, **_given(max_new_tokens=options.max_new_tokens))
    if options.model is None:
        expected = "the name of a model on the server"
        raise ConfigError(problem("distillkit decompose: --model is missing", expected=expected))
    return ServerDecomposer(
        base_url=options.server,
        model=options.model,
        api_key_env=options.api_key_env,
        **_given(max_new_tokens=options.max_new_tokens),
        timeout_s=options.timeout,
        retries=options.retries,
        backoff_s=options.backoff,
        concurrency=options.concurrency,
        examples=options.examples,
        extra_body=_extra_body(options.extra_body),
    )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _extra_body(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(problem("--extra-body: not JSON", got=f"{text} ({error})")) from error
    if not isinstance(value, dict):
        raise ConfigError(problem("--extra-body", got=text, expected="a JSON object"))
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distillkit decompose",
        description="Take reasoning traces apart into numbered steps, as a training set for a decomposer. Rows have "
        "prompt and completion, as SupervisedModule reads them. The same command again continues.",
    )
    add = parser.add_argument
    add("--input", required=True, help="JSONL, JSON, parquet or CSV file, hub dataset, or embedded:<task>/<split>")
    add("--output", required=True, help="JSONL file to write, or to continue")
    add("--server", metavar="URL", help="OpenAI-compatible server, such as http://localhost:8000/v1")
    add("--model", metavar="NAME", help="name of the model on the server")
    add("--local", metavar="PATH", help="a model in this process instead of a server, such as embedded:decomposer")
    add("--problem-column", default="problem", metavar="NAME", help="column with the problem (default: problem)")
    add("--trace-column", default="trace", metavar="NAME", help="column with the trace (default: trace)")
    add("--think-end", default="</think>", metavar="TEXT", help="only what stands before it is taken apart")
    add("--examples", metavar="FILE", help="JSONL file with problem, trace and decomposition, shown to the model first")
    add("--limit", type=int, metavar="N", help="only the first N rows")
    longest = "of one decomposition (default: 8192 of a server, 1024 or half its context of a local model)"
    add("--max-new-tokens", type=int, metavar="N", help=longest)
    add("--api-key-env", metavar="VARIABLE", help="environment variable with the server's key")
    add("--timeout", type=float, default=300.0, metavar="S", help="seconds for one answer (default: 300)")
    add("--retries", type=int, default=3, metavar="N", help="further tries after a failed one (default: 3)")
    add("--backoff", type=float, default=1.0, metavar="S", help="seconds before the first of them (default: 1)")
    add("--concurrency", type=int, default=16, metavar="N", help="requests at a time (default: 16)")
    add("--chunk", type=int, default=64, metavar="N", help="traces between two writes (default: 64)")
    add("--extra-body", metavar="JSON", help="merged into every request")
    return parser
