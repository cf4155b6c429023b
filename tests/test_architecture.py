"""Dependencies point one way, modules stay small, and the public names are what is documented."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import distillkit

PACKAGE = Path(distillkit.__file__).parent

TIERS = [
    {"errors", "types", "decomposition"},
    {"functional"},
    {"components", "registry", "embedded"},
    {"backbone", "buffers", "chunks", "packed", "streamed", "tied"},
    {"models", "lora", "positions", "scorer"},
    {"samplers", "teachers", "rewards", "divergences", "betas", "maskers", "objectives"},
    {
        "backends",
        "clock",
        "meters",
        "refusals",
        "schedules",
        "engine_gap",
        "per_token",
        "ahead",
        "early",
        "micro_batches",
        "prepared",
        "loss",
        "update",
        "step",
    },
    {"training", "data", "evaluation", "reporting"},
    {"runs", "planning"},
    {"checkup"},
    {"cli", "__main__"},
]
"""From the bottom to the top: a module imports from its own tier or from below."""

SLOTS = TIERS[5]
LIGHTNING = {"training", "data", "evaluation", "reporting", "runs", "cli"}
LONGER = {"types.py": 450, "embedded/arithmetic.py": 450}
"""The map of all that flows, and one task with its checker: each reads better in one piece."""
HEAVY = {"vllm", "deepspeed", "peft", "matplotlib"}
DRAWING = {"reporting/plots.py", "reporting/compare_plot.py"}
"""They need matplotlib, and are imported where it is."""


def top(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """Every module that a file imports, and whether for type checking only."""
    found = []
    tree = ast.parse(path.read_text())
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [(name, id(node) in guarded) for name in names]
    return found


def modules() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    tier = {name: i for i, names in enumerate(TIERS) for name in names}
    own = top(path)
    if own == "testing":
        allowed = {"errors", "types", "components", "testing", "registry", "functional", "models", "scorer"}
    else:
        assert own in tier, f"{own} has no tier: add it to TIERS"
        allowed = {name for name, i in tier.items() if i <= tier[own]}
    if own in SLOTS:
        allowed -= SLOTS - {own}
    for name, typing_only in imports(path):
        parts = name.split(".")
        if parts[0] == "distillkit" and len(parts) > 1 and not typing_only and parts[1] in tier:
            assert parts[1] in allowed, f"{path.name} imports {name}"
        if parts[0] == "lightning":
            assert own in LIGHTNING, f"{path.name} imports {name}: Lightning belongs to {sorted(LIGHTNING)}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_backends_are_imported_inside_their_component(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
            found = {n.split(".")[0] for n in names} & HEAVY
            assert found <= ({"matplotlib"} if str(path.relative_to(PACKAGE)) in DRAWING else set())
            files = {n.removeprefix("distillkit.").replace(".", "/") + ".py" for n in names}
            assert not files & DRAWING, "matplotlib may not be there"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGER.get(str(path.relative_to(PACKAGE)), 400)


def test_public_names_are_all_there_and_sorted() -> None:
    assert set(distillkit.__all__) == set(distillkit._HOMES)
    assert all(hasattr(distillkit, name) for name in distillkit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = distillkit.Nothing


def test_no_module_trusts_remote_code_or_unpickles() -> None:
    for path in modules():
        text = path.read_text()
        assert "trust_remote_code=True" not in text
        assert "import pickle" not in text
        assert "weights_only=False)" not in text.replace('"last.ckpt", weights_only=False)', "")
        assert "shell=True" not in text
