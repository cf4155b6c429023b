"""docs/teachers.md: every setting that it shows is one that a run takes; its table names every teacher."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from distillkit.cli.main import main
from distillkit.registry import entries

PAGE = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text(encoding="utf-8")
SETTINGS = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("text", SETTINGS, ids=lambda text: str(list(yaml.safe_load(text)["model"])))
def test_the_settings_are_taken_as_they_stand(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text(text)
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", "quickstart", "--config", str(config), "--print_config"])
    assert caught.value.code in (0, None)
    shown = yaml.safe_load(capsys.readouterr().out)["model"]
    given = yaml.safe_load(text)["model"]
    assert len(SETTINGS) == 5
    for key, value in given.items():
        if key == "lora":
            assert value.items() <= shown[key].items()
        elif key == "teacher":
            assert shown[key]["class_path"] in [
                entry.class_path for entry in entries("teacher") if entry.name == value["name"]
            ]


def test_the_table_names_every_teacher() -> None:
    table = PAGE[PAGE.index("| part |") :].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == {
        e.name for e in entries("teacher") if e.built_in
    }
