"""`megatron-srft train CONFIG --dry-run`: what can be wrong before the model is built, and what the run comes to."""

import os
import shlex

from megatron_srft import hidden_stream, layout
from megatron_srft.config import RunConfig, require
from megatron_srft.data import check_vocabulary, load_dataset, usable_prompts
from megatron_srft.evaluate import load_held_out
from megatron_srft.layout import Memory
from megatron_srft.metrics import check_packages
from megatron_srft.rewards import Scorer
from megatron_srft.rollout import check_engine, load_tokenizer
from megatron_srft.trainer.architecture import padded_vocab_size, transformer_config
from megatron_srft.trainer.conversion import read_hf_config
from megatron_srft.trainer.critic import check_folder
from megatron_srft.trainer.old_policy import remarks
from megatron_srft.trainer.parallel import check_world_size
from megatron_srft.weights.architecture import Architecture, read_architecture
from megatron_srft.weights.folder import HfFolder
from megatron_srft.weights.streaming import check_names


def main(arguments: list[str], config: RunConfig, ranks: int | None) -> int:
    """Check model, layout, data and rewards of every stage, and print the arithmetic.

    Args:
        arguments: config file and overrides as given, for the closing hint.
        ranks: processes to reckon with; None: WORLD_SIZE, or one model replica.

    Raises:
        ValueError: the first thing that does not fit.
    """
    require(ranks is None or ranks >= 1, f"--ranks must be at least 1, not {ranks}")
    world_size = ranks or int(os.environ.get("WORLD_SIZE", layout.smallest_world(config)))
    check_run_folder(config)
    check_packages(config.logging)
    check_world_size(config.parallel, world_size)
    model = read_model(config)
    stages = config.stage_configs()
    for _, stage in stages:
        check_engine(stage, world_size)
        transformer_config(model, stage)
        check_folder(stage, model)
    tokenizer = load_tokenizer(config.model)
    hidden_stream.read_heads([stage for _, stage in stages], model, tokenizer)
    print_model(config, model)
    print_ranks(config, model, world_size)
    for name, stage in stages:
        print(f"\nstage {name}: {stage.steps} steps, objective {stage.objective.kind}")
        for remark in (*remarks(stage), *hidden_stream.remarks(stage)):
            print(f"  note: {remark}")
        print_stage(stage, model, world_size, tokenizer)
    print_disk([stage for _, stage in stages], model)
    command = f"torchrun --nproc-per-node {world_size} -m megatron_srft.train {shlex.join(arguments)}"
    print(f"\nnothing was trained; to train: {command}")
    return 0


def check_run_folder(config: RunConfig) -> None:
    """Raise ConfigError when the run folder could not be made or written in; nothing is made here."""
    nearest = next(path for path in (config.folder.absolute(), *config.folder.absolute().parents) if path.exists())
    usable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    require(usable, f"run_dir: {config.folder} cannot be written, because of {nearest}; choose another run_dir or name")


def read_model(config: RunConfig) -> Architecture:
    """The model's sizes, after checking that its folder holds every tensor they promise."""
    require(bool(config.model.path), "model.path is not set; it must name a Hugging Face folder")
    folder = HfFolder(config.model.path)
    model = read_architecture(read_hf_config(config.model.path, config.model.trust_remote_code))
    check_names(folder.shapes(), model, str(folder.path))
    return model


# ---------------------------------------------------------------- printing


def print_model(config: RunConfig, model: Architecture) -> None:
    head = "tied to the embedding" if model.tied else "of its own"
    print(
        f"model: {model.family}, {model.parameters:,} parameters in {config.model.dtype}\n"
        f"  {model.num_layers} layers, hidden {model.hidden_size}, MLP {model.ffn_size}, {model.num_heads} heads "
        f"({model.num_kv_heads} key-value) of {model.head_dim}, vocabulary {model.vocab_size:,}, LM head {head}"
    )


