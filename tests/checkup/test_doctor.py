"""`distillkit doctor`: a healthy recipe passes, and each thing broken on purpose is found by its own line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distillkit.checkup import memory as memory_check
from distillkit.cli.main import main
from distillkit.embedded import resolve
from distillkit.models import load_causal_lm
from tests import toy

QUICK = ["--config", "quickstart"]
BROKEN = "tests.checkup.broken"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the doctor; return the exit code and name -> (verdict, whole line)."""

    def run(*words: str) -> tuple[int, dict[str, tuple[str, str]]]:
        code = main(["doctor", *words])
        out = capsys.readouterr().out
        lines = out.splitlines()[:-1]
        assert out.splitlines()[-1].endswith(" fail")
        return code, {line[6:].split(":")[0]: (line[:4], line) for line in lines}

    return run


def teacher(name: str, path: str = "embedded:teacher") -> list[str]:
    return [f"--model.teacher.class_path={BROKEN}.{name}", f"--model.teacher.init_args.path={path}"]


def failed(found: dict[str, tuple[str, str]]) -> set[str]:
    return {name for name, (verdict, _) in found.items() if verdict == "fail"}


def test_a_healthy_recipe_passes_every_check(doctor: Any) -> None:
    code, found = doctor(*QUICK)
    assert code == 0
    assert list(found) == [
        "memory",
        "vocabulary",
        "end token and template",
        "teacher",
        "student as its own teacher",
        "verifier",
        "engine",
    ]
    assert {verdict for verdict, _ in found.values()} == {"pass"}
    assert "the gold of 10 of 10 rows is right" in found["verifier"][1]
    assert list(Path().iterdir()) == [], "a doctor writes nothing"


@pytest.mark.parametrize("divergence", ["k3", "reverse_kl", "jsd", "topk"])
def test_every_kind_of_divergence_is_near_nothing_between_equals(divergence: str, doctor: Any) -> None:
    code, found = doctor(*QUICK, "--model.divergence", divergence)
    assert code == 0, found
    assert found["student as its own teacher"][0] == "pass"


def test_a_teacher_with_other_token_ids_is_found(tmp_path: Path, doctor: Any) -> None:
    load_causal_lm("embedded:teacher", where="test").save_pretrained(tmp_path / "other")
    toy.tokenizer().save_pretrained(tmp_path / "other")
    code, found = doctor(*QUICK, "--model.teacher.path", str(tmp_path / "other"))
    assert code == 1 and {"vocabulary", "teacher"} <= failed(found)
    assert "tokens differ, the first is" in found["vocabulary"][1]
    assert found["engine"][0] == "pass", "the others go on"


def test_a_head_that_is_too_small_for_the_tokenizer_is_found(tmp_path: Path, doctor: Any) -> None:
    toy.model(vocabulary=17).save_pretrained(tmp_path / "small")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(resolve("embedded:student")).save_pretrained(tmp_path / "small")
    code, found = doctor(*QUICK, "--model.student", str(tmp_path / "small"))
    assert code == 1
    assert found["vocabulary"][0] == "fail" and "17 in the student's head" in found["vocabulary"][1]


def test_a_teacher_with_another_template_is_refused_or_tolerated(tmp_path: Path, doctor: Any) -> None:
    from transformers import AutoTokenizer

    load_causal_lm("embedded:teacher", where="test").save_pretrained(tmp_path / "chatty")
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded:teacher"))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "chatty")
    words = [*QUICK, "--model.teacher.path", str(tmp_path / "chatty")]
    code, found = doctor(*words)
    assert code == 1 and "model.teacher.tolerate: [chat_template]" in found["end token and template"][1]
    code, found = doctor(*words, "--model.teacher.tolerate", '["chat_template"]')
    assert code == 0 and found["end token and template"][0] == "warn"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("NaNTeacher", "are NaN or infinite"),
        ("DiceTeacher", "asked twice they differ by"),
        ("BrokenTeacher", "KeyboardInterrupt: a library's own interrupt"),
    ],
)
def test_a_teacher_that_is_broken_is_found_and_the_others_go_on(name: str, said: str, doctor: Any) -> None:
    code, found = doctor(*QUICK, *teacher(name))
    assert code == 1 and failed(found) == {"teacher"}
    assert said in found["teacher"][1]


