"""The typed tree of one run, and the loader that fills it from YAML and `key.path=value` overrides.

A value comes from the field's default, then the file, then the command line; the later one wins. Unknown keys, wrong
types and impossible combinations raise `ConfigError` with the key and the remedy. Importing this module needs neither
torch nor megatron, so `--help`, `--dry-run` checks and editors stay fast.

`None` in an objective's or the advantage's field means "what the chosen preset publishes"; `RunConfig.resolved()`
replaces every such `None`, and the resolved tree is what a run writes into its folder.
"""

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

STRICT = pydantic.ConfigDict(extra="forbid", str_strip_whitespace=False)


class ConfigError(ValueError):
    """A mistake in the user's configuration; the message names the key and says what to do."""


def section(cls):
    """Make `cls` a frozen keyword-only dataclass whose unknown keys pydantic refuses."""
    cls.__pydantic_config__ = STRICT
    return dataclass(frozen=True, kw_only=True)(cls)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


# ---------------------------------------------------------------- model and layout


@section
class ModelConfig:
    path: str = ""
    """Hugging Face folder to start from (config.json, *.safetensors, tokenizer files)."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the trained parameters and activations. bfloat16 keeps float32 master weights in the optimizer."""

    trust_remote_code: bool = False
    """Let transformers run Python code found in the model folder. Off unless you trust its author."""


@section
class ParallelConfig:
    tensor: int = 1
    """Tensor-parallel size: every weight matrix is cut over this many ranks."""

    pipeline: int = 1
    """Pipeline-parallel size: the layers are cut into this many stages."""

    virtual_pipeline: int | None = None
    """Model chunks per pipeline stage (interleaved schedule). Needs pipeline > 1."""

    sequence_parallel: bool = False
    """Also cut the norm and residual activations along the sequence, over the tensor-parallel ranks."""

    distributed_optimizer: bool = True
    """Shard the optimizer state over the data-parallel ranks."""

    overlap_communication: bool = False
    """Overlap gradient reduction with the backward pass."""

    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: selective recomputes core attention, full recomputes every layer."""

    def __post_init__(self):
        require(self.tensor >= 1, "parallel.tensor must be at least 1")
        require(self.pipeline >= 1, "parallel.pipeline must be at least 1")
        require(
            self.virtual_pipeline is None or (self.virtual_pipeline >= 2 and self.pipeline > 1),
            "parallel.virtual_pipeline must be at least 2 and needs parallel.pipeline > 1; leave it null otherwise",
        )
        require(
            not self.sequence_parallel or self.tensor > 1,
            "parallel.sequence_parallel needs parallel.tensor > 1; set it to false",
        )

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline


@section
class OptimizerConfig:
    lr: float = 1e-6
    """Peak learning rate of AdamW."""

    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay after the warm-up, over the steps of the stage."""

    warmup_steps: int = 0
    """Steps of linear warm-up from zero."""

    min_lr_ratio: float = 0.0
    """The decay ends at lr * min_lr_ratio."""

    adam_beta1: float = 0.9
    """AdamW's first decay rate."""

    adam_beta2: float = 0.999
    """AdamW's second decay rate."""

    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""

    weight_decay: float = 0.01
    """Decoupled weight decay; biases and norm weights are exempt, as in Megatron."""

    clip_grad: float = 1.0
    """Global gradient-norm clip; 0 switches it off."""

    def __post_init__(self):
        require(self.lr >= 0, "optimizer.lr must not be negative")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps must not be negative")
        require(0 <= self.min_lr_ratio <= 1, "optimizer.min_lr_ratio must lie between 0 and 1")
        require(self.clip_grad >= 0, "optimizer.clip_grad must not be negative; 0 switches clipping off")


# ---------------------------------------------------------------- data and batches


