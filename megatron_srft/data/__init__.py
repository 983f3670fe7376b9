"""Prompts, demonstrations, chat templates, order of visits and packing."""

from megatron_srft.data.dataset import Dataset, load_dataset, load_problems, read_records
from megatron_srft.data.report import DataReport, RowCounts
from megatron_srft.data.stream import PromptStream, choose_demonstration
from megatron_srft.data.usable import check_vocabulary, usable_prompts

__all__ = [
    "DataReport",
    "Dataset",
    "PromptStream",
    "RowCounts",
    "check_vocabulary",
    "choose_demonstration",
    "load_dataset",
    "load_problems",
    "read_records",
    "usable_prompts",
]
