"""A teacher's tokenizer is loaded only where its files are not the student's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from distillkit.components import StudentInfo
from distillkit.errors import ModelError
from distillkit.models import load_tokenizer, same_tokenizer_files
from distillkit.teachers import _tokenizer
from distillkit.teachers._tokenizer import uncounted_end_ids
from tests import toy


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    for name in ("student", "teacher"):
        toy.tokenizer().save_pretrained(tmp_path / name)
    return str(tmp_path / "student"), str(tmp_path / "teacher")


def student(path: str) -> StudentInfo:
    return replace(toy.info(), tokenizer=load_tokenizer(path, where="model.student"))


def no_class(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "tokenizer_class"}))


def other_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"+"', '"%"'))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a token": other_token,
    "a chat template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
    "a file less": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "another file": lambda folder: (folder / "added_tokens.json").write_text("{}"),
}


def test_the_same_files_are_not_loaded_again(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    info = student(folders[0])
    monkeypatch.setattr(_tokenizer, "load_tokenizer", None)
    assert same_tokenizer_files(*folders) and uncounted_end_ids(folders[1], info, ()) == ()


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_differs_is_looked_at(change: str, folders: tuple[str, str]) -> None:
    CHANGES[change](Path(folders[1]))
    assert not same_tokenizer_files(*folders) and not same_tokenizer_files(*folders[::-1])


def test_a_tokenizer_of_no_class_of_its_own_is_looked_at(folders: tuple[str, str]) -> None:
    for folder in folders:
        no_class(Path(folder))
    assert not same_tokenizer_files(*folders)


def test_other_ids_are_still_refused(folders: tuple[str, str]) -> None:
    other_token(Path(folders[1]))
    with pytest.raises(ModelError, match="1 tokens differ, the first is '\\+'"):
        uncounted_end_ids(folders[1], student(folders[0]), ())


def test_names_that_are_no_folders_are_loaded() -> None:
    assert not same_tokenizer_files("Qwen/Qwen3-8B", "Qwen/Qwen3-8B")
    assert same_tokenizer_files("embedded:student", "embedded:teacher")