@section
class DataConfig:
    train: tuple[str, ...] = ()
    """JSONL or parquet files with prompts, answers and optional demonstrations; rows are concatenated in this order."""

    demonstrations: tuple[str, ...] = ()
    """Optional extra files whose demonstrations are joined to the prompts of `train` by id."""

    prompt_key: str | None = None
    """Field with the prompt (a string or a list of chat messages). null: `prompt`, then `problem`, then `question`."""

    answer_key: str | None = None
    """Field with the reference answer. null: `answer`, then `reward_model.ground_truth` (verl)."""

    demonstration_key: str | None = None
    """Field with the demonstration(s). null: `demonstration`, then `demonstrations`, then `target` (LUFFY)."""

    system_prompt: str | None = None
    """Put before every chat prompt that does not bring its own system message."""

    prompt_template: str | None = None
    """Python format string with one field, {prompt}, applied to string prompts, e.g. '{prompt}\\nAnswer:'."""

    chat_template: Literal["auto", "always", "never"] = "auto"
    """Render prompts with the tokenizer's chat template. auto: when the tokenizer has one."""

    generation_prefix: str = ""
    """Text that starts every response (for example '<think>\\n'); it becomes part of the prompt and is stripped from
    the front of demonstrations."""

    max_prompt_tokens: int = 1024
    """Longest prompt, in tokens."""

    overlong_prompts: Literal["drop", "truncate_left", "error"] = "drop"
    """What to do with a longer prompt; the count is reported."""

    max_demonstration_tokens: int | None = None
    """Longest demonstration, in tokens, with its end-of-sequence token. null: rollout.max_response_tokens."""

    overlong_demonstrations: Literal["drop", "truncate", "error"] = "drop"
    """What to do with a longer demonstration. A truncated one has no end token and never receives a reward."""

    require_demonstration: bool = False
    """Leave out prompts without a demonstration."""

    shuffle: bool = True
    """Visit the prompts in a new random order each epoch, a function of (seed, epoch)."""

    def __post_init__(self):
        require(self.max_prompt_tokens >= 1, "data.max_prompt_tokens must be at least 1")
        require(
            self.prompt_template is None or self.prompt_template.count("{prompt}") == 1,
            "data.prompt_template must contain {prompt} exactly once",
        )


@section
class BatchConfig:
    prompts_per_step: int = 128
    """Prompts drawn for one step, over all ranks."""

    rollouts_per_prompt: int = 8
    """Completions sampled for each prompt. The demonstration, where there is one, comes on top."""

    tokens_per_microbatch: int = 8192
    """Token budget of one packed micro-batch; a longer single sequence gets a micro-batch of its own."""

    updates_per_step: int = 1
    """Optimizer updates made from one step's rollouts, each over its own share of the prompts."""

    def __post_init__(self):
        for key in ("prompts_per_step", "rollouts_per_prompt", "tokens_per_microbatch", "updates_per_step"):
            require(getattr(self, key) >= 1, f"batch.{key} must be at least 1")
        require(
            self.prompts_per_step % self.updates_per_step == 0,
            "batch.prompts_per_step must be a multiple of batch.updates_per_step",
        )


# ---------------------------------------------------------------- rollout and rewards


@section
class SamplingConfig:
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy (evaluation only)."""

    top_p: float = 1.0
    """Nucleus sampling: keep the smallest set of tokens with this much probability."""

    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""

    max_response_tokens: int = 1024
    """Longest completion, in tokens, with its end token."""

    stop: tuple[str, ...] = ()
    """Strings that end a completion; the stop string stays in the text."""

    def __post_init__(self):
        require(self.temperature >= 0, "temperature must not be negative")
        require(0 < self.top_p <= 1, "top_p must lie in (0, 1]")
        require(self.top_k >= 0, "top_k must not be negative; 0 keeps all tokens")
        require(self.max_response_tokens >= 1, "max_response_tokens must be at least 1")


@section
class LocalRolloutConfig(SamplingConfig):
    kind: Literal["local"] = "local"

    max_concurrent_sequences: int = 256
    """Sequences decoded together on each rank."""

    dump_every: int = 0
    """Write every Nth step's rollouts to runs/<name>/rollouts/; 0 never."""


@section
class ReplayRolloutConfig(SamplingConfig):
    kind: Literal["replay"] = "replay"

    folder: str = ""
    """Folder with the dumped rollouts of an earlier run (step-*.jsonl or .jsonl.zst)."""

    dump_every: int = 0
    """Write every Nth step's rollouts to runs/<name>/rollouts/; 0 never."""

    def __post_init__(self):
        SamplingConfig.__post_init__(self)
        require(bool(self.folder), "rollout.folder must name a folder with dumped rollouts")


