"""What a run will need, before it is started: memory of a rank and time of a step, from sizes alone.

model_shape.py   a model's sizes from its config; known_models.py those of the shipped recipes' models
workload.py      what one step asks of one rank, in numbers; recipe.py reads it from a recipe
memory.py        bytes per phase: layers.py of a layer, blocks.py and allocator.py how malloc keeps them
head_arrays.py   the arrays of a divergence, counted by running it
timing.py        seconds per phase from FLOPs and bytes; hardware.py the rates of accelerators
fit.py           the largest micro-batch and the most rollouts at once that fit
report.py        the tables that `distillkit plan` prints
"""
