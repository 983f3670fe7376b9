"""Arithmetic of a run before it starts: who holds what, how much is in one step, how much memory and disk it takes.

Pure functions of the config, the model's sizes and the number of ranks; nothing is allocated. docs/parallelism.md
derives the formulas. Memory is an estimate: it leaves out the allocator's waste, communication buffers and the
libraries themselves.

Legend: `t`, `p`, `d` tensor-, pipeline- and data-parallel sizes; a *chunk* is one piece of the layers (there are
p * parallel.virtual_pipeline of them, dealt round-robin to the stages).
"""

from dataclasses import dataclass

from megatron_srft.config import RunConfig
from megatron_srft.weights.architecture import Architecture

BYTES = {"float32": 4, "bfloat16": 2}

GRADIENT_BYTES = 4
"""Gradients are accumulated and reduced in float32 for every parameter type."""

MASTER_AND_MOMENT_BYTES = {"float32": 8, "bfloat16": 12}
"""AdamW's two float32 moments; bfloat16 parameters also need a float32 copy."""

CHECKPOINT_BYTES = {"float32": 4 + 12, "bfloat16": 2 + 12}
"""The parameters as they are, and the optimizer's float32 parameter and two moments."""

REFERENCE_COPIES = 2
"""Of the weights in host memory: the reference policy's, and the policy's own while the reference is being measured."""

CHUNK_BYTES = 32 << 20
NARROWEST_CHUNK = 1024
"""Size of a chunk of logits in ops.linear_token_logprob; a test keeps them equal."""