@section
class MathRewardConfig:
    kind: Literal["math"] = "math"

    weight: float = 1.0
    """Multiplies the reward in the total."""

    correct: float = 1.0
    """Reward of a right answer."""

    wrong: float = 0.0
    """Reward of a wrong, missing or unverifiable answer (the last two are counted apart)."""

    answer_after: str = ""
    """Only look behind the last occurrence of this text, e.g. '</think>'; without it the answer counts as missing."""

    timeout_seconds: float = 5.0
    """Deadline of one verification; the worker process is killed when it passes."""

    workers: int = 1
    """Verifier processes per rank."""

    def __post_init__(self):
        require(self.timeout_seconds > 0, "rewards: timeout_seconds of a math reward must be positive")
        require(self.workers >= 1, "rewards: workers of a math reward must be at least 1")


@section
class ExactRewardConfig:
    kind: Literal["exact"] = "exact"

    weight: float = 1.0
    """Multiplies the reward in the total."""

    correct: float = 1.0
    """Reward of a right answer."""

    wrong: float = 0.0
    """Reward of a wrong or missing answer."""

    answer_after: str = ""
    """Compare what follows the last occurrence of this text, e.g. '#'; empty compares the whole response."""

    ignore_case: bool = False
    """Compare without regard to case."""


@section
class FormatRewardConfig:
    kind: Literal["format"] = "format"

    weight: float = 1.0
    """Multiplies the reward in the total."""

    pattern: str = r"(?s).*</think>.+"
    """Regular expression that the whole response must match."""

    matched: float = 0.0
    """Reward of a response that matches."""

    unmatched: float = 0.0
    """Reward of a response that does not match."""

    gate: bool = True
    """A response that does not match is not correct: every verifier's reward becomes its `wrong` value."""

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"rewards: pattern {self.pattern!r} is not a regular expression: {error}") from None


RewardConfig = Annotated[
    MathRewardConfig | ExactRewardConfig | FormatRewardConfig, pydantic.Field(discriminator="kind")
]
RolloutConfig = Annotated[LocalRolloutConfig | ReplayRolloutConfig, pydantic.Field(discriminator="kind")]


# ---------------------------------------------------------------- advantages and objectives

Denominator = Literal["tokens", "sequence_mean", "sequence_sum", "constant"]
"""How a sum over one token population becomes a mean; every count is global over the optimizer update.

tokens         sum over tokens / number of tokens                      (DAPO, SFT)
sequence_mean  mean over sequences of the mean over their tokens       (GRPO)
sequence_sum   mean over sequences of the sum over their tokens
constant       sum over tokens / (number of sequences * constant_length)   (Dr.GRPO)
"""


@section
class AdvantageConfig:
    kind: Literal["group", "leave_one_out"] = "group"
    """group: reward minus the group's mean (GRPO). leave_one_out: minus the mean of the others (RLOO)."""

    normalize_std: bool | None = None
    """Divide by the group's standard deviation (GRPO) or not (Dr.GRPO). null: the objective's published setting."""

    include_demonstration: bool | None = None
    """Count the demonstration as a member of its group. null: the objective's published setting."""

    std_epsilon: float = 1e-6
    """Added to the standard deviation; a group with equal rewards gets advantage 0 whatever this is."""


def _require_positive(objective: Any, *names: str) -> None:
    for name in names:
        value = getattr(objective, name)
        require(value is None or value > 0, f"objective.{name} must be above 0, got {value}")


def _require_clips(objective: Any, *names: str) -> None:
    for name in names:
        value = getattr(objective, name)
        require(value is None or value >= 0, f"objective.{name} must not be negative, got {value}")


@section
class SftConfig:
    kind: Literal["sft"] = "sft"

    denominator: Denominator = "tokens"
    """How the negative log-likelihood is averaged."""

    constant_length: int | None = None
    """Tokens per sequence for the constant denominator. null: data.max_demonstration_tokens."""

    def __post_init__(self):
        _require_positive(self, "constant_length")


