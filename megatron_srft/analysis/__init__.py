"""The run report and the sample rollouts it shows.

Importing this folder is cheap; matplotlib is imported when a plot is drawn.
"""

from megatron_srft.analysis.report import write_report
from megatron_srft.analysis.samples import log_samples, read_samples

__all__ = ["log_samples", "read_samples", "write_report"]
