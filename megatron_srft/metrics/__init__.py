"""One sink for the numbers of a run: metrics.jsonl always, a progress line, TensorBoard and W&B by option.

`step` is the number of training steps already behind the policy that was measured, counted over all stages of the run:
the first training step logs step 0, an evaluation before training logs step 0 too, one after the last of N steps logs
step N. docs/metrics.md lists the keys. Importing this folder needs the standard library only; rich, tensorboard and
wandb are imported when a sink that uses them is opened.
"""

from megatron_srft.metrics.lines import LINE_FIELDS, append_line, discard_from, is_training, read_lines, read_metrics
from megatron_srft.metrics.sink import MetricSink, NullSink, check_packages
from megatron_srft.metrics.timer import Timer

__all__ = [
    "LINE_FIELDS",
    "MetricSink",
    "NullSink",
    "Timer",
    "append_line",
    "check_packages",
    "discard_from",
    "is_training",
    "read_lines",
    "read_metrics",
]