@section
class GrpoConfig:
    kind: Literal["grpo"] = "grpo"

    preset: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    """grpo: clip 0.2, sequence_mean, std. dapo: clip 0.2/0.28, tokens, std. dr_grpo: clip 0.2, constant, no std."""

    clip_low: float | None = None
    """The importance ratio is clipped below at 1 - clip_low. null: the preset's."""

    clip_high: float | None = None
    """The importance ratio is clipped above at 1 + clip_high. null: the preset's."""

    dual_clip: float | None = None
    """Bound on the ratio for negative advantages (dual-clip PPO); null switches it off."""

    denominator: Denominator | None = None
    """How the loss is averaged. null: the preset's."""

    constant_length: int | None = None
    """Tokens per sequence for the constant denominator. null: rollout.max_response_tokens."""

    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus, subtracted from the loss."""

    def __post_init__(self):
        _require_positive(self, "constant_length")
        _require_clips(self, "clip_low", "clip_high")
        require(
            self.dual_clip is None or self.dual_clip > 1, "objective.dual_clip must be above 1; null switches it off"
        )


@section
class LuffyConfig:
    kind: Literal["luffy"] = "luffy"

    shaping: Literal["p_div_p_gamma", "none"] = "p_div_p_gamma"
    """Off-policy shaping of the demonstration's probability p: p / (p + gamma), or p itself."""

    gamma: float = 0.1
    """The shaping constant."""

    clip: float | None = None
    """Symmetric clip of the rollouts' ratio; null leaves it unclipped, as the paper's runs did."""

    denominator: Denominator = "constant"
    """How each term is averaged; the count runs over rollouts and demonstrations together (paper eq. 4)."""

    constant_length: int | None = None
    """Tokens per sequence for the constant denominator. null: rollout.max_response_tokens."""

    entropy_coefficient: float = 0.001
    """Weight of the entropy bonus over both populations (paper 0.01, released script 0.001)."""

    def __post_init__(self):
        _require_positive(self, "constant_length", "gamma")
        _require_clips(self, "clip")


@section
class SrftConfig:
    kind: Literal["srft"] = "srft"

    preset: Literal["srft-paper", "srft-released"] = "srft-released"
    """Which of the two disagreeing sources fills the fields below: arXiv 2506.19767v1, or the released code."""

    sft_weight: float | None = None
    """Constant in front of the SFT term (0.5)."""

    sft_entropy_sign: Literal[-1, 0, 1] | None = None
    """The SFT weight is sft_weight * exp(sign * H). Paper -1, released code +1, 0 switches the weighting off."""

    rl_weight: float | None = None
    """Constant in front of the positive rollouts (0.1)."""

    rl_entropy_sign: Literal[-1, 0, 1] | None = None
    """The positive rollouts' weight is rl_weight * exp(sign * H). Both sources +1; 0 switches the weighting off."""

    entropy_level: Literal["token", "sequence", "group", "batch"] | None = None
    """What H is averaged over. The paper does not say (sequence here, as HPT); the released code uses tokens."""

    exponent_limit: float = 5.0
    """sign * H is clamped to [-limit, limit] before exp."""

    rollout_advantage: Literal["plus_minus_one", "group"] | None = None
    """Sign and size of the rollout terms: +1/-1 by correctness (paper) or the group advantage (released code)."""

    rollout_surrogate: Literal["logprob", "ratio", "clipped_ratio"] | None = None
    """What is weighted on rollouts: log-probability (paper), importance ratio (released), clipped ratio."""

    clip_low: float = 0.2
    """Lower clip of clipped_ratio."""

    clip_high: float = 0.2
    """Upper clip of clipped_ratio."""

    demonstration_shaping: Literal["none", "p_div_p_gamma"] | None = None
    """Off-policy RL term on demonstrations: p (paper) or p / (p + gamma) (released)."""

    demonstration_rl_weight: float = 1.0
    """Multiplies the off-policy RL term on demonstrations."""

    gamma: float = 0.1
    """The shaping constant."""

    entropy_coefficient: float | None = None
    """Weight of the entropy bonus over both populations. Paper 0, released code 0.001."""

    denominator: Denominator | None = None
    """How the RL terms are averaged. Paper tokens, released code constant. (The SFT term is a token mean in both.)"""

    joint_rl_count: bool | None = None
    """Divide the RL terms by rollouts and demonstrations counted together (released code, as LUFFY's eq. 4), or each
    by its own population (paper)."""

    constant_length: int | None = None
    """Tokens per sequence for the constant denominator. null: rollout.max_response_tokens."""

    def __post_init__(self):
        _require_positive(self, "constant_length", "gamma", "exponent_limit")
        _require_clips(self, "clip_low", "clip_high")


