"""Whether the teachers can score every training row, asked before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from distillkit.components import TeacherScorer
from distillkit.data import PromptData
from distillkit.errors import DataError, problem

__all__ = ["check_teacher_rows"]


def check_teacher_rows(frozen: Mapping[str, TeacherScorer], data: PromptData) -> None:
    """Ask teacher and reference whether they can score every row that training may draw.

    Raises:
        DataError: they cannot; the first such row is named.
    """
    prompts = data.train_prompts
    if prompts is None:
        return
    kept = set(prompts.kept)
    for key, part in frozen.items():
        if type(part).check_rows is TeacherScorer.check_rows:
            continue  # it scores whatever there is: the rows need not be read
        bad = [(i, reason) for i, reason in part.check_rows(prompts.our_rows()) if i in kept]
        if bad:
            where = f"model.{key}: rows that it cannot score ({len(bad):,} of {len(prompts):,})"
            raise DataError(problem(where, got=f"{prompts.rows.place(bad[0][0])}: {bad[0][1]}"))
