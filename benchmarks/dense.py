"""Log-prob, entropy and gradients of dense softmax rows in float64, a block of rows at a time.

With p = softmax(x), of log p(label) + e H (e is 1 or 0): gradient by x_j = [j = label] - p_j - e p_j (log p_j + H).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHECKED_ROWS = 16
CHECKED_TOKENS = 512
BLOCK = 512


@dataclass
class Scores:
    logprobs: Tensor
    entropy: Tensor
    gradients: list[Tensor]
    """By the first rows of the logits; or by the first hidden states, and by the weight of the first tokens."""


def exact_scores(leaves: list[Tensor], labels: Tensor, with_entropy: bool) -> Scores:
    """Of logits on the first rows; of hidden states and weight on all rows, as the weight's gradient needs them."""
    if len(leaves) == 1:
        return _of_logits(leaves[0][:CHECKED_ROWS].detach().double(), labels[:CHECKED_ROWS], with_entropy)
    hidden, weight = (leaf.detach() for leaf in leaves)
    wide = weight.double()
    logprobs, entropy, by_hidden, by_weight = [], [], None, 0
    for start in range(0, len(hidden), BLOCK):
        own = hidden[start : start + BLOCK].double()
        block = _of_logits(own @ wide.t(), labels[start : start + BLOCK], with_entropy)
        logprobs.append(block.logprobs)
        entropy.append(block.entropy)
        by_logits = block.gradients[0]
        by_weight = by_weight + by_logits[:, :CHECKED_TOKENS].t() @ own
        by_hidden = by_logits[:CHECKED_ROWS] @ wide if by_hidden is None else by_hidden
    return Scores(torch.cat(logprobs), torch.cat(entropy), [by_hidden, by_weight])


def _of_logits(logits: Tensor, labels: Tensor, with_entropy: bool) -> Scores:
    logs = logits.log_softmax(dim=1)
    probabilities = logs.exp()
    entropy = -(probabilities * logs).sum(dim=1)
    hits = torch.zeros_like(logs).scatter_(1, labels[:, None], 1)
    gradient = hits - probabilities
    if with_entropy:
        gradient -= probabilities * (logs + entropy[:, None])
    return Scores(logs.gather(1, labels[:, None])[:, 0], entropy, [gradient])
