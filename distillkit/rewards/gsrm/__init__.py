"""The generative structure reward model: does the student's trace branch where the teacher's does?

    completion ──decomposer──┐
                             ├─ steps ──judge, step by step──▶ agreement ──functional.structure──▶ reward
    teacher trace ─decomposer┘

`reward` the reward, short name `gsrm` · `alignment` all rollouts of a batch compared in lockstep · `cache`
decompositions by content, in memory and on disk.

Decomposers take a trace apart into the steps of `distillkit.decomposition`: `decomposer` what they share · `local` a
model in this process · `server` an OpenAI-compatible server.

Judges say whether two steps agree: `judge` the base, `exact` and `overlap` · `local_judge` a model's own yes or no ·
`server_judge` a server's.

Helpers: `chat_model` generation and scoring of chat prompts · `chat_client` requests with a deadline and bounded
retries · `chat_request` one of them, and why it fails · `outage` when a server is not asked further · `questions` what
a judge is asked, and how its word is read · `training_rows` from decomposed traces to the rows that a decomposer is
trained on.

To add one: subclass `Decomposer` or `StepJudge` (keyword-only arguments, no work in `__init__`) and give its
`class_path`. What cannot be told is `Undecided` or None with a reason in the log, never a guess: the rollout is then
not scored.
"""
