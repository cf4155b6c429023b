"""The tokenizer of the embedded decomposer: characters, operands with what follows, and pieces of the grammar."""

from __future__ import annotations

import re
import string

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from distillkit.decomposition import Decomposition, ReasoningStep, messages, render
from distillkit.embedded.arithmetic import ARROW
from distillkit.embedded.decompositions import KINDS, NOTHING, OTHER

__all__ = ["build_decomposer_tokenizer"]

_SPECIAL = ("<pad>", "<eos>", "<unk>")
_GO = "\n\nDecomposition:\n"
"""Ends what is asked: the answer follows."""

_STEPS, _OPERATORS = 24, 4
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ message['content'] + '" + _GO.replace("\n", "\\n") + "' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


def build_decomposer_tokenizer() -> PreTrainedTokenizerFast:
    r"""Return the tokenizer: `<pad>`, `<eos>`, `<unk>`, printable ASCII and newline, then the pieces of the grammar.

    A piece is text that every decomposition has, such as `\nSub-problem: `, a meta-reasoning, such as `product 2`, or a
    digit with the operator or `>` after it: two expressions agree token by token up to the sub-expression that went,
    and a reduction is 7 tokens. The grammar's pieces are cut out of what `messages` and `render` write. Text of
    printable ASCII and newlines comes back exactly; any other character becomes `<unk>`. The chat template leaves the
    system message out, which is always the same, and writes `<eos>` after an answer.

    Example:
        >>> tokenizer = build_decomposer_tokenizer()
        >>> tokenizer.tokenize("\nSub-problem: 4*2\nAnswer: 8")
        ['\nSub-problem: ', '4*', '2', '\nAnswer: ', '8']
        >>> tokenizer.apply_chat_template(messages("3+4", "7"), tokenize=False)
        'Problem:\n3+4\n\nReasoning:\n7\n\nDecomposition:\n'
    """
    characters, pieces = sorted("\n" + string.printable[:95]), _pieces()
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *characters, *pieces))}
    longest_first = sorted(pieces, key=len, reverse=True)
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    pattern = Regex("|".join([*(re.escape(piece) for piece in longest_first), r"[\s\S]"]))
    tokenizer.pre_tokenizer = Split(pattern, behavior="isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def _pieces() -> list[str]:
    """Cut the fixed text out of an example of what is asked and of what is answered."""
    hole = "\ue000"
    step = ReasoningStep(meta=hole, question=hole, answer=hole)
    asked = messages(hole, hole)[-1]["content"] + _GO
    answered = render(Decomposition(steps=(step,) * _STEPS, final=hole))
    unfinished = render(Decomposition(steps=(step,), final="")).split(hole)[-1]
    metas = [f"{kind} {place}" for kind in KINDS.values() for place in range(1, _OPERATORS + 1)]
    operands = [digit + after for digit in string.digits for after in (*KINDS, ARROW)]
    found = [*asked.split(hole), *answered.split(hole), unfinished, *metas, OTHER, NOTHING, *operands]
    return [piece for piece in dict.fromkeys(found) if len(piece) > 1]
