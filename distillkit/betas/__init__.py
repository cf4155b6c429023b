"""Numbers that change with the step: `model.beta`, and every entry of `model.schedules`.

Of the step alone: `constant.Constant` (a bare number in YAML) · `linear.Linear` · `cosine.Cosine` · `switch.Switch`.
Of what the step before measured, with a state: `adaptive_kl.AdaptiveKL` holds a divergence near a target ·
`reward_progress.RewardProgress` falls as the rewards rise.

To add one: subclass `distillkit.components.BetaScheduler` with `value(step, signals)`; whatever it remembers between
steps belongs into `state_dict`. Name it in the registry (or in a package's entry points, group `distillkit.beta`), and
run `distillkit.testing.check_beta` on it.
"""
