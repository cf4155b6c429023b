"""Hold the embedded decomposer against the rule-based decomposition, and write docs/decomposer.md.

    python benchmarks/decomposer.py [--decomposer embedded:decomposer] [--student embedded:student] [--page FILE]

Every trace works on one of the 500 held-out problems, no part of any training. A step agrees when its meta-reasoning,
its sub-problem and its answer are all those of the rule at the same position. The page is written again with the same
figures on the same machine; it takes about a minute on one core.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillkit.decomposition import Decomposition
from distillkit.embedded import resolve
from distillkit.embedded.arithmetic import ARROW, held_out
from distillkit.embedded.careless import careless_chain
from distillkit.embedded.corruptions import CORRUPTIONS, any_order_chain, wavering_chain
from distillkit.embedded.decompositions import Agreement, agreement, decompose
from distillkit.rewards.gsrm.local import LocalDecomposer

PAGE = Path(__file__).parents[1] / "docs" / "decomposer.md"
MAX_NEW_TOKENS = 256
"""Longest decomposition: enough for any trace that the embedded models write in 24 tokens."""

Trace = tuple[str, str]
"""A problem and a text that works on it."""

_DESCRIBED = {
    "reference chains": "legal steps only",
    "careless chains": "as the student's corpus: sums before products, from the left",
    "chains in any order": "any sub-expression next",
    "wavering chains": "two steps of five begin as one reduction and end as another",
    "student's rollouts": "sampled at temperature 1",
    "teacher's rollouts": "sampled at temperature 1",
    "wrong": "one step writes a wrong digit, the later ones go on from it",
    "reordered": "two neighbouring expressions change places",
    "missing": "one expression is left out",
    "repeated": "one expression is written twice",
    "garbled": "characters changed, dropped or added, the end cut off, more written after it",
}
_PAGE = """# The embedded decomposer, measured

`embedded:decomposer` ({parameters:.2f} M parameters) takes chains of the arithmetic task apart into reasoning steps.
Here its greedy decompositions are held against the rule-based ones (`distillkit/embedded/decompositions.py`). Every
trace works on one of the 500 held-out problems, no part of any training; corruptions are made of reference and careless
chains in turn. A step agrees when its meta-reasoning, its sub-problem and its answer are all those of the rule at the
same position; precision is agreeing ÷ predicted steps, recall agreeing ÷ steps of the rule. A trace is whole when all
its steps and the final answer are.

    python benchmarks/decomposer.py

{table}

`distillkit fit --config embedded_decomposer` makes the model again.
"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a decomposer made of one set of traces."""

    traces: int
    readable: int
    whole: int
    steps: Agreement


def trace_sets(student: str = "embedded:student", teacher: str = "embedded:teacher") -> dict[str, list[Trace]]:
    """Return every set of traces by name, always the same: 500 each, 1000 of the student's rollouts."""
    rng = random.Random("distillkit-decomposer-benchmark")
    rows = held_out()
    prompts = [row["prompt"] for row in rows]
    careless = [careless_chain(prompt.removesuffix(ARROW), rng) for prompt in prompts]
    mixed = [row["chain"] if i % 2 else chain for i, (row, chain) in enumerate(zip(rows, careless, strict=True))]
    written = {
        "reference chains": [row["chain"] for row in rows],
        "careless chains": careless,
        "chains in any order": [any_order_chain(prompt.removesuffix(ARROW), rng) for prompt in prompts],
        "wavering chains": [wavering_chain(prompt.removesuffix(ARROW), rng) for prompt in prompts],
        "teacher's rollouts": rollouts(teacher, prompts, seed=1),
        **{
            name: [corrupt(prompt, chain, rng) for prompt, chain in zip(prompts, mixed, strict=True)]
            for name, corrupt in CORRUPTIONS.items()
        },
    }
    sets = {name: list(zip(prompts, traces, strict=True)) for name, traces in written.items()}
    twice = [*prompts, *prompts]
    sets["student's rollouts"] = list(zip(twice, rollouts(student, twice, seed=0), strict=True))
    return {name: sets[name] for name in _DESCRIBED}


def rollouts(model_name: str, prompts: Sequence[str], *, seed: int, temperature: float = 1.0) -> list[str]:
    """Return one sampled completion per prompt, of at most 24 tokens; the global random state is left as it was."""
    folder = resolve(model_name)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        written = model.generate(**inputs, max_new_tokens=24, do_sample=True, temperature=temperature, top_k=0)
    texts: list[str] = tokenizer.batch_decode(written[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def measure(decomposer: LocalDecomposer, traces: Sequence[Trace]) -> Result:
    """Hold the decompositions of `traces` against the rule-based ones."""
    steps, readable, whole = Agreement(), 0, 0
    for (prompt, text), found in zip(traces, decomposer.decompose(traces), strict=True):
        read = found if isinstance(found, Decomposition) else None
        expected = decompose(prompt, text)
        steps += agreement(read, expected)
        readable += read is not None
        whole += read == expected
    return Result(traces=len(traces), readable=readable, whole=whole, steps=steps)


def table(results: Mapping[str, Result]) -> str:
    """Return the Markdown table."""
    heads = ["traces", "", "number", "read", "steps by rule", "precision", "recall", "whole"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, found in results.items():
        shares = [found.readable / found.traces, found.steps.precision, found.steps.recall, found.whole / found.traces]
        read, precision, recall, whole = (f"{100 * share:.1f} %" for share in shares)
        cells = [name, _DESCRIBED[name], str(found.traces), read, str(found.steps.expected), precision, recall, whole]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decomposer", default="embedded:decomposer")
    parser.add_argument("--student", default="embedded:student", help="whose rollouts are taken apart")
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    decomposer = LocalDecomposer(path=given.decomposer, max_new_tokens=MAX_NEW_TOKENS)
    decomposer.setup(torch.device("cpu"))
    shown = table({name: measure(decomposer, traces) for name, traces in trace_sets(given.student).items()})
    parameters = AutoModelForCausalLM.from_pretrained(resolve(given.decomposer)).num_parameters() / 1e6
    print(shown)
    given.page.write_text(_PAGE.format(parameters=parameters, table=shown))


if __name__ == "__main__":
    main()
