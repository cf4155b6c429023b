"""The role of every inhabitant of a Knights and Knaves puzzle."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distillkit.components import RewardFn
from distillkit.rewards.extract import gold_cell
from distillkit.types import RewardOutput, RewardStatus, RolloutBatch

__all__ = ["KnightsAndKnaves", "Role", "read_roles"]

Role = Literal["knight", "knave"]

_ANSWER_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL | re.IGNORECASE)
_MARK = r"[*_`\"' ]{0,4}"
_STATEMENT = re.compile(
    rf"(?P<number>\(?\b\d{{1,3}}[).:]\)?)?[ \t]{{0,4}}{_MARK}\b(?P<name>[^\W\d_][\w'-]{{0,40}}){_MARK}"
    rf"(?:\b(?:is|must be|has to be)\b|[:=|\u2013\u2014-])(?P<negation>{_MARK}\bnot\b)?"
    rf"{_MARK}(?:\b(?:an?|the)\b)?{_MARK}\b(?P<role>knights?|knaves?)\b",
    re.IGNORECASE,
)
_JOINT = re.compile(r"(?:[\s*_`,;.|&()\[\]#-]|\b(?:and|while|but|whereas|respectively)\b)*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class _Statement:
    name: str
    role: Role
    number: int | None
    start: int
    end: int


def read_roles(text: str, names: Sequence[str]) -> dict[str, Role | None] | None:
    r"""Return the role that the final answer in `text` gives to each person, or None when it holds no answer.

    The answer is what stands in the last `<answer>...</answer>`; without one, what follows the last `</think>`. There,
    the last list that names everybody counts. A list is a run of statements `Zoey is a knight`, joined by commas, "and"
    or line ends, or one numbered `(1) ... (2) ...` whatever stands between; a number that it already has begins a new
    list. Inside `<answer>`, when no list is whole, all statements together are the answer. A person whom the answer
    leaves out, or gives both roles, has None; so has everybody when it speaks of a person who is not there.

    Args:
        text: the completion.
        names: the people of the puzzle; upper and lower case are the same.

    Example:
        >>> read_roles("<think>If Zoey is a knave...</think>(1) Zoey is a knight\n(2) Bob is a knave", ["Zoey", "Bob"])
        {'Zoey': 'knight', 'Bob': 'knave'}
        >>> read_roles("Zoey is a knight, I think.", ["Zoey", "Bob"]) is None
        True
    """
    people = {name.casefold() for name in names}
    tagged = _ANSWER_TAG.findall(text)
    scope = tagged[-1] if tagged else text.rpartition("</think>")[2]
    statements = _statements(scope, people)
    lists = [*_joined(statements, scope), *_numbered(statements)]
    whole = [found for found in lists if people <= {s.name for s in found}]
    if not statements or not (whole or tagged):
        return None
    answer = max(whole, key=lambda found: found[-1].end) if whole else statements
    said: dict[str, set[Role]] = {}
    for statement in answer:
        said.setdefault(statement.name, set()).add(statement.role)
    if said.keys() - people:
        return dict.fromkeys(names)
    roles = {name: said.get(name.casefold(), set()) for name in names}
    return {name: next(iter(given)) if len(given) == 1 else None for name, given in roles.items()}


def _statements(text: str, people: set[str]) -> list[_Statement]:
    found = []
    for match in _STATEMENT.finditer(text):
        name, number = match["name"].casefold(), match["number"]
        if name in people or number is not None:
            knight = match["role"].casefold().startswith("knight") is (match["negation"] is None)
            found.append(
                _Statement(
                    name=name,
                    role="knight" if knight else "knave",
                    number=None if number is None else int(number.strip("().:")),
                    start=match.start(),
                    end=match.end(),
                )
            )
    return found


def _joined(statements: Sequence[_Statement], text: str) -> list[list[_Statement]]:
    lists: list[list[_Statement]] = []
    for statement in statements:
        follows = lists and _JOINT.fullmatch(text, lists[-1][-1].end, statement.start) is not None
        again = statement.number is not None and lists and statement.number in {s.number for s in lists[-1]}
        if follows and not again:
            lists[-1].append(statement)
        else:
            lists.append([statement])
    return lists


def _numbered(statements: Sequence[_Statement]) -> list[list[_Statement]]:
    lists: list[list[_Statement]] = []
    for statement in statements:
        if statement.number is None:
            continue
        if lists and statement.number == (lists[-1][-1].number or 0) + 1:
            lists[-1].append(statement)
        else:
            lists.append([statement])
    return lists


class KnightsAndKnaves(RewardFn):
    """1 when the completion gives every inhabitant the right role, else 0.

    A person left out, or given both roles, is wrong; a completion without a list of roles is `unparseable`, value 0.
    `read_roles` says what counts as the answer.

    See *Logic-RL: Unleashing LLM Reasoning with Rule-Based Reinforcement Learning*, Xie et al., 2025,
    https://arxiv.org/abs/2502.14768, whose puzzles it reads.

    Args:
        names: column with the list of people.
        solution: column with one true (knight) or false (knave) for each of `names`, or with the roles written out
            (`(1) Zoey is a knight ...`).
        weight: factor on this reward in the total.
    """

    def __init__(self, *, names: str = "names", solution: str = "solution", weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        self.names = names
        self.solution = solution

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
        """Return the rows whose names and solution do not give everybody one role."""
        missing = [(i, c) for i, row in enumerate(rows) for c in (self.names, self.solution) if c not in row]
        bad = {i: f"no column {column!r}" for i, column in reversed(missing)}
        for i, row in enumerate(rows):
            if i not in bad and self._gold(row) is None:
                bad[i] = f"names {row[self.names]!r:.80} and solution {row[self.solution]!r:.80} do not match"
        return sorted(bad.items())

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        """Return 1 or 0 for each rollout; NaN for one whose row has no usable solution."""
        correct: list[bool | None] = []
        status: list[RewardStatus] = []
        answers: list[str | None] = []
        for text, row in zip(rollouts.texts, rollouts.rows, strict=True):
            gold = self._gold(row)
            roles = None if gold is None else read_roles(text, list(gold))
            correct.append(None if gold is None else roles == gold)
            status.append("not_applicable" if gold is None else "unparseable" if roles is None else "scored")
            answers.append(", ".join(f"{name}: {role or '?'}" for name, role in roles.items()) if roles else None)
        values = [None if c is None else float(c) for c in correct]
        return RewardOutput.single(
            "knights_and_knaves", values, weight=self.weight, status=status, correct=correct, answers=answers
        )

    def _gold(self, row: Mapping[str, Any]) -> dict[str, Role | None] | None:
        names, solution = (gold_cell(row, c, "knights_and_knaves") for c in (self.names, self.solution))
        names = [name for name in (names if names is not None else ()) if isinstance(name, str) and name.strip()]
        if isinstance(solution, str):
            roles = read_roles(solution, names) if names else None
            return roles if roles and None not in roles.values() else None
        flags = list(solution) if solution is not None else []
        if not names or len(flags) != len(names) or len(set(map(str.casefold, names))) != len(names):
            return None
        if not all(isinstance(flag, bool) or str(getattr(flag, "dtype", "")) == "bool" for flag in flags):
            return None
        return {name: "knight" if flag else "knave" for name, flag in zip(names, flags, strict=True)}
