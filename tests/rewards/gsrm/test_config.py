"""The reward in a config: short names inside it, and whole runs that use it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distillkit.cli.main import main
from distillkit.cli.shortnames import expand
from distillkit.errors import ConfigError
from distillkit.reporting.rollouts import read_rollouts
from tests.rewards.gsrm.chat_server import Answer, chat_server, nobody, says
from tests.rewards.gsrm.test_reward import arithmetic

LOCAL = "distillkit.rewards.gsrm.local.LocalDecomposer"
SERVER = "distillkit.rewards.gsrm.server.ServerDecomposer"
JUDGES = {
    "exact": "distillkit.rewards.gsrm.judge.ExactJudge",
    "overlap": "distillkit.rewards.gsrm.judge.OverlapJudge",
    "local_lm": "distillkit.rewards.gsrm.local_judge.LocalJudge",
    "server_lm": "distillkit.rewards.gsrm.server_judge.ServerJudge",
}


def arguments(text: str) -> dict[str, Any]:
    spec = expand("reward", {"name": "gsrm", **yaml.safe_load(text)})
    assert spec["class_path"] == "distillkit.rewards.gsrm.reward.StructureReward"
    given: dict[str, Any] = spec["init_args"]
    return given


def part(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


@pytest.mark.parametrize(
    "decomposer",
    [
        "{name: local, path: p}",
        "{name: local, init_args: {path: p}}",
        f"{{class_path: {LOCAL}, path: p}}",
        f"{{class_path: {LOCAL}, init_args: {{path: p}}}}",
    ],
)
def test_every_form_of_a_nested_part_means_the_same(decomposer: str) -> None:
    assert arguments(f"decomposer: {decomposer}") == {"decomposer": part(LOCAL, path="p")}


def test_judges_by_name() -> None:
    local = "decomposer: {name: local, path: p}"
    assert arguments(f"{local}\njudge: overlap")["judge"] == part(JUDGES["overlap"])
    assert arguments(f"{local}\njudge: {JUDGES['exact']}")["judge"] == part(JUDGES["exact"])
    assert arguments(f"{local}\njudge: {{name: overlap, threshold: 0.5}}")["judge"] == part(
        JUDGES["overlap"], threshold=0.5
    )
    served = arguments(f"{local}\njudge: {{name: server_lm, base_url: 'http://a', model: m}}")
    assert served["judge"] == part(JUDGES["server_lm"], base_url="http://a", model="m")
    assert arguments(f"{local}\njudge: {{name: local_lm, path: p}}")["judge"] == part(JUDGES["local_lm"], path="p")
    assert arguments(f"{local}\njudge: null")["judge"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{}",
            "reward: StructureReward misses the argument 'decomposer'\n"
            "    expected: decomposer: Decomposer (local, server)",
        ),
        (
            "decomposer: {name: serve, base_url: x}",
            "reward.decomposer: no Decomposer 'serve'\n    got:      'serve'\n"
            "    expected: local, server, or the class path of a Decomposer\n    try:      server",
        ),
        (
            "decomposer: 3",
            "reward.decomposer: which Decomposer?\n    got:      3\n"
            "    expected: name: local, server, or the class path of a Decomposer",
        ),
        (
            f"decomposer: {JUDGES['exact']}",
            f"reward.decomposer: {JUDGES['exact']} is not a Decomposer\n    got:      {JUDGES['exact']}\n"
            "    expected: local, server, or the class path of a Decomposer",
        ),
        (
            "decomposer: distillkit.rewards.gsrm.decomposer.Decomposer",
            "reward.decomposer: distillkit.rewards.gsrm.decomposer.Decomposer is not a Decomposer\n"
            "    got:      distillkit.rewards.gsrm.decomposer.Decomposer\n"
            "    expected: local, server, or the class path of a Decomposer",
        ),
        (
            "decomposer: no.such.Thing",
            "reward.decomposer: cannot import no.such.Thing\n    got:      ModuleNotFoundError: No module named 'no'\n"
            "    expected: local, server, or the class path of a Decomposer",
        ),
        (
            "decomposer: {name: local, path: p, max_tokens: 3}",
            "reward.decomposer.max_tokens: LocalDecomposer has no argument 'max_tokens'\n    got:      max_tokens\n"
            "    expected: path, dtype, max_new_tokens, tokens_per_batch, chat_template_kwargs\n"
            "    try:      max_new_tokens",
        ),
        (
            "decomposer: {name: local, path: p}\njudge: {name: overlap, threshold: high}",
            "reward.judge.threshold: not what OverlapJudge takes\n    got:      'high'\n    expected: float",
        ),
    ],
)
def test_bad_nested_parts_are_named_by_their_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        arguments(text)
    assert str(caught.value) == message


def test_the_listing_names_what_can_be_nested(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["components", "reward", "gsrm"]) == 0
    said = capsys.readouterr().out
    assert "decomposer: Decomposer (local, server) " in said
    assert "judge: StepJudge (exact, overlap, local_lm, server_lm) or null = null " in said


def rows() -> list[dict[str, str]]:
    with open("run/metrics.csv") as stream:
        return list(csv.DictReader(stream))


def fit(gsrm: dict[str, Any], steps: int = 2) -> int:
    rewards = [{"name": "answer", "after": ">", "weight": 0.5}, {"name": "gsrm", "trace": "chain", **gsrm}]
    return main(
        ["fit", "--config", "quickstart", "--data.prompts_per_step", "4", "--model.sampler.group_size", "4",
         "--data.val.0.source.limit", "8", "--trainer.accelerator", "cpu", "--run_dir", "run",
         "--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps),
         "--model.rewards", json.dumps(rewards)]
    )  # fmt: skip


@pytest.fixture
def _run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.mark.slow
@pytest.mark.usefixtures("_run_here")
def test_a_run_with_a_served_decomposer(tmp_path: Path) -> None:
    def answers(body: Any, number: int) -> Answer:
        if body["max_tokens"] == 1:
            return says("Yes")
        problem, trace = body["messages"][-1]["content"].removeprefix("Problem:\n").split("\n\nReasoning:\n")
        return says(arithmetic(problem, trace) if number % 5 else "I cannot")

    with chat_server(answers) as server:
        decomposer = {"name": "server", "base_url": server.url, "model": "rule", "retries": 0}
        given = {"decomposer": decomposer, "normalize": "teacher_steps", "cache_dir": "kept", "weight": 0.5}
        assert fit(given) == 0
        config = yaml.safe_load(Path("run/config.yaml").read_text())
        nested = config["model"]["rewards"][1]["init_args"]["decomposer"]
        assert nested["class_path"] == SERVER and nested["init_args"]["model"] == "rule"
    last = rows()[-1]
    assert float(last["train/undecided/gsrm"]) > 0
    assert float(last["train/undecided/gsrm"]) == float(last["train/unscored"])
    assert 0 <= float(last["train/reward/gsrm"]) <= 1
    recorded = read_rollouts("run/rollouts/step-000001.jsonl")
    for rollout in recorded:
        assert (rollout.status["gsrm"] == "undecided") == (rollout.rewards["gsrm"] is None)
        assert (rollout.total is None) == (rollout.rewards["gsrm"] is None)
    assert {rollout.status["gsrm"] for rollout in recorded} == {"scored", "undecided"}
    assert list(Path("kept").rglob("*.txt"))


@pytest.mark.slow
@pytest.mark.usefixtures("_run_here")
def test_a_run_whose_server_goes_down_goes_on_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Half of the first step is answered."""

    def answers(body: Any, number: int) -> Answer:
        if body["max_tokens"] == 1:
            return says("Yes")
        problem, trace = body["messages"][-1]["content"].removeprefix("Problem:\n").split("\n\nReasoning:\n")
        return says(arithmetic(problem, trace)) if number < 12 else Answer("gone", status=503)

    with chat_server(answers) as server:
        decomposer = {"name": "server", "base_url": server.url, "model": "rule", "retries": 1, "backoff_s": 0.0}
        assert fit({"decomposer": {**decomposer, "concurrency": 1}}) == 0
    undecided = [float(row["train/undecided/gsrm"]) for row in rows()[1:]]
    assert 0 < undecided[0] <= undecided[1] == 16.0
    assert "HTTP 503" in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("_run_here")
def test_a_run_whose_server_is_down_does_not_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit({"decomposer": {"name": "server", "base_url": nobody(), "model": "rule"}}) == 2
    said = capsys.readouterr().err
    assert "ConfigError: model.rewards: gsrm.decomposer.base_url: the server cannot be used\n" in said
    assert "try:      start it first, or another address" in said


@pytest.mark.slow
@pytest.mark.usefixtures("_run_here")
def test_a_run_without_any_teacher_trace_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit({"decomposer": {"name": "local", "path": "embedded:decomposer"}, "trace": "teacher_trace"}) == 2
    said = capsys.readouterr().err
    assert said.startswith("DataError: data.train: StructureReward can use the gold answer of no row\n")
    assert "no column 'teacher_trace' (gsrm.trace names it; gsrm.without_trace: skip goes without)" in said