def print_ranks(config: RunConfig, model: Architecture, world_size: int) -> None:
    parallel = config.parallel
    data_ranks = world_size // parallel.model_ranks
    sizes = f"{parallel.tensor} tensor x {parallel.context} context x {parallel.pipeline} pipeline x {data_ranks} data"
    print(f"\nlayout: {world_size} ranks = {sizes}")
    rows = [
        (p.rank, p.tensor, p.context, p.pipeline, p.data, ", ".join(f"{first}-{end - 1}" for first, end in p.layers))
        for p in layout.places(config, model.num_layers, world_size)
    ]
    print_table(("rank", "tensor", "context", "pipeline", "data", "layers"), rows)


def print_stage(stage: RunConfig, model: Architecture, world_size: int, tokenizer) -> None:
    dataset = load_dataset(stage.data, stage.rollout, tokenizer, with_preferences=stage.uses_preferences)
    print(f"  data: {dataset.report.summary()}")
    prompts = usable_prompts(dataset, stage)
    check_vocabulary(prompts, model.vocab_size)
    for name, held_out in load_held_out(stage, tokenizer):
        check_vocabulary(held_out.prompts, model.vocab_size)
        print(f"  evaluation {name}: {held_out.report.summary()}")
    with Scorer(stage.rewards) as scorer:
        scorer.self_test()
    print(f"  rewards: {', '.join(reward.kind for reward in stage.rewards)}; self-test passed")
    lengths = [len(prompt.token_ids) for prompt in prompts]
    print_batch(stage, world_size, sum(lengths) / len(lengths))
    print_memory(stage, model, world_size)


def print_batch(stage: RunConfig, world_size: int, prompt_tokens: float) -> None:
    size = layout.batch_arithmetic(stage, world_size // stage.parallel.model_ranks, prompt_tokens)
    least, most = size.tokens_per_update
    fewest, greatest = size.microbatches_per_update
    pairs = f"{size.pairs} pairs of answers, " if size.pairs else ""
    print(
        f"  step: {size.prompts} prompts, {size.rollouts} completions, up to {size.demonstrations} demonstrations, "
        f"{pairs}{size.updates} update(s)\n"
        f"  update: up to {size.sequences_per_update} sequences of at most {size.longest_sequence:,} tokens, "
        f"{least:,} to {most:,} tokens in all\n"
        f"  micro-batches of {stage.batch.tokens_per_microbatch:,} tokens: {fewest} to {greatest} per data rank"
    )


def print_memory(stage: RunConfig, model: Architecture, world_size: int) -> None:
    padded = padded_vocab_size(model.vocab_size, stage.parallel.tensor)
    rows = [
        (number, *memory_cells(layout.memory(stage, model, number, world_size, padded)))
        for number in range(stage.parallel.pipeline)
    ]
    print("  memory per rank, by pipeline stage (estimate, without the libraries themselves):")
    names = ["parameters", "gradients", "optimizer", "activations", "LM head", "engine", "KV cache", "critic", "peak"]
    print_table(("stage", *names), rows)
    if stage.kl.needs_reference:
        sizes = [layout.memory(stage, model, n, world_size, padded).reference for n in range(stage.parallel.pipeline)]
        print(f"  reference policy (kl.coefficient): up to {amount(max(sizes))} of host memory per rank")


def memory_cells(memory: Memory) -> list[str]:
    parts = (memory.parameters, memory.gradients, memory.optimizer, memory.activations, memory.head)
    return [amount(part) for part in (*parts, memory.engine, memory.cache, memory.critic, memory.peak)]


def print_disk(stages: list[RunConfig], model: Architecture) -> None:
    config = stages[0]
    checkpoint = max(layout.checkpoint_bytes(stage, model) for stage in stages)
    folder = layout.hf_folder_bytes(config, model)
    print(
        f"\ndisk: {amount(checkpoint)} per checkpoint (the newest {config.checkpoint.keep} are kept), "
        f"{amount(folder)} per Hugging Face folder, in {config.folder}"
    )


def print_table(names: tuple[str, ...], rows: list[tuple]) -> None:
    """Right-aligned columns under their names."""
    cells = [names, *(tuple(str(value) for value in row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    for line in cells:
        print("    " + "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def amount(number: int) -> str:
    """1536 -> '1.5 KiB'."""
    size, unit = float(number), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
