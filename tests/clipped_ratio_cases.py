"""Random rows and lists of terms for the tests of clipped_ratio, and their losses by independent formulas."""

import torch

from megatron_srft.ops import implementations
from megatron_srft.ops.clipped_ratio import MAX_TERMS, Term, clipped_ratio


def batch(rows: int, *, dtype=torch.float64, seed: int = 0, spread: float = 0.4, demonstrations: float = 0.4) -> dict:
    """Random rows; old, engine and importance weights given."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return (low + (high - low) * torch.rand(rows, generator=generator, dtype=torch.float64)).to(torch.float32)

    logprobs = uniform(-6, -0.01)
    old = logprobs + spread * torch.randn(rows, generator=generator)
    engine = old + 0.1 * torch.randn(rows, generator=generator)
    is_demonstration = torch.rand(rows, generator=generator) < demonstrations
    gap = torch.where(is_demonstration, 0, (old - engine).double())
    values = {
        "logprobs": logprobs, "entropy": uniform(0.05, 4), "old_logprobs": old, "engine_logprobs": engine,
        "response_lengths": uniform(1, 50).round(), "importance_weights": gap.exp().clamp(max=1.1),
        "advantages": torch.randn(rows, generator=generator).to(torch.float32), "weights": uniform(0.1, 2),
    }  # fmt: skip
    return {name: value.to(dtype) for name, value in values.items()} | {"is_demonstration": is_demonstration}


def by_hand(rows: dict, term: Term, logprobs, entropy):
    """[rows] a term's losses, by the papers' formulas and nothing else."""
    advantages = 1.0 if term.advantages is None else term.advantages
    ratio = torch.exp(torch.clamp(logprobs - rows["old_logprobs"], -20, 20))
    match term.loss:
        case "nll":
            losses = -logprobs
        case "logprob":
            losses = -advantages * logprobs
        case "clipped":
            bounds = 1 - term.clip_low, 1 + term.clip_high
            surrogate = torch.minimum(ratio * advantages, ratio.clamp(*bounds) * advantages)
            if term.dual_clip is not None:
                bounded = torch.maximum(surrogate, term.dual_clip * torch.as_tensor(advantages, dtype=ratio.dtype))
                surrogate = torch.where(torch.as_tensor(advantages) < 0, bounded, surrogate)
            losses = -surrogate
        case "probability":
            losses = -advantages * torch.exp(logprobs)
        case "shaped":
            losses = -advantages * torch.exp(logprobs) / (torch.exp(logprobs) + term.gamma)
        case "entropy":
            losses = -entropy
        case "power":
            losses = -advantages * torch.pow(torch.exp(logprobs), term.gamma)
        case "blended":
            losses = -advantages * (torch.exp(logprobs) + term.gamma * logprobs)
    factors = term.scale * torch.ones_like(logprobs)
    if term.weights is not None:
        factors = factors * term.weights
    if term.per_length:
        factors = factors / rows["response_lengths"]
    if term.corrected:
        factors = factors * rows["importance_weights"]
    demonstration = rows["is_demonstration"]
    positive = torch.as_tensor(advantages) > 0
    chosen = {
        "rollouts": ~demonstration,
        "demonstrations": demonstration,
        "both": demonstration | ~demonstration,
        "positive_rollouts": ~demonstration & positive,
        "other_rollouts": ~demonstration & ~positive,
    }[term.rows]
    return torch.where(chosen, factors * losses, 0)


def expected(rows: dict, terms: list[Term]):
    """(loss of each term, gradient by log-prob, gradient by entropy) by autograd."""
    logprobs, entropy = (rows[name].clone().requires_grad_() for name in ("logprobs", "entropy"))
    losses = torch.stack([by_hand(rows, term, logprobs, entropy).sum() for term in terms])
    gradients = torch.autograd.grad(losses.sum(), (logprobs, entropy), allow_unused=True, materialize_grads=True)
    return losses.detach(), *gradients


def call(rows: dict, terms: list[Term], *, upstream: float = 1.0, implementation=None, **changes):
    """(loss, gradient by log-prob, gradient by entropy, figures) of the op."""
    given = {
        name: value for name, value in (rows | changes).items() if name not in ("advantages", "weights")
    }  # fmt: skip
    leaves = {name: given.pop(name).clone().requires_grad_() for name in ("logprobs", "entropy")}
    sizes = int((~rows["is_demonstration"]).sum()), int(rows["is_demonstration"].sum())
    loss, figures = clipped_ratio(**leaves, terms=terms, tokens=sizes, implementation=implementation, **given)
    (loss * upstream).backward()
    return loss.detach(), leaves["logprobs"].grad, leaves["entropy"].grad, figures


def terms_of(rows: dict) -> dict[str, list[Term]]:
    """Lists of terms that between them use every loss, population, clip and factor."""
    a, w = rows["advantages"], rows["weights"]
    return {
        "nll": [Term(loss="nll", rows="demonstrations", scale=0.01, weights=w)],
        "grpo": [Term(loss="clipped", rows="rollouts", scale=0.01, advantages=a, clip_low=0.2, clip_high=0.28)],
        "dual clip": [
            Term(loss="clipped", rows="both", scale=0.02, advantages=a, clip_low=0.1, clip_high=0.2, dual_clip=1.5)
        ],
        "ratio": [Term(loss="clipped", rows="rollouts", scale=0.1, advantages=a, per_length=True)],
        "psft": [Term(loss="clipped", rows="demonstrations", scale=0.01, clip_high=0.28, clip_low=0.2)],
        "luffy": [
            Term(loss="clipped", rows="rollouts", scale=0.01, advantages=a),
            Term(loss="shaped", rows="demonstrations", scale=0.01, advantages=a, gamma=0.3, corrected=False),
        ],
        "shapings": [
            Term(loss="power", rows="demonstrations", scale=0.02, advantages=a, gamma=0.5, per_length=True),
            Term(loss="power", rows="rollouts", scale=0.03, advantages=a, weights=w, gamma=1.5, corrected=False),
            Term(loss="blended", rows="demonstrations", scale=0.04, advantages=a, gamma=0.3),
            Term(loss="blended", rows="both", scale=0.05, weights=w, gamma=1.0),
        ],
        "srft": [
            Term(loss="nll", rows="demonstrations", scale=0.02, weights=w),
            Term(loss="probability", rows="demonstrations", scale=0.03, advantages=a, per_length=True),
            Term(loss="logprob", rows="positive_rollouts", scale=0.04, advantages=a, weights=w, corrected=False),
            Term(loss="clipped", rows="other_rollouts", scale=0.05, advantages=a, weights=w, per_length=True),
            Term(loss="entropy", rows="both", scale=0.001, corrected=False),
        ],
        "entropy": [Term(loss="entropy", rows="rollouts", scale=0.3, weights=w, per_length=True)],
        "many": [Term(loss="clipped", rows="both", scale=0.1 * i, advantages=i * a) for i in range(MAX_TERMS)],
    }  # fmt: skip


CASES = list(terms_of(batch(1)))


def tolerances(dtype):
    return dict(rtol=1e-12, atol=1e-15) if dtype == torch.float64 else dict(rtol=5e-6, atol=1e-7)


def check(rows: dict, terms: list[Term], implementation: str):
    """The op's losses and gradients on `rows` against float64 autograd on the same numbers."""
    exact = {name: value.double() if value.is_floating_point() else value for name, value in rows.items()}
    exact_terms = [replaced(term, torch.float64) for term in terms]
    losses, by_logprob, by_entropy = expected(exact, exact_terms)
    loss, logprob_gradient, entropy_gradient, figures = call(rows, terms, upstream=-2.0, implementation=implementation)
    close = tolerances(loss.dtype)
    of_terms = torch.stack([figures_of_term["loss"] for figures_of_term in figures.terms])
    size = exact["logprobs"].shape[0] ** 0.5 + 1  # rounding errors add up like a random walk
    torch.testing.assert_close(of_terms.double(), losses, rtol=close["rtol"], atol=close["atol"] * size)
    torch.testing.assert_close(loss.double(), losses.sum(), rtol=close["rtol"], atol=close["atol"] * size)
    torch.testing.assert_close(logprob_gradient.double(), -2 * by_logprob, **close)
    if any(term.loss == "entropy" for term in terms):
        torch.testing.assert_close(entropy_gradient.double(), -2 * by_entropy, **close)
    else:
        assert entropy_gradient is None


def replaced(term: Term, dtype: torch.dtype) -> Term:
    values = {name: getattr(term, name) for name in term.__slots__}
    return Term(**{n: v.to(dtype) if isinstance(v, torch.Tensor) else v for n, v in values.items()})


def arguments_of(rows: dict, terms: list[Term]) -> tuple:
    """What the op itself is called with."""
    seen = []
    kernel = implementations.kernel
    implementations.kernel = lambda *names: lambda *arguments: (seen.append(arguments), kernel(*names)(*arguments))[1]
    try:
        call(rows, terms, implementation="reference")
    finally:
        implementations.kernel = kernel
    return tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in seen[0])
