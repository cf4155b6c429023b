"""Checks of a recipe before hours are spent on it, each on its own: `distillkit doctor`.

patient.py     the recipe under examination: student, tokenizer, prompts and rollouts, each made when first asked for
checks.py      a check, its finding, and how checks are run: isolated and bounded in time
models.py      tokenizers, vocabularies, teacher and reference
rewards.py     the verifier on gold rows
engine.py      the sampler's engine against the trainer, before and after a sync
memory.py      free memory against the plan
"""
