"""Which metrics stand in which plot of the report; keys that no plot names get one of their own at the end."""

from dataclasses import dataclass

from megatron_srft.analysis.plots import Panel
from megatron_srft.analysis.runs import Run, Series


@dataclass(frozen=True, kw_only=True)
class PanelPlan:
    """A plot before its values are known."""

    title: str
    unit: str
    keys: tuple[str, ...]
    """Metric keys; one that ends in / takes every key that starts with it and was not named by an earlier plot."""
    kind: str = "lines"
    note: str = ""


SECTIONS: dict[str, tuple[PanelPlan, ...]] = {
    "Reward and accuracy": (
        PanelPlan(
            title="Accuracy",
            unit="share correct",
            keys=("accuracy", "demonstration_solved"),
            note="Rollouts the verifier called right, and demonstrations it called right.",
        ),
        PanelPlan(title="Reward", unit="reward", keys=("reward/",), note="Mean over the step's rollouts."),
        PanelPlan(
            title="Reward of right and of wrong answers",
            unit="reward",
            keys=("reward_correct/", "reward_wrong/"),
            note="Mean of each stream over the rollouts the verifier called right, and over the others.",
        ),
        PanelPlan(
            title="Spread of rewards",
            unit="standard deviation",
            keys=("reward_std/",),
            note="Of each stream over the step's rollouts.",
        ),
        PanelPlan(
            title="Held-out accuracy",
            unit="share correct",
            keys=("eval/",),
            note="The first metric of each evaluation file; the table above has them all.",
        ),
        PanelPlan(
            title="Groups without contrast",
            unit="share of groups",
            keys=("groups/",),
            note="A group whose rewards are all equal gives a group advantage of zero.",
        ),
    ),
    "Hidden-state reward": (
        PanelPlan(
            title="Scores of right and of wrong answers",
            unit="logit",
            keys=("swift/score_correct", "swift/score_wrong", "swift/score"),
            note="Means over the step's rollouts, before normalisation and weight.",
        ),
        PanelPlan(
            title="Does the head tell right from wrong?",
            unit="share or correlation",
            keys=("swift/auroc", "swift/correlation"),
            note="AUROC within groups (chance: 0.5), correlation with the verdict (chance: 0). A fall while the reward "
            "rises is a policy that pleases its head.",
        ),
        PanelPlan(
            title="Age of the head",
            unit="optimizer updates",
            keys=("swift/staleness",),
            kind="exact",
            note="Since the weights that it was trained for; a refresh starts it anew.",
        ),
        PanelPlan(title="Loss of the head's refresh", unit="loss", keys=("swift/refresh_loss",)),
        PanelPlan(title="Responses without a score", unit="share of responses", keys=("swift/unscored_share",)),
    ),
    "Entropy and SRFT weights": (
        PanelPlan(
            title="Entropy of the policy",
            unit="nats per token",
            keys=("entropy/rollouts", "entropy/demonstrations", "entropy/"),
            note="Mean over the response tokens of each population, before the update.",
        ),
        PanelPlan(
            title="Entropy-aware weights",
            unit="weight",
            keys=("weight/rl", "weight/sft", "weight/"),
            note="sft multiplies the demonstrations' likelihood term, rl the positive rollouts.",
        ),
        PanelPlan(
            title="Largest weight of a token", unit="weight", keys=("weight_rl/max", "weight_sft/max"), kind="log"
        ),
    ),
    "Loss": (
        PanelPlan(title="Total loss", unit="loss", keys=("loss",)),
        PanelPlan(
            title="Loss terms", unit="loss", keys=("loss/",), note="Each with its weight: the total is their sum."
        ),
        PanelPlan(
            title="Negative log-likelihood",
            unit="nats per token",
            keys=("nll/rollouts", "nll/demonstrations", "nll/"),
            note="Response tokens, unweighted.",
        ),
    ),
    "Preference pairs": (
        PanelPlan(
            title="Rewards of chosen and rejected answers",
            unit="beta times log-ratio",
            keys=("dpo/chosen_reward", "dpo/rejected_reward", "dpo/margin"),
            note="Against the policy that the stage began with.",
        ),
        PanelPlan(title="Pairs in the right order", unit="share of pairs", keys=("dpo/accuracy",)),
        PanelPlan(
            title="Log-prob of chosen and rejected answers",
            unit="nats per answer",
            keys=("dpo/chosen_logprob", "dpo/rejected_logprob"),
        ),
    ),
    "Length": (
        PanelPlan(
            title="Response length",
            unit="tokens",
            keys=("response_length/mean", "response_length/max", "response_length/stopped/mean"),
            note="stopped: responses that ended by themselves.",
        ),
        PanelPlan(title="Cut at the length limit", unit="share of responses", keys=("truncated_share",)),
    ),
    "Policy change": (
        PanelPlan(
            title="Clipped tokens",
            unit="share of tokens",
            keys=("clip_fraction/",),
            note="Tokens whose gradient the lower or the upper clip removed; rollouts, or PSFT's demonstrations.",
        ),
        PanelPlan(
            title="Importance ratio",
            unit="ratio",
            keys=("ratio/mean", "ratio/max", "ratio/demonstrations", "ratio_demonstrations/max"),
        ),
        PanelPlan(
            title="Distance from the reference policy",
            unit="nats per token",
            keys=("kl/reference_k1", "kl/reference_k3"),
            note="Two estimates of the divergence from the policy that kl holds this one near.",
        ),
        PanelPlan(
            title="Distance from the sampling policy",
            unit="nats per token",
            keys=("kl/",),
            note="Two estimates of the same KL divergence; k3 is never negative.",
        ),
    ),
    "Critic": (
        PanelPlan(
            title="Values and returns",
            unit="reward",
            keys=("value/mean", "value/return"),
            note="Means over the tokens of the step's rollouts; values from before the step.",
        ),
        PanelPlan(
            title="Explained variance",
            unit="share of variance",
            keys=("value/explained_variance",),
            note="1: the values are the returns. 0: no better than a constant.",
        ),
        PanelPlan(title="Loss of the critic", unit="loss", keys=("value/loss",)),
        PanelPlan(title="Clipped values", unit="share of tokens", keys=("value/clip_fraction",)),
    ),
    "Trainer against rollout engine": (
        PanelPlan(
            title="Mismatch of log-probs",
            unit="nats",
            keys=("mismatch/mean", "mismatch/k3", "mismatch/max"),
            kind="log",
            note="Same tokens, same weights, two implementations.",
        ),
        PanelPlan(title="Corrected tokens", unit="share of tokens", keys=("mismatch/corrected_share",)),
        PanelPlan(
            title="Parity gate",
            unit="nats",
            keys=("parity/mean_difference", "parity/max_difference", "parity/kl"),
            kind="log",
        ),
        PanelPlan(title="Parity gate: importance ratio", unit="ratio", keys=("parity/",)),
    ),
    "Optimizer": (
        PanelPlan(title="Gradient norm", unit="norm before clipping", keys=("grad_norm", "value/grad_norm")),
        PanelPlan(title="Learning rate", unit="learning rate", keys=("lr", "value/lr"), kind="exact"),
    ),
    "Time": (
        PanelPlan(title="Seconds per stage", unit="seconds", keys=("time/",), kind="stacked"),
        PanelPlan(title="Throughput", unit="tokens per second", keys=("tokens/s",)),
    ),
}

