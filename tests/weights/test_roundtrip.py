"""HF -> Megatron -> HF to the bit, and the model's logits against transformers', in every layout.

One spawn per layout runs all families, because starting processes costs more than the checks.
"""

import pytest
import torch
from safetensors.torch import load_file
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

LENGTHS = (9, 1, 30, 6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, options in MODELS.items():
        make_model(name.removesuffix("-tied"), root / name, tokenizer=False, **options)
    return root


@pytest.mark.parametrize(
    "tensor, pipeline, virtual, sequence_parallel",
    [(1, 1, None, False), (2, 1, None, True), (1, 2, None, False), (1, 2, 2, False), (2, 2, None, False)],
    ids=["1", "tp2-sp", "pp2", "pp2-vpp2", "tp2-pp2"],
)
def test_weights_and_logits(folders, tensor, pipeline, virtual, sequence_parallel):
    layout = dict(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, sequence_parallel=sequence_parallel)
    ranks = spawn(tensor * pipeline, check_layout, str(folders), list(MODELS), layout)
    assert ranks == [list(MODELS)] * (tensor * pipeline)


def check_layout(root: str, names: list[str], layout: dict) -> list[str]:
    """In each rank: load, export, compare with the file; run, compare with transformers."""
    from megatron_srft.config import DataConfig, LocalRolloutConfig, ParallelConfig, RunConfig
    from megatron_srft.trainer import parallel
    from megatron_srft.trainer.conversion import export_policy, load_policy, parameters, read_hf_config
    from megatron_srft.trainer.model import build_model
    from megatron_srft.weights.folder import HfFolder
    from megatron_srft.weights.streaming import export_hf

    run = RunConfig(
        parallel=ParallelConfig(**layout),
        data=DataConfig(max_prompt_tokens=64),
        rollout=LocalRolloutConfig(max_response_tokens=64),
    )
    groups = parallel.start(run.parallel, seed=1)
    for name in names:
        folder = HfFolder(f"{root}/{name}")
        chunks = build_model(read_hf_config(folder.path), run, groups)
        load_policy(chunks, folder, groups)
        for bucket_bytes in (256 << 20, 5000):
            stream = export_hf(parameters(chunks), chunks[0].architecture, groups, bucket_bytes)
            assert_identical(load_file(folder.path / "model.safetensors"), dict((n, t.clone()) for n, t in stream))
        assert_identical(load_file(folder.path / "model.safetensors"), dict(export_policy(chunks, groups)))
        check_logits(folder.path, chunks, groups)
    parallel.stop()
    return names


def assert_identical(expected: dict, actual: dict) -> None:
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == actual[name].dtype
        assert torch.equal(tensor, actual[name]), name


def check_logits(path, chunks, groups) -> None:
    from transformers import AutoModelForCausalLM

    from megatron_srft.distributed import all_gather

    hf = AutoModelForCausalLM.from_pretrained(path)
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(hf.config.vocab_size, (n,), generator=generator) for n in LENGTHS]
    hidden = forward(chunks, sequences)
    if groups.pipeline.rank() < groups.pipeline.size() - 1:
        return
    if chunks[-1].config.sequence_parallel:
        hidden = torch.cat(all_gather(hidden, groups.tensor))
    logits = torch.cat(all_gather(hidden[:, 0] @ chunks[-1].output_weight().T, groups.tensor), dim=-1)
    assert logits.shape[-1] % 64 == 0 and not logits[:, hf.config.vocab_size :].any()
    with torch.no_grad():
        expected = torch.cat([hf(sequence[None]).logits[0] for sequence in sequences])
    torch.testing.assert_close(logits[: len(expected), : hf.config.vocab_size], expected, atol=1e-4, rtol=0)


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
