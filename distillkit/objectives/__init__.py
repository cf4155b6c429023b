"""From rewards to advantages, and from advantages to a loss that is minimised: `model.objective`.

`grpo.GRPO` group-relative advantages and PPO's clipped ratio; Dr. GRPO and DAPO are settings of it · `gspo.GSPO` one
ratio per rollout · `cispo.CISPO` a clipped weight, and no token without gradient · `rlsd.RLSD` the teacher as a factor
of each token's advantage · `trrd.TRRD` (RLAD) the teacher in the ratio.

To add one: write ratio and loss as pure functions in `functional/objectives.py`, subclass
`distillkit.components.PolicyObjective` (or `GRPO`, overriding `log_ratio`), name it in the registry (or in a package's
entry points, group `distillkit.objective`), and run `distillkit.testing.check_objective` on it.
"""
