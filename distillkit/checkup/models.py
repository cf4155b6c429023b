"""Tokenizers, vocabularies, teacher and reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distillkit.checkup.checks import Finding
from distillkit.checkup.patient import Patient
from distillkit.components import TeacherScorer
from distillkit.divergences.sampled import K2
from distillkit.models import load_tokenizer, vocab_mismatch
from distillkit.refusals import teacher_request
from distillkit.scorer import ScorePlan
from distillkit.teachers.local import LocalTeacher
from distillkit.types import ScoreRequest, TeacherScores

__all__ = ["end_and_template", "self_divergence", "teacher_probe", "vocabulary"]

_EXACT, _CLOSE = 1e-5, 1e-2
"""Nats between two answers to the same question: rounding, and what no kernel's order of sums explains."""


def vocabulary(patient: Patient) -> Finding:
    """Compare the ids that tokenizer, student and teacher have."""
    name = "vocabulary"
    student, tokenizer = patient.module.student_vocab_size(), patient.module.tokenizer
    largest = max(tokenizer.get_vocab().values())
    text = f"{largest + 1:,} ids in the tokenizer, {student:,} in the student's head"
    if largest >= student:
        return Finding(name=name, verdict="fail", text=text, advice="the tokenizer that belongs to model.student")
    sizes = {role: part.vocab_size for role, part in patient.module.frozen.items()}
    text += "".join(f", {size:,} in the {role}'s" for role, size in sizes.items() if size is not None)
    smallest = min([student, *(size for size in sizes.values() if size is not None)])
    if largest >= smallest:
        return Finding(name=name, verdict="fail", text=text, advice="a teacher of the same tokenizer family")
    for role, part in _with_path(patient).items():
        moved = [
            t
            for t in vocab_mismatch(tokenizer, load_tokenizer(part.path, where=f"model.{role}.path"))
            if t.startswith("ids")
        ]
        if moved:
            advice = "a teacher of the same tokenizer family"
            return Finding(name=name, verdict="fail", text=f"{text}; {moved[0]}", advice=advice)
    if smallest < max([student, *(size for size in sizes.values() if size is not None)]):
        text += f"; ids from {smallest:,} on are padding and take part in no softmax"
    return Finding(name=name, verdict="pass", text=text)


def end_and_template(patient: Patient) -> Finding:
    """Compare end tokens and chat templates."""
    name, tokenizer = "end token and template", patient.module.tokenizer
    chat = patient.data.train.chat if patient.data.train is not None else "auto"
    if chat == "always" and not tokenizer.chat_template:
        advice = "an instruct student, or data.train.chat: never with a template"
        text = "data.train.chat is always, and the student's tokenizer has no chat template"
        return Finding(name=name, verdict="fail", text=text, advice=advice)
    ends = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in patient.info.eos_token_ids)
    tolerated: list[str] = []
    for role, part in _with_path(patient).items():
        found = vocab_mismatch(tokenizer, load_tokenizer(part.path, where=f"model.{role}.path"))
        for text in (t for t in found if not t.startswith("ids")):
            kind = text.split(":")[0]
            if kind not in getattr(part, "tolerate", ()):
                advice = f"model.{role}.tolerate: [{kind}] if that is meant"
                return Finding(name=name, verdict="fail", text=f"{role}: {text}", advice=advice)
            tolerated.append(f"{role}: {text}")
    if tolerated:
        return Finding(name=name, verdict="warn", text=f"tolerated: {'; '.join(tolerated)}")
    same = "; the same for the teacher" if _with_path(patient) else ""
    return Finding(name=name, verdict="pass", text=f"completions end with {ends}{same}")


