"""The Lightning modules and what they need of Lightning.

`on_policy` the module around `distillkit.step` · `supervised` SFT and offline distillation on given traces (`given` its
step, in torch alone; `fresh` a student with random weights) · `base` what both modules share · `backend` forward,
backward and optimizer under a Lightning strategy · `checkpoints` atomic files, last checkpoint, student export ·
`warmup` a learning rate for a run of known length · `rank_watch` ends every rank when one has ended (`roll_call` the
connections between them).
"""
