"""Which tokens the policy and the distillation term may learn from: `model.masker`.

`response_level.ResponseLevel` distils wrong responses only · `group_level.GroupLevel` distils groups without a correct
response only; both leave the policy term alone · `routed.Routed` gives correct responses to the policy term and wrong
ones to the distillation term.

To add one: subclass `distillkit.components.Masker`, decide by `rewards.correct` (never by `reward == 0`; unknown is not
wrong), name it in the registry (or in a package's entry points, group `distillkit.masker`), and run
`distillkit.testing.check_masker` on it.
"""
