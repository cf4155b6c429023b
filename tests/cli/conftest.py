from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[2] / "plugins" / "distillkit-example"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in an empty folder, sees no installed plugin, and is rank 0 of nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILLKIT_PLUGINS", "")
    for variable in ("DISTILLKIT_RUN_DIR", "RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="session")
def plugin_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip has installed the example plugin into."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(PLUGIN)], check=True, capture_output=True, text=True)
    return target


@pytest.fixture
def plugin(plugin_site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example plugin, installed and seen."""
    monkeypatch.syspath_prepend(plugin_site)
    monkeypatch.setenv("DISTILLKIT_PLUGINS", "distillkit-example")
    return plugin_site
