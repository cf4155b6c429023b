"""Steps are compared in lockstep, and no further than they have to be."""

from __future__ import annotations

from collections.abc import Sequence

from distillkit.decomposition import Decomposition, ReasoningStep
from distillkit.rewards.gsrm.alignment import Agreement, Case, align
from distillkit.rewards.gsrm.judge import ExactJudge, StepPair


def trace(*steps: str) -> Decomposition:
    """Steps as `meta question answer`, one letter each."""
    return Decomposition(steps=tuple(ReasoningStep(meta=s[0], question=s[1], answer=s[2]) for s in steps))


def case(ours: Sequence[str], theirs: Sequence[str]) -> Case:
    return Case(student=trace(*ours), teacher=trace(*theirs), problem="p")


class Asked:
    """The exact judge, with a record of its calls; a `?` is neither."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, pairs: Sequence[StepPair]) -> list[bool | None]:
        self.calls.append([f"{p.kind[0]}:{p.ours}{p.theirs}" for p in pairs])
        said = ExactJudge().agree(pairs)
        return [None if "?" in (p.ours, p.theirs) else verdict for p, verdict in zip(pairs, said, strict=True)]


def agreement(meta: Sequence[int], question: Sequence[int], answer: Sequence[int]) -> Agreement:
    return Agreement(meta=tuple(map(bool, meta)), question=tuple(map(bool, question)), answer=tuple(map(bool, answer)))


def test_every_rollout_at_once_step_by_step() -> None:
    asked = Asked()
    found = align(
        [
            case(["mqa", "nrb", "osc"], ["mqa", "nrb", "osc"]),
            case(["mxy", "zrb"], ["mqa", "nrb", "osc"]),
            case(["zqa", "nrb"], ["mqa", "nrb"]),
            case(["mqa", "nrx"], ["mqy"]),
        ],
        asked,
    )
    assert found == [
        agreement([1, 1, 1], [1, 1, 1], [1, 1, 1]),
        agreement([1, 0], [0, 0], [0, 0]),
        agreement([0], [0], [0]),
        agreement([1], [1], [0]),
    ]
    assert asked.calls == [
        ["m:mm", "m:mm", "m:zm", "m:mm"],
        ["q:qq", "a:aa", "q:xq", "a:ya", "q:qq", "a:ay"],
        ["m:nn", "m:zn"],
        ["q:rr", "a:bb"],
        ["m:oo"],
        ["q:ss", "a:cc"],
    ]


def test_neither_yes_nor_no_leaves_the_rollout_open_wherever_it_is_said() -> None:
    for place in range(3):
        broken = ["mqa", "nrb"]
        broken[1] = broken[1][:place] + "?" + broken[1][place + 1 :]
        assert align([case(broken, ["mqa", "nrb"])], Asked()) == [None]
    # Behind the first mismatch nothing is asked, so nothing can stay open.
    assert align([case(["mqa", "zrb", "?sc"], ["mqa", "nrb", "osc"])], Asked()) == [agreement([1, 0], [1, 0], [1, 0])]
    # An open meta is asked nothing more.
    asked = Asked()
    assert align([case(["?qa"], ["mqa"])], asked) == [None]
    assert asked.calls == [["m:?m"]]


def test_nothing_to_compare() -> None:
    asked = Asked()
    assert align([], asked) == [] and asked.calls == []
