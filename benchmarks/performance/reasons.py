"""Why a phase takes longer than its floor: by "case phase", else by "phase". The shares are in the table of kinds."""

from __future__ import annotations

REASONS = {
    "rollout": (
        "one new token per row and call: products of as many rows as rollouts are alive, and some hundred small "
        "operations per token whose dispatch alone costs more than their work"
    ),
    "vocab rollout": "the head's 151,936 rows are read from memory for every token, for 16 rollouts at a time",
    "teacher": "products of 256 columns are slower than 2048³; attention, norms and activations are not products",
    "vocab teacher": "the layers are small; what the teacher's head costs is in the update, chunk by chunk",
    "update": "as the teacher, forward and backward; clipping and the optimizer are in no floor",
    "vocab update": (
        "softmax and divergence go over every logit several times, at the memory's speed; the teacher's head is in it"
    ),
    "step": "the phases, and rewards, data and logging",
}
