"""Pure tensor math: no state, no config, no models. Imports torch, types and errors only.

`logprobs` log-probabilities and entropy from logits · `aggregation` normalisation as a coefficient per token ·
`divergences` k1, k2, k3, full and top-k divergences · `advantages` group-relative advantages · `objectives`
policy-gradient losses and the TRRD ratio · `betas` schedules of a number · `packing` micro-batches by token budget ·
`structure` the structural reward of two traces.
"""
