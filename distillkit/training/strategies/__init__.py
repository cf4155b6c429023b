"""How a run is spread over processes: one file per way, each with its Lightning strategy and its step backend.

    single.py    one process, or DDP: every rank has the whole student
    fsdp2.py     `trainer.strategy: fsdp2`: weights, gradients and optimizer state in shards (torch `fully_shard`)
    zero.py      `trainer.strategy: deepspeed_stage_2` or `deepspeed_stage_3`: DeepSpeed ZeRO

Importing this package makes the names known to Lightning. To add one: a Lightning strategy, a `StepBackend` for it,
and a line in `select.py`.
"""

from distillkit.training.strategies.select import backend_for, check_trainer, register, shards_weights

__all__ = ["backend_for", "check_trainer", "register", "shards_weights"]

register()
