"""Names to classes: built-ins, installed packages, what is seen of them, and every way a look-up fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distillkit import registry
from distillkit.cli.arguments import BASES
from distillkit.errors import ConfigError, PluginLoadError, UnknownComponentError

BETAS = "adaptive_kl, constant, cosine, linear, reward_progress, switch"


def install(folder: Path, name: str, entry_points: dict[str, str], version: str = "0.1") -> None:
    """Lay out a distribution's metadata the way an installer does."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"[{group}]\n{line}\n" for group, line in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder on the import path, where packages can be installed."""
    monkeypatch.delenv(registry.PLUGINS_VARIABLE, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_kinds_stand_in_data_flow_order() -> None:
    assert registry.KINDS == ("sampler", "teacher", "reward", "divergence", "beta", "masker", "objective")
    assert set(registry.KINDS) == set(BASES)


@pytest.mark.parametrize("entry", [e for e in registry.entries() if e.built_in], ids=lambda e: f"{e.kind}-{e.name}")
def test_every_built_in_loads_and_has_the_base_of_its_kind(entry: registry.Entry) -> None:
    assert issubclass(registry.load(entry), BASES[entry.kind])
    assert registry.NAME.fullmatch(entry.name)
    assert registry.name_of(registry.load(entry)) == entry.name


def test_importing_and_listing_the_registry_imports_no_part_and_no_torch() -> None:
    code = (
        "import sys; from distillkit import registry; registry.entries();"
        "print([m for m in sys.modules if m in ('torch', 'lightning') or m.startswith('distillkit.divergences')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_installed_package_is_listed_with_its_version_and_not_imported(site: Path) -> None:
    (site / "explosive.py").write_text("raise RuntimeError('imported')\n")
    install(site, "distillkit-explosive", {"distillkit.divergence": "boom = explosive:Boom"}, version="1.2")
    found = [e for e in registry.entries("divergence") if not e.built_in and e.name == "boom"]
    assert found == [
        registry.Entry(
            kind="divergence",
            name="boom",
            class_path="explosive.Boom",
            distribution="distillkit-explosive",
            version="1.2",
        )
    ]
    assert found[0].source == "distillkit-explosive 1.2"
    assert "boom (distillkit-explosive 1.2)" in registry.describe_known("divergence")
    assert "explosive" not in sys.modules


def test_a_package_that_does_not_import_fails_on_use(site: Path) -> None:
    (site / "needy.py").write_text("import a_module_that_is_not_installed\n")
    install(site, "distillkit-needy", {"distillkit.reward": "needy = needy:Needy"})
    with pytest.raises(PluginLoadError) as caught:
        registry.load(registry.find("reward", "needy"))
    assert str(caught.value) == (
        "the reward 'needy' of distillkit-needy 0.1 does not load\n"
        "    got:      ModuleNotFoundError: No module named 'a_module_that_is_not_installed'\n"
        "    expected: needy.Needy to import\n"
        "    try:      update or uninstall distillkit-needy"
    )


def test_an_entry_point_that_is_no_class_is_refused(site: Path) -> None:
    (site / "funny.py").write_text("def funny(): ...\n")
    install(site, "distillkit-funny", {"distillkit.reward": "funny = funny:funny"})
    with pytest.raises(PluginLoadError) as caught:
        registry.load(registry.find("reward", "funny"))
    assert str(caught.value) == (
        "the reward 'funny' of distillkit-funny 0.1 is not a class\n"
        "    got:      funny.funny, a function\n"
        "    expected: an entry point that names a class"
    )


def test_a_name_that_two_packages_claim_is_refused_naming_both(site: Path) -> None:
    install(site, "distillkit-one", {"distillkit.divergence": "k2 = one:K2"})
    with pytest.raises(ConfigError) as caught:
        registry.find("divergence", "k2")
    assert str(caught.value) == (
        "two packages offer the divergence 'k2'\n"
        "    got:      distillkit (distillkit.divergences.sampled.K2) and distillkit-one 0.1 (one.K2)\n"
        "    expected: one of them\n"
        "    try:      class_path: one.K2, or name the packages to load in DISTILLKIT_PLUGINS"
    )
    assert list(registry.clashes()) == [("divergence", "k2")]


def test_an_editable_install_that_shows_up_twice_is_one_part(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = site / "again"
    second.mkdir()
    monkeypatch.syspath_prepend(second)
    for folder in (site, second):
        install(folder, "distillkit-one", {"distillkit.beta": "steps = one:Steps"})
    assert registry.find("beta", "steps").class_path == "one.Steps"


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (None, {"from_one", "from_two"}),
        ("", set()),
        ("distillkit-one", {"from_one"}),
        ("Distillkit_Two, distillkit-absent", {"from_two"}),
    ],
)
def test_the_environment_chooses_which_packages_are_seen(
    site: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, seen: set[str]
) -> None:
    install(site, "distillkit-one", {"distillkit.beta": "from_one = one:B"})
    install(site, "distillkit-two", {"distillkit.beta": "from_two = two:B"})
    if value is not None:
        monkeypatch.setenv("DISTILLKIT_PLUGINS", value)
    assert {e.name for e in registry.plugins()} & {"from_one", "from_two"} == seen
    assert {"constant", "linear", "cosine"} <= {e.name for e in registry.entries("beta")}


def test_a_part_that_is_switched_off_says_so(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "distillkit-one", {"distillkit.beta": "steps = one:B"})
    monkeypatch.setenv("DISTILLKIT_PLUGINS", "")
    with pytest.raises(UnknownComponentError) as caught:
        registry.find("beta", "steps")
    assert str(caught.value) == (
        "the beta 'steps' is switched off\n"
        "    got:      'steps'\n"
        f"    expected: {BETAS}\n"
        "    try:      DISTILLKIT_PLUGINS='' leaves distillkit-one 0.1 out: add it there"
    )


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        (
            "beta",
            "linaer",
            f"unknown beta 'linaer'\n    got:      'linaer'\n    expected: {BETAS}\n    try:      linear",
        ),
        (
            "beta",
            "k2",
            f"'k2' is a divergence, not a beta\n    got:      'k2'\n    expected: {BETAS}",
        ),
        (
            "beta",
            "reverse_lk",
            f"unknown beta 'reverse_lk'\n    got:      'reverse_lk'\n    expected: {BETAS}\n"
            "    try:      reverse_kl (a divergence)",
        ),
        (
            "beta",
            "zzz",
            f"unknown beta 'zzz'\n    got:      'zzz'\n    expected: {BETAS}\n"
            "    try:      class_path: package.module.Class for a part that has no short name",
        ),
        (
            "divergance",
            "k2",
            "'divergance' is not a kind of part\n    got:      'divergance'\n"
            "    expected: sampler, teacher, reward, divergence, beta, masker, objective\n    try:      divergence",
        ),
    ],
)
def test_unknown_names_are_told_what_is_known_and_what_is_near(
    monkeypatch: pytest.MonkeyPatch, kind: str, name: str, text: str
) -> None:
    monkeypatch.setenv("DISTILLKIT_PLUGINS", "")
    with pytest.raises(UnknownComponentError) as caught:
        registry.find(kind, name)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("no_such_package.Part", "No module named 'no_such_package'"),
        ("collections.OrderedDcit", "collections has no 'OrderedDcit'; did you mean 'OrderedDict'?"),
        ("collections.abc.Nothing", "collections.abc has no 'Nothing'"),
        ("json.decoder.JSONDecoder.nothing", "json.decoder.JSONDecoder has no 'nothing'"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_ends(path: str, text: str) -> None:
    with pytest.raises(ImportError) as caught:
        registry.import_object(path)
    assert str(caught.value) == text


def test_an_import_error_inside_a_module_is_not_taken_for_a_missing_name(site: Path) -> None:
    (site / "outer_pkg").mkdir()
    (site / "outer_pkg" / "__init__.py").write_text("")
    (site / "outer_pkg" / "inner.py").write_text("import a_module_that_is_not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_installed"):
        registry.import_object("outer_pkg.inner.Part")
