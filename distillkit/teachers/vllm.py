"""A teacher behind one or several vLLM servers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from distillkit.components import StudentInfo, TeacherScorer
from distillkit.errors import ConfigError, ScoringError, problem
from distillkit.models import fingerprint, model_vocab_size
from distillkit.teachers._tokenizer import Tolerated, uncounted_end_ids
from distillkit.teachers.vllm_answer import PATH, RolloutScores, read_scores, scoring_entries
from distillkit.teachers.vllm_checks import ServerChecks
from distillkit.teachers.vllm_client import Server, ServerPool
from distillkit.teachers.vllm_request import server_address
from distillkit.types import RolloutBatch, ScoreRequest, TeacherScores

__all__ = ["VLLMTeacher"]


class VLLMTeacher(TeacherScorer):
    """A frozen model on vLLM servers: log-probs of the sampled tokens and of the teacher's most likely ones.

    Each rollout is one request of token ids (`POST /v1/completions` with `prompt_logprobs`), never of text; the servers
    share the requests by load, and each batches those it has. A request that fails goes to another server; a server
    that fails is asked for its health and used again when it is back. `score` may be called from several threads, say
    for each group as it is finished.

    A server answers at temperature 1 only (`model.distil_temperature`), with no whole distributions and no entropy. It
    cannot leave ids out of its softmax: a head with more rows than the student's is accepted where a measurement at
    start-up gives these ids at most 0.001 of the probability, and they never count among the most likely ones. A token
    that the teacher rules out altogether (log-prob −∞) is not a valid position.

    Args:
        urls: addresses, such as `[http://node1:8000, http://node2:8000]`.
        path: local checkpoint folder, hub name, or `embedded:teacher` of the served model: tokenizer and config are
            read here, and its files are the teacher's identity.
        model: name on the servers; None takes the one that each of them serves.
        max_logprobs: most likely tokens per position that may be asked for; as in `vllm serve --max-logprobs`.
        concurrency: unanswered requests per server, of each process.
        timeout_s: seconds for the answer to one request.
        retries: further tries of a request, wherever.
        backoff_s: seconds that a server is left alone after a failure; doubled every time, 15 s at most.
        max_wait_s: seconds to wait for a server to return when none answers.
        api_key_env: environment variable with the key (`vllm serve --api-key`); None sends none.
        tolerate: differences from the student's tokenizer to accept: `chat_template`, or `eos` (end tokens that differ
            are then left out of the teacher's signal). Differing token ids are never accepted.

    Raises:
        ConfigError: a number that is too small, no address; at setup, a wrong address, another model there, or fewer
            log-probs than `max_logprobs`.
        ModelError: at setup, when the tokenizer or vocabulary does not fit the student's.
        ScoringError: at setup, when servers differ; later, when a rollout is too long, a server refuses it or gives
            other tokens' scores, or none is back in time.
    """

    more_topk = "model.teacher.max_logprobs: {k}, and vllm serve MODEL --max-logprobs {k}"

    def __init__(
        self,
        *,
        urls: tuple[str, ...],
        path: str,
        model: str | None = None,
        max_logprobs: int = 20,
        concurrency: int = 32,
        timeout_s: float = 300.0,
        retries: int = 4,
        backoff_s: float = 0.5,
        max_wait_s: float = 600.0,
        api_key_env: str | None = None,
        tolerate: tuple[Tolerated, ...] = (),
    ) -> None:
        for name, value, ok, expected in (
            ("urls", urls, len(urls) > 0 and not isinstance(urls, str), "a list of at least one address"),
            ("max_logprobs", max_logprobs, max_logprobs >= 0, "at least 0"),
            ("concurrency", concurrency, concurrency >= 1, "at least 1"),
            ("timeout_s", timeout_s, timeout_s > 0, "above 0 seconds"),
            ("retries", retries, retries >= 0, "at least 0"),
            ("backoff_s", backoff_s, backoff_s >= 0, "at least 0 seconds"),
            ("max_wait_s", max_wait_s, max_wait_s >= 0, "at least 0 seconds"),
        ):
            if not ok:
                raise ConfigError(problem(f"model.teacher.{name}", got=repr(value), expected=expected))
        for i, url in enumerate(urls):
            server_address(url, f"model.teacher.urls[{i}]")
        self.urls = tuple(urls)
        self.path = path
        self.model = model
        self.max_logprobs = max_logprobs
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self.retries = retries
        self.backoff_s = backoff_s
        self.max_wait_s = max_wait_s
        self.api_key_env = api_key_env
        self.tolerate = tuple(tolerate)
        self._masked_ids: tuple[int, ...] = ()
        self._limit = self._beyond = 0
        self._pool: ServerPool | None = None
        self._threads: ThreadPoolExecutor | None = None

    @property
    def offers(self) -> ScoreRequest:
        return ScoreRequest(sampled=True, topk=self.max_logprobs)

    @property
    def any_temperature(self) -> bool:
        return False

    @property
    def elsewhere(self) -> bool:
        return True

    @property
    def vocab_size(self) -> int:
        return model_vocab_size(self.path, where="model.teacher.path")

    def identity(self) -> str:
        return f"vllm:{self.model or ''}:{fingerprint(self.path)}"

    def setup(self, student: StudentInfo) -> None:
        self._masked_ids = uncounted_end_ids(self.path, student, self.tolerate)
        self._limit, size = student.vocab_limit, self.vocab_size
        self._beyond = size - self._limit
        checks = ServerChecks(
            wanted=self.model,
            vocab_size=size,
            limit=self._limit,
            max_logprobs=self.max_logprobs,
            tokenizer=student.tokenizer,
        )
        places = [f"model.teacher.urls[{i}]" for i in range(len(self.urls))]
        pool = ServerPool(
            [Server(url=server_address(url, place), where=place) for url, place in zip(self.urls, places, strict=True)],
            headers=self._headers(),
            concurrency=self.concurrency,
            timeout_s=self.timeout_s,
            retries=self.retries,
            backoff_s=self.backoff_s,
            max_wait_s=self.max_wait_s,
            recheck=lambda server: checks.again(pool, server),
        )
        try:
            checks.start(pool)
        except BaseException:
            pool.close()
            raise
        self._pool = pool
        self._threads = ThreadPoolExecutor(self.concurrency * len(self.urls), thread_name_prefix="teacher")

    def teardown(self) -> None:
        if self._pool is not None:
            self._pool.close()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._pool = self._threads = None

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        if self._pool is None or self._threads is None:
            raise ScoringError(
                problem("VLLMTeacher.score", got="called before setup", hint="call setup(student) first")
            )
        if request.temperature != 1:
            where = "model.distil_temperature: a vLLM server scores at temperature 1 only"
            hint = "model.distil_temperature: 1.0, or model.teacher: {name: local, path: ...}"
            raise ConfigError(problem(where, got=request.temperature, expected=1.0, hint=hint))
        k = min(request.topk, self._limit)
        device, shape = rollouts.tokens.device, rollouts.tokens.shape
        valid = rollouts.loss_mask.cpu().clone()
        valid[:, 0] = False  # a server gives no log-prob of a token without a prefix
        jobs = self._jobs(rollouts, valid)
        self._check_lengths(rollouts, jobs, self._pool)
        found = self._ask_all(self._pool, self._threads, jobs, k)
        sampled = torch.zeros(shape)
        topk, topk_ids = torch.zeros(*shape, k), torch.zeros(*shape, k, dtype=torch.long)
        for i, scores in found.items():
            at = jobs[i][1]
            sampled[i, at] = torch.tensor(scores.sampled)
            if k:
                topk[i, at], topk_ids[i, at] = torch.tensor(scores.topk), torch.tensor(scores.topk_ids)
        valid &= sampled.isfinite()
        valid &= ~torch.isin(rollouts.tokens.cpu(), torch.tensor(self._masked_ids, dtype=torch.long))
        sampled = sampled.masked_fill(~sampled.isfinite(), 0.0)
        return TeacherScores(
            valid=valid.to(device),
            sampled=sampled.to(device) if request.sampled else None,
            topk_ids=topk_ids.to(device) if k else None,
            topk=topk.to(device) if k else None,
        )

    def _headers(self) -> dict[str, str]:
        if self.api_key_env is None:
            return {}
        key = os.environ.get(self.api_key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            where = f"model.teacher.api_key_env: no key in the environment variable {self.api_key_env}"
            raise ConfigError(problem(where, expected="one word", hint="null for a server without keys"))
        return {"Authorization": f"Bearer {key}"}

    def _jobs(self, rollouts: RolloutBatch, valid: Tensor) -> dict[int, tuple[list[int], list[int]]]:
        """Per rollout with something to score: its token ids up to the last such position, and these positions."""
        jobs = {}
        for i, mask in enumerate(valid):
            positions = mask.nonzero().flatten().tolist()
            if positions:
                jobs[i] = (rollouts.tokens[i, : positions[-1] + 1].tolist(), positions)
        return jobs

    def _check_lengths(
        self, rollouts: RolloutBatch, jobs: dict[int, tuple[list[int], list[int]]], pool: ServerPool
    ) -> None:
        shortest = min(pool.servers, key=lambda server: server.max_model_len or 2**62)
        for i, (ids, _) in jobs.items():
            if shortest.max_model_len is not None and len(ids) + 1 > shortest.max_model_len:
                prompt = int(rollouts.prompt_lengths[i])
                where = (
                    f"{shortest.where}: a rollout of group {int(rollouts.group_id[i])} is too long for {shortest.url}"
                )
                got = f"{prompt} prompt tokens + {len(ids) - prompt} of the completion + 1 = {len(ids) + 1}"
                hint = "vllm serve MODEL --max-model-len N, a smaller model.sampler.max_new_tokens, or shorter prompts"
                raise ScoringError(problem(where, got=got, expected=f"at most {shortest.max_model_len}", hint=hint))

    def _ask_all(
        self, pool: ServerPool, threads: ThreadPoolExecutor, jobs: dict[int, tuple[list[int], list[int]]], k: int
    ) -> dict[int, RolloutScores]:
        unwanted = threading.Event()
        pending: dict[int, Future[RolloutScores]] = {}
        try:
            for i, (ids, positions) in jobs.items():
                pending[i] = threads.submit(self._ask, pool, ids, positions, k, unwanted)
            wait(pending.values(), return_when=FIRST_EXCEPTION)
            for future in (future for future in pending.values() if future.done()):
                future.result()
            return {i: future.result() for i, future in pending.items()}
        except ScoringError:
            raise
        except (CancelledError, RuntimeError) as error:  # the threads were stopped meanwhile
            raise ScoringError(problem("model.teacher: not scored", got="scoring was ended")) from error
        finally:
            unwanted.set()
            for future in pending.values():
                future.cancel()

    def _ask(
        self, pool: ServerPool, ids: list[int], positions: list[int], k: int, unwanted: threading.Event
    ) -> RolloutScores:
        """Score one rollout; ask again for more where ids beyond the vocabulary limit are among the most likely."""
        spare, most = 0, max(self.max_logprobs, k)
        while True:
            asked = min(k + spare, most)
            scores = pool.ask(PATH, scoring_entries(ids, asked), self._reader(ids, positions, asked), unwanted)
            if all(len(row) >= k for row in scores.topk):
                return RolloutScores(
                    sampled=scores.sampled,
                    topk_ids=[row[:k] for row in scores.topk_ids],
                    topk=[row[:k] for row in scores.topk],
                )
            spare = min(max(8, 2 * spare), self._beyond)
            if asked == most:
                where = "model.teacher.max_logprobs: too few to leave out ids that the student does not have"
                hint = f"model.teacher.max_logprobs: {k + spare}, and vllm serve MODEL --max-logprobs {k + spare}"
                raise ConfigError(problem(where, got=self.max_logprobs, expected=f"more than {asked}", hint=hint))

    def _reader(self, ids: list[int], positions: list[int], asked: int) -> Callable[[object], RolloutScores]:
        return lambda answer: read_scores(answer, ids, positions, asked=asked, limit=self._limit)
