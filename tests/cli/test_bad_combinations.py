"""Combinations and models that cannot work: the whole of what is printed, exit code 2, no model loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import distillkit.models
import distillkit.training.base
from distillkit import embedded
from distillkit.cli.main import main
from distillkit.teachers.local import LocalTeacher
from distillkit.types import ScoreRequest


class SampledOnly(LocalTeacher):
    """A teacher that, like many servers, gives the log-prob of the sampled token and nothing else."""

    @property
    def offers(self) -> ScoreRequest:
        return ScoreRequest(sampled=True)


QUICKSTART = ["fit", "--config", "quickstart", "--trainer.max_steps", "1"]

EXTRAPOLATED = {
    "name": "extrapolated",
    "teacher": {"name": "local", "path": "embedded:teacher"},
    "base": {"name": "local", "path": "embedded:student"},
}


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(distillkit.training.base, "load_causal_lm", refuse)
    monkeypatch.setattr("distillkit.teachers.local.load_causal_lm", refuse)


COMBINATIONS = {
    "k1 as a loss": (
        ["--model.divergence", "k1"],
        """\
ConfigError: model.distill_through: K1 cannot be used as a loss: {K1}
    got:      loss
    expected: advantage or reward
    try:      model.distill_through: advantage
""",
    ),
    "top-k as an advantage": (
        ["--model.divergence", "topk", "--model.distill_through", "advantage"],
        """\
ConfigError: model.distill_through: TopK cannot be used as an advantage: {TopK}
    got:      advantage
    expected: loss or reward
    try:      model.distill_through: loss
""",
    ),
    "routed responses through the reward": (
        ["--model.masker", "routed", "--model.divergence", "k1", "--model.distill_through", "reward"],
        """\
ConfigError: model.distill_through: Routed cannot mask a divergence used as a reward: {Routed}
    got:      reward
    expected: loss or advantage
    try:      model.distill_through: advantage
""",
    ),
    "trrd without a teacher": (
        ["--model.objective", "trrd", "--model.divergence", "null", "--model.teacher", "null"],
        """\
ConfigError: model.teacher: objective TRRD needs a teacher
    got:      null
    expected: a teacher that gives sampled log-probs
    try:      model.teacher: {name: local, path: ...}, or model.objective: grpo
""",
    ),
    "a divergence without a teacher": (
        ["--model.teacher", "null"],
        """\
ConfigError: model.teacher: divergence K2 needs a teacher
    got:      null
    expected: a teacher that gives sampled log-probs
    try:      model.teacher: {name: local, path: ...}, or model.divergence: null
""",
    ),
    "whole distributions of a cache": (
        [
            "--model.teacher",
            '{"name": "cached", "dir": "cache", "teacher": {"name": "local", "path": "embedded:teacher"}}',
            "--model.divergence",
            "reverse_kl",
        ],
        """\
ConfigError: model.divergence: ReverseKL needs what the teacher CachedTeacher does not give
    got:      sampled log-probs, top-2147483648 log-probs, entropies
    expected: whole distributions
    try:      model.teacher: {name: local, path: ...} gives everything
""",
    ),
    "whole distributions of an extrapolated teacher": (
        ["--model.teacher", json.dumps(EXTRAPOLATED), "--model.divergence", "reverse_kl"],
        """\
ConfigError: model.divergence: ReverseKL needs what the teacher ExtrapolatedTeacher does not give
    got:      sampled log-probs
    expected: whole distributions
    try:      model.teacher: {name: local, path: ...} gives everything
""",
    ),
    "estimates and a policy gradient on given completions": (
        ["--model.sampler", json.dumps({"name": "mixed", "sampler": {"name": "hf", "group_size": 1}})],
        """\
ConfigError: model.objective: the sampler MixedSampler also gives tokens of others, which have no policy gradient
    got:      GRPO
    expected: null
    try:      model.objective: null, or model.sampler: hf
model.divergence: K2 is an estimate over the student's own samples, and the sampler MixedSampler also gives tokens of \
others
    got:      sampled log-probs
    expected: a divergence of whole distributions or of top-k tokens
    try:      model.divergence: jsd
""",
    ),
    "top-k of a teacher without top-k": (
        [
            "--model.teacher",
            json.dumps({"class_path": f"{__name__}.SampledOnly", "init_args": {"path": "embedded:teacher"}}),
            "--model.divergence",
            "topk",
        ],
        """\
