"""Every shipped recipe is a config that the command line accepts; every small one runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from distillkit.cli.main import main
from distillkit.cli.shipped import recipes
from distillkit.reporting.metrics import read_metrics

ALL = sorted(recipes())
SMALL = [name for name in ALL if name.startswith("small/")]


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_is_accepted_and_spelled_out(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [] if "student: " in recipes()[name].read_text() else ["--model.student", "my/checkpoint"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", name, *asked, "--print_config"])
    assert ended.value.code == 0
    canonical = yaml.safe_load(capsys.readouterr().out)
    assert {"seed_everything", "model", "data", "trainer"} <= set(canonical)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_small_recipe_runs_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--data.val.0.source.limit", "4", "--data.val.1.source.limit", "4", "--trainer.val_check_interval", "2"]
    if name == "small/zero_rl":
        base = ["fit", "--config", "small/zero_rl_base", "--run_dir", "runs/zero_rl_base", "--trainer.max_steps", "2"]
        assert main([*base, *few]) == 0
    assert main(["fit", "--config", name, "--run_dir", "run", "--trainer.max_steps", "2", *few]) == 0
    rows = read_metrics(Path("run/metrics.csv"))
    assert [row.step for row in rows] == [0, 1, 2]
    assert all(row.values["train/grad_norm"] > 0 for row in rows[1:])
    if "\n  minibatches: " in recipes()[name].read_text():
        assert all(row.values["train/ratio"] != 1 for row in rows[1:]), "every update is on-policy: no clip can bind"
    assert rows[2].values["train/completion_tokens"] > 0
    assert rows[2].values["val/held_out/pass@1"] >= 0
    assert Path("run/student/model.safetensors").exists()


def test_the_page_of_methods_names_every_small_recipe() -> None:
    page = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    named = set(re.findall(r"`small/(\w+)`", page))
    for first, more in re.findall(r"`small/(\w+)`((?:, `_\w+`)+)", page):
        named |= {first.rsplit("_", 1)[0] + suffix for suffix in re.findall(r"`(_\w+)`", more)}
    assert {f"small/{name}" for name in named} == set(SMALL)
