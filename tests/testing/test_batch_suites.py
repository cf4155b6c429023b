"""The masker and objective suites must fail parts broken on purpose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distillkit.components import Masker, PolicyObjective
from distillkit.objectives.grpo import GRPO
from distillkit.objectives.trrd import TRRD
from distillkit.testing import check
from distillkit.types import (
    WRONG,
    RewardOutput,
    RolloutBatch,
    ScoreRequest,
    StudentScores,
    TeacherScores,
    TokenWeights,
)
from tests.testing.broken import finds


class Wrong(Masker):
    """Distils wrong responses: a plain masker that the broken ones vary."""

    def __call__(
        self, rollouts: RolloutBatch, rewards: RewardOutput | None, scores: TeacherScores | None
    ) -> TokenWeights:
        assert rewards is not None
        ones = torch.ones(rollouts.tokens.shape)
        return self.change(TokenWeights(policy=ones, distil=ones * (rewards.correct == WRONG).unsqueeze(1)), rollouts)

    def change(self, weights: TokenWeights, rollouts: RolloutBatch) -> TokenWeights:
        return weights


class Entropic(Wrong):
    """Distils where the teacher is sure."""

    needs = ScoreRequest(entropy=True)

    def __call__(
        self, rollouts: RolloutBatch, rewards: RewardOutput | None, scores: TeacherScores | None
    ) -> TokenWeights:
        assert scores is not None and scores.entropy is not None
        ones = torch.ones(rollouts.tokens.shape)
        return TokenWeights(policy=ones, distil=(scores.entropy < 4.0).float())


class PerRollout(Wrong):
    def change(self, weights: TokenWeights, rollouts: RolloutBatch) -> TokenWeights:
        return replace(weights, distil=weights.distil[:, 0])


class Bools(Wrong):
    def change(self, weights: TokenWeights, rollouts: RolloutBatch) -> TokenWeights:
        return replace(weights, distil=weights.distil.bool())


class Negative(Wrong):
    def change(self, weights: TokenWeights, rollouts: RolloutBatch) -> TokenWeights:
        return replace(weights, policy=weights.policy - 2)


class WithGradient(Wrong):
    def change(self, weights: TokenWeights, rollouts: RolloutBatch) -> TokenWeights:
        return replace(weights, policy=weights.policy.requires_grad_())


class FirstHalf(Wrong):
    def change(self, weights: TokenWeights, rollouts: RolloutBatch) -> TokenWeights:
        rows = torch.arange(len(rollouts)).unsqueeze(1) < len(rollouts) // 2
        return replace(weights, distil=weights.distil * rows)


class ByLength(Wrong):
    def change(self, weights: TokenWeights, rollouts: RolloutBatch) -> TokenWeights:
        return replace(weights, policy=weights.policy / rollouts.tokens.shape[1])


class ByGroupNumber(Wrong):
    def change(self, weights: TokenWeights, rollouts: RolloutBatch) -> TokenWeights:
        return replace(weights, distil=weights.distil * (rollouts.group_id % 2 == 0).unsqueeze(1))


class ByRewardZero(Wrong):
    def __call__(
        self, rollouts: RolloutBatch, rewards: RewardOutput | None, scores: TeacherScores | None
    ) -> TokenWeights:
        assert rewards is not None
        ones = torch.ones(rollouts.tokens.shape)
        return TokenWeights(policy=ones, distil=ones * (rewards.total == 0).unsqueeze(1))


class EditsRewards(Wrong):
    def __call__(
        self, rollouts: RolloutBatch, rewards: RewardOutput | None, scores: TeacherScores | None
    ) -> TokenWeights:
        assert rewards is not None
        rewards.correct.clamp_(min=0)
        return super().__call__(rollouts, rewards, scores)


class Pair(Wrong):
    def __call__(
        self, rollouts: RolloutBatch, rewards: RewardOutput | None, scores: TeacherScores | None
    ) -> TokenWeights:
        weights = super().__call__(rollouts, rewards, scores)
        return (weights.policy, weights.distil)  # type: ignore[return-value]


class UndeclaredNeeds(Entropic):
    needs = ScoreRequest()


@pytest.mark.parametrize("part", [Wrong(), Entropic()], ids=lambda p: type(p).__name__)
def test_sound_maskers_pass(part: Masker) -> None:
    check(part)


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (PerRollout(), "TokenWeights.distil is torch.float32 [12], not [N, L]"),
        (Bools(), "TokenWeights.distil is torch.bool [12, 11], not float32"),
        (Negative(), "TokenWeights.policy is not >= 0"),
        (WithGradient(), "TokenWeights.policy carries gradient"),
        (FirstHalf(), "a factor depends on the place of the rollout in the batch"),
        (ByLength(), "a factor depends on the padding"),
        (ByGroupNumber(), "a factor depends on the number of a group"),
        (ByRewardZero(), "a factor depends on the reward's value where correctness is the same"),
        (EditsRewards(), "edits its input RewardOutput.correct in place"),
        (Pair(), "returns tuple, not TokenWeights"),
        (UndeclaredNeeds(), "cannot be called with what it needs: AssertionError"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Masker) else "",
)
def test_broken_maskers_are_found(part: Masker, text: str) -> None:
    finds(part, text)


class StrideGroups(GRPO):
    """Groups by position: what breaks as soon as rollouts arrive in another order."""

    def advantages(self, rollouts: RolloutBatch, rewards: RewardOutput, scores: TeacherScores | None) -> Tensor:
        strided = replace(rollouts, group_id=torch.arange(len(rollouts)) // 4)
        return super().advantages(strided, rewards, scores)


class NanAdvantages(GRPO):
    def advantages(self, rollouts: RolloutBatch, rewards: RewardOutput, scores: TeacherScores | None) -> Tensor:
        return torch.where(rollouts.loss_mask, rewards.total.unsqueeze(1), 0.0)


class FailedIsZero(GRPO):
    def advantages(self, rollouts: RolloutBatch, rewards: RewardOutput, scores: TeacherScores | None) -> Tensor:
        filled = rewards.values.nan_to_num(0.0)
        status = tuple(tuple("scored" for _ in s) for s in rewards.status)
        return super().advantages(rollouts, replace(rewards, values=filled, status=status), scores)


class OnPrompt(GRPO):
    def advantages(self, rollouts: RolloutBatch, rewards: RewardOutput, scores: TeacherScores | None) -> Tensor:
        whole = replace(rollouts, loss_mask=rollouts.attention_mask)
        return super().advantages(whole, rewards, scores)


class LengthBias(GRPO):
    def advantages(self, rollouts: RolloutBatch, rewards: RewardOutput, scores: TeacherScores | None) -> Tensor:
        return super().advantages(rollouts, rewards, scores) / rollouts.tokens.shape[1]


class MergesSmallNumbers(GRPO):
    def advantages(self, rollouts: RolloutBatch, rewards: RewardOutput, scores: TeacherScores | None) -> Tensor:
        odd = replace(rollouts, group_id=rollouts.group_id.clamp(min=10))
        return super().advantages(odd, rewards, scores)


class PerRolloutAdvantages(GRPO):
    def advantages(self, rollouts: RolloutBatch, rewards: RewardOutput, scores: TeacherScores | None) -> Tensor:
        return super().advantages(rollouts, rewards, scores).amax(dim=1)


class LiveAdvantages(GRPO):
    def advantages(self, rollouts: RolloutBatch, rewards: RewardOutput, scores: TeacherScores | None) -> Tensor:
        return super().advantages(rollouts, rewards, scores).requires_grad_()


class NothingToLearn(GRPO):
    def advantages(self, rollouts: RolloutBatch, rewards: RewardOutput, scores: TeacherScores | None) -> Tensor:
        return torch.zeros(rollouts.tokens.shape)


class VaryLoss(GRPO):
    """GRPO whose loss the broken ones vary."""

    def loss(
        self, student: StudentScores, old_logprobs: Tensor, scores: TeacherScores | None, advantages: Tensor
    ) -> Tensor:
        return self.change(super().loss(student, old_logprobs, scores, advantages), student)

    def change(self, loss: Tensor, student: StudentScores) -> Tensor:
        return loss


class Reduced(VaryLoss):
    def change(self, loss: Tensor, student: StudentScores) -> Tensor:
        return loss.mean()


class DetachedLoss(VaryLoss):
    def change(self, loss: Tensor, student: StudentScores) -> Tensor:
        return loss.detach()


class Maximised(VaryLoss):
    def change(self, loss: Tensor, student: StudentScores) -> Tensor:
        return -loss


class DividedByMicroBatch(VaryLoss):
    def change(self, loss: Tensor, student: StudentScores) -> Tensor:
        return loss / student.loss_mask.sum()


class PaddingBias(VaryLoss):
    def change(self, loss: Tensor, student: StudentScores) -> Tensor:
        return loss / loss.shape[1]


class HiddenBonus(VaryLoss):
    def change(self, loss: Tensor, student: StudentScores) -> Tensor:
        return loss + 0.1 * student.logprobs


class OffMask(VaryLoss):
    def change(self, loss: Tensor, student: StudentScores) -> Tensor:
        return loss + student.logprobs * (~student.loss_mask)


class Infinite(VaryLoss):
    def change(self, loss: Tensor, student: StudentScores) -> Tensor:
        return loss / loss.new_zeros(())


class ByRow(VaryLoss):
    def change(self, loss: Tensor, student: StudentScores) -> Tensor:
        return loss * torch.arange(1, len(loss) + 1).unsqueeze(1)


class LeaksIntoOld(GRPO):
    def log_ratio(self, student: StudentScores, old_logprobs: Tensor, scores: TeacherScores | None) -> Tensor:
        return student.logprobs - old_logprobs


class LeaksIntoTeacher(TRRD):
    def log_ratio(self, student: StudentScores, old_logprobs: Tensor, scores: TeacherScores | None) -> Tensor:
        assert scores is not None and scores.sampled is not None
        leak = torch.where(scores.valid, scores.sampled, 0.0)
        return super().log_ratio(student, old_logprobs, scores) - 0.1 * (leak - leak.detach())


class EditsAdvantages(GRPO):
    def loss(
        self, student: StudentScores, old_logprobs: Tensor, scores: TeacherScores | None, advantages: Tensor
    ) -> Tensor:
        return super().loss(student, old_logprobs, scores, advantages.clamp_(max=0.1))


class NoSuchAggregation(GRPO):
    def __init__(self) -> None:
        super().__init__()
        self.aggregation = "batchmean"  # type: ignore[assignment]


class ScalarDiagnostics(GRPO):
    def diagnostics(
        self, student: StudentScores, old_logprobs: Tensor, scores: TeacherScores | None, advantages: Tensor
    ) -> Mapping[str, Tensor]:
        return {"ratio": (student.logprobs - old_logprobs).exp().mean()}


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (StrideGroups(), "an advantage depends on the place of the rollout in the batch"),
        (NanAdvantages(), "advantages are not finite"),
        (FailedIsZero(), "a rollout that was not scored has an advantage"),
        (OnPrompt(), "advantages are not 0 off loss_mask"),
        (LengthBias(), "an advantage depends on the padding"),
        (MergesSmallNumbers(), "an advantage depends on the number of a group"),
        (PerRolloutAdvantages(), "advantages are [12], not [N, L]"),
        (LiveAdvantages(), "advantages carry gradient"),
        (NothingToLearn(), "every advantage is 0, with rewards that differ"),
        (Reduced(), "loss is [], not [n, L]"),
        (DetachedLoss(), "no gradient reaches the student's log-probs"),
        (Maximised(), "descending the loss does not raise the log-probs of tokens with a positive advantage"),
        (DividedByMicroBatch(), "a loss depends on the other rollouts of its micro-batch"),
        (PaddingBias(), "a loss depends on the padding"),
        (HiddenBonus(), "a rollout of advantage 0 has a gradient"),
        (OffMask(), "gradient reaches positions off loss_mask"),
        (Infinite(), "loss is not finite"),
        (ByRow(), "a loss depends on the place of the rollout in the batch"),
        (LeaksIntoOld(), "gradient flows into the old log-probs"),
        (LeaksIntoTeacher(), "gradient flows into the teacher's scores"),
        (EditsAdvantages(), "edits its input tensor in place"),
        (NoSuchAggregation(), "aggregation is 'batchmean'"),
        (ScalarDiagnostics(), "diagnostics['ratio'] is [], not [n, L]"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, PolicyObjective) else "",
)
def test_broken_objectives_are_found(part: PolicyObjective, text: str) -> None:
    finds(part, text)