ConfigError: model.divergence: TopK needs what the teacher SampledOnly does not give
    got:      sampled log-probs
    expected: its top 64 log-probs (it gives 0)
    try:      model.teacher: {name: local, path: ...} gives everything
""",
    ),
    "one rollout per prompt": (
        ["--model.sampler.group_size", "1"],
        """\
ConfigError: model.sampler.group_size: the group is the baseline; with one rollout every advantage is 0
    got:      1
    expected: at least 2 with rewards and an objective
    try:      model.sampler.group_size: 8, or model.rewards: [] to distil alone
""",
    ),
    "greedy training": (
        ["--model.sampler.temperature", "0"],
        """\
ConfigError: model.sampler.temperature: training needs draws, not the mode
    got:      0
    expected: > 0
    try:      model.sampler.temperature: 1.0
""",
    ),
    "two problems at once": (
        ["--model.sampler.top_p", "0.9", "--model.beta", "null"],
        """\
ConfigError: model.sampler.top_p: the importance ratio of truncated sampling is not defined in training
    got:      0.9
    expected: 1.0
    try:      model.sampler.top_p: 1.0 (evaluation sets have their own top_p)
model.beta: the divergence has no coefficient
    got:      null
    expected: a number
    try:      model.beta: 0.02
""",
    ),
    "nothing to learn from": (
        ["--model.objective", "null", "--model.divergence", "null"],
        """\
ConfigError: model: nothing to learn from
    got:      objective null and divergence null
    try:      model.objective: grpo, or model.divergence: k2 with a model.teacher
""",
    ),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_combination_that_cannot_work_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from distillkit.divergences.sampled import K1
    from distillkit.divergences.topk import TopK
    from distillkit.maskers.routed import Routed

    arguments, expected = COMBINATIONS[name]
    for part in (K1, TopK, Routed):
        expected = expected.replace(f"{{{part.__name__}}}", part.why_not)
    monkeypatch.chdir(tmp_path)
    assert main([*QUICKSTART, *arguments]) == 2
    assert capsys.readouterr().err == expected


def other_teacher(folder: Path, change: str) -> Path:
    """The embedded teacher with another tokenizer."""
    shutil.copytree(embedded.resolve("embedded:teacher"), folder)
    if change == "ids":
        file = folder / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["3"], vocabulary["4"] = vocabulary["4"], vocabulary["3"]
        file.write_text(json.dumps(tokenizer))
    elif change == "eos":
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_text())
        config["eos_token"] = config["pad_token"]
        file.write_text(json.dumps(config))
    elif change == "chat_template":
        (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    return folder


MISFITS = {
    "ids": ("2 tokens differ, the first is '3': student 23, teacher 24", "a teacher of the same tokenizer family"),
    "eos": ("student '<eos>' (1), teacher '<pad>' (0)", "model.teacher.tolerate: [eos]"),
    "chat_template": (
        "the student's prompts would look unfamiliar to the teacher",
        "model.teacher.tolerate: [chat_template]",
    ),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("change", MISFITS)
def test_a_tokenizer_that_differs_is_refused_before_any_model_is_loaded(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    other_teacher(tmp_path / "teacher", change)
    assert main([*QUICKSTART, "--model.teacher.path", "teacher"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "ModelError: model.teacher.path: the tokenizer of teacher does not fit the student's\n"
        f"    got:      {change}: {MISFITS[change][0]}\n"
        "    expected: the same token ids and markers\n"
        f"    try:      {MISFITS[change][1]}\n"
    )


def test_a_student_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*QUICKSTART, "--model.student", "no/such/folder"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ModelError: model.student: cannot load a tokenizer\n    got:      no/such/folder (")
    expected = "a local Hugging Face checkpoint folder, a hub name, or embedded:student / embedded:teacher"
    assert said.endswith(f"    expected: {expected}\n")
    assert "Traceback" not in said


def test_an_existing_run_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    assert main([*QUICKSTART, "--run_dir", "mine"]) == 2
    assert capsys.readouterr().err == (
        "ConfigError: run_dir: mine exists already\n"
        "    expected: a folder that does not exist\n"
        "    try:      another --run_dir, or leave it out for runs/<config name>-<number>\n"
    )
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


def test_a_part_that_refuses_its_argument_says_so_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*QUICKSTART, "--model.objective.clip_low", "-5"]) == 2
    expected = "ConfigError: model.objective.clip_low\n    got:      -5.0\n    expected: between 0 and 1\n"
    assert capsys.readouterr().err == expected
