"""The example plugin as a user has it: installed by pip, found through its entry points."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import distillkit
from distillkit import registry
from distillkit.cli.main import main
from distillkit.errors import UnknownComponentError
from tests.cli.stand_ins import Parsed

ROOT = Path(distillkit.__file__).parents[1]


def test_pip_installs_metadata_with_both_entry_points(plugin_site: Path) -> None:
    (found,) = [d for d in metadata.distributions(path=[str(plugin_site)]) if d.name == "distillkit-example"]
    assert {(point.group, point.name, point.value) for point in found.entry_points} == {
        ("distillkit.divergence", "hellinger", "distillkit_example.hellinger:Hellinger"),
        ("distillkit.reward", "few_words", "distillkit_example.few_words:FewWords"),
    }


@pytest.mark.usefixtures("plugin")
def test_the_plugin_is_listed_and_passes_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["components", "--plugins-only", "--check"]) == 0
    assert capsys.readouterr().out == (
        "KIND        NAME       FROM                      CLASS\n"
        "reward      few_words  distillkit-example 0.1.0  distillkit_example.few_words.FewWords  ok\n"
        "divergence  hellinger  distillkit-example 0.1.0  distillkit_example.hellinger.Hellinger  ok\n"
    )
    assert main(["components", "divergence", "hellinger"]) == 0
    text = capsys.readouterr().out
    assert "  from    distillkit-example 0.1.0\n" in text
    assert "  yaml    divergence: {name: hellinger, scale: 1.0}\n" in text


@pytest.mark.usefixtures("plugin")
def test_the_plugins_names_work_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "model:\n  student: x\n  divergence: {name: hellinger, scale: 0.3}\n  rewards: [few_words]\n"
        "trainer: {max_steps: 1}\n"
    )
    from_file = Parsed.config("fit", "--config", "recipe.yaml")["model"]
    assert from_file["divergence"] == {
        "class_path": "distillkit_example.hellinger.Hellinger",
        "init_args": {"scale": 0.3},
    }
    assert from_file["rewards"] == [
        {"class_path": "distillkit_example.few_words.FewWords", "init_args": {"limit": 100, "weight": 1.0}}
    ]
    argv = ["--model.divergence", "hellinger", "--model.divergence.scale", "0.3", "--model.rewards+=few_words"]
    assert Parsed.config("fit", "--model.student=x", "--trainer.max_steps=1", *argv)["model"] == from_file


def test_without_the_plugin_switched_on_its_names_are_explained(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLKIT_PLUGINS", "another-package")
    assert registry.plugins() == []
    with pytest.raises(UnknownComponentError, match="the divergence 'hellinger' is switched off"):
        registry.find("divergence", "hellinger")


def test_a_fresh_process_finds_it_by_its_metadata_alone(plugin_site: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(plugin_site), str(ROOT)])}
    environment["DISTILLKIT_PLUGINS"] = "distillkit-example"
    done = subprocess.run(
        [sys.executable, "-m", "distillkit", "components", "--plugins-only", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [(row["kind"], row["name"], row["version"]) for row in json.loads(done.stdout)] == [
        ("reward", "few_words", "0.1.0"),
        ("divergence", "hellinger", "0.1.0"),
    ]
