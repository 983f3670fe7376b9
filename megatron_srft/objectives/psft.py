"""Proximal supervised fine-tuning (PSFT): PPO's clipped ratio on demonstrations, each token with advantage 1.

    loss = - mean_t min(r_t, clip(r_t, 1 - clip, 1 + clip))  -  c * mean_t H_t        over the demonstrations' tokens
    r_t  = policy(y_t | x, y_<t) / old policy(y_t | x, y_<t)

arXiv 2508.17784. The gradient is that of -r_t log p_t where r_t <= 1 + clip and 0 beyond: with a positive advantage the
lower bound never acts, so there is no key for it. Where the old policy is the current one, r_t = 1, the loss is -1 and
the gradient is that of SFT; this is the warm-up, and every update under refresh_every 1.

Rollout rows contribute nothing. Which policy is the old one, and since when: trainer/old_policy.py. Differs from the
released code: the mean is over the tokens of the whole update, not of a micro-batch (docs/objectives.md).
"""

from math import inf

from megatron_srft.config import PsftConfig
from megatron_srft.objectives.terms import Mean, ObjectiveInputs, ObjectiveOutput, entropy_bonus, evaluate, mean_over
from megatron_srft.ops.token_losses import Term
from megatron_srft.sample import Counts


def psft(inputs: ObjectiveInputs, counts: Counts, config: PsftConfig) -> ObjectiveOutput:
    """This micro-batch's share of the PSFT loss."""
    terms = {
        "psft": Term(
            loss="clipped",
            rows="demonstrations",
            clip_high=inf if config.clip is None else config.clip,
            **mean_over("demonstrations", counts, Mean(config.denominator, config.constant_length)),
        ),
        "entropy_bonus": entropy_bonus("demonstrations", counts, config.entropy_coefficient),
    }
    clips = config.clip is not None
    return evaluate(inputs, counts, terms, of_rollouts=False, clips=clips, demonstration_ratios=True)
