"""The shared file of reward functions under TRL's own `GRPOTrainer`, and under distillkit on the same completions."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from distillkit.rewards import as_reward
from distillkit.types import RewardOutput
from tests.rewards import trl_functions
from tests.rewards.batches import batch

trl = pytest.importorskip("trl", reason="TRL is not installed: the other side of this comparison")

FUNCTIONS = {
    trl_functions.correct_answer: 1.0,
    trl_functions.brevity: 0.5,
    trl_functions.only_for_sums: 0.25,
    trl_functions.judged: 2.0,
    trl_functions.has_plus: 0.125,
    trl_functions.with_extras: 0.1,
}
OURS = ("trainer_state", "log_extra", "log_metric")
TEMPLATE = "{% for m in messages %}{{ m['role'][0] + ' ' + m['content'] + ' ' }}{% endfor %}"


class Recorder:
    """A reward function that remembers what it was called with and what it returned."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.calls: list[tuple[dict[str, Any], Any]] = []
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, **kwargs: Any) -> Any:
        returned = self.function(**kwargs)
        self.calls.append((kwargs, returned))
        return returned


class AsyncRecorder(Recorder):
    """The same for an async function, which TRL tells apart by its `__call__`."""

    async def __call__(self, **kwargs: Any) -> Any:
        returned = await self.function(**kwargs)
        self.calls.append((kwargs, returned))
        return returned


def recorder(function: Any) -> Recorder:
    return AsyncRecorder(function) if inspect.iscoroutinefunction(function) else Recorder(function)


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "u", "a", "s", "what", "is", "1", "2", "3", "4", "+", "x"]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    fast.chat_template = TEMPLATE
    return fast


def dataset(conversational: bool) -> list[dict[str, Any]]:
    rows = []
    for a, b in ((1, 1), (1, 2), (2, 2), (1, 3)):
        text = f"what is {a} + {b}"
        prompt = [{"role": "user", "content": text}] if conversational else text
        rows.append({"prompt": prompt, "answer": str(a + b), "task": "sum" if a == 1 else "word"})
    return rows


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("conversational", [False, True], ids=["text", "messages"])
def test_trl_and_distillkit_call_the_same_functions_alike(tmp_path: Path, conversational: bool) -> None:
    from datasets import Dataset
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=14,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=1,
    )
    theirs = {function: recorder(function) for function in FUNCTIONS}
    trainer = trl.GRPOTrainer(
        model=Qwen3ForCausalLM(config),
        processing_class=tokenizer(),
        reward_funcs=list(theirs.values()),
        train_dataset=Dataset.from_list(dataset(conversational)),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=6,
            reward_weights=list(FUNCTIONS.values()),
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
        ),
    )
    trainer.train()
    assert all(len(theirs[function].calls) == 2 for function in FUNCTIONS)

    for step in range(2):
        given, _ = theirs[trl_functions.brevity].calls[step]
        columns = {name: values for name, values in given.items() if name not in OURS and name != "completions"}
        ids = columns.pop("completion_ids")
        prompts = columns.pop("prompts")
        rows = [{name: values[i] for name, values in columns.items()} for i in range(len(ids))]
        rollouts = batch(
            [trl_functions.content(completion) for completion in given["completions"]],
            rows,
            prompts=prompts,
            completion_ids=ids,
            version=step,
        )
        outputs = []
        for function, weight in FUNCTIONS.items():
            ours = recorder(function)
            reward = as_reward(ours, weight=weight)
            outputs.append(reward(rollouts))
            reward.teardown()
            [(our_arguments, our_values)], (their_arguments, their_values) = ours.calls, theirs[function].calls[step]
            assert our_values == their_values
            assert our_arguments.keys() == their_arguments.keys()
            for name in our_arguments.keys() - set(OURS):
                assert our_arguments[name] == their_arguments[name], name
            assert callable(our_arguments["log_extra"]) and callable(our_arguments["log_metric"])
            assert our_arguments["trainer_state"].global_step == step
        weighted = RewardOutput.merge(outputs)
        logged = trainer.state.log_history[step]
        assert weighted.total.mean().item() == pytest.approx(logged["reward"], abs=1e-6)
        assert {row["task"] for row in rows} <= {"sum", "word"} and len(rollouts) == 8


@pytest.mark.parametrize("name", ["think_format_reward", "accuracy_reward"])
def test_trls_own_rewards_run_from_their_dotted_path(name: str) -> None:
    from distillkit.rewards.function import FunctionReward

    prompts = [[{"role": "user", "content": "?"}]] * 3
    texts = ["<think>2+2</think>$\\boxed{4}$", "<think>2+2</think>$\\boxed{5}$", "no box and no thought"]
    reward = FunctionReward(function=f"trl.rewards.{name}", correct_above=0.5)
    output = reward(batch(texts, [{"solution": "$4$"}] * 3, prompts=prompts))
    expected = {"think_format_reward": [1.0, 1.0, 0.0], "accuracy_reward": [1.0, 0.0, 0.0]}[name]
    assert output.values[:, 0].tolist() == expected
