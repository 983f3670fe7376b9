"""The hidden-state reward as one stream of a run: scores measured with the log-probs, merged into the groups' rewards.

heads    read and checked before anything is trained
stream   what a run does with its reward head, stage by stage
merge    scores as one more stream of the groups
watch    the head against the verifier: figures of a step, and a warning
window   the latest judged completions
refresh  training the head on, on them
"""

from megatron_srft.hidden_stream.heads import read_heads, remarks
from megatron_srft.hidden_stream.stream import HiddenStream

__all__ = ["HiddenStream", "read_heads", "remarks"]
