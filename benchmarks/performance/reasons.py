"""Why a phase takes longer than its floor: by "case method phase", "case phase" or "phase". See the table of kinds."""

from __future__ import annotations

REASONS = {
    "rollout": (
        "one token per row and call: products of as many rows as rollouts are alive read every weight for little work, "
        "and half of the time is some hundred small operations per token and what is between them"
    ),
    "vocab rollout": "the head's 156 MB are read from memory for every token, for 16 rollouts at a time",
    "long rollout": (
        "attention of one token is a product of one row with the 512 to 640 keys, and the values, of every rollout: it "
        "reads the caches, and computes little"
    ),
    "teacher": "products take little more than the floor; the rest is element-wise work, attention and copies",
    "vocab teacher": "the head in tiles of 1,024 columns: an exponential of every logit, and sums, beside its product",
    "vocab distil teacher": "less than the floor: the teacher's head is in the update",
    "update": (
        "products take 1.1 to 1.3 times the floor; the rest is norms, activations, attention and copies, forward and "
        "backward, and clipping and the optimizer, which are in no floor"
    ),
    "vocab update": (
        "the logits are computed twice, forward and backward, and the floor has them once; an exponential of each both "
        "times, and the optimizer over 42 M weights"
    ),
    "vocab distil update": (
        "as for GRPO; and two products with the teacher's head, one of which is in the teacher's floor, and its "
        "exponentials"
    ),
    "step": "the phases, and rewards, data and logging",
}