# ---------------------------------------------------------------- ranks and layers


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one rank stands. Example: rank=3, data=1, context=0, pipeline=0, tensor=1, layers=((0, 14),)."""

    rank: int
    data: int
    context: int
    pipeline: int
    tensor: int
    layers: tuple[tuple[int, int], ...]
    """[first, last + 1) of each chunk."""


def smallest_world(config: RunConfig) -> int:
    """Ranks of one model replica."""
    return config.parallel.model_ranks


def places(config: RunConfig, num_layers: int, world_size: int) -> list[Place]:
    """Every rank's place; tensor ranks are neighbours, then context, data and pipeline (megatron's tp-cp-dp-pp)."""
    layout = config.parallel
    data = world_size // layout.model_ranks
    return [
        Place(
            rank=rank,
            tensor=rank % layout.tensor,
            context=rank // layout.tensor % layout.context,
            data=rank // (layout.tensor * layout.context) % data,
            pipeline=(stage := rank // (layout.tensor * layout.context * data)),
            layers=stage_layers(config, num_layers, stage),
        )
        for rank in range(world_size)
    ]


def stage_layers(config: RunConfig, num_layers: int, stage: int) -> tuple[tuple[int, int], ...]:
    """Layers of each chunk of one pipeline stage."""
    layout = config.parallel
    chunks = layout.virtual_pipeline or 1
    each = num_layers // (layout.pipeline * chunks)
    starts = [(chunk * layout.pipeline + stage) * each for chunk in range(chunks)]
    return tuple((start, start + each) for start in starts)


# ---------------------------------------------------------------- one step


@dataclass(frozen=True, kw_only=True)
class BatchArithmetic:
    """Sizes of one step; an upper bound wherever demonstrations or lengths are not known beforehand."""

    prompts: int
    rollouts: int
    demonstrations: int
    """At most: every prompt has one."""
    pairs: int
    """Of a chosen and a rejected answer, two sequences that stay in one micro-batch."""
    updates: int
    sequences_per_update: int
    longest_sequence: int
    """Tokens of the longest allowed prompt with the longest allowed response."""
    tokens_per_update: tuple[int, int]
    """With one-token responses, and with every sequence as long as allowed."""
    microbatches_per_update: tuple[int, int]
    """Of each data-parallel rank, in the same two cases."""


def batch_arithmetic(config: RunConfig, data_ranks: int, prompt_tokens: float) -> BatchArithmetic:
    """What three batch numbers come to.

    Args:
        data_ranks: data-parallel size.
        prompt_tokens: mean prompt length of the data.
    """
    batch = config.batch
    rollouts = batch.prompts_per_step * batch.rollouts_per_prompt if config.samples_rollouts else 0
    demonstrations = batch.prompts_per_step if config.uses_demonstrations else 0
    pairs = batch.prompts_per_step if config.uses_preferences else 0
    sequences = (rollouts + demonstrations + 2 * pairs) // batch.updates_per_step
    together = 2 if pairs else 1
    longest = config.data.max_prompt_tokens + longest_response(config)
    share = -(-sequences // (together * data_ranks)) * together
    fewest = -(-round(share * (prompt_tokens + 1)) // batch.tokens_per_microbatch)
    most = -(-share // (together * max(1, batch.tokens_per_microbatch // (together * longest))))
    multiple = config.parallel.pipeline if config.parallel.virtual_pipeline else 1
    return BatchArithmetic(
        prompts=batch.prompts_per_step,
        rollouts=rollouts,
        demonstrations=demonstrations,
        pairs=pairs,
        updates=batch.updates_per_step,
        sequences_per_update=sequences,
        longest_sequence=longest,
        tokens_per_update=(round(sequences * (prompt_tokens + 1)), sequences * longest),
        microbatches_per_update=(_round_up(max(1, fewest), multiple), _round_up(max(1, most), multiple)),
    )


def longest_response(config: RunConfig) -> int:
    return max(config.rollout.max_response_tokens, config.data.max_demonstration_tokens or 0)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# ---------------------------------------------------------------- parameters


def parameters_on(config: RunConfig, model: Architecture, stage: int, padded_vocab: int) -> int:
    """Parameters that one rank of a pipeline stage holds.

    Args:
        padded_vocab: rows of the vocabulary matrices after padding.
    """
    layout = config.parallel
    layers = sum(end - start for start, end in stage_layers(config, model.num_layers, stage))
    whole = 2 * model.hidden_size + 2 * model.head_dim * model.qk_norm  # norms are on every tensor-parallel rank
    per_layer = whole + (model.layer_parameters - whole) // layout.tensor
    matrix = padded_vocab * model.hidden_size // layout.tensor
    first, last = stage == 0, stage == layout.pipeline - 1
    has_head_of_its_own = last and not (first and model.tied)
    return layers * per_layer + first * matrix + has_head_of_its_own * matrix + last * model.hidden_size


def critic_parameters_on(config: RunConfig, model: Architecture, stage: int, padded_vocab: int) -> int:
    """The same of the critic, which has one output in place of the LM head; every tensor rank holds that one whole."""
    layout = config.parallel
    last = stage == layout.pipeline - 1
    numbers = parameters_on(config, model, stage, padded_vocab)
    if last and not (stage == 0 and model.tied):
        numbers -= padded_vocab * model.hidden_size // layout.tensor
    return numbers + last * model.hidden_size


# ---------------------------------------------------------------- memory and disk


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank of a pipeline stage."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """Of all micro-batches in flight, each as full as tokens_per_microbatch allows."""
    head: int
    """Log-probs of the response rows: kept logits and working chunks; last stage only."""
    engine: int
    """The rollout engine's own whole copy of the model; of vLLM its share, with its keys and values."""
    cache: int
    """Its keys and values at their fullest; gone before training starts."""
    critic: int
    """PPO's critic: its parameters, gradients and optimizer. Its activations come in turn with the policy's."""
    reference: int
    """The reference policy, in host memory, whatever the device."""

    @property
    def peak(self) -> int:
        """On the device: what stands all the time, and the larger of what training and generating take in turn."""
        standing = self.parameters + self.gradients + self.optimizer + self.engine + self.critic
        return standing + max(self.activations + self.head, self.cache)


