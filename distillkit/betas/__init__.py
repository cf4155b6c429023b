"""Numbers that change with the step: `model.beta`, and every entry of `model.schedules`.

`constant.Constant` · `linear.Linear` · `cosine.Cosine`. A bare number in YAML is `constant`.

To add one: subclass `distillkit.components.BetaScheduler` with `value(step, signals)`; whatever it remembers between
steps belongs into `state_dict`. Name it in the registry (or in a package's entry points, group `distillkit.beta`), and
run `distillkit.testing.check_beta` on it.
"""
