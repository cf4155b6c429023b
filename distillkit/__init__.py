"""distillkit: train a student language model on its own rollouts, with a task reward and a teacher at once."""

__version__ = "0.1.0"
