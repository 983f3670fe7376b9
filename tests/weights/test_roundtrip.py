"""HF -> Megatron -> HF to the bit, and the model's logits against transformers', in every layout.

One world of four processes goes through all layouts and families; starting processes costs more than the checks.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from spawning import spawn
from tiny_models import make_model

MODELS = {
    "qwen2": dict(vocab=99),
    "qwen2-tied": dict(vocab=97, tied=True),
    "qwen3": dict(vocab=130),
    "llama3": dict(vocab=64),
    "mistral": dict(vocab=99),
}
"""Vocabularies below, at and above multiples of the padding."""

LAYOUTS = [
    dict(tensor=2, pipeline=2),
    dict(tensor=2, sequence_parallel=True),
    dict(pipeline=2),
    dict(pipeline=2, virtual_pipeline=2),
    dict(tensor=2, pipeline=2, virtual_pipeline=2, sequence_parallel=True),
    dict(),
]
"""Of 4 ranks; what tensor and pipeline leave is data parallel."""

LENGTHS = (9, 1, 30, 6)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Model folders, each with transformers' logits of `random_sequences` beside it."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("models")
    for name, options in MODELS.items():
        make_model(name.removesuffix("-tied"), root / name, tokenizer=False, **options)
        model = AutoModelForCausalLM.from_pretrained(root / name)
        with torch.no_grad():
            logits = [model(sequence[None]).logits[0] for sequence in random_sequences(options["vocab"])]
        save_file({"logits": torch.cat(logits)}, root / f"{name}.expected")
    return root


def random_sequences(vocab):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocab, (n,), generator=generator) for n in LENGTHS]


def test_weights_and_logits_in_every_layout(root):
    assert spawn(4, check_layouts, str(root)) == [len(LAYOUTS) * len(MODELS)] * 4


def check_layouts(root: str) -> int:
    """In each rank; returns the number of (layout, model) pairs checked."""
    from megatron.core import parallel_state

    from megatron_srft.config import DataConfig, LocalRolloutConfig, ParallelConfig, RunConfig
    from megatron_srft.trainer import parallel

    lengths = dict(data=DataConfig(max_prompt_tokens=64), rollout=LocalRolloutConfig(max_response_tokens=64))
    for layout in LAYOUTS:
        run = RunConfig(parallel=ParallelConfig(**layout), **lengths)
        groups = parallel.start(run.parallel, seed=1)
        for name in MODELS:
            try:
                check_model(f"{root}/{name}", run, groups)
            except Exception as error:
                error.add_note(f"in {name} under {layout}")
                raise
        parallel_state.destroy_model_parallel()
    parallel.stop()
    return len(LAYOUTS) * len(MODELS)


def check_model(path, run, groups) -> None:
    from megatron_srft.trainer.conversion import export_policy, load_policy, parameters, read_hf_config
    from megatron_srft.trainer.model import build_model
    from megatron_srft.weights.folder import HfFolder
    from megatron_srft.weights.streaming import export_hf

    original = load_file(f"{path}/model.safetensors")
    chunks = build_model(read_hf_config(path), run, groups)
    load_policy(chunks, HfFolder(path), groups)
    small_buckets = export_hf(parameters(chunks), chunks[0].architecture, groups, bucket_bytes=5000)
    for stream in (small_buckets, export_policy(chunks, groups)):
        exported = dict(stream)
        assert original.keys() == exported.keys()
        assert all(exported[name].dtype == tensor.dtype for name, tensor in original.items())
        assert [name for name, tensor in original.items() if not torch.equal(exported[name], tensor)] == []
    check_logits(load_file(f"{path}.expected")["logits"], chunks, groups)


def check_logits(expected, chunks, groups) -> None:
    from megatron_srft.distributed import all_gather

    vocab = chunks[0].architecture.vocab_size
    hidden = forward(chunks, random_sequences(vocab))
    if groups.pipeline.rank() < groups.pipeline.size() - 1:
        return
    if chunks[-1].config.sequence_parallel:
        hidden = torch.cat(all_gather(hidden, groups.tensor))
    logits = torch.cat(all_gather(hidden[:, 0] @ chunks[-1].output_weight().T, groups.tensor), dim=-1)
    assert logits.shape[-1] % 64 == 0 and not logits[:, vocab:].any()
    torch.testing.assert_close(logits[:, :vocab], expected, atol=1e-4, rtol=0)


def forward(chunks, sequences):
    """The packed sequences through the pipeline schedule; the last stage's hidden states."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_srft.trainer.attention import packed_params

    tokens = torch.cat(sequences)
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    packed = packed_params(torch.tensor([0] + [len(s) for s in sequences]).cumsum(0).int())

    def step(data, chunk):
        next(data)
        hidden = chunk(tokens[None], positions[None], None, packed_seq_params=packed)
        return hidden, lambda hidden, non_loss_data: hidden

    microbatches = 2
    streams = [iter(range(microbatches)) for _ in chunks]
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=streams if len(chunks) > 1 else streams[0],
            model=chunks,
            num_microbatches=microbatches,
            seq_length=len(tokens),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return outputs[-1] if outputs else None