ObjectiveConfig = Annotated[SftConfig | GrpoConfig | LuffyConfig | SrftConfig, pydantic.Field(discriminator="kind")]

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": dict(clip_low=0.2, clip_high=0.2, denominator="sequence_mean"),
    "dapo": dict(clip_low=0.2, clip_high=0.28, denominator="tokens"),
    "dr_grpo": dict(clip_low=0.2, clip_high=0.2, denominator="constant"),
    "srft-paper": dict(
        sft_weight=0.5, sft_entropy_sign=-1, rl_weight=0.1, rl_entropy_sign=1, entropy_level="sequence",
        rollout_advantage="plus_minus_one", rollout_surrogate="logprob", demonstration_shaping="none",
        entropy_coefficient=0.0, denominator="tokens", joint_rl_count=False,
    ),
    "srft-released": dict(
        sft_weight=0.5, sft_entropy_sign=1, rl_weight=0.1, rl_entropy_sign=1, entropy_level="token",
        rollout_advantage="group", rollout_surrogate="ratio", demonstration_shaping="p_div_p_gamma",
        entropy_coefficient=0.001, denominator="constant", joint_rl_count=True,
    ),
}  # fmt: skip
"""Published values per preset; sources in docs/objectives.md."""

ADVANTAGES: dict[str, dict[str, bool]] = {
    "sft": dict(normalize_std=True, include_demonstration=False),
    "grpo": dict(normalize_std=True, include_demonstration=False),
    "dapo": dict(normalize_std=True, include_demonstration=False),
    "dr_grpo": dict(normalize_std=False, include_demonstration=False),
    "luffy": dict(normalize_std=False, include_demonstration=True),
    "srft-paper": dict(normalize_std=True, include_demonstration=True),
    "srft-released": dict(normalize_std=False, include_demonstration=True),
}
"""Published advantage settings per objective or preset."""


# ---------------------------------------------------------------- keeping, watching, guarding


@section
class CheckpointConfig:
    every: int = 0
    """Save the full state every N steps (and after the last step); 0 saves only after the last step."""

    keep: int = 2
    """Newest checkpoints kept; older ones are deleted after the new one is complete."""

    export_every: int = 0
    """Write a Hugging Face folder every N steps; 0 writes only the final one."""

    resume: bool = True
    """Continue from the newest complete checkpoint in the run folder, if there is one."""


@section
class EvaluationConfig:
    files: tuple[str, ...] = ()
    """Held-out JSONL or parquet files; each is scored by the rewards' verifier."""

    every: int = 0
    """Evaluate every N steps, and before the first and after the last; 0 only before the first and after the last."""

    samples: int = 1
    """Completions per problem."""

    temperature: float = 0.0
    """Sampling temperature of the evaluation; 0 is greedy and needs samples = 1."""

    top_p: float = 1.0
    """Nucleus sampling of the evaluation."""

    max_problems: int = 0
    """Use only the first N problems of each file; 0 uses all."""

    def __post_init__(self):
        require(self.samples >= 1, "evaluation.samples must be at least 1")
        require(
            self.temperature > 0 or self.samples == 1,
            "evaluation.samples > 1 needs evaluation.temperature > 0 (greedy samples are all the same)",
        )


@section
class LoggingConfig:
    tensorboard: bool = False
    """Also write TensorBoard events to runs/<name>/tensorboard."""

    wandb_project: str | None = None
    """Also log to this Weights & Biases project (needs `pip install wandb`)."""

    sample_rollouts: int = 4
    """Completions of each step kept for the report."""


@section
class ParityConfig:
    every: int = 20
    """Compare trainer and engine log-probs before the first update and then every N steps; 0 only at the start."""

    max_mean_difference: float = 0.02
    """Largest allowed mean |trainer - engine| log-prob difference, in nats."""

    max_difference: float = 1.0
    """Largest allowed single difference, in nats."""

    on_failure: Literal["stop", "truncate", "mask"] = "stop"
    """stop: end the run with a diagnosis. truncate / mask: go on with truncated or masked importance sampling."""

    importance_limit: float = 2.0
    """Truncate the importance weight at this value, or mask tokens beyond it."""


@section
class AccountingConfig:
    max_verifier_failure_share: float = 0.1
    """Stop when more than this share of a step's verifications crashed or ran out of time."""

    max_truncated_share: float = 1.0
    """Stop when more than this share of a step's completions hit the length limit."""

    max_skipped_updates: int = 3
    """Stop after this many consecutive optimizer updates that were skipped for a non-finite gradient."""


