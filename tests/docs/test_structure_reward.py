"""Every block of docs/structure_reward.md is run, in its order, with a served and a tiny model for the real ones."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from distillkit.cli.main import main
from distillkit.cli.shortnames import expand
from distillkit.decomposition import Decomposition, ReasoningStep, messages, parse, render
from distillkit.rewards.gsrm.decomposer import Undecided
from distillkit.rewards.gsrm.judge import StepPair
from distillkit.testing import char_tokenizer, tiny_model
from tests.rewards.gsrm.chat_server import Answer, chat_server, says

PAGE = (Path(__file__).parents[2] / "docs" / "structure_reward.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def files() -> dict[str, str]:
    """The blocks that the text before them names as a file."""
    named = re.findall(r"`([\w.]+)`:\n\n```(?:json|yaml)\n(.*?)```", PAGE, flags=re.DOTALL)
    return dict(named)


def commands() -> list[list[str]]:
    return [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]


def answers(body: Mapping[str, Any], number: int) -> Answer:
    """A model that has read the examples."""
    asked = body["messages"]
    shown = [parse(m["content"]) for m in asked if m["role"] == "assistant"]
    assert shown and asked[-1] == messages(*re.split("\n\nReasoning:\n", asked[-1]["content"][9:]))[1]
    step = ReasoningStep(meta="as shown", question="?", answer="!")
    return says(render(Decomposition(steps=(step,), final="!")))


def test_the_page_names_the_files_it_uses() -> None:
    assert set(files()) == {"traces.jsonl", "examples.jsonl", "decomposer.yaml"}
    assert [words[:2] for words in commands()] == [
        ["distillkit", "fit"],
        ["distillkit", "decompose"],
        ["distillkit", "fit"],
        ["distillkit", "decompose"],
    ]


def test_the_grammar_prints_what_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("python")[0], "structure_reward.md", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out == blocks("text")[0]


def test_the_configs_parts_are_parts() -> None:
    shown = yaml.safe_load(blocks("yaml")[0])["model"]["rewards"]
    built = [expand("reward", reward) for reward in shown]
    assert [spec["class_path"].rpartition(".")[2] for spec in built] == ["MathVerify", "StructureReward"]
    assert built[1]["init_args"]["judge"]["class_path"].endswith(".OverlapJudge")


def test_parts_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_parts.py").write_text(blocks("python")[1])
    monkeypatch.syspath_prepend(tmp_path)
    given = yaml.safe_load(blocks("yaml")[2])
    spec = expand("reward", {"name": "gsrm", **given})
    assert [spec["init_args"][name]["class_path"] for name in given] == ["my_parts.Sentences", "my_parts.SameFirstWord"]
    import my_parts

    good, bad = my_parts.Sentences().decompose([("p", "1+1 is 2. So 2+1 is 3."), ("p", "")])
    assert [step.answer for step in good.steps] == ["2", "3"] and bad == Undecided(reason="no sentence")
    pair = StepPair(kind="meta", ours="So it is", theirs="So what", problem="p")
    assert my_parts.SameFirstWord().agree([pair]) == [True]


def tiny(folder: Path) -> str:
    """A checkpoint with room for the grammar's prompts."""
    model = tiny_model(1)
    model.config.max_position_embeddings = 4096
    model.save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_the_commands_make_a_decomposer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    for name, content in files().items():
        Path(name).write_text(content)
    _, labels, fit, check = (words[1:] for words in commands())
    with chat_server(answers) as server:
        assert main([server.url if word.startswith("http://localhost") else word for word in labels]) == 0
    assert capsys.readouterr().out == "decompositions.jsonl: 2 rows: 2 written\n"
    rows = [json.loads(line) for line in Path("decompositions.jsonl").read_text().splitlines()]
    assert set(rows[0]) == {"prompt", "completion", "id"}
    small = ["--model.student", tiny(tmp_path / "tiny"), "--model.dtype", "float32", "--trainer.max_steps", "2"]
    assert main([*fit, *small, "--trainer.accelerator", "cpu"]) == 0
    assert Path("runs/decomposer/student/model.safetensors").exists()
    capsys.readouterr()
    assert main(check) == 0
    said = capsys.readouterr().out
    assert said.startswith("check.jsonl: 2 rows: 0 written, 2 left out\n")  # two updates teach it nothing


@pytest.mark.slow
def test_the_first_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    limits = ["--data.val.0.source.limit", "4", "--data.val.1.source.limit", "4", "--data.prompts_per_step", "2"]
    assert main([*commands()[0][1:], *limits, "--trainer.val_check_interval", "3"]) == 0
