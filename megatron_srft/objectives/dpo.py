"""Direct preference optimisation: a pair's chosen answer is to gain more over the reference than its rejected one.

    s       = sum_t (log p_t - log reference_t)   of an answer; its mean over the tokens where length-normalised
    margin  = s_chosen - s_rejected
    sigmoid:  - (1 - e) log sigma(beta margin)  -  e log sigma(-beta margin)          e: label_smoothing
    ipo:      (margin - 1 / (2 beta))^2
    loss    = mean of that over pairs  +  sft_coefficient * mean over pairs of the mean over tokens of -log p_chosen

Sigmoid is DPO (arXiv 2305.18290, eq. 7), with e the conservative form of its authors' note; length-normalised it is
Tulu 3's (2411.15124, eq. 6). ipo is eq. 17 of 2310.12036 with tau = beta. The last term is that of RPO (2404.19733).
Every mean is over the pairs of the whole update. The reference is the policy at the stage's start
(trainer/old_policy.py); where it is the current one, margins are 0 and the sigmoid loss is log 2.

All rows are of pairs, whose answers stand together, the chosen one first (data.packing.pair_units). There is no fused
op: the loss is not a sum over tokens. Sums run in row order, so that they are the same every time on every device.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_srft.config import DpoConfig
from megatron_srft.objectives.metrics import Metrics
from megatron_srft.objectives.terms import ObjectiveInputs, ObjectiveOutput, sums_by_sequence
from megatron_srft.sample import Counts


def dpo(inputs: ObjectiveInputs, counts: Counts, config: DpoConfig) -> ObjectiveOutput:
    """This micro-batch's share of the preference loss."""
    reference = inputs.logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
    ratios = inputs.logprobs - reference
    chosen, rejected = _by_pair(ratios / inputs.response_lengths if config.per_token else ratios, inputs)
    chosen_nll, rejected_nll = _by_pair(-inputs.logprobs / inputs.response_lengths, inputs)

    def mean(of_pairs: Tensor) -> Tensor:
        return of_pairs.sum() / max(counts.demonstration_sequences // 2, 1)

    preference = mean(_losses(chosen - rejected, config))
    likelihood = config.sft_coefficient * mean(chosen_nll)
    loss = preference + likelihood
    parts = {"loss/preference": preference, "loss/sft": likelihood} if config.sft_coefficient else {}
    chosen_entropy, rejected_entropy = _by_pair(inputs.entropy.detach() / inputs.response_lengths, inputs)
    chosen_logprob, rejected_logprob = _by_pair(inputs.logprobs.detach(), inputs)
    margin = config.beta * (chosen - rejected)
    metrics = {
        "loss": loss,
        **parts,
        "dpo/accuracy": mean((1 + margin.sign()) / 2),  # a tie, as at the start, counts one half
        "dpo/margin": mean(margin),
        "dpo/chosen_reward": config.beta * mean(chosen),
        "dpo/rejected_reward": config.beta * mean(rejected),
        "dpo/chosen_logprob": mean(chosen_logprob),
        "dpo/rejected_logprob": mean(rejected_logprob),
        "nll/chosen": mean(chosen_nll),
        "nll/rejected": mean(rejected_nll),
        "entropy/chosen": mean(chosen_entropy),
        "entropy/rejected": mean(rejected_entropy),
    }
    figures = torch.stack([value.detach() for value in metrics.values()])
    return ObjectiveOutput(loss=loss, metrics=Metrics(figures, {name: place for place, name in enumerate(metrics)}))


def _losses(margin: Tensor, config: DpoConfig) -> Tensor:
    """[pairs]."""
    if config.loss == "ipo":
        return (margin - 1 / (2 * config.beta)).square()
    right, wrong = logsigmoid(config.beta * margin), logsigmoid(-config.beta * margin)
    return -(1 - config.label_smoothing) * right - config.label_smoothing * wrong


def _by_pair(values: Tensor, inputs: ObjectiveInputs) -> tuple[Tensor, Tensor]:
    """Sums of the rows' values over each chosen answer, [pairs], and over each rejected one."""
    assert inputs.num_sequences % 2 == 0, "pairs have been torn apart"
    chosen, rejected = sums_by_sequence(values, inputs).view(inputs.num_sequences // 2, 2).unbind(1)
    return chosen, rejected
