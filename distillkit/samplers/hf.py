"""`hf`: the student decodes its own rollouts, in place, over its key/value cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distillkit.components import RolloutSampler, StudentInfo
from distillkit.errors import ConfigError, ModelError, RolloutError, problem
from distillkit.types import Rollout, RolloutGroup, SampleRequest

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from distillkit.samplers.decoding import Completion, Decoder, Forward
    from distillkit.scorer import StudentScorer

__all__ = ["HFSampler"]

_SUPPORTED = (
    "a decoder whose every layer keeps keys and values, with full or sliding-window attention "
    "(Llama, Qwen2, Qwen3, Mistral, Gemma 2, Gemma 3, Phi-3 and the like)"
)
_INSTEAD = "another model.student, or model.sampler: replay with completions that were sampled elsewhere"


class HFSampler(RolloutSampler):
    """Samples from the trainer's own weights: no copy, no second engine, behaviour policy = old policy.

    A prompt goes through the model once for its whole group. Rows that finish leave the batch; when requests have more
    rollouts than `rows_per_batch`, waiting ones take their places. Works on any device and under autocast; the student
    is in eval mode and without gradient while it decodes, and as it was whenever a group is handed out.

    **Reproducible.** The t-th token of rollout g is decided by the t-th number of a stream made from (request.seed, g)
    alone, whatever else is in the batch; no global random state is read or changed. The same call on the same weights,
    device and thread count gives the same bits. Another `rows_per_batch`, order or company of requests changes the
    shapes of the matrix products, so logits move by rounding (about 1e-6 in float32): greedy outputs stay the same
    unless two tokens tie to that precision, sampled ones unless a draw falls that close to the border between two.

    Log-probs are those of softmax(logits / temperature) in float32 over the ids below `StudentInfo.vocab_limit`
    (renormalised over the nucleus when `top_p` is below 1; at temperature 1 for greedy decoding). The checkpoint's
    `generation_config` (its own temperature, top-k, penalties, cache) is not read.

    Args:
        group_size: G, completions per prompt.
        max_new_tokens: longest completion, in tokens.
        temperature: of the sampling softmax; 0 is greedy (evaluation only).
        top_p: nucleus; below 1 is refused in training, where its importance ratio is not defined.
        rows_per_batch: rollouts decoded at once, the rows of the cache: lower it when memory runs out.
        drop_finished: a rollout that ends leaves the batch; false keeps it until the last one of its batch ends, which
            gives the same tokens later.
        prefill_once: a prompt goes through the model once for its group; false sends it once for each rollout.
    """

    same_engine = True

    def __init__(
        self,
        *,
        group_size: int = 8,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        rows_per_batch: int = 256,
        drop_finished: bool = True,
        prefill_once: bool = True,
    ) -> None:
        super().__init__(group_size=group_size, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        if rows_per_batch < 1:
            raise ConfigError(problem("model.sampler.rows_per_batch", got=rows_per_batch, expected="at least 1"))
        self.rows_per_batch = rows_per_batch
        self.drop_finished, self.prefill_once = drop_finished, prefill_once
        self._info: StudentInfo | None = None
        self._model: nn.Module | None = None
        self._checked: nn.Module | None = None
        self._same = False

    def setup(self, student: StudentInfo) -> None:
        """Keep what is needed to know about the student's tokens."""
        self._info = student

    def sync(self, student: StudentScorer) -> None:
        """Refer to the student's model, whose weights are always the current ones.

        Raises:
            ModelError: its cache is not keys and values alone (state-space, linear-attention, encoder-decoder models).
        """
        if student.model is not self._model:
            _check_cache(_inner(student.model))
            self._model = student.model

    def teardown(self) -> None:
        """Let go of the model."""
        self._model = self._checked = None

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        """Yield one group per request as soon as its last rollout is finished.

        Raises:
            RolloutError: called before `setup` and `sync`; requests of different settings; an empty prompt, or one that
                does not fit the model's table of positions; log-probs that are not finite; out of memory.
            ModelError: the model did not use the cache.
        """
        if self._info is None or self._model is None:
            raise RolloutError(
                problem("HFSampler.sample", got="no student yet", expected="setup(info) and sync(student) before it")
            )
        if not requests:
            return iter(())
        self._check_requests(requests)
        return self._groups(tuple(requests), self._info, self._model)

    def _check_requests(self, requests: Sequence[SampleRequest]) -> None:
        first = requests[0].settings
        limit = _position_limit(_inner(self._model))
        for i, request in enumerate(requests):
            where = f"HFSampler.sample: request {i} (group {request.group_id})"
            if request.settings != first:
                raise RolloutError(
                    problem(
                        f"{where} has other sampling settings than request 0",
                        got=request.settings,
                        expected=first,
                        hint="one call per kind of settings",
                    )
                )
            if not request.prompt_ids:
                raise RolloutError(problem(f"{where} has an empty prompt", expected="at least one token"))
            length = len(request.prompt_ids) + first.max_new_tokens
            if limit is not None and length > limit:
                raise RolloutError(
                    problem(
                        f"{where} does not fit the model's table of positions",
                        got=f"{len(request.prompt_ids)} prompt tokens + {first.max_new_tokens} new ones = {length}",
                        expected=f"at most {limit} (max_position_embeddings)",
                        hint="a smaller model.sampler.max_new_tokens, or drop prompts this long",
                    )
                )

    def _groups(
        self, requests: tuple[SampleRequest, ...], info: StudentInfo, model: nn.Module
    ) -> Iterator[RolloutGroup]:
        from transformers import DynamicCache

        from distillkit.samplers.decoding import Decoder

        def new_cache() -> Cache:
            return DynamicCache(config=_inner(model).config)

        decoder: Decoder | None = None
        while True:
            # The consumer runs between groups: it must find the student's modes as it left them.
            with _decoding(model):
                try:
                    decoder = decoder or Decoder(
                        requests,
                        forward=self._fastest_forward(model, new_cache, info.device),
                        new_cache=new_cache,
                        stop_ids=info.eos_token_ids,
                        vocab_limit=info.vocab_limit,
                        pad_id=info.pad_token_id,
                        device=info.device,
                        max_rows=self.rows_per_batch,
                        drop_finished=self.drop_finished,
                        prefill_once=self.prefill_once,
                    )
                    finished = decoder.run()
                except torch.OutOfMemoryError as error:
                    got = f"{self.rows_per_batch} rows of up to {requests[0].settings.max_new_tokens} new tokens"
                    hint = "a smaller model.sampler.rows_per_batch"
                    raise RolloutError(
                        problem("model.sampler: out of memory while decoding", got=got, hint=hint)
                    ) from error
            if not finished:
                return
            for completions in finished:
                request = requests[completions[0].request]
                yield RolloutGroup(request=request, rollouts=tuple(_rollout(request, c, info) for c in completions))

    def _fastest_forward(self, model: nn.Module, new_cache: Callable[[], Cache], device: torch.device) -> Forward:
        """The model's own forward, with single tokens through `LeanForward` where that gives the same logits."""
        from distillkit.samplers.lean_forward import LeanForward, gives_same_logits

        own, inner = _forward(model), _inner(model)
        if not LeanForward.fits(inner):
            return own
        lean = LeanForward(inner)
        if self._checked is not model:
            self._checked, self._same = model, gives_same_logits(lean, own, new_cache, device)
        if not self._same:
            return own

        def forward(ids: Tensor, attended: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
            return (lean if ids.shape[1] == 1 else own)(ids, attended, positions, cache)

        return forward


def _rollout(request: SampleRequest, completion: Completion, info: StudentInfo) -> Rollout:
    ids = completion.ids
    if not bool(torch.isfinite(completion.logprobs).all()):
        raise RolloutError(
            problem(
                f"model.sampler: the student's log-probs are not finite (group {request.group_id})",
                got=f"{completion.logprobs.tolist()[:8]} in rollout {completion.rollout}",
                hint="the weights have diverged: start again from an earlier checkpoint with a lower learning rate",
            )
        )
    text = info.tokenizer.decode(ids[:-1] if completion.stopped else ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return Rollout(
        completion_ids=ids,
        behaviour_logprobs=completion.logprobs,
        loss_mask=torch.ones_like(ids, dtype=torch.bool),
        policy_version=torch.full_like(ids, request.policy_version),
        finish_reason="stop" if completion.stopped else "length",
        text=text,
    )


def _inner(model: nn.Module | None) -> Any:
    """The Hugging Face model inside a peft wrapper (whose adapters are injected in place), or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


@contextmanager
def _decoding(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradient; every module's own mode is restored.

    Inside a training step's autocast the low-precision copies of the weights are cached. Copies from before an update
    must not be used here, nor copies made without gradient by the backward pass later (older torch), so the cache is
    emptied at both ends.
    """
    training = [module for module in model.modules() if module.training]
    torch.clear_autocast_cache()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        torch.clear_autocast_cache()


def _forward(model: nn.Module) -> Forward:
    accepted = inspect.signature(_inner(model).forward).parameters

    def forward(ids: Tensor, attended: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
        optional: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        chosen = {name: value for name, value in optional.items() if name in accepted}
        mask = None if attended is None else attended.long()
        out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **chosen)
        logits: Tensor = out.logits[:, -1]
        return logits

    return forward


def _position_limit(model: Any) -> int | None:
    """Tokens that fit a learned table of positions; None for rotary and other computed positions."""
    config = model.config.get_text_config()
    computed = getattr(config, "rope_parameters", None) or getattr(config, "alibi", False)
    limit = getattr(config, "max_position_embeddings", None)
    return None if computed or limit is None else int(limit)


def _check_cache(model: Any) -> None:
    """Raise ModelError, naming the model class and what its cache has, unless rows of it can be selected."""
    from transformers import DynamicCache

    from distillkit.samplers.row_cache import unsupported_layers

    kind = type(model).__name__
    reason = None
    if model.config.is_encoder_decoder:
        reason = f"{kind} is an encoder-decoder model (EncoderDecoderCache)"
    else:
        try:
            layers = unsupported_layers(DynamicCache(config=model.config))
        except KeyError as error:
            layers = [str(error)]
        if layers:
            reason = f"{kind}, whose cache has layers of class {', '.join(layers)}"
        elif model._is_stateful or not model._supports_default_dynamic_cache():
            reason = f"{kind}, which keeps a recurrent state of its own instead of a DynamicCache"
    if reason is not None:
        where = "model.sampler: the hf sampler cannot decode with this student's cache"
        raise ModelError(problem(where, got=reason, expected=_SUPPORTED, hint=_INSTEAD))
