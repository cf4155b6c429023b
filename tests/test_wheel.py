"""What `pip install` puts on a machine: the package, its recipes, its models, its command, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import distillkit
from distillkit.cli.shipped import recipes

ROOT = Path(distillkit.__file__).parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source tree to build from")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    return target


def test_the_wheel_holds_package_recipes_and_models_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"distillkit"}
    assert {f"distillkit/configs/{name}.yaml" for name in recipes()} <= set(names)
    embedded = {p.relative_to(ROOT).as_posix() for p in (ROOT / "distillkit" / "embedded").rglob("*") if p.is_file()}
    assert {name for name in embedded if "__pycache__" not in name} <= set(names)
    assert "distillkit/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_metadata_names_the_command_the_licence_and_the_extras(site: Path) -> None:
    (found,) = [d for d in metadata.distributions(path=[str(site)]) if d.name == "distillkit"]
    assert found.version == distillkit.__version__
    assert found.metadata["License-Expression"] == "Apache-2.0"
    assert {"vllm", "deepspeed", "lora", "test", "dev"} <= set(found.metadata.get_all("Provides-Extra"))
    scripts = {point.name: point.value for point in found.entry_points if point.group == "console_scripts"}
    assert scripts == {"distillkit": "distillkit.cli.main:main"}


def test_recipes_resolve_by_name_away_from_the_checkout(site: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(site), "DISTILLKIT_PLUGINS": ""}
    code = (
        "import sys; from distillkit.cli.main import main; from distillkit.cli.shipped import find_config;"
        "print(find_config(sys.argv[1])); sys.exit(main(['configs']))"
    )
    for name in (next(iter(recipes())), next(name for name in recipes() if "/" in name)):
        command = [sys.executable, "-c", code, name]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        first, *listed = done.stdout.splitlines()
        assert first == str(site / "distillkit" / "configs" / f"{name}.yaml")
        assert [line.split()[0] for line in listed if line] == list(recipes())