def test_a_teacher_that_hangs_is_left_behind(doctor: Any) -> None:
    code, found = doctor(*QUICK, *teacher("HungTeacher"), "--timeout", "15")
    assert code == 1 and failed(found) == {"teacher"}
    assert found["teacher"][1] == "fail  teacher: no answer within 15 s; try: a larger --timeout"


def test_a_verifier_that_rejects_its_own_gold_is_found(doctor: Any) -> None:
    reward = json.dumps([{"class_path": f"{BROKEN}.StrictAnswer", "init_args": {"after": ">"}}])
    code, found = doctor(*QUICK, f"--model.rewards={reward}")
    assert code == 1 and failed(found) == {"verifier"}
    assert "the gold of 0 of 10 rows is right; StrictAnswer rejects" in found["verifier"][1]


def test_gold_that_is_not_there_is_found(doctor: Any) -> None:
    code, found = doctor(*QUICK, '--model.rewards=[{"name": "answer", "answer": "solution"}]')
    assert code == 1 and failed(found) == {"verifier"}
    assert "no column 'solution'" in found["verifier"][1] and "data.train.columns" in found["verifier"][1]


def test_rewards_without_gold_only_warn(doctor: Any) -> None:
    code, found = doctor(*QUICK, "--model.rewards", '["length"]')
    assert code == 0 and found["verifier"][0] == "warn"


def test_data_that_cannot_be_read_is_one_line(doctor: Any) -> None:
    code, found = doctor(*QUICK, "--data.train.path", "nowhere.jsonl")
    assert code == 1 and failed(found) == {"verifier"}
    assert "no such file" in found["verifier"][1]


@pytest.mark.parametrize(
    ("name", "said"),
    [("StaleSampler", "the weights did not arrive"), ("HotSampler", "another model.sampler")],
)
def test_an_engine_that_is_not_the_trainer_is_found(name: str, said: str, doctor: Any) -> None:
    code, found = doctor(*QUICK, f"--model.sampler.class_path={BROKEN}.{name}")
    assert code == 1 and failed(found) == {"engine"}
    assert said in found["engine"][1]


def test_a_student_with_adapters_is_looked_at_with_them(doctor: Any) -> None:
    pytest.importorskip("peft", reason="adapters need peft")
    more = ["--model.reference", "adapter_off", "--model.reference_divergence", "k3", "--model.reference_beta", "0.1"]
    code, found = doctor(*QUICK, "--model.lora.rank", "4", *more)
    assert code == 0 and found["reference"][0] == found["engine"][0] == "pass"
    code, found = doctor(*QUICK, "--model.lora.rank", "4", f"--model.sampler.class_path={BROKEN}.StaleSampler")
    assert code == 1 and failed(found) == {"engine"}


def test_too_little_memory_is_found_before_any_model_is_loaded(monkeypatch: pytest.MonkeyPatch, doctor: Any) -> None:
    monkeypatch.setattr(memory_check, "free_memory", lambda device: 2**20)
    code, found = doctor(*QUICK)
    assert code == 1 and {"memory", "teacher", "student as its own teacher", "engine"} == failed(found)
    assert "0.0 GiB free; try: distillkit plan" in found["memory"][1]
    assert "the models would not fit" in found["teacher"][1]


def test_memory_that_is_nearly_used_up_is_a_warning(monkeypatch: pytest.MonkeyPatch, doctor: Any) -> None:
    _, found = doctor(*QUICK)
    planned = float(found["memory"][1].split(" GiB planned")[0].split()[-1])
    monkeypatch.setattr(memory_check, "free_memory", lambda device: int(planned * 1.05 * 2**30))
    code, found = doctor(*QUICK)
    assert code == 0 and found["memory"][0] == "warn"


def test_a_config_that_cannot_run_is_refused_as_by_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *QUICK, "--model.divergence", "k9"]) == 2
    assert "model.divergence: unknown divergence" in capsys.readouterr().err
    assert main(["doctor"]) == 2
    assert "distillkit doctor: of which config?" in capsys.readouterr().err


def test_json_has_a_row_for_each_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *QUICK, "--model.teacher", "null", "--model.divergence", "null", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["verdict"] for row in rows] == ["pass"] * 5
    assert set(rows[0]) == {"name", "verdict", "text", "advice"}
