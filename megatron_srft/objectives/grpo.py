"""Group relative policy optimisation: the clipped surrogate on rollouts, with group advantages.

    loss = - mean min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)  -  c * mean_t H_t
    r_t  = policy(y_t | x, y_<t) / policy before the step(y_t | x, y_<t)

GRPO: arXiv 2402.03300. DAPO (arXiv 2503.14476) is the preset with a higher upper clip and the mean over all tokens;
Dr.GRPO (arXiv 2503.20783) the one with the constant denominator and advantages without the standard deviation. Dual
clip (arXiv 1912.09729) bounds the ratio of negative advantages. PPO (arXiv 1707.06347) is the same surrogate with an
advantage for every token, against a critic's values (advantages/returns.py); the critic's loss is in value.py.

Demonstration rows contribute nothing. A KL term to a reference policy is added by kl.py.
"""

from megatron_srft.config import GrpoConfig, PpoConfig
from megatron_srft.objectives.terms import (
    ObjectiveInputs,
    ObjectiveOutput,
    clipped_surrogate,
    entropy_bonus,
    evaluate,
)
from megatron_srft.sample import Counts


def grpo(inputs: ObjectiveInputs, counts: Counts, config: GrpoConfig | PpoConfig) -> ObjectiveOutput:
    """This micro-batch's share of the loss of GRPO, or of PPO's policy."""
    terms = {
        "rollouts": clipped_surrogate(inputs, counts, config, dual_clip=config.dual_clip),
        "entropy_bonus": entropy_bonus("rollouts", counts, config.entropy_coefficient),
    }
    return evaluate(inputs, counts, terms, of_demonstrations=False, clips=True)
