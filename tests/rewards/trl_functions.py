"""Reward functions as a TRL user writes them: nothing here knows of distillkit, and TRL runs the same file."""

import asyncio


def content(completion):
    """The text of a completion, which is a message list when the prompt is one."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def correct_answer(completions, answer, **kwargs):
    """Right when the last word of the completion is the answer."""
    return [float(content(c).split()[-1:] == [a]) for c, a in zip(completions, answer, strict=True)]


def brevity(completion_ids, **kwargs):
    """A hundredth off for each token."""
    return [-0.01 * len(ids) for ids in completion_ids]


def only_for_sums(prompts, completions, task, **kwargs):
    """Counts plus signs in answers to sums; None, not applicable, for everything else."""
    assert len(prompts) == len(completions) == len(task)
    return [content(c).count("+") if t == "sum" else None for c, t in zip(completions, task, strict=True)]


def never(completions, **kwargs):
    """Applies to nothing."""
    return [None] * len(completions)


async def judged(prompts, completions, **kwargs):
    """An asynchronous judge: half a point for a completion longer than its prompt."""

    async def one(prompt, completion):
        await asyncio.sleep(0.01)
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        return 0.5 if len(content(completion)) > len(asked) else 0.0

    return await asyncio.gather(*(one(p, c) for p, c in zip(prompts, completions, strict=True)))


def with_extras(completions, trainer_state, log_extra=None, log_metric=None, **kwargs):
    """Rewards that ramp up with training, and log on the way."""
    lengths = [len(content(c)) for c in completions]
    if log_extra:
        log_extra("length", lengths)
    if log_metric:
        log_metric("mean_length", sum(lengths) / len(lengths))
    return [min(1.0, trainer_state.global_step / 10) * length for length in lengths]


class Marker:
    """A reward as an object, with a setting of its own."""

    def __init__(self, mark):
        self.mark = mark

    def __call__(self, completions, **kwargs):
        return [self.mark in content(c) for c in completions]


has_plus = Marker("+")
