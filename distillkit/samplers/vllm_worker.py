"""Runs inside vLLM's workers: takes the trainer's weights over TCP. vLLM imports it by name.

    --worker-extension-cls distillkit.samplers.vllm_worker.WorkerExtension
    --weight-transfer-config '{"backend": "distillkit"}'

vLLM's own engines move weights between GPUs (NCCL, CUDA IPC). This one needs a socket only: the worker connects to the
address that `update_weights` names, shows the key that came with it and reads the raw bytes of the tensors that it
announces. Nothing is unpickled and no file is written.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distillkit.samplers.vllm_weights import Piece, assemble

__all__ = ["BACKEND", "WorkerExtension", "load_weights", "register"]

BACKEND = "distillkit"
"""The name of the weight-transfer engine."""


class WorkerExtension:
    """Nothing: importing its module registers the engine before the worker makes one."""


@dataclass(kw_only=True)
class Introduction:
    """What the trainer tells at the start: the entries of its model's config that decide shapes and computation."""

    config: dict[str, Any]


@dataclass(kw_only=True)
class Delivery:
    """One update: where to connect, the key to show, the tensors to come; `complete`: every weight is among them."""

    host: str
    port: int
    key: str
    timeout_s: float
    complete: bool
    pieces: list[dict[str, Any]]


def load_weights(model: Any, vllm_config: Any, weights: Iterator[tuple[str, Tensor]], *, complete: bool) -> None:
    """Load weights by checkpoint name into a vLLM model that runs already.

    Raises:
        ValueError: a name or shape that the model does not have, or with `complete` a weight that did not come.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    wanted = {name for name, _ in model.named_parameters()}
    initialize_layerwise_reload(model)
    try:
        loaded = model.load_weights(weights)
    finally:  # a broken-off update would else be mixed into the next one
        finalize_layerwise_reload(model, vllm_config.model_config)
    if complete and loaded is not None and wanted - loaded:
        raise ValueError(f"the student has no weights for {sorted(wanted - loaded)[:3]} of the served model")
    _pack_head(model)


def _pack_head(model: Any) -> None:
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear"):
        # vLLM 0.32 on the CPU leaves a tied head with the packed copy of its old weights: log-probs then are wrong by
        # nats, without an error.
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def received(delivery: Delivery) -> Generator[Piece, None, None]:
    """Connect to the trainer and yield its tensors, in the announced order, on the CPU.

    Raises:
        OSError: no connection, or one that ended early.
    """
    with socket.create_connection((delivery.host, delivery.port), timeout=delivery.timeout_s) as connection:
        connection.sendall(bytes.fromhex(delivery.key))
        for entry in delivery.pieces:
            tensor = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
            _fill(connection, tensor)
            yield Piece(name=entry["name"], part=entry["part"], tensor=tensor, scale=entry["scale"])


def _fill(connection: socket.socket, tensor: Tensor) -> None:
    if not tensor.numel():
        return
    view = tensor.reshape(-1).view(torch.uint8).numpy().data
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError("the trainer closed the connection in the middle of its weights")
        view = view[count:]


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Name the entries of two configs that are in both and differ."""
    return [
        f"{k}: {theirs[k]!r} (student) and {mine[k]!r} (server)" for k in theirs if k in mine and mine[k] != theirs[k]
    ]


def register() -> None:
    """Add the engine to vLLM's, once per process."""
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    class TensorReceiver(WeightTransferEngine):  # type: ignore[misc]
        init_info_cls = Introduction
        update_info_cls = Delivery

        def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: Any) -> None:
            super().__init__(config, vllm_config, device, model)
            self._kept: dict[str, Tensor] = {}

        def init_transfer_engine(self, init_info: Introduction) -> None:
            served = json.loads(self.model_config.hf_config.get_text_config().to_json_string(use_diff=False))
            if unlike := differences(served, init_info.config):
                raise ValueError(f"another model is served: {'; '.join(unlike[:4])}")

        def start_weight_update(self) -> None:
            pass

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))
            if self.device.type != "cpu":  # on which vLLM's own version of this method fails
                torch.accelerator.synchronize()

        def receive_weights(self, update_info: Delivery) -> None:
            if update_info.complete:
                self._kept.clear()
            with contextlib.closing(received(update_info)) as pieces, torch.no_grad():
                weights = assemble(pieces, self._kept, self.device)
                load_weights(self.model, self.vllm_config, weights, complete=update_info.complete)

        def finish_weight_update(self) -> None:
            pass

        def shutdown(self) -> None:
            self._kept.clear()

    WeightTransferEngineFactory.register_engine(BACKEND, TensorReceiver)


if "vllm" in sys.modules:
    register()