# ---------------------------------------------------------------- the run


@section
class RunConfig:
    name: str = "run"
    """The run's folder is run_dir/name."""

    run_dir: str = "runs"
    """Where run folders are made."""

    seed: int = 0
    """Seeds data order, sampling and initialisation."""

    steps: int = 100
    """Training steps of the (single) stage."""

    stages: tuple[dict[str, Any], ...] = ()
    """Optional list of stages run one after another; each is a name and the sections it overrides, for example
    {name: sft, steps: 50, objective: {kind: sft}}. Empty: one stage with the settings of this file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    rollout: RolloutConfig = field(default_factory=LocalRolloutConfig)
    rewards: tuple[RewardConfig, ...] = (MathRewardConfig(),)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    objective: ObjectiveConfig = field(default_factory=SrftConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)
    accounting: AccountingConfig = field(default_factory=AccountingConfig)

    megatron: dict[str, Any] = field(default_factory=dict)
    """Native megatron-core TransformerConfig fields under their own names; checked where megatron is imported."""

    def __post_init__(self):
        require(self.steps >= 0, "steps must not be negative")
        require(self.seed >= 0, "seed must not be negative")
        require(
            self.rollout.kind != "replay" or not self.evaluation.files,
            "rollout.kind replay cannot answer held-out problems; set evaluation.files to []",
        )
        require(
            self.objective.kind == "sft" or self.rollout.temperature > 0,
            "rollout.temperature must be above 0 for training (0 is greedy and has no log-probs to learn from)",
        )

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run_dir) / self.name

    def resolved(self) -> "RunConfig":
        """This tree with every `None` that stands for a published setting replaced by that setting."""
        objective = self.objective
        preset = PRESETS.get(getattr(objective, "preset", ""), {})
        filled = {k: v for k, v in preset.items() if getattr(objective, k) is None}
        demonstration_tokens = self.data.max_demonstration_tokens or self.rollout.max_response_tokens
        if objective.constant_length is None:
            filled["constant_length"] = (
                demonstration_tokens if objective.kind == "sft" else self.rollout.max_response_tokens
            )
        published = ADVANTAGES[getattr(objective, "preset", objective.kind)]
        advantage = {k: v for k, v in published.items() if getattr(self.advantage, k) is None}
        return dataclasses.replace(
            self,
            objective=dataclasses.replace(objective, **filled),
            advantage=dataclasses.replace(self.advantage, **advantage),
            data=dataclasses.replace(self.data, max_demonstration_tokens=demonstration_tokens),
        )

    def stage_configs(self) -> list[tuple[str, "RunConfig"]]:
        """(stage name, resolved settings) of each stage in order.

        Raises:
            ConfigError: a stage has no name, a name twice, or overrides what must stay the same over a run.
        """
        if not self.stages:
            return [(self.objective.kind, self.resolved())]
        base, out = to_dict(self), []
        base.pop("stages")
        for number, stage in enumerate(self.stages):
            overrides = dict(stage)
            name = overrides.pop("name", None)
            require(isinstance(name, str) and bool(name), f"stages.{number} needs a name")
            require(name not in [n for n, _ in out], f"stages.{number}.name '{name}' is used twice")
            fixed = sorted(set(overrides) & FIXED_OVER_STAGES)
            require(not fixed, f"stages.{number}.{fixed[0] if fixed else ''} cannot differ between stages of one run")
            out.append((name, from_dict(merge(base, overrides), f"stages.{number}.").resolved()))
        return out


FIXED_OVER_STAGES = {"name", "run_dir", "seed", "stages", "model", "parallel", "megatron", "logging", "checkpoint"}


# ---------------------------------------------------------------- loading


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file, apply `key.path=value` overrides and validate.

    Raises:
        ConfigError: the file is missing or not YAML, or a key or value is wrong; the message names it.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f":{where.line + 1}" if where else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    require(tree is None or isinstance(tree, dict), f"{path}: the file must hold a mapping of keys to values")
    tree = tree or {}
    for override in overrides:
        tree = merge(tree, parse_override(override, tree))
    config = from_dict(tree, "")
    config.stage_configs()
    return config


def parse_override(override: str, tree: dict[str, Any]) -> dict[str, Any]:
    """Turn `a.b=value` into {'a': {'b': value}}; list items are addressed by number, as in `rewards.0.weight=2`."""
    key, equals, text = override.partition("=")
    require(bool(equals) and bool(key.strip()), f"override '{override}' must look like key.path=value")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        value = text
    parts = key.strip().split(".")
    return _nest(parts, value, tree, key)


def _nest(parts: list[str], value: Any, here: Any, key: str) -> Any:
    if not parts:
        return value
    head, *rest = parts
    if isinstance(here, (list, tuple)):
        require(head.isdigit() and int(head) < len(here), f"override '{key}': '{head}' is no item number of that list")
        items = list(here)
        nested = _nest(rest, value, items[int(head)], key)
        items[int(head)] = merge(items[int(head)], nested) if isinstance(nested, dict) else nested
        return items
    require(
        here is None or isinstance(here, dict), f"override '{key}': '{head}' lies below a plain value; check the path"
    )
    return {head: _nest(rest, value, (here or {}).get(head), key)}


def merge(base: Any, over: Any) -> Any:
    """`base` updated by `over`, section by section; a section whose `kind` or `preset` changes starts afresh."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    for tag in ("kind", "preset"):
        if tag in over and tag in base and over[tag] != base[tag]:
            return over if tag == "kind" else {**({"kind": base["kind"]} if "kind" in base else {}), **over}
    return {**base, **{k: merge(base.get(k), v) if k in base else v for k, v in over.items()}}


