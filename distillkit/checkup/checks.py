"""A check, what it found, and how checks are run: one after the other, isolated, each within a time limit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from distillkit.checkup.patient import Patient

__all__ = ["Check", "Finding", "run_checks"]

Verdict = Literal["pass", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found: `text` says what was seen, `advice` what to do about it."""

    name: str
    verdict: Verdict
    text: str
    advice: str | None = None

    @property
    def line(self) -> str:
        """The finding on one line."""
        said = " ".join(self.text.split())
        return f"{self.verdict}  {self.name}: {said}" + (f"; try: {self.advice}" if self.advice else "")


@dataclass(frozen=True, kw_only=True)
class Check:
    """A name and a function that looks at the patient."""

    name: str
    look: Callable[[Patient], Finding]


def run_checks(patient: Patient, checks: Sequence[Check], *, seconds: float) -> Iterator[Finding]:
    """Yield each check's finding as soon as it is there; one that raises or takes too long is a `fail`.

    Args:
        patient: the recipe.
        checks: in their order.
        seconds: that one check may take. A check that hangs is left behind in its thread.
    """
    for check in checks:
        found: list[Finding] = []

        def look(check: Check = check, found: list[Finding] = found) -> None:
            try:
                found.append(check.look(patient))
            except BaseException as error:  # a check that cannot be done is a finding, whatever it raised
                text = f"{type(error).__name__}: {error}"
                found.append(Finding(name=check.name, verdict="fail", text=text))

        thread = threading.Thread(target=look, name=f"doctor-{check.name}", daemon=True)
        thread.start()
        thread.join(seconds)
        late = f"no answer within {seconds:g} s"
        yield found[0] if found else Finding(name=check.name, verdict="fail", text=late, advice="a larger --timeout")
