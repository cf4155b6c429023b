"""Prompts and problems: from files to batches.

In the order of the flow: `files` (read one file), `sources` (settings and rows of a source), `rows` (a row becomes a
prompt), `prompts` (token ids; what is kept and dropped), `streams` (which prompts come when), `module` (the Lightning
data module). Everything but `module` works without Lightning.
"""

from __future__ import annotations

from distillkit.data.module import PromptData
from distillkit.data.prompts import DataReport, PreparedPrompt, PromptSet, prepare_prompts
from distillkit.data.sources import Chat, DataSource, SourceRows, read_source
from distillkit.data.streams import EvalBatch, EvalBatches, EvalSet, PromptBatch, PromptStream

__all__ = [
    "Chat",
    "DataReport",
    "DataSource",
    "EvalBatch",
    "EvalBatches",
    "EvalSet",
    "PreparedPrompt",
    "PromptBatch",
    "PromptData",
    "PromptSet",
    "PromptStream",
    "SourceRows",
    "prepare_prompts",
    "read_source",
]
