"""Checkpoints that are never half-written, and the student in Hugging Face format."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from distillkit.errors import ConfigError, problem
from distillkit.lora import is_lora, merged_state_dict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "AtomicCheckpointIO",
    "LastCheckpoint",
    "StudentExport",
    "export_student",
    "is_dry_run",
    "random_states",
    "restore_random",
]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it; reads with `weights_only=True`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def load_checkpoint(
        self, path: Any, map_location: Any | None = lambda storage, _: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        try:
            return super().load_checkpoint(path, map_location, weights_only=True)
        except FileNotFoundError as error:
            where = "--ckpt_path: no such checkpoint"
            raise ConfigError(problem(where, got=path, hint="--ckpt_path last continues the newest run")) from error


class LastCheckpoint(Callback):
    """Writes `checkpoints/last.ckpt` of the run folder every `every_n_steps` rollout steps and at the end.

    A step whose end is a validation is saved after the validation, so that a resumed run neither misses nor repeats it.

    Args:
        every_n_steps: rollout steps between checkpoints.
        dirpath: folder of `last.ckpt`; None is `checkpoints` in the trainer's root folder.
    """

    def __init__(self, *, every_n_steps: int = 10, dirpath: str | None = None) -> None:
        if every_n_steps < 1:
            raise ConfigError(problem("checkpoint.every_n_steps", got=every_n_steps, expected="at least 1"))
        self.every_n_steps = every_n_steps
        self.dirpath = dirpath
        self._saved = -1

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not self._validates(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit" and trainer.global_step > 0:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer, due=True)

    def _validates(self, trainer: pl.Trainer) -> bool:
        every = trainer.val_check_batch
        last = trainer.should_stop and trainer.fit_loop._can_stop_early
        return trainer.enable_validation and (last or (isinstance(every, int) and trainer.global_step % every == 0))

    def _save(self, trainer: pl.Trainer, due: bool = False) -> None:
        step = trainer.global_step
        if is_dry_run(trainer) or step == self._saved or not (due or step % self.every_n_steps == 0):
            return
        folder = Path(self.dirpath or Path(trainer.default_root_dir) / "checkpoints")
        trainer.save_checkpoint(folder / "last.ckpt", weights_only=False)
        self._saved = step


class StudentExport(Callback):
    """Exports the student in Hugging Face format: `student` at the end, `student_best` with each best checkpoint.

    A student with LoRA is exported with its adapters merged, and the adapters alone as `adapter`, `adapter_best`.
    """

    def __init__(self) -> None:
        self._best: dict[int, str] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self._export_best(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if is_dry_run(trainer):
            return
        self._export_best(trainer, pl_module)
        _export(trainer, pl_module, "student")

    def _export_best(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for i, callback in enumerate(trainer.checkpoint_callbacks):
            if not isinstance(callback, ModelCheckpoint) or callback.monitor is None:
                continue
            best = callback.best_model_path
            if best and self._best.get(i) != best:
                self._best[i] = best
                _export(trainer, pl_module, "student_best")

    def state_dict(self) -> dict[str, Any]:
        return {"best": {str(i): path for i, path in self._best.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = {int(i): path for i, path in state_dict["best"].items()}


def _export(trainer: pl.Trainer, module: Any, name: str) -> None:
    with module.backend.whole() as student:  # every rank gives its part
        if trainer.is_global_zero:
            export_student(student.model, module.tokenizer, Path(trainer.default_root_dir) / name)


def is_dry_run(trainer: pl.Trainer) -> bool:
    """Whether this is Lightning's `fast_dev_run`, which leaves nothing behind."""
    return bool(getattr(trainer, "fast_dev_run", False))


def export_student(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model (safetensors) and tokenizer to `folder`; an older export there is replaced in one rename.

    A model with LoRA is written as a plain one, adapters merged; `folder` with `adapter` in its name for `student` has
    the adapters in peft's format.
    """
    plain: Any = model.get_base_model() if is_lora(model) else model
    weights = merged_state_dict(model) if is_lora(model) else None

    def write(at: Path) -> None:
        plain.save_pretrained(at, state_dict=weights)
        tokenizer.save_pretrained(at)

    if is_lora(model):
        beside = folder.with_name(folder.name.replace("student", "adapter"))
        _replace_folder(beside, lambda at: model.save_pretrained(str(at), save_embedding_layers=False))
    _replace_folder(folder, write)


def _replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    write(temporary)
    temporary.chmod(0o755)
    for file in temporary.iterdir():  # safetensors makes its own private
        file.chmod(0o644)
    if folder.exists():
        old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
        os.replace(folder, old / folder.name)
        os.replace(temporary, folder)
        shutil.rmtree(old)
    else:
        os.replace(temporary, folder)


def random_states() -> dict[str, Any]:
    """Return the global random states (python, numpy, torch, CUDA) in types that `weights_only=True` reads."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random(states: Mapping[str, Any]) -> None:
    """Restore `random_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