def from_dict(tree: dict[str, Any], prefix: str = "") -> RunConfig:
    """Validate a plain tree. Raises ConfigError naming the first wrong key.

    A rollout or objective section without a kind is of the default kind.
    """
    for key, default in (("rollout", LocalRolloutConfig), ("objective", SrftConfig)):
        if isinstance(tree.get(key), dict):
            tree = {**tree, key: {"kind": default.kind, **tree[key]}}
    try:
        return pydantic.TypeAdapter(RunConfig).validate_python(tree)
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(error, prefix)) from None


def to_dict(config: Any) -> Any:
    """The plain tree of a config (lists and dicts), ready for YAML."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {k: to_dict(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(v) for v in config]
    return config


def to_yaml(config: RunConfig) -> str:
    """YAML text that `load` reads back to the same config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _explain(error: pydantic.ValidationError, prefix: str) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = prefix + ".".join(part for part in location if part not in KINDS)
    if first["type"] == "unexpected_keyword_argument":
        names = _names_at([part for part in location[:-1]])
        close = difflib.get_close_matches(location[-1], names, n=1)
        hint = f"; did you mean {prefix}{'.'.join(_visible(location[:-1]) + close)}?" if close else ""
        return f"unknown key {key}{hint}" + ("" if close else f"; known keys there: {', '.join(sorted(names))}")
    if first["type"] == "union_tag_invalid":
        return f"{key}.kind: unknown kind {first['ctx']['tag']!r}; choose from {first['ctx']['expected_tags']}"
    if first["type"] == "union_tag_not_found":
        return f"{key} needs a kind"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "tuple_type" and isinstance(first["input"], (str, int, float)):
        return f"{key} needs a list; write {key}: [{first['input']}]"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{key}: {message} (got {first['input']!r})"


def _visible(location: list[str]) -> list[str]:
    return [part for part in location if part not in KINDS]


KINDS = {"local", "replay", "math", "exact", "format", "sft", "grpo", "luffy", "srft"}
"""Tags of the unions; pydantic puts them into error locations, where a user does not expect them."""


def _names_at(location: list[str]) -> list[str]:
    """Field names of the section at `location` (which includes union tags)."""
    sections = {"": RunConfig} | {
        f.name: f.default_factory for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(f.default_factory)
    }
    tagged = {
        "local": LocalRolloutConfig, "replay": ReplayRolloutConfig, "math": MathRewardConfig,
        "exact": ExactRewardConfig, "format": FormatRewardConfig, "sft": SftConfig, "grpo": GrpoConfig,
        "luffy": LuffyConfig, "srft": SrftConfig,
    }  # fmt: skip
    cls = RunConfig
    for part in location:
        cls = tagged.get(part) or sections.get(part) or cls
    return [f.name for f in dataclasses.fields(cls)]