def teacher_probe(patient: Patient, role: str) -> Finding:
    """Ask a frozen model twice about the same tokens."""
    part: TeacherScorer = patient.module.frozen[role]
    patient.check_size()
    part.setup(patient.info)
    request = _wanted(patient, role)
    first, second = (_answers(part.score(patient.probe, request)) for _ in range(2))
    if not first:
        return Finding(name=role, verdict="fail", text="it returned no log-probs", advice=f"another model.{role}")
    count = sum(values.numel() for values in first.values())
    for what, values in first.items():
        if not bool(torch.isfinite(values).all()):
            bad = int((~torch.isfinite(values)).sum())
            text = f"{bad} of {values.numel()} values of {what} are NaN or infinite"
            return Finding(name=role, verdict="fail", text=text, advice=f"another model.{role}.dtype, or its weights")
        if what == "log-probs" and bool((values > _CLOSE).any()):
            text = f"a log-prob of {values.max().item():.3g}: not the logarithm of a probability"
            return Finding(name=role, verdict="fail", text=text)
    gap = max(float((first[what] - second[what]).abs().max()) for what in first)
    text = f"{count} finite values; asked twice they differ by {gap:.2g}"
    if gap > _CLOSE:
        advice = "a teacher without dropout or sampling: its opinion must not change"
        return Finding(name=role, verdict="fail", text=text, advice=advice)
    return Finding(name=role, verdict="pass" if gap <= _EXACT else "warn", text=text)


def self_divergence(patient: Patient) -> Finding:
    """Let the student teach itself: the recipe's divergence has to be next to 0."""
    name = "student as its own teacher"
    if getattr(patient.module, "init", None) is not None:
        return Finding(name=name, verdict="warn", text="not looked at: a new student has no checkpoint")
    scorer = patient.scorer
    teacher = LocalTeacher(path=patient.module.student, dtype=patient.module.dtype_name)
    teacher.setup(patient.info)
    parts = getattr(patient.module, "parts", None)
    given = parts.divergence if parts is not None else patient.module.divergence
    divergence = given or K2()
    temperature = patient.module.settings.distil_temperature
    plan = ScorePlan(sampling_temperature=temperature, distil_temperature=temperature, divergence=divergence)
    with patient.computing():
        request = replace(divergence.needs, sampled=True, temperature=temperature)
        scores = scorer(patient.probe, plan, teacher.score(patient.probe, request))
    teacher.teardown()
    value = float(scores.divergence[scores.loss_mask].abs().mean())
    exact = patient.precision != "bf16-mixed" and patient.module.dtype_name in ("float32", "auto")
    limit = 1e-3 if exact else 5e-2
    text = f"{type(divergence).__name__} of the student from itself is {value:.2g} nats/token"
    if value <= limit:
        return Finding(name=name, verdict="pass", text=text)
    advice = "model.divergence is not 0 between equals, or the scores are not aligned"
    return Finding(name=name, verdict="fail", text=f"{text}, above {limit:g}", advice=advice)


def _with_path(patient: Patient) -> dict[str, Any]:
    """The frozen models in this process, whose tokenizers can be read; a server's own setup compares its."""
    return {role: part for role, part in patient.module.frozen.items() if isinstance(getattr(part, "path", None), str)}


def _wanted(patient: Patient, role: str) -> ScoreRequest:
    parts = getattr(patient.module, "parts", None)
    temperature = patient.module.settings.distil_temperature
    if parts is None:
        needs = ScoreRequest() if patient.module.divergence is None else patient.module.divergence.needs
    elif role == "reference":
        needs = parts.reference_divergence.needs if parts.reference_divergence else ScoreRequest(sampled=True)
    else:
        needs = teacher_request(parts)
    sampled = needs.sampled or (patient.module.frozen[role].offers.sampled and not needs.topk)
    return replace(needs, sampled=sampled, temperature=temperature)


def _answers(scores: TeacherScores) -> dict[str, Tensor]:
    """What a teacher said at the positions it calls valid."""
    named = {"log-probs": scores.sampled, "top-k log-probs": scores.topk, "entropy": scores.entropy}
    found = {what: values[scores.valid].float() for what, values in named.items() if values is not None}
    if scores.hidden is not None and scores.head is not None:
        found["logits"] = torch.cat([scores.head(states[:1]) for states in scores.hidden]).float()
    return found
