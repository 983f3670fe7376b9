"""The policy and what it learns from: model, layout, optimizer, data, batches."""

from typing import ClassVar, Literal

from megatron_srft.config.base import require, require_at_least, section


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

    context: int = 1
    """Context-parallel size: the tokens of every micro-batch are cut over this many ranks, so that one sequence may be
    as much longer. Attention gathers keys and values in every layer."""

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
        require(self.context >= 1, "parallel.context must be at least 1")
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
        """Ranks that work on one micro-batch together."""
        return self.tensor * self.context * self.pipeline


@section
class OptimizerConfig:
    SECTION: ClassVar[str] = "optimizer"

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
        name_of_section = self.SECTION
        require_at_least(0, self, name_of_section, "lr", "warmup_steps", "adam_epsilon", "weight_decay", "clip_grad")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name_of_section}.{name} must lie in [0, 1), not {value}")
        require(0 <= self.min_lr_ratio <= 1, f"{name_of_section}.min_lr_ratio must lie between 0 and 1")


@section
class OpsConfig:
    implementation: Literal["auto", "reference", "native", "triton"] = "auto"
    """Kernels of the log-probs and losses: auto takes the fastest that is installed, reference is plain torch, native
    the compiled extension, triton needs a GPU. `megatron-srft doctor` tells what is there; what is not is an error."""

    saved_logits_gib: float = 4.0
    """Keep a micro-batch's logits for the backward pass if they fit into this much memory; otherwise they are computed
    again, which costs a third more work in the LM head. 0 never keeps them."""

    def __post_init__(self):
        require(self.saved_logits_gib >= 0, "ops.saved_logits_gib must not be negative")


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

    chosen_key: str = "chosen"
    """Field with the better answer of a pair (text, or chat messages that end with the assistant's); objective dpo."""

    rejected_key: str = "rejected"
    """Field with the worse answer of a pair, in the same forms."""

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
    """Longest demonstration, in tokens, with its end-of-sequence token. null: rollout.max_response_tokens. The answers
    of a pair have the same limit."""

    overlong_demonstrations: Literal["drop", "truncate", "error"] = "drop"
    """What to do with a longer demonstration, or with a pair that has a longer answer. What is truncated has no end
    token and never receives a reward."""

    require_demonstration: bool = False
    """Leave out prompts without a demonstration."""

    shuffle: bool = True
    """Visit the prompts in a new random order each epoch, a function of (seed, epoch)."""

    def __post_init__(self):
        require_at_least(1, self, "data", "max_prompt_tokens", "max_demonstration_tokens")
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

    dynamic_sampling: bool = False
    """Keep only prompts with both right and wrong answers, and draw more until there are prompts_per_step (DAPO)."""

    max_draws: int = 10
    """Batches of prompts that dynamic sampling may draw for one step; then the step goes on with what it has."""

    def __post_init__(self):
        for key in (
            "prompts_per_step",
            "rollouts_per_prompt",
            "tokens_per_microbatch",
            "updates_per_step",
            "max_draws",
        ):
            require(getattr(self, key) >= 1, f"batch.{key} must be at least 1")
        require(
            self.prompts_per_step % self.updates_per_step == 0,
            "batch.prompts_per_step must be a multiple of batch.updates_per_step",
        )