HIDDEN = (
    "time/step",
    "ranks",
    "accounting/",
    "count/",
    "response_length/",
    "swift/auroc_groups",
    "swift/refresh_responses",
)
"""Keys that get no plot of their own: they stand in tables or the settings, or repeat what a plot shows."""


def sections(run: Run) -> dict[str, tuple[list[Panel], list[str]]]:
    """Section title -> (its plots, the keys of the plots that the run logged nothing for)."""
    free = [key for key in run.keys() if run.series(key)]
    primary = {f"eval/{file}/{next(iter(metrics))}" for file, metrics in run.evaluations().items()}
    free = [key for key in free if not key.startswith("eval/") or key in primary]
    filled: dict[str, tuple[list[Panel], list[str]]] = {}
    for title, plans in SECTIONS.items():
        panels, missing = [], []
        for plan in plans:
            keys = [key for wanted in plan.keys for key in _take(free, wanted) if key not in HIDDEN]
            if keys:
                panels.append(_panel(run, plan, keys))
            else:
                missing += [wanted + "*" * wanted.endswith("/") for wanted in plan.keys]
        filled[title] = (panels, missing)
    for hidden in HIDDEN:
        _take(free, hidden)
    rest = [_panel(run, PanelPlan(title=key, unit="value", keys=(key,)), [key]) for key in free]
    return filled | ({"Other metrics": (rest, [])} if rest else {})


def _matches(keys: list[str], wanted: str) -> list[str]:
    return [key for key in keys if key == wanted or (wanted.endswith("/") and key.startswith(wanted))]


def _take(free: list[str], wanted: str) -> list[str]:
    taken = _matches(free, wanted)
    free[:] = [key for key in free if key not in taken]
    return taken


def _untimed(run: Run, keys: list[str]) -> dict[str, Series]:
    """What the step took beyond its timed stages, under the name `other`, so that the stack is as high as the step."""
    stages = [dict(run.series(key)) for key in keys]
    rest = [(s, max(whole - sum(t.get(s, 0.0) for t in stages), 0.0)) for s, whole in run.series("time/step")]
    return {"other": rest} if rest else {}


def _panel(run: Run, plan: PanelPlan, keys: list[str]) -> Panel:
    lines = {key: run.series(key) for key in keys}
    if plan.kind == "stacked":
        lines |= _untimed(run, keys)
    return Panel(title=plan.title, unit=plan.unit, lines=lines, kind=plan.kind, note=plan.note)
