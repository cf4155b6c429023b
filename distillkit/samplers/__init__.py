"""Samplers: where the student's own completions come from (`model.sampler`).

`hf` decodes with the trainer's own weights over the model's key/value cache · `vllm` hands them to a vLLM engine in the
same process · `vllm_server` sends them to a vLLM server · `replay` reads recorded completions from a JSONL file ·
`mixed` lets another sampler answer some prompts and the dataset the others (GKD).

`hf` is made of `decoding` (the loop), `drawing` (random tokens) and `row_cache` (rows come and go); `vllm` of
`vllm_engine`; `vllm_server` of `vllm_remote` (one server), `vllm_process` and `vllm_launch` (start it), `vllm_client`
(ask it), `vllm_answers` (read it), `vllm_sender` and `vllm_worker` (move weights), `vllm_ranks` (several trainers);
both of `vllm_requests` and `vllm_weights`.

To add one: subclass `distillkit.components.RolloutSampler` in a file of this folder (or in your own package), implement
`sync` and `sample`, register the class path under the group `distillkit.sampler`, and run
`distillkit components sampler NAME --check`.
"""
