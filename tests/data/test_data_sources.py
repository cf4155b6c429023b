"""Files, embedded tasks and hub datasets become the same rows; what is wrong with them is said in full."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from distillkit.data import DataSource, read_source
from distillkit.errors import ConfigError, DataError

ROWS = [
    {"question": "2+3?", "answer": "5", "level": "1"},
    {"question": 'say "hi",\nthen 1/2', "answer": "007", "level": "NA"},
    {"question": "when?", "answer": "2020-01-01", "level": "3"},
]
KNOWN = "a .jsonl, .json, .parquet or .csv file, a hub dataset name, or embedded:<task>/<split>"


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def refused(source: DataSource, where: str = "data.train") -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        read_source(source, where)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_every_format_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    rows = read_source(DataSource(path=write(tmp_path, kind, ROWS)))
    assert list(rows) == ROWS
    assert rows.columns == ("question", "answer", "level")
    assert rows.place(1) == f"{tmp_path}/rows.{kind}, {'line' if kind == 'jsonl' else 'row'} 2"


def test_json_values_stay_what_the_file_says(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": 12345678901234567890123}, {"prompt": "b", "answer": 2.5, "extra": {"x": None}}]
    assert list(read_source(DataSource(path=write(tmp_path, "jsonl", rows)))) == rows
    assert list(read_source(DataSource(path=write(tmp_path, "json", rows)))) == rows


def test_json_lines_in_a_json_file_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "b"}\n')
    assert [row["prompt"] for row in read_source(DataSource(path=str(path)))] == ["a", "b"]


def test_reading_a_file_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    rows = read_source(DataSource(path=write(tmp_path, "parquet", ROWS)))
    assert not cache.exists()
    assert rows[2] == ROWS[2]


def test_several_files_and_a_limit(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    paths = [write(tmp_path, "csv", ROWS[:2]), write(tmp_path / "more", "jsonl", ROWS[2:])]
    assert list(read_source(DataSource(path=paths))) == ROWS
    rows = read_source(DataSource(path=paths, limit=3))
    assert rows.place(2) == f"{tmp_path}/more/rows.jsonl, line 1"
    assert rows.name == f"{tmp_path}/rows.csv and 1 more"
    assert list(read_source(DataSource(path=paths, limit=1))) == ROWS[:1]
    assert rows[1:] == ROWS[1:] and rows[-1] == ROWS[2]
    with pytest.raises(IndexError):
        rows[3]


def test_blank_lines_do_not_shift_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"prompt": "a"}\n\n{"prompt": "b"}\n')
    rows = read_source(DataSource(path=str(path)))
    assert rows.place(1) == f"{path}, line 4"


def test_content_hash_follows_content_alone(tmp_path: Path) -> None:
    first = read_source(DataSource(path=write(tmp_path, "jsonl", ROWS))).sha256
    (tmp_path / "moved").mkdir()
    assert read_source(DataSource(path=write(tmp_path / "moved", "jsonl", ROWS))).sha256 == first
    changed = [*ROWS[:2], {**ROWS[2], "answer": "2020-01-02"}]
    assert read_source(DataSource(path=write(tmp_path, "jsonl", changed))).sha256 != first


def test_environment_variables_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "jsonl", ROWS)
    monkeypatch.setenv("MY_DATA", str(tmp_path))
    for path in ("$MY_DATA/rows.jsonl", "${MY_DATA}/rows.jsonl", f"${{NOT_SET:-{tmp_path}}}/rows.jsonl"):
        assert len(read_source(DataSource(path=path))) == 3
    monkeypatch.delenv("MY_DATA")
    assert refused(DataSource(path="${MY_DATA}/rows.jsonl")) == (
        "data.train.path: the environment variable MY_DATA is not set\n"
        "    got:      ${MY_DATA}/rows.jsonl\n"
        "    try:      export MY_DATA=/folder/of/the/data, or give --data.train.path"
    )


def test_embedded_task() -> None:
    rows = read_source(DataSource(path="embedded:arithmetic/train", limit=3))
    assert len(rows) == 3
    assert {"prompt", "answer"} <= set(rows.columns)
    assert rows.place(0) == "embedded:arithmetic/train, row 1"


def test_hub_or_folder_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "test.jsonl").write_text('{"prompt": "b"}\n{"prompt": "c"}\n')
    assert [row["prompt"] for row in read_source(DataSource(path=str(folder)))] == ["a"]
    rows = read_source(DataSource(path=str(folder), split="test"))
    assert [row["prompt"] for row in rows] == ["b", "c"]
    assert rows.place(1) == f"{folder} [test], row 2"
    assert refused(DataSource(path=str(folder), split="tset")) == (
        "data.train: cannot load this dataset\n"
        f"    got:      {folder}, split tset (Unknown split \"tset\". Should be one of ['train', 'test'].)\n"
        f"    expected: {KNOWN}"
    )


def test_missing_file_names_a_near_one(tmp_path: Path) -> None:
    write(tmp_path, "jsonl", ROWS)
    assert refused(DataSource(path=f"{tmp_path}/row.jsonl"), "data.val[0].source") == (
        "data.val[0].source: no such file\n"
        f"    got:      {tmp_path}/row.jsonl\n"
        f"    expected: {KNOWN}\n"
        f"    try:      {tmp_path}/rows.jsonl"
    )


def test_a_mistyped_path_is_a_missing_file_not_a_hub_name() -> None:
    assert refused(DataSource(path="no/such/folder/rows.parquet")) == (
        f"data.train: no such file\n    got:      no/such/folder/rows.parquet\n    expected: {KNOWN}"
    )


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("a")
    assert refused(DataSource(path=str(path))) == (
        f"data.train: unknown kind of file\n    got:      {path}\n    expected: .jsonl .json .parquet .csv"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", ""),
        ("a.jsonl", "\n \n"),
        ("a.json", ""),
        ("a.json", "[]"),
        ("a.csv", ""),
        ("a.csv", "prompt,answer\n"),
    ],
)
def test_empty_file(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert refused(DataSource(path=str(path))) == (
        f"data.train: {path}: no rows\n    got:      0 rows\n    expected: at least one row"
    )


@pytest.mark.parametrize(
    ("name", "content", "place", "got", "expected"),
    [
        (
            "a.jsonl",
            b'{"prompt": "a"}\n{"prompt": "b",\n{"prompt": "c"}\n',
            ", line 2: malformed",
            'Expecting property name enclosed in double quotes: line 1 column 16 (char 15) in \'{"prompt": "b",\'',
            "one JSON object per line",
        ),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n[1, 2]\n3\n"x"\nnull\n{]\n',
            ", line 2: malformed (and 4 more: line 3, line 4, line 5, …)",
            "a list: '[1, 2]'",
            "one JSON object per line",
        ),
        (
            "a.jsonl",
            '{"prompt": "é"}\n'.encode("latin-1"),
            ", line 1: malformed",
            "'utf-8' codec can't decode byte 0xe9 in position 12: invalid continuation byte"
            ' in \'{"prompt": "\ufffd"}\'',
            "one JSON object per line",
        ),
        (
            "a.json",
            b'[{"prompt": "a"},\n {"prompt":',
            ", line 2: malformed",
            "Expecting value: line 2 column 12 (char 29)",
            "a list of JSON objects, or one object per line",
        ),
        (
            "a.json",
            b'[{"prompt": "a"}, "b"]',
            ", row 2: malformed",
            "a str: '\"b\"'",
            "a list of JSON objects, or one object per line",
        ),
        (
            "a.csv",
            b"prompt,answer\na,1\nb\nc,2,3\n",
            ", row 2: malformed (and 1 more: row 3)",
            "1 cells under 2 headers: 'b'",
            "a header line, then as many cells in every row",
        ),
        (
            "a.parquet",
            b"not a parquet file",
            ": malformed",
            "Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file.",
            "a parquet file",
        ),
    ],
)
def test_malformed_file(name: str, content: bytes, place: str, got: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert refused(DataSource(path=str(path))) == (
        f"data.train: {path}{place}\n    got:      {got}\n    expected: {expected}"
    )


def test_a_line_that_would_blow_up_the_parser_is_malformed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n' + "[" * 100_000 + "\n")
    assert refused(DataSource(path=str(path))).startswith(f"data.train: {path}, line 2: malformed\n")


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", ROWS)
    assert refused(DataSource(path="")) == f"data.train.path: no path\n    got:      ''\n    expected: {KNOWN}"
    assert refused(DataSource(path=path, limit=0)) == (
        "data.train.limit\n    got:      0\n    expected: at least 1, or null for all rows"
    )
    assert refused(DataSource(path=path, system_prompt="Be brief.", chat="never")) == (
        "data.train.system_prompt: not used with chat: never\n"
        "    got:      both\n"
        "    try:      set data.train.chat to always, or write the text into data.train.template"
    )
    assert refused(DataSource(path=path, split="train")) == (
        f"data.train.split: only a hub dataset has one\n    got:      {path}\n    try:      remove data.train.split"
    )
