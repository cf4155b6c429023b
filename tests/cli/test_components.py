"""`distillkit components`, without and with an installed plugin."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from distillkit import registry
from distillkit.cli.listing import summary
from distillkit.cli.main import main
from tests.test_registry import install


def output(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    assert main(["components", *argv]) == code
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_everything_is_listed_in_the_order_of_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys).splitlines()
    assert lines[0] == "KIND        NAME                FROM        CLASS"
    assert lines[1] == "sampler     hf                  distillkit  distillkit.samplers.hf.HFSampler"
    kinds = [line.split()[0] for line in lines[1:]]
    assert list(dict.fromkeys(kinds)) == list(registry.KINDS)
    assert len(lines) == 1 + len(registry.entries())


def test_one_kind_adds_the_first_line_of_each_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "beta").splitlines()
    assert lines[0] == "KIND  NAME             FROM        CLASS"
    assert any(
        line.startswith("beta  linear           distillkit  distillkit.betas.linear.Linear  β(step) = start + ")
        for line in lines
    )


def test_a_part_is_described_with_its_arguments_and_a_line_of_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "beta", "linear")
    assert text.startswith("linear — β(step) = start + (end − start)·min(step/steps, 1), or max(start − delta·step,")
    assert "  class   distillkit.betas.linear.Linear\n" in text
    assert "  source  *KDRL*, Xu et al., 2025, https://arxiv.org/abs/2506.02208" in text
    assert (
        "  args    start: float                 value at step 0.\n"
        "          end: float                   the value it stops at.\n"
        "          steps: int or null = null    rollout steps from `start` to `end`; give this or `delta`.\n"
    ) in text
    assert text.splitlines()[-1].startswith("  yaml    beta: {name: linear, start: ")


def test_a_part_says_what_it_needs_of_the_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "divergence", "topk")
    assert "          tail: bool = true  " in text
    assert "  needs   teacher scores: log-probs of the teacher's 64 most likely tokens\n" in text
    assert "  yaml    divergence: {name: topk, k: 64}\n" in text
    assert "needs" not in output(capsys, "reward", "format")
    assert "  yaml    rewards: [{name: format, " in output(capsys, "reward", "format")


BETAS = "adaptive_kl, constant, cosine, linear, reward_progress, switch"


@pytest.mark.parametrize("entry", registry.entries(), ids=lambda e: f"{e.kind}-{e.name}")
def test_every_built_in_is_described(capsys: pytest.CaptureFixture[str], entry: registry.Entry) -> None:
    facts = json.loads(output(capsys, entry.kind, entry.name, "--json"))
    assert facts["summary"] == summary(entry.class_path) != ""
    assert all(argument["help"] for argument in facts["args"])
    line = yaml.safe_load(facts["yaml"])
    assert list(line) == ["rewards" if entry.kind == "reward" else entry.kind]


def test_json_has_a_row_per_part(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(output(capsys, "--json"))
    assert len(rows) == len(registry.entries())
    assert rows[0] == {
        "kind": "sampler",
        "name": "hf",
        "distribution": "distillkit",
        "version": rows[0]["version"],
        "class_path": "distillkit.samplers.hf.HFSampler",
        "summary": rows[0]["summary"],
    }
    assert rows[0]["summary"]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (
            ["divergance"],
            "'divergance' is not a kind of part\n    got:      'divergance'\n"
            "    expected: sampler, teacher, reward, divergence, beta, masker, objective\n    try:      divergence\n",
        ),
        (
            ["beta", "linaer"],
            f"unknown beta 'linaer'\n    got:      'linaer'\n    expected: {BETAS}\n    try:      linear\n",
        ),
        (
            ["beta", "linaer", "--check"],
            f"unknown beta 'linaer'\n    got:      'linaer'\n    expected: {BETAS}\n    try:      linear\n",
        ),
    ],
)
def test_unknown_kinds_and_names(capsys: pytest.CaptureFixture[str], argv: list[str], text: str) -> None:
    assert main(["components", *argv]) == 2
    assert capsys.readouterr().err == f"UnknownComponentError: {text}"


def test_check_passes_on_the_built_ins(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "--check").splitlines()[1:]
    assert [line for line in lines if not line.endswith("  ok")] == []


BROKEN = """
from distillkit.components import BetaScheduler

class Positional(BetaScheduler):
    '''A schedule.'''
    def __init__(self, size=1.0):
        self.size = size
    def value(self, step, signals):
        return self.size
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package whose parts do not import, break the contract, have a taken name, or an impossible one."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "brk_needy.py").write_text("import a_module_that_is_not_installed\n")
    (site / "brk_parts.py").write_text(BROKEN)
    points = "needy = brk_needy:Needy\npositional = brk_parts:Positional\nlinear = brk_parts:Positional\nBad-Name = a:B"
    install(site, "distillkit-broken", {"distillkit.beta": points})
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("DISTILLKIT_PLUGINS", "distillkit-broken")


@pytest.mark.usefixtures("broken")
def test_a_broken_package_is_listed_and_breaks_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "beta").splitlines()
    assert "beta  needy            distillkit-broken 0.1  brk_needy.Needy" in lines
    clashing = [line for line in lines if "CLASH" in line]
    assert [line.split()[1:3] for line in clashing] == [["linear", "distillkit"], ["linear", "distillkit-broken"]]
    assert "brk_needy" not in sys.modules
    assert main(["--help"]) == 0


@pytest.mark.usefixtures("broken")
def test_check_says_what_is_broken_and_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "--check", "--plugins-only", code=1).splitlines()[1:]
    found = {line.split()[1]: line.split("BROKEN  ")[1] for line in lines}
    assert found["needy"] == "ModuleNotFoundError: No module named 'a_module_that_is_not_installed'"
    assert found["linear"] == "the name is also used by distillkit"
    assert found["Bad-Name"] == "the name 'Bad-Name' is not lower-case letters, digits and _"
    assert "constructor argument 'size' is not keyword-only" in found["positional"]
    assert "constructor argument 'size' has no type" in found["positional"]


@pytest.mark.usefixtures("broken")
def test_check_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in json.loads(output(capsys, "beta", "--check", "--json", code=1))}
    assert rows["constant"]["broken"] is None
    assert rows["needy"]["broken"].startswith("ModuleNotFoundError")
    assert rows["needy"]["version"] == "0.1"


@pytest.mark.usefixtures("broken")
def test_describing_a_broken_part_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["components", "beta", "needy"]) == 2
    assert capsys.readouterr().err.startswith(
        "PluginLoadError: the beta 'needy' of distillkit-broken 0.1 does not load\n"
    )
