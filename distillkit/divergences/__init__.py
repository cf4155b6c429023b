"""Divergences between student and teacher, one value per token: `model.divergence`.

| name | class | compares | direction |
|---|---|---|---|
| `k1` | `sampled.K1` | the sampled token | reverse, as an advantage or reward |
| `k2` | `sampled.K2` | the sampled token | reverse, as a loss |
| `k3` | `sampled.K3` | the sampled token | value reverse, gradient as a loss forward |
| `forward_kl` | `full.ForwardKL` | whole distributions | KL(π_T‖π_θ) |
| `reverse_kl` | `full.ReverseKL` | whole distributions | KL(π_θ‖π_T) |
| `jsd` | `full.JSD` | whole distributions | both, against their mixture |
| `skew_forward_kl` | `skew.SkewForwardKL` | whole distributions | forward, towards a mixture |
| `skew_reverse_kl` | `skew.SkewReverseKL` | whole distributions | reverse, towards a mixture |
| `todi` | `todi.ToDi` | whole distributions | forward or reverse per vocabulary entry |
| `power` | `power.PowerDivergence` | whole distributions | D_λ(π_T‖π_θ): λ = 0 forward, λ = −1 reverse |
| `topk` | `topk.TopK` | K tokens and the rest in one bucket | reverse or forward |

To add one: write the formula as a pure function in `functional/divergences.py`, subclass
`distillkit.components.DivergenceEstimator` with `needs` and `__call__`, name it in the registry (or in a package's
entry points, group `distillkit.divergence`), and run `distillkit.testing.check_divergence` on it.
"""
