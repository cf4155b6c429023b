"""The Lightning modules and what they need of Lightning.

`on_policy` the module around `distillkit.step` · `supervised` SFT and offline distillation on given traces · `backend` forward,
backward and optimizer under a Lightning strategy · `checkpoints` atomic files, last checkpoint, student export.
"""
