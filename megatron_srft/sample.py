"""What flows through one training step, in the order in which it is made.

    Prompt, Demonstration   data/       one problem and, for some, an expert's answer (or a Preference: two, ranked)
    Completion              rollout/    one sampled answer
    Score                   rewards/    what one answer earned, and how sure the verifier is
    Group                   rollout/    one prompt with its completions and its demonstration; scores added by rewards/
    TrainingSequence        advantages  one prompt + answer, ready to be packed
    PackedBatch             data/       one micro-batch: sequences laid end to end
    TokenStats              trainer/    log-prob and entropy of the response tokens

Legend for shapes: `tokens` packed tokens of a micro-batch, `rows` its response tokens (the only ones the LM head sees),
`sequences`, `response` tokens of one response. Log-probs are natural logarithms. Arrays of one sequence are numpy,
tensors of a micro-batch are torch.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Demonstration:
    """An expert's answer to a prompt, as tokens of the policy's tokenizer.

    Example: text="7+15=2#2", token_ids=[10, 4, 15, ..., 1] with 1 the end-of-sequence token.
    """

    token_ids: np.ndarray
    """[response] int32; ends with exactly one end-of-sequence token unless `truncated`."""

    text: str
    """The answer as written, without the end token; what the verifier reads."""

    truncated: bool = False
    """Cut at data.max_demonstration_tokens: it teaches tokens but never earns a reward."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Preference:
    """Two answers to one prompt, of which the first is the better one.

    Example: chosen.text="7+15=2#2", rejected.text="#5".
    """

    chosen: Demonstration
    rejected: Demonstration


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prompt:
    """One problem.

    Example: id="train/17", text="7+15=", token_ids=[7, 10, 1, 5, 11], answer="2", source="chains.jsonl".
    """

    id: str
    """Unique over the data files of a run."""

    text: str
    """The prompt as the model sees it, after templates, including data.generation_prefix."""

    token_ids: np.ndarray
    """[prompt tokens] int32."""

    answer: str | None
    """Reference answer for the verifier; None when the row has none (SFT)."""

    source: str
    """Data file (or the row's own data_source) it came from; metrics are reported per source."""

    response_prefix: str = ""
    """data.generation_prefix: the part of the response that already stands in the prompt."""

    demonstrations: tuple[Demonstration, ...] = ()
    """The row's demonstrations; a step uses one of them, chosen by (seed, step)."""

    preference: Preference | None = None
    """The row's pair of answers; only in a stage that learns from preferences, where no prompt has demonstrations."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Completion:
    """One sampled answer.

    Example: token_ids=[2, 14, 1], rollout_logprobs=[-0.1, -0.7, -0.02], finish_reason="stop", policy_version=12.
    """

    token_ids: np.ndarray
    """[response] int32; with the end-of-sequence token when the model produced it, nothing after it."""

    text: str
    """Decoded response without special tokens."""

    rollout_logprobs: np.ndarray
    """[response] float32; the engine's log-probs of the sampled tokens under softmax(logits / temperature), before
    top-p and top-k. The engine computed them, so they may differ from the trainer's by rounding."""

    finish_reason: Literal["stop", "length"]
    """stop: end token or stop string. length: cut at max_response_tokens."""

    policy_version: int
    """Optimizer updates behind the weights that sampled it."""

    hidden_score: float | None = None
    """What a reward head read off the hidden states while the engine decoded, a logit; None without a head in the
    engine, and for a response that has no token to score."""

    hidden_head: str | None = None
    """`hidden_reward.head_fingerprint` of that head; None without one in the engine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What one answer earned.

    Example: reward=1.0, streams={"math": 1.0}, correct=True, status="verified".
    """

    reward: float
    """Weighted sum of the streams."""

    streams: dict[str, float] = field(default_factory=dict)
    """Each reward before its weight, by name; the sum over the tokens of a dense one."""

    dense: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """The streams that reward every token: [response] values each, before the weight."""

    correct: bool | None = None
    """The verifier's verdict; None when there is no verifier or it failed."""

    status: Literal["verified", "no_answer", "unverifiable", "timeout", "crash"] = "verified"
    """verified: a verdict was reached. no_answer: nothing to extract from the response (counts as wrong).
    unverifiable: the reference answer cannot be parsed. timeout, crash: the verifier failed."""

    answer: str | None = None
    """The final answer found in the text, in canonical form ("1/2" for \\frac{1}{2}); what majority@k counts."""

    @property
    def is_judged(self) -> bool:
        """Whether a verdict was reached; otherwise the reward is that of a wrong answer for want of a better one."""
        return self.status in ("verified", "no_answer")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Group:
    """One prompt, its completions, its demonstration. Scores are None until rewards/ has filled them in."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    demonstration: Demonstration | None = None
    scores: tuple[Score, ...] | None = None
    """One per completion."""
    demonstration_score: Score | None = None
    """None without a demonstration, and for a truncated one."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingSequence:
    """Prompt + answer of one member of a group, with everything the objective will need.

    Example: token_ids=[7, 10, 1, 5, 11, 2, 1], prompt_length=5, advantages=[0.5, 0.5], group=3.
    """

    token_ids: np.ndarray
    """[prompt + response] int32."""

    prompt_length: int
    """Tokens of the prompt; the rest is the response."""

    is_demonstration: bool

    advantages: np.ndarray
    """[response] float32."""

    correct: bool
    """The verifier's verdict; False also where it failed."""

    group: int
    """Index of the group within the step."""

    preferred: bool | None = None
    """Whether it is the chosen one of a pair, which comes before the rejected one; None outside pairs. Both are
    demonstrations of the same group."""

    rollout_logprobs: np.ndarray | None = None
    """[response] float32; None for demonstrations."""

    old_logprobs: np.ndarray | None = None
    """[response] float32; log-probs before the step: the trainer's, or with parity.old_logprobs engine those of the
    engine on rollouts. None: use the current ones (first update)."""

    policy_logprobs: np.ndarray | None = None
    """[response] float32; the trainer's log-probs before the step, where they have been measured."""

    reference_logprobs: np.ndarray | None = None
    """[response] float32; the reference policy's log-probs; None unless something is held near it."""

    values: np.ndarray | None = None
    """[response] float32; the critic's value before each response token; None without a critic."""

    returns: np.ndarray | None = None
    """[response] float32; what the critic is to predict; None without a critic."""

    pooled_entropy: float | None = None
    """Entropy before the step, averaged over the sequence's group or the whole batch; only for objectives that ask."""

    hidden_score: float | None = None
    """What a reward head read off the hidden states before the step, a logit; None without one, and for a response that
    has no token to score."""

    @property
    def response_length(self) -> int:
        return len(self.token_ids) - self.prompt_length


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedBatch:
    """One micro-batch: sequences laid end to end, padding as a last sequence without rows.

    Example of two sequences, prompt+response of lengths 2+1 and 1+2, padded to 8 tokens:
        token_ids  = [5, 6, 9,  5, 7, 1,  0, 0]     cu_seqlens = [0, 3, 6, 8]
        rows       = [1, 3, 4]   (position p predicts token p + 1)
        labels     = [9, 7, 1]   sequence = [0, 1, 1]
    """

    token_ids: torch.Tensor
    """[tokens] int64."""

    position_ids: torch.Tensor
    """[tokens] int64, starting at 0 in each sequence."""

    cu_seqlens: torch.Tensor
    """[sequences + 1] int32; boundaries, the padding's included."""

    rows: torch.Tensor
    """[rows] int64; positions whose next token is a response token."""

    labels: torch.Tensor
    """[rows] int64; that next token."""

    sequence: torch.Tensor
    """[rows] int64; index of the row's sequence in this micro-batch."""

    is_demonstration: torch.Tensor
    """[rows] bool."""

    advantages: torch.Tensor
    """[rows] float32."""

    correct: torch.Tensor
    """[rows] bool."""

    response_lengths: torch.Tensor
    """[rows] float32; response tokens of the row's sequence."""

    rollout_logprobs: torch.Tensor
    """[rows] float32; 0 on demonstrations."""

    old_logprobs: torch.Tensor | None
    """[rows] float32; None: the objective uses the current log-probs, detached."""

    reference_logprobs: torch.Tensor | None
    """[rows] float32; the reference policy's; None unless the loss holds the policy near it."""

    values: torch.Tensor | None
    """[rows] float32; the critic's values before the step; None without a critic."""

    returns: torch.Tensor | None
    """[rows] float32; what the critic is to predict; None without a critic."""

    group: torch.Tensor
    """[rows] int64; index of the row's group within the step."""

    pooled_entropy: torch.Tensor | None
    """[rows] float32; None unless the objective pools entropy over groups or the batch."""

    sequence_ids: tuple[int, ...]
    """For each sequence (without the padding), its index in the step's list of TrainingSequence."""

    reference_hidden: torch.Tensor | None = None
    """[own rows, hidden] the reference's last hidden states, at the rows of this context rank's tokens; None unless its
    whole distribution is asked for."""

    def to(self, device: torch.device) -> "PackedBatch":
        """The same micro-batch with its tensors on `device`."""
        values = {name: getattr(self, name) for name in self.__slots__}
        tensors = {n: v.to(device, non_blocking=True) for n, v in values.items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Sizes of the token populations of one optimizer update, over all micro-batches and ranks."""

    rollout_tokens: int
    rollout_sequences: int
    demonstration_tokens: int
    demonstration_sequences: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenStats:
    """Statistics of the next-token distribution at temperature T, at the response rows."""

    logprobs: torch.Tensor
    """[rows] float32; log-prob of the label."""

    entropy: torch.Tensor
    """[rows] float32; entropy in nats, over the valid vocabulary."""

    reference_kl: torch.Tensor | None = None
    """[rows] float32; divergence between this distribution and the reference's, in nats; None unless asked for."""


def count(sequences: list[TrainingSequence]) -> Counts:
    """Count the response tokens and sequences of each population."""
    demonstrations = [s for s in sequences if s.is_demonstration]
    rollouts = [s for s in sequences if not s.is_demonstration]
    return Counts(
        rollout_tokens=sum(s.response_length for s in rollouts),
        rollout_sequences=len(rollouts),
        demonstration_tokens=sum(s.response_length for s in demonstrations),
        demonstration_sequences=len(demonstrations),
    )
