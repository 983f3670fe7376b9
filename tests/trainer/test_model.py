"""The policy model in one process: packing, recomputation, the LM head, and what is refused before building."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from tiny_models import make_model

from megatron_srft.config import ConfigError, DataConfig, LocalRolloutConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_srft.trainer import architecture as trainer_architecture
from megatron_srft.trainer import parallel
from megatron_srft.trainer.architecture import padded_vocab_size, transformer_config
from megatron_srft.trainer.attention import packed_params
from megatron_srft.trainer.conversion import export_policy, load_policy, read_hf_config
from megatron_srft.trainer.model import RMSNorm, build_model
from megatron_srft.weights.architecture import read_architecture
from megatron_srft.weights.folder import HfFolder

SHORT = dict(data=DataConfig(max_prompt_tokens=64), rollout=LocalRolloutConfig(max_response_tokens=64))


@pytest.fixture(scope="module")
def groups():
    yield parallel.start(ParallelConfig(), seed=1)
    parallel.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return HfFolder(make_model("qwen3", tmp_path_factory.mktemp("qwen3"), tokenizer=False))


def build(folder, groups, **settings):
    chunks = build_model(read_hf_config(folder.path), RunConfig(**SHORT | settings), groups)
    load_policy(chunks, folder, groups)
    return chunks[0]


def run(model, sequences):
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    boundaries = torch.tensor([0] + [len(s) for s in sequences]).cumsum(0).int()
    return model(torch.cat(sequences)[None], positions[None], None, packed_seq_params=packed_params(boundaries))[:, 0]


def random_sequences(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(90, (n,), generator=generator) for n in lengths]


def test_a_changed_sequence_leaves_the_others_untouched_by_a_bit(folder, groups):
    model = build(folder, groups)
    sequences = random_sequences([12, 7, 12])
    before = run(model, sequences)
    after = run(model, [sequences[0], random_sequences([7], seed=1)[0], sequences[2]])
    assert torch.equal(before[:12], after[:12]) and torch.equal(before[19:], after[19:])
    assert not torch.isclose(before[12:19], after[12:19]).all(1).any()


def test_rms_norm_and_its_gradients_equal_torch_in_float64():
    generator = torch.Generator().manual_seed(0)
    settings = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False)
    norm = RMSNorm(settings, 24, eps=1e-2)
    norm.weight.data.normal_(1, 0.5, generator=generator)
    scales = torch.logspace(-2, 2, 12)[:, None, None]
    x = (torch.randn(12, 1, 24, generator=generator) * scales).requires_grad_()
    upstream = torch.randn(12, 1, 24, generator=generator)
    wide = [t.detach().double().requires_grad_() for t in (x, norm.weight)]
    expected = torch.nn.functional.rms_norm(wide[0], (24,), wide[1], 1e-2)
    out = norm(x)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-6)
    wanted = torch.autograd.grad(expected, wide, upstream.double())
    for found, gradient in zip(torch.autograd.grad(out, (x, norm.weight), upstream), wanted, strict=True):
        torch.testing.assert_close(found.double(), gradient, atol=2e-6, rtol=2e-5)


def gradients(model, sequences):
    model.train()
    (run(model, sequences) @ model.output_weight().T).logsumexp(-1).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_gradient(folder, groups, recompute):
    sequences = random_sequences([9, 14, 3])
    expected = gradients(build(folder, groups), sequences)
    recomputed = gradients(build(folder, groups, parallel=ParallelConfig(recompute=recompute)), sequences)
    assert all(grad.abs().max() > 0 for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(recomputed[name], grad, atol=1e-6, rtol=1e-6, msg=name)


def test_gradients_equal_transformers(folder, groups):
    from transformers import AutoModelForCausalLM

    sequences = random_sequences([9, 14, 3])
    model = build(folder, groups)
    logits = (run(model, sequences) @ model.output_weight().T)[:, : model.architecture.vocab_size]
    logits.logsumexp(-1).sum().backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad  # so that the exporter hands out gradients under HF names
    ours = dict(export_policy([model], groups))
    hf = AutoModelForCausalLM.from_pretrained(folder.path)
    sum(hf(s[None]).logits.logsumexp(-1).sum() for s in sequences).backward()
    for name, parameter in hf.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_bfloat16_follows_transformers(folder, groups):
    from transformers import AutoModelForCausalLM

    model = build(folder, groups, model=ModelConfig(dtype="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    (sequence,) = random_sequences([20])
    with torch.no_grad():
        ours = (run(model, [sequence]) @ model.output_weight().T)[:, : model.architecture.vocab_size].float()
        exact = AutoModelForCausalLM.from_pretrained(folder.path)(sequence[None]).logits[0]
        theirs = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.bfloat16)(sequence[None]).logits[0]
    # Each rounds in its own places; ours must be about as close to full precision as theirs.
    assert (ours - exact).pow(2).mean() < 2 * (theirs.float() - exact).pow(2).mean()


def architecture(folder, **changes):
    return read_architecture(read_hf_config(folder.path) | changes)


def test_an_unknown_family_is_named_before_transformers_sees_it(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba9"}')
    with pytest.raises(ValueError, match="'mamba9' is not supported; supported are qwen2"):
        read_hf_config(tmp_path)


def test_native_fields_reach_megatron(folder):
    config = transformer_config(
        architecture(folder), RunConfig(**SHORT, megatron={"deallocate_pipeline_outputs": True})
    )
    assert config.deallocate_pipeline_outputs


@pytest.mark.parametrize(
    "key, message",
    [
        ("deallocate_pipeline_output", "did you mean megatron.deallocate_pipeline_outputs"),
        ("zzz", "has no such field"),
        ("tensor_model_parallel_size", "parallel.tensor"),
        ("bf16", "model.dtype"),
        ("num_layers", "config.json"),
        ("attention_dropout", "can only be 0.0"),
    ],
)
def test_wrong_native_fields_are_refused(folder, key, message):
    with pytest.raises(ConfigError, match=message):
        transformer_config(architecture(folder), RunConfig(**SHORT, megatron={key: 1}))


@pytest.mark.parametrize(
    "layout, message",
    [
        (dict(tensor=3), "parallel.tensor = 3 does not divide the model's 4 attention heads"),
        (dict(tensor=4), "2 key-value heads"),
        (dict(pipeline=3), "4 layers .* 3 x 1 = 3"),
        (dict(pipeline=2, virtual_pipeline=3), "4 layers .* 2 x 3 = 6"),
    ],
)
def test_impossible_layouts_are_refused(folder, layout, message):
    with pytest.raises(ConfigError, match=message):
        transformer_config(architecture(folder), RunConfig(**SHORT, parallel=ParallelConfig(**layout)))


def test_a_window_shorter_than_the_sequences_is_refused(tmp_path):
    for window, fits in ((127, False), (128, True)):
        folder = make_model("mistral", tmp_path / str(window), tokenizer=False, sliding_window=window)
        mistral = read_architecture(read_hf_config(folder))
        if fits:
            transformer_config(mistral, RunConfig(**SHORT))
        else:
            with pytest.raises(ConfigError, match="127 tokens back .* up to 128 tokens"):
                transformer_config(mistral, RunConfig(**SHORT))


def test_sequences_longer_than_the_model_has_positions_are_refused(folder):
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        transformer_config(architecture(folder, max_position_embeddings=127), RunConfig(**SHORT))


@pytest.mark.parametrize("vocab", [1, 64, 65, 151936])
def test_the_padded_vocabulary_fits_every_common_layout_alike(vocab):
    sizes = {padded_vocab_size(vocab, tensor) for tensor in (1, 2, 4, 8, 64)}
    assert len(sizes) == 1 and sizes.pop() % 64 == 0
    assert padded_vocab_size(vocab, 3) % 3 == 0


def test_transformer_engine_is_for_half_precision_on_cuda(monkeypatch):
    """Its attention takes no packed float32 sequences, and float32 is the default of model.dtype."""
    found = object()
    monkeypatch.setattr(trainer_architecture.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(trainer_architecture.torch.cuda, "is_available", lambda: True)
    uses = trainer_architecture.uses_transformer_engine
    half, single = (TransformerConfig(num_layers=1, num_attention_heads=1, params_dtype=dtype)
                    for dtype in (torch.bfloat16, torch.float32))  # fmt: skip
    assert uses(half) and not uses(single)
    assert not uses(TransformerConfig(num_layers=1, num_attention_heads=1, params_dtype=torch.bfloat16,
                                      context_parallel_size=2))  # fmt: skip
    monkeypatch.setattr(trainer_architecture.torch.cuda, "is_available", lambda: False)
    assert not uses(half)
