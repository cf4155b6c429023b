"""Frozen models that score the student's own tokens.

`local` a checkpoint in this process · `vllm` a model on vLLM servers · `adapter_off` base weights of a LoRA student ·
`mixture` several teachers, by row or averaged · `cached` another teacher's scores, kept · `extrapolated` what a teacher
learned since its base model, λ times (G-OPD, ExOPD).

To add one: subclass `distillkit.components.TeacherScorer`, say in `offers` what it can answer, and register the class
under the entry-point group `distillkit.teacher`.
"""
