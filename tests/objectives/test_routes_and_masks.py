"""How a divergence reaches the gradient and what a masker's weights do to it, through a whole step, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from distillkit.betas.constant import Constant
from distillkit.components import Masker
from distillkit.divergences.sampled import K1, K2
from distillkit.maskers.group_level import GroupLevel
from distillkit.maskers.response_level import ResponseLevel
from distillkit.maskers.routed import Routed
from distillkit.objectives.grpo import GRPO
from distillkit.prepared import StepSettings
from tests.objectives.by_hand import advantages, run

PLAIN: dict[str, Any] = {"std": False, "aggregation": "token"}

ROUTES: dict[str, tuple[dict[str, Any], list[list[float]]]] = {
    # β·d reaches its own token
    "loss": ({"divergence": K2(), "settings": StepSettings()}, [[0.9, 1.2], [-1.1], [0.2], [0.2, -0.1]]),
    "advantage": (
        {"divergence": K1(), "settings": StepSettings(distill_through="advantage")},
        [[0.9, 1.2], [-1.1], [0.2], [0.2, -0.1]],
    ),
    # R + β·Σd is 2 + 0.1, 0 − 0.1 | 0.2, 0.1: every token of a rollout gets the same, minus the group's mean
    "reward, sum": (
        {"divergence": K1(), "settings": StepSettings(distill_through="reward", reward_shaping="sum")},
        [[1.1, 1.1], [-1.1], [0.05], [-0.05, -0.05]],
    ),
    # R + β·mean d is 2 + 0.05, 0 − 0.1 | 0.2, 0.05
    "reward, mean": (
        {"divergence": K1(), "settings": StepSettings(distill_through="reward", reward_shaping="mean")},
        [[1.075, 1.075], [-1.075], [0.075], [-0.075, -0.075]],
    ),
}


@pytest.mark.parametrize("route", ROUTES)
def test_each_route_by_hand(route: str) -> None:
    slots, want = ROUTES[route]
    (found,), _ = run(objective=GRPO(**PLAIN), **slots)
    for ours, theirs in zip(advantages(found), want, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize(
    ("shaping", "want"),
    [
        ("sum", [[1.05, 1.05], [-1.05], [0.05], [-0.05, -0.05]]),
        ("mean", [[1.05, 1.05], [-1.05], [0.075], [-0.075] * 2]),
    ],
)
def test_a_masked_rollout_is_shaped_by_nothing(shaping: Any, want: list[list[float]]) -> None:
    """response_level: the correct rollout keeps its reward of 2, the wrong ones get −0.1 | 0.2, 0.1 or 0.05."""
    settings = StepSettings(distill_through="reward", reward_shaping=shaping)
    (found,), _ = run(objective=GRPO(**PLAIN), divergence=K1(), masker=ResponseLevel(), settings=settings)
    for ours, theirs in zip(advantages(found), want, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_a_divergence_as_a_reward_is_rescaled_by_the_groups_std_and_a_loss_is_not() -> None:
    """In group B the shaped rewards are 0.2 and 0.1: divided by their std they weigh as much as any reward."""
    settings = StepSettings(distill_through="reward", reward_shaping="sum")
    (found,), _ = run(objective=GRPO(eps=0.0, correction=0), divergence=K1(), settings=settings)
    assert advantages(found)[2] == pytest.approx([1.0], abs=1e-5)
    assert advantages(found)[0] == pytest.approx([1.0, 1.0], abs=1e-5)
    (found,), _ = run(objective=GRPO(eps=0.0, correction=0), divergence=K2())
    assert advantages(found)[2] == pytest.approx([0.2], abs=1e-6)


# −∂loss/∂log π_θ of k2 alone is β·d times the token's coefficient: β = 0.2, d = −½ at a, +1 at b.
MASKS: dict[str, tuple[Masker, str, str, list[list[float]]]] = {
    # Eligible: six tokens, four rollouts, whatever the mask.
    "response, token, eligible": (
        ResponseLevel(), "token", "eligible", [[0, 0], [-0.1 / 6], [0.2 / 6], [0.2 / 6, -0.1 / 6]]
    ),
    "response, sequence, eligible": (
        ResponseLevel(), "sequence", "eligible", [[0, 0], [-0.1 / 4], [0.2 / 4], [0.2 / 8, -0.1 / 8]]
    ),
    "response, constant, eligible": (
        ResponseLevel(), "constant", "eligible", [[0, 0], [-0.1 / 16], [0.2 / 16], [0.2 / 16, -0.1 / 16]]
    ),
    # Kept: four tokens of three rollouts are left; the effective β of those rises.
    "response, token, kept": (
        ResponseLevel(), "token", "kept", [[0, 0], [-0.1 / 4], [0.2 / 4], [0.2 / 4, -0.1 / 4]]
    ),
    "response, sequence, kept": (
        ResponseLevel(), "sequence", "kept", [[0, 0], [-0.1 / 3], [0.2 / 3], [0.2 / 6, -0.1 / 6]]
    ),
    # The group of rollouts 2 and 3: three tokens.
    "group, token, eligible": (GroupLevel(), "token", "eligible", [[0, 0], [0], [0.2 / 6], [0.2 / 6, -0.1 / 6]]),
    "group, token, kept": (GroupLevel(), "token", "kept", [[0, 0], [0], [0.2 / 3], [0.2 / 3, -0.1 / 3]]),
    "group, sequence, kept": (GroupLevel(), "sequence", "kept", [[0, 0], [0], [0.2 / 2], [0.2 / 4, -0.1 / 4]]),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_weights_of_a_masked_divergence_by_hand(name: str) -> None:
    masker, aggregation, normalize, want = MASKS[name]
    settings = StepSettings(distil_aggregation=aggregation, normalize=normalize)  # type: ignore[arg-type]
    (found,), _ = run(divergence=K2(), masker=masker, settings=settings)
    for text, row in zip(("ab", "a", "b", "ba"), want, strict=True):
        assert [-g for g in found.get(text, [0.0] * len(row))] == pytest.approx(row, abs=1e-7)


def test_routing_normalises_each_term_over_its_own_tokens_when_asked() -> None:
    """Kept: the policy term has the two tokens of the correct response, the distillation the other four."""
    slots: dict[str, Any] = {"objective": GRPO(**PLAIN), "divergence": K2(), "masker": Routed()}
    (eligible,), _ = run(**slots)
    assert [-g for g in eligible["ab"]] == pytest.approx([1 / 6, 1 / 6])
    assert [-g for g in eligible["ba"]] == pytest.approx([0.2 / 6, -0.1 / 6])
    (kept,), _ = run(settings=StepSettings(normalize="kept"), **slots)
    assert [-g for g in kept["ab"]] == pytest.approx([1 / 2, 1 / 2])
    assert [-g for g in kept["ba"]] == pytest.approx([0.2 / 4, -0.1 / 4])


NOTHING_TO_TEACH: dict[str, dict[str, Any]] = {
    "response_level, all correct": {"masker": ResponseLevel(), "correct": (True, True, True, True)},
    "group_level, one correct in each group": {"masker": GroupLevel(), "correct": (True, False, True, False)},
    "routed, all correct": {"masker": Routed(), "correct": (True, True, True, True)},
    "β is 0": {"masker": ResponseLevel(), "beta": Constant(value=0.0)},
}


NO_PULL = [
    (case, route)
    for case, slots in NOTHING_TO_TEACH.items()
    for route in ("loss", "advantage", "reward")
    if route in slots["masker"].allowed_through
]


@pytest.mark.parametrize(("case", "route"), NO_PULL)
@pytest.mark.parametrize("normalize", ["eligible", "kept"])
def test_an_effective_beta_of_zero_leaves_the_policys_gradient(case: str, normalize: Any, route: Any) -> None:
    """A mask that keeps nothing makes no 0/0 and no stray pull: what is done is what GRPO does without a teacher.

    With all correct that is nothing at all.
    """
    slots, divergence = NOTHING_TO_TEACH[case], K2() if route == "loss" else K1()
    settings = StepSettings(normalize=normalize, distill_through=route)
    ours, output = run(objective=GRPO(**PLAIN), divergence=divergence, settings=settings, **slots)
    theirs, _ = run(objective=GRPO(**PLAIN), correct=slots.get("correct", (True, False, False, False)))
    assert len(ours) == len(theirs) == output.updates == ("all correct" not in case)
    for our, their in zip(ours, theirs, strict=True):
        for mine, plain in zip(advantages(our), advantages(their), strict=True):
            assert mine == pytest.approx(plain, abs=1e-6)
    assert output.skipped == 0


def test_masking_does_not_raise_the_effective_beta_of_what_is_left() -> None:
    (whole,), _ = run(divergence=K2())
    (masked,), _ = run(divergence=K2(), masker=ResponseLevel())
    assert masked["ba"] == pytest.approx(whole["ba"]) and "ab" not in masked
    (kept,), _ = run(divergence=K2(), masker=ResponseLevel(), settings=StepSettings(normalize="kept"))
    assert kept["ba"] == pytest.approx([g * 6 / 4 for g in whole["ba"]])
