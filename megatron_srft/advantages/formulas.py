"""Advantages of a group, and the training sequences made of it.

With rewards R of a group's members (its completions, and its demonstration where that counts as one):

    group           A_i = R_i - mean(R)                        GRPO (arXiv 2402.03300), SRFT eq. 7, LUFFY eq. 4
    leave_one_out   A_i = R_i - mean of the other members      RLOO (arXiv 2402.14740)
    none            A_i = R_i                                  REINFORCE++ (arXiv 2501.03262)
    gae             against a critic's values, see returns.py  PPO (arXiv 1707.06347)

divided by std(R) + std_epsilon under `normalize_std`. The standard deviation is the unbiased one (n - 1), as torch.std
and hence verl and LUFFY compute it; the papers do not say. A group of one, and a group of equal rewards, has
advantage exactly 0.

`normalize_batch` then subtracts the mean over all rollout tokens of the step and divides by their deviation.

Where a reward has a gamma below 1, or a value for every token, or a divergence is paid for (kl.place reward: the stream
-kl.coefficient * k(policy, reference) of every token), the tokens of a response have returns of their own,

    G_t = sum over rewards m and l >= 0 of weight_m gamma_m^l r_{m, t + l}         (arXiv 2502.03373, section 4.6)

with a reward of the whole response at its last token. Then A_{i,t} = G_{i,t} - b_i, where the baseline b_i takes the
mean return of a member in place of R, and the deviation is that of all returns about the group's mean; in both each
member counts once, whatever its length. Constant returns are rewards R, so this is the formula above.
"""

import math

import numpy as np

from megatron_srft.config import AdvantageConfig


def group_advantages(
    rewards: list[float], demonstration_reward: float | None, config: AdvantageConfig
) -> tuple[np.ndarray, float | None]:
    """Advantages of one group, from a resolved config.

    Args:
        rewards: one per completion.
        demonstration_reward: None when there is no demonstration or it has no score.

    Returns:
        ([completions] float64, the demonstration's advantage). The latter is None when the demonstration is no member:
        it has no reward, or the config leaves it out.
    """
    assert config.kind is not None and config.include_demonstration is not None, "use a resolved config"
    is_member = config.include_demonstration and demonstration_reward is not None
    members = np.array([*rewards, demonstration_reward] if is_member else rewards, dtype=np.float64)
    advantages = _centre(members, config)
    if is_member:
        return advantages[:-1], float(advantages[-1])
    return advantages, None


def _centre(members: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    if config.kind == "none":
        return members
    if len(members) < 2 or members.min() == members.max():
        return np.zeros(len(members))
    if config.kind == "group":
        advantages = members - members.mean()
    else:
        advantages = members - (members.sum() - members) / (len(members) - 1)
    if config.normalize_std:
        advantages = advantages / (members.std(ddof=1) + config.std_epsilon)
    return advantages


def centred_returns(members: list[np.ndarray], config: AdvantageConfig) -> list[np.ndarray]:
    """Advantages of the tokens of a group's members from their returns, from a resolved config."""
    assert config.kind is not None, "use a resolved config"
    if config.kind == "none":
        return members
    if len(members) < 2 or len(np.unique(np.concatenate(members))) == 1:
        return [np.zeros(len(member)) for member in members]
    means = np.array([member.mean() for member in members])
    if config.kind == "group":
        baselines = np.full(len(members), means.mean())
    else:
        baselines = (means.sum() - means) / (len(members) - 1)
    advantages = [member - baseline for member, baseline in zip(members, baselines, strict=True)]
    if config.normalize_std:
        squares = sum(np.mean((member - means.mean()) ** 2) for member in members)
        deviation = math.sqrt(squares / (len(members) - 1))
        advantages = [advantage / (deviation + config.std_epsilon) for advantage in advantages]
    return advantages
