"""A divergence and a reward for distillkit, as a separate package."""