def memory(config: RunConfig, model: Architecture, stage: int, world_size: int, padded_vocab: int) -> Memory:
    """Estimate one rank's memory; the rules are those of docs/parallelism.md."""
    data_ranks = world_size // config.parallel.model_ranks
    dtype = config.model.dtype
    numbers = parameters_on(config, model, stage, padded_vocab)
    shards = data_ranks * config.parallel.context if config.parallel.distributed_optimizer else 1
    trained = BYTES[dtype] + GRADIENT_BYTES + MASTER_AND_MOMENT_BYTES[dtype] / shards
    together = 2 if config.uses_preferences else 1
    longest = together * (config.data.max_prompt_tokens + longest_response(config))
    tokens = max(config.batch.tokens_per_microbatch, longest)
    own_tokens = -(-tokens // config.parallel.context)
    return Memory(
        parameters=numbers * BYTES[dtype],
        gradients=numbers * GRADIENT_BYTES,
        optimizer=numbers * MASTER_AND_MOMENT_BYTES[dtype] // shards,
        activations=round(activation_elements(config, model, stage, tokens) * BYTES[dtype]),
        head=head_bytes(config, model, own_tokens, padded_vocab) if stage == config.parallel.pipeline - 1 else 0,
        engine=engine_bytes(config, model) if generates(config) else 0,
        cache=cache_bytes(config, model, world_size) if generates(config) else 0,
        critic=round(critic_parameters_on(config, model, stage, padded_vocab) * trained) if config.uses_critic else 0,
        reference=numbers * BYTES[dtype] * REFERENCE_COPIES if config.kl.needs_reference else 0,
    )


def activation_elements(config: RunConfig, model: Architecture, stage: int, tokens: int) -> float:
    """Numbers kept for the backward pass by the layers of one rank, over all micro-batches in flight.

    One layer keeps for each token: the inputs of both norms and of the two matrices behind them (4 hidden, cut over
    the tensor ranks only with sequence parallelism); query, key, value and the attention's output; the MLP's gate and
    up halves, the activated gate, and their product. Full recomputation keeps one hidden per layer, and all of the
    above for the one layer that is being recomputed. Context ranks have their share of the tokens, and of all tokens
    the gathered keys and values.
    """
    layout = config.parallel
    sequence_share = layout.tensor if layout.sequence_parallel else 1
    query, key = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    one_layer = 4 * model.hidden_size / sequence_share + (2 * query + 2 * key + 4 * model.ffn_size) / layout.tensor
    if layout.context > 1:
        one_layer = one_layer / layout.context + 2 * key / layout.tensor
        sequence_share *= layout.context
    in_flight = layers_in_flight(config, model.num_layers, stage)
    if layout.recompute == "full":
        return tokens * (in_flight * model.hidden_size / sequence_share + one_layer)
    return tokens * in_flight * one_layer


def layers_in_flight(config: RunConfig, num_layers: int, stage: int) -> int:
    """Layers times micro-batches whose activations a stage holds at the schedule's peak (one forward, one backward)."""
    layout = config.parallel
    chunks = layout.virtual_pipeline or 1
    each = num_layers // (layout.pipeline * chunks)
    if chunks == 1:
        return each * (layout.pipeline - stage)
    return each * ((layout.pipeline - stage - 1) * 2 + (chunks - 1) * layout.pipeline + 1)


def head_bytes(config: RunConfig, model: Architecture, tokens: int, padded_vocab: int) -> int:
    """Kept logits (none where they exceed their budget), a working chunk, and both matrices' gradients."""
    shard = padded_vocab // config.parallel.tensor
    item = BYTES[config.model.dtype]
    logits = tokens * shard * item
    kept = logits if logits <= config.ops.saved_logits_gib * 2**30 else 0
    chunk = min(max(CHUNK_BYTES, tokens * NARROWEST_CHUNK * 4), tokens * shard * 4)
    return kept + chunk + shard * model.hidden_size * item + tokens * model.hidden_size * 4


def generates(config: RunConfig) -> bool:
    """Whether an engine with a model of its own samples completions on the trainer's machines."""
    return config.samples_rollouts and config.rollout.kind not in ("replay", "vllm_server")


def engine_bytes(config: RunConfig, model: Architecture) -> int:
    """What the engine holds on one rank all the time.

    vLLM cuts the weights over its own tensor-parallel ranks, and keeps its keys and values too; how many these are is
    known beforehand where `kv_cache_memory_bytes` says it.
    """
    weights = hf_folder_bytes(config, model)
    if config.rollout.kind != "vllm":
        return weights
    return weights // config.rollout.engine_ranks + config.rollout.vllm.get("kv_cache_memory_bytes", 0)


def cache_bytes(config: RunConfig, model: Architecture, world_size: int) -> int:
    """Keys and values of the sequences that one rank decodes together, each at its greatest length."""
    if config.rollout.kind == "vllm":
        return 0
    share = -(-config.batch.prompts_per_step * config.batch.rollouts_per_prompt // world_size)
    sequences = min(config.rollout.max_concurrent_sequences, share)
    tokens = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * BYTES[config.model.dtype]
    return sequences * tokens * per_token


def checkpoint_bytes(config: RunConfig, model: Architecture) -> int:
    """Disk of one full checkpoint of a (single) stage, whatever the layout."""
    dtype = config.model.dtype
    size = model.parameters * CHECKPOINT_BYTES[dtype]
    if config.uses_critic:
        head = 0 if model.tied else model.vocab_size * model.hidden_size
        size += (model.parameters - head + model.hidden_size) * CHECKPOINT_BYTES[dtype]
    if config.kl.needs_reference:
        size += model.parameters * BYTES[dtype]
    return size


def hf_folder_bytes(config: RunConfig, model: Architecture) -> int:
    """Disk of one exported Hugging Face folder."""
    return model.parameters * BYTES[config.model.dtype]
