"""A policy small enough to sum over everything it can say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

VOCABULARY, LONGEST, END = 4, 3, 0

Prefix = tuple[int, ...]
Logits = Callable[[Prefix], Tensor]


def prefixes() -> list[Prefix]:
    """Every prefix at which a token is drawn: no end token, shorter than the limit."""
    found: list[Prefix] = [()]
    for prefix in found:
        if len(prefix) < LONGEST - 1:
            found += [(*prefix, token) for token in range(VOCABULARY) if token != END]
    return found


def sequences() -> Iterator[Prefix]:
    """Every completion: ended by END, or cut at the limit."""
    for prefix in prefixes():
        for token in range(VOCABULARY):
            if token == END or len(prefix) == LONGEST - 1:
                yield (*prefix, token)


@dataclass(frozen=True)
class ToyPolicy:
    """An autoregressive policy: `parameters` are free float64 numbers, `logits(prefix)` [V] a function of them."""

    parameters: Tensor
    logits: Logits

    def logprobs(self, prefix: Prefix) -> Tensor:
        return torch.log_softmax(self.logits(prefix), dim=-1)

    def of(self, sequence: Prefix) -> Tensor:
        """Log-probs [T] of the tokens of `sequence`."""
        return torch.stack([self.logprobs(sequence[:t])[token] for t, token in enumerate(sequence)])

    def probability(self, tokens: Prefix) -> Tensor:
        """The probability that a completion starts with `tokens`, without gradient."""
        with torch.no_grad():
            return self.of(tokens).sum().exp() if tokens else torch.ones((), dtype=torch.float64)

    def expected(self, value: Callable[[Prefix], Tensor]) -> Tensor:
        """E_{y ~ policy} value(y), the weights without gradient: the limit of many on-policy samples."""
        return torch.stack([self.probability(y) * value(y) for y in sequences()]).sum()

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.parameters, retain_graph=True)[0].flatten()


def table(generator: torch.Generator) -> ToyPolicy:
    """Logits of every prefix are parameters of their own."""
    rows = {prefix: i for i, prefix in enumerate(prefixes())}
    weights = torch.randn(len(rows), VOCABULARY, dtype=torch.float64, generator=generator).requires_grad_()
    return ToyPolicy(weights, lambda prefix: weights[rows[prefix]])


def shared(generator: torch.Generator) -> ToyPolicy:
    """One linear map for all prefixes, from counts of the tokens so far, the last token and a bias."""
    weights = torch.randn(2 * VOCABULARY + 1, VOCABULARY, dtype=torch.float64, generator=generator).requires_grad_()

    def logits(prefix: Prefix) -> Tensor:
        features = torch.zeros(2 * VOCABULARY + 1, dtype=torch.float64)
        features[-1] = 1
        for token in prefix:
            features[token] += 1
        if prefix:
            features[VOCABULARY + prefix[-1]] = 1
        return features @ weights

    return ToyPolicy(weights, logits)
