"""The character tokenizer of both embedded models: one token per printable ASCII character and newline."""

from __future__ import annotations

import string

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

__all__ = ["build_tokenizer"]

_SPECIAL = ("<pad>", "<eos>", "<unk>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}"
    "{% elif message['role'] == 'user' and not message['content'].endswith('>') %}>{% endif %}"
    "{% endfor %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: ids 0, 1, 2 are `<pad>`, `<eos>`, `<unk>`, then characters in ASCII order.

    Text of printable ASCII and newlines comes back exactly; any other character becomes `<unk>`. No token is added on
    its own. The chat template writes messages one after the other, `>` after a user message, `<eos>` after an answer.

    Example:
        >>> tokenizer = build_tokenizer()
        >>> tokenizer("3+4>")["input_ids"], len(tokenizer)
        ([23, 15, 24, 34], 99)
        >>> tokenizer.decode(tokenizer("3+4>")["input_ids"])
        '3+4>'
        >>> tokenizer.apply_chat_template([{"role": "user", "content": "3+4"}], tokenize=False)
        '3+4>'
    """
    characters = sorted("\n" + string.printable[:95])
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *characters))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )
