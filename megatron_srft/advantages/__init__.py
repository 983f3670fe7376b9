"""From scored groups to training sequences with an advantage for every token, and the figures of a step's groups.

sequences.py    what the step trains on, and where each token's advantage comes from
formulas.py     advantages of a group from rewards, or from returns of tokens
returns.py      discounted returns of tokens
statistics.py   what the groups looked like
"""

from megatron_srft.advantages.formulas import group_advantages
from megatron_srft.advantages.sequences import to_sequences, with_advantages
from megatron_srft.advantages.statistics import group_statistics

__all__ = ["group_advantages", "group_statistics", "to_sequences", "with_advantages"]
