"""`distillkit plan`: every shipped recipe, every strategy, and what it says when something is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config

from distillkit.cli.main import main
from distillkit.cli.shipped import recipes

BIG = ["--config", "papers/rlad/math_8b_base", "--gpus", "8", "--gpu-memory", "80"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str) -> dict[str, Any]:
        assert main(["plan", *words, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def most(found: dict[str, Any]) -> float:
    return max(phase["sum"] for phase in found["memory_bytes"].values()) / 2**30


NEEDS_STUDENT = ("gsm8k", "knights_and_knaves", "sft_gsm8k")
AFTER_ANOTHER = ("small/zero_rl", "small/sft_then_rl")
"""Their student is what another run left."""


@pytest.mark.parametrize("recipe", recipes())
def test_every_shipped_recipe_has_a_plan_without_a_network(recipe: str, plan: Any) -> None:
    student = ["--model.student", "Qwen/Qwen3-0.6B"] if recipe in NEEDS_STUDENT else []
    if recipe in AFTER_ANOTHER:
        student = ["--student-config", "embedded:student"]
    found = plan("--config", recipe, "--gpus", "4", "--gpu-memory", "141", *student)
    assert found["seconds"]["step"] > 0 and {"update", "optimizer"} <= set(found["memory_bytes"])
    fits = all(phase["sum"] <= found["limit_bytes"] for phase in found["memory_bytes"].values())
    assert found["fits"] == fits
    assert fits or recipe.startswith("papers/"), "a small recipe fits anywhere"
    assert list(Path().iterdir()) == [], "a plan writes nothing"


def test_the_text_has_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *BIG, "--trainer.strategy", "deepspeed_stage_3"]) == 0
    out = capsys.readouterr().out
    for said in (
        "papers-rlad-math_8b_base: 8 GPUs (h100) of 80 GiB, deepspeed_stage_3, bf16-mixed",
        "Qwen/Qwen3-8B-Base: 8.19 B parameters, 36 layers",
        "Qwen/Qwen3-32B: 32.76 B parameters, on every rank",
        "memory of a rank, GiB",
        "does not fit in 76.0 of 80.0 GiB: rollout, teacher",
        "time of a step, s",
        "micro-batch       none: not even one rollout of 32,768 tokens",
        "989 TFLOP/s, 3350 GB/s of memory, 450 GB/s between ranks: NVIDIA H100 data sheet, SXM",
        "40% of the FLOP/s",
    ):
        assert said in out


def test_strategies_share_what_they_say_they_share(plan: Any) -> None:
    def parts(strategy: str, phase: str = "optimizer") -> dict[str, float]:
        found = plan(*BIG, "--model.teacher", "null", "--model.objective", "grpo", "--trainer.strategy", strategy)
        return {name: size / 2**30 for name, size in found["memory_bytes"][phase].items()}

    whole = 8.190735360e9 * 4 / 2**30
    ddp, fsdp2, zero2, zero3 = (parts(name) for name in ("ddp", "fsdp2", "deepspeed", "deepspeed_stage_3"))
    assert [ddp[k] for k in ("weights", "gradients", "communication")] == pytest.approx([whole] * 3)
    assert ddp["optimizer"] == pytest.approx(2 * whole)
    assert [fsdp2[k] for k in ("weights", "gradients")] == pytest.approx([whole / 8] * 2)
    assert fsdp2["optimizer"] == pytest.approx(2 * whole / 8)
    # bfloat16 weights, and a float32 copy beside the two moments
    assert [zero2["weights"], zero2["gradients"]] == pytest.approx([whole / 2, whole / 16])
    assert zero2["optimizer"] == zero3["optimizer"] == pytest.approx(3 * whole / 8)
    assert zero3["weights"] == pytest.approx(whole / 16)
    assert parts("fsdp2", "rollout")["gathered weights"] == pytest.approx(whole)
    assert parts("deepspeed_stage_3", "rollout")["gathered weights"] == pytest.approx(whole / 2)


def test_a_teacher_on_servers_takes_gpus_and_no_memory_of_the_ranks(plan: Any) -> None:
    urls = [
        "--model.teacher",
        "vllm",
        "--model.teacher.path",
        "Qwen/Qwen3-32B",
        "--model.teacher.urls",
        '["http://n:1"]',
    ]
    found = plan(*BIG, *urls, "--trainer.strategy", "fsdp2", "--teacher-gpus", "4")
    assert found["ranks"] == 4 and "teacher" not in found["memory_bytes"]["update"]
    assert found["servers"] == ["teacher on 4 GPUs: 2 × tensor parallel 2, 30.5 GiB of weights on each"]
    assert plan(*BIG, *urls, "--trainer.strategy", "fsdp2")["ranks"] == 6, "one server where nothing is said"
    local = plan(*BIG, "--trainer.strategy", "fsdp2")
    assert found["seconds"]["teacher"] == pytest.approx(2 * local["seconds"]["teacher"])
    assert main(["plan", *BIG[:2], "--gpus", "2", "--gpu-memory", "80", *urls]) == 2


def test_adapters_take_no_optimizer_for_the_rest_and_their_base_no_second_copy(plan: Any) -> None:
    words = [*BIG, "--model.teacher", "null", "--model.objective", "grpo", "--trainer.strategy", "ddp"]
    whole, adapters = plan(*words), plan(*words, "--model.lora.rank", "16")
    parts = adapters["memory_bytes"]["optimizer"]
    assert parts["weights"] == whole["memory_bytes"]["optimizer"]["weights"]
    trained = 36 * 16 * ((4096 + 4096) + (4096 + 1024))  # q_proj and v_proj
    assert parts["optimizer"] == pytest.approx(8 * trained) and parts["gradients"] == pytest.approx(4 * trained)
    more = ["--model.reference", "adapter_off", "--model.reference_divergence", "k3", "--model.reference_beta", "0.1"]
    based = plan(*words, "--model.lora.rank", "16", *more)
    assert "reference" not in based["memory_bytes"]["update"] and based["seconds"]["reference"] > 0


def test_settings_move_memory_as_they_should(plan: Any) -> None:
    tiny = ["--config", "quickstart", "--gpus", "1", "--gpu-memory", "4", "--trainer.accelerator", "cpu"]
    big = ["--student-config", "Qwen/Qwen3-0.6B", "--model.teacher", "null", "--model.divergence", "null"]
    base = plan(*tiny, *big)
    assert most(plan(*tiny, *big, "--model.dtype", "bfloat16")) < most(base)
    assert most(plan(*tiny, *big, "--model.gradient_checkpointing", "true")) < most(base)
    assert most(plan(*tiny, *big, "--model.head_chunk", "100000")) > most(base)  # by default it is not what counts
    assert most(plan(*tiny, *big, "--model.optimizer.class_path", "torch.optim.SGD")) < most(base)
    assert most(plan(*tiny, *big, "--model.tokens_per_micro_batch", "1024")) < most(base)
    long = plan(*tiny, *big, "--model.sampler.max_new_tokens", "480")
    assert long["memory_bytes"]["rollout"]["KV cache"] > 1.5 * base["memory_bytes"]["rollout"]["KV cache"]
    engine = plan(*tiny, *big, "--model.sampler", "vllm", "--model.sampler.kv_cache_gib", "2.5")
    assert engine["memory_bytes"]["update"]["KV cache"] == 2.5 * 2**30
    assert engine["memory_bytes"]["update"]["engine weights"] > 2e9


def test_what_is_said_to_fit_fits_and_the_next_does_not(plan: Any) -> None:
    words = ["--config", "papers/rlad/logic_0_6b_grpo", "--gpus", "8", "--gpu-memory", "40"]
    found = plan(*words)["largest"]
    tokens, rows = found["tokens_per_micro_batch"], found["rows"]
    longest = 8192 + 2048

    def fits(name: str, value: int, phase: str) -> bool:
        changed = plan(*words, f"--model.{name}", str(value))
        return bool(changed["memory_bytes"][phase]["sum"] <= changed["limit_bytes"])

    assert fits("tokens_per_micro_batch", tokens, "update")
    assert not fits("tokens_per_micro_batch", tokens + longest, "update")
    assert fits("sampler.rows_per_batch", rows, "rollout") and not fits("sampler.rows_per_batch", rows + 1, "rollout")


def test_more_gpus_take_less_time_and_rates_are_arguments(plan: Any) -> None:
    one, many = (plan(*BIG[:2], "--gpu-memory", "80", "--gpus", n)["seconds"] for n in ("8", "64"))
    assert many["teacher"] == pytest.approx(one["teacher"] / 8)
    own = plan(*BIG, "--gpu-tflops", "98.9", "--mfu", "0.4")["seconds"]
    assert own["teacher"] == pytest.approx(10 * one["teacher"])
    # 2 FLOPs a parameter (the embedding table is only read) and attention over half the tokens, at 40 %.
    tokens, mean = 256 * 8 * 17_408 / 8, 17_408
    flops = tokens * (2 * (32.762123264e9 - 151_936 * 5120) + 2 * 64 * 128 * mean * 64)
    assert one["teacher"] == pytest.approx(flops / (0.4 * 989e12))


@pytest.mark.parametrize("cache_gib", [1, 70], ids=["sampling takes longer", "the rest takes longer"])
def test_rollouts_sampled_ahead_hide_the_shorter_part(cache_gib: int, plan: Any) -> None:
    sampler = ["--model.sampler", "vllm_server", "--model.sampler.kv_cache_gib", str(cache_gib), "--sampler-gpus", "6"]
    words = [*BIG, *sampler, "--trainer.strategy", "fsdp2"]
    found, ahead = (plan(*words, "--model.one_step_off", flag)["seconds"] for flag in ("false", "true"))
    rest = sum(found[name] for name in found if name not in ("sync", "rollout", "step", "reward"))
    assert (found["rollout"] > rest) == (cache_gib == 1)
    assert found["step"] == pytest.approx(found["sync"] + found["rollout"] + rest)
    assert ahead["step"] == pytest.approx(found["sync"] + max(found["rollout"], rest))
    assert {k: v for k, v in ahead.items() if k != "step"} == {k: v for k, v in found.items() if k != "step"}


def test_a_config_file_or_folder_stands_for_a_model(tmp_path: Path, plan: Any) -> None:
    Qwen3Config(num_hidden_layers=2, vocab_size=512, hidden_size=64).save_pretrained(tmp_path / "shape")
    words = ["--config", "quickstart", "--gpus", "1", "--gpu-memory", "8", "--model.student", "nobody/has-this"]
    for source in (tmp_path / "shape", tmp_path / "shape" / "config.json"):
        found = plan(*words, "--student-config", str(source))
        assert found["models"]["student"]["name"] == "nobody/has-this"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "quickstart", "--gpus", "0", "--gpu-memory", "8"], "--gpus\n    got:      0"),
        (["--gpus", "1", "--gpu-memory", "8"], "distillkit plan: of which config?"),
        (["--config", "quicksatrt", "--gpus", "1", "--gpu-memory", "8"], "--config quickstart"),
        (
            ["--config", "quickstart", "--gpus", "1", "--gpu-memory", "8", "--trainer.strategy", "xla"],
            "trainer.strategy: no plan for it",
        ),
        (
            ["--config", "quickstart", "--gpus", "1", "--gpu-memory", "8", "--student-config", "./nowhere"],
            "--student-config FOLDER_OR_CONFIG_JSON",
        ),
    ],
)
def test_what_cannot_be_planned_is_said(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err
