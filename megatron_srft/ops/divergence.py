"""Estimators of a divergence between two policies from the log-probs of one token.

    d = log policy(y_t) - log other(y_t)        k1 = d        k2 = d^2 / 2        k3 = exp(-d) - 1 + d

http://joschu.net/blog/kl-approx.html. On tokens that the policy itself has sampled, k1 and k3 are unbiased estimates of
KL(policy || other), and k2 is one to second order. Their gradients by the policy are another matter: the mean of k1 has
the gradient 0, that of k2 the gradient of KL(policy || other), and that of k3, 1 - exp(-d) by the log-prob, the one of
KL(other || policy). By the other, which has not sampled, the gradients of k1 and k3 are those of KL(policy || other).
"""

from torch import Tensor

from megatron_srft.ops.token_losses import LOG_RATIO_LIMIT


def divergence(logprobs: Tensor, other: Tensor, estimator: str) -> Tensor:
    """[tokens] k1, k2 or k3 of each token; d is clamped like the log-ratios of importance ratios."""
    d = (logprobs - other).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    match estimator:
        case "k1":
            return d
        case "k2":
            return d.square() / 2
        case "k3":
            return (-d).exp() - 1 + d
    raise AssertionError(estimator)
