"""LUFFY: rollouts and demonstrations in one policy-gradient loss; the demonstrations' probability is shaped.

    loss = - (1/Z) ( sum_demonstrations sum_t f(p_t) A  +  sum_rollouts sum_t r_t A )  -  c * mean_t H_t
    p_t  = policy(y_t | x, y_<t)        f(p) = p / (p + gamma)        r_t = p_t / p_t before the step

Equations 4-6 of arXiv 2504.14945. Z counts both populations together; A is the advantage over the group with its
demonstration. A demonstration has the behaviour probability 1 and is never clipped.

Follows the paper's runs rather than its equations: no clip on rollouts, a constant length in place of the token count,
no standard deviation in the advantage. Differs from the released code: it divides by the constant length but not by
the number of sequences and averages over ranks, so its loss scales with the cluster; here Z is the number of sequences
times the constant length, and the entropy mean runs over the whole update.
"""

from math import inf

from megatron_srft.config import LuffyConfig
from megatron_srft.objectives.terms import Mean, ObjectiveInputs, ObjectiveOutput, entropy_bonus, evaluate, mean_over
from megatron_srft.ops.token_losses import SHAPINGS, Term
from megatron_srft.sample import Counts


def luffy(inputs: ObjectiveInputs, counts: Counts, config: LuffyConfig) -> ObjectiveOutput:
    """This micro-batch's share of the LUFFY loss."""
    mean = mean_over("both", counts, Mean(config.denominator, config.constant_length))
    clip = inf if config.clip is None else config.clip
    terms = {
        "rollouts": Term(
            loss="clipped", rows="rollouts", advantages=inputs.advantages, clip_low=clip, clip_high=clip, **mean
        ),
        "demonstrations": Term(
            loss=SHAPINGS[config.shaping],
            rows="demonstrations",
            advantages=inputs.advantages,
            gamma=config.gamma,
            **mean,
        ),
        "entropy_bonus": entropy_bonus("both", counts, config.entropy_coefficient),
    }
    return evaluate(inputs, counts, terms, clips=config.clip is not None)
