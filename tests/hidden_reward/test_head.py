"""Heads: sizes as published, what fits, files, and the released code's state dicts."""

import dataclasses
import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from reward_heads import TINY, make_head, other
from safetensors.torch import save_file

from megatron_srft.data.packing import pack
from megatron_srft.hidden_reward import (
    BaseModel,
    HeadConfig,
    add_layer,
    check_fits,
    from_published,
    load_head,
    read_published,
    save_head,
    scored_sequences,
)
from megatron_srft.ops.gated_pooling import gated_mean
from megatron_srft.sample import TrainingSequence

PROMPTS = "p" * 64
TOKENS = 11


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "vocabulary", "parameters", "on_logits"),
    [
        ("Llama-3.2-3B", 28, 3072, 128256, 178_178, 256_514),
        ("Llama-3.1-8B", 32, 4096, 128256, 270_338, 256_514),
        ("Ministral-8B", 36, 4096, 131072, 303_106, 262_146),
    ],
)
def test_parameter_counts_are_the_papers(name, layers, hidden, vocabulary, parameters, on_logits):
    base = BaseModel(
        name=name, fingerprint="", num_layers=layers, hidden_size=hidden, vocab_size=vocabulary, dtype="bfloat16"
    )
    head = make_head(base)
    assert head.config.parameter_count == head.weight.numel() + head.bias.numel() == parameters
    ungated = dataclasses.replace(head.config, gate=False)
    assert ungated.parameter_count == parameters // 2
    # Folding the LM head in leaves the same function with fewer numbers.
    assert 2 * vocabulary + 2 == on_logits
    served = HeadConfig(base=base, layers=(layers,), trained_on="logits", prompt_format="")
    assert served.parameter_count == 2 * hidden + 2


@pytest.mark.parametrize("layers", [(), (5,), (-1, 2), (2, 1), (1, 1)])
def test_layers_that_mean_nothing_are_refused(layers):
    with pytest.raises(ValueError, match="layers must be"):
        HeadConfig(base=TINY, layers=layers, prompt_format="")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"last_token": "both"}, "last_token must be excluded or included, got 'both'"),
        ({"normalisation": "layer"}, "normalisation must be none or rms"),
        ({"epsilon": float("nan")}, "epsilon must be a finite number"),
        ({"training": {"epochs": 2, "auroc": float("nan")}}, "training.auroc is nan; leave out"),
    ],
)
def test_other_values_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        HeadConfig(**{"base": TINY, "layers": (4,), "prompt_format": ""} | change)


@pytest.mark.parametrize("change", [{"layers": (3,)}, {"normalisation": "rms"}])
def test_a_head_on_logits_reads_the_last_layer_as_it_is(change):
    with pytest.raises(ValueError, match="trained_on logits means layer 4"):
        HeadConfig(**{"base": TINY, "layers": (4,), "trained_on": "logits", "prompt_format": ""} | change)


@pytest.mark.parametrize("place", ["weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(place, value):
    head = make_head()
    broken = getattr(head, place).clone()
    broken.view(-1)[1] = value
    with pytest.raises(ValueError, match=f"reward head: {place} has values that are not finite"):
        dataclasses.replace(head, **{place: broken})


def test_a_closed_gate_row_is_demanded_without_a_gate():
    head = make_head()
    with pytest.raises(ValueError, match="row 0"):
        dataclasses.replace(head, config=dataclasses.replace(head.config, gate=False))
    assert make_head(gate=False).weight[:, 0].count_nonzero() == 0


def test_what_fits():
    head = make_head()
    check_fits(head, TINY, PROMPTS)
    check_fits(head, other(name="moved"), None)
    check_fits(head, other(fingerprint="e" * 64), PROMPTS, weights=False)


@pytest.mark.parametrize(
    ("base", "prompts", "sentences"),
    [
        (other(num_layers=6), PROMPTS, ["num_layers 4"]),
        (other(hidden_size=16, vocab_size=20), PROMPTS, ["hidden_size 8", "vocab_size 19"]),
        (other(fingerprint="e" * 64), PROMPTS, ["other weights"]),
        (other(fingerprint=""), PROMPTS, ["than those of tiny (unknown)"]),
        (other(dtype="bfloat16"), PROMPTS, ["set model.dtype to float32"]),
        (TINY, "q" * 64, ["prompts of another form"]),
        (other(fingerprint="e" * 64), "q" * 64, ["other weights", "prompts of another form"]),
    ],
)
def test_each_mismatch_has_a_sentence_of_its_own(tmp_path, base, prompts, sentences):
    save_head(make_head(), tmp_path)
    head = load_head(tmp_path)
    with pytest.raises(ValueError) as caught:
        check_fits(head, base, prompts)
    found = str(caught.value).split(f"; {tmp_path}")
    assert len(found) == len(sentences)
    assert str(caught.value).startswith(str(tmp_path / "reward_head.safetensors"))
    for sentence, words in zip(found, sentences, strict=True):
        assert words in sentence


# ---------------------------------------------------------------- files


def test_a_head_comes_back_from_its_folder_as_it_was(tmp_path):
    head = make_head(
        layers=(0, 3, 4),
        normalisation="rms",
        epsilon=1e-5,
        last_token="included",
        training={"auroc": 0.75, "epochs": 3},
    )
    folder = tmp_path / "runs" / "head"
    save_head(head, folder)
    again = load_head(folder)
    assert again.config == head.config
    assert torch.equal(again.weight, head.weight) and torch.equal(again.bias, head.bias)
    (folder / "report.md").write_text("kept")
    save_head(make_head(seed=1), folder)
    assert torch.equal(load_head(folder).weight, make_head(seed=1).weight)
    assert sorted(p.name for p in folder.iterdir()) == ["report.md", "reward_head.json", "reward_head.safetensors"]


@pytest.mark.parametrize("left", [("reward_head.safetensors",), ("reward_head.json",), ()])
def test_half_a_folder_is_no_head(tmp_path, left):
    save_head(make_head(), tmp_path)
    for name in {"reward_head.safetensors", "reward_head.json"} - set(left):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="is missing; a reward head is a folder"):
        load_head(tmp_path)


def test_a_save_killed_between_its_files_is_no_head(tmp_path):
    save_head(make_head(), tmp_path)
    before = (tmp_path / "reward_head.json").read_bytes()
    save_head(make_head(seed=1), tmp_path)
    (tmp_path / "reward_head.json").write_bytes(before)
    with pytest.raises(ValueError, match="one of the two is incomplete"):
        load_head(tmp_path)


def rewritten(folder, change):
    file = folder / "reward_head.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(format=2), "format 1"),
        (lambda c: c.update(extra=1), "unknown key extra"),
        (lambda c: c["base"].update(size=1), "unknown key size"),
        (lambda c: c.pop("prompt_format"), "prompt_format"),
        (lambda c: c.update(base=None), "base must be an object"),
        (lambda c: c["base"].update(num_layers="4"), "base.num_layers"),
        (lambda c: c.update(last_token="both"), "last_token"),
        (lambda c: c.update(layers=[0, 9]), "layers must be within"),
        (lambda c: c.update(layers=[0, 1]), "weight must be float32 of shape \\[2, 2, 8\\]"),
    ],
)
def test_a_config_that_is_not_ours_is_refused_by_name(tmp_path, change, words):
    save_head(make_head(), tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(ValueError, match=words) as caught:
        load_head(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_other_tensors_are_refused(tmp_path):
    save_head(make_head(), tmp_path)
    weights = tmp_path / "reward_head.safetensors"
    save_file({"weight": torch.zeros(5, 2, 8)}, weights)
    rewritten(tmp_path, lambda c: c.update(weights_sha256=hashlib.sha256(weights.read_bytes()).hexdigest()))
    with pytest.raises(ValueError, match="must hold weight and bias, got weight"):
        load_head(tmp_path)


# ---------------------------------------------------------------- the released code


def states(generator: torch.Generator) -> list[torch.Tensor]:
    """[tokens, hidden] of layers 0 ... L in float64."""
    return [torch.randn(TOKENS, 8, dtype=torch.float64, generator=generator) * 3**layer for layer in range(5)]


def released_score(features: torch.Tensor, linear: torch.nn.Linear) -> float:
    """As written in the paper: one linear layer on concatenated states; without a gate the plain mean."""
    outputs = linear(features)
    if outputs.shape[1] == 1:
        return outputs.mean().item()
    gate = torch.sigmoid(outputs[:, 0])
    return ((gate * outputs[:, 1]).sum() / gate.sum()).item()


def our_score(layers: dict[int, torch.Tensor], head) -> float:
    total = None
    for place, layer in enumerate(head.layers):
        total = add_layer(total, layers[layer].float(), head.weight[place], head.config)
    return gated_mean(total, torch.tensor([[0, TOKENS]]), head.bias)[0].item()


@pytest.mark.parametrize("layers", [None, [2, 4], [4, 0, 3]])
@pytest.mark.parametrize("rows", [2, 1])
@pytest.mark.parametrize("apply_norm", [False, True])
def test_a_published_head_scores_as_in_its_own_form(tmp_path, layers, rows, apply_norm):
    generator = torch.Generator().manual_seed(7)
    hidden, norm = states(generator), torch.rand(8, dtype=torch.float64, generator=generator) + 0.5
    order = list(range(5)) if layers is None else layers
    torch.manual_seed(3)
    linear = torch.nn.Linear(len(order) * 8, rows)
    name = "fused_layer" if rows == 2 else "reward_layer"
    torch.save({f"{name}.{key}": value for key, value in linear.state_dict().items()}, tmp_path / "head.pt")

    def normed(state):
        return norm * state / (state.square().mean(1, keepdim=True) + 1e-5).sqrt()

    features = torch.cat([normed(hidden[layer]) if apply_norm else hidden[layer] for layer in order], dim=1)
    head = from_published(
        read_published(tmp_path / "head.pt"),
        TINY,
        layers,
        prompt_format=PROMPTS,
        final_norm=norm if apply_norm else None,
        epsilon=1e-5,
    )
    assert head.layers == tuple(sorted(order)) and head.config.gate == (rows == 2)
    assert head.config.last_token == "included"
    wanted = released_score(features, linear.double())
    assert our_score(dict(enumerate(hidden)), head) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("rows", [2, 1])
def test_a_head_on_logits_scores_as_on_logits(rows):
    generator = torch.Generator().manual_seed(7)
    last = states(generator)[-1] / 100
    lm_head = torch.randn(19, 8, dtype=torch.float64, generator=generator)
    torch.manual_seed(3)
    linear = torch.nn.Linear(19, rows)
    name = "fused_layer" if rows == 2 else "reward_layer"
    state = {f"{name}.{key}": value.clone() for key, value in linear.state_dict().items()}
    head = from_published(state, TINY, prompt_format=PROMPTS, lm_head=lm_head)
    assert head.config.trained_on == "logits" and head.layers == (4,)
    wanted = released_score(last @ lm_head.T, linear.double())
    assert our_score({4: last}, head) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("state", "options", "words"),
    [
        ({"fused_layer.weight": (2, 40)}, {}, "expected fused_layer.weight and fused_layer.bias"),
        ({"fused_layer.weight": (3, 40), "fused_layer.bias": (3,)}, {}, r"must be \[2, inputs\]"),
        ({"fused_layer.weight": (2, 32), "fused_layer.bias": (2,)}, {}, "has 32 inputs, and 5 layers"),
        ({"fused_layer.weight": (2, 16), "fused_layer.bias": (2,)}, {"layers": [3, 3]}, "each once"),
        ({"fused_layer.weight": (2, 8), "fused_layer.bias": (2,)}, {"layers": [5]}, "within 0"),
        ({"fused_layer.weight": (2, 20), "fused_layer.bias": (2,)}, {"lm_head": torch.ones(20, 8)}, r"\[2, 19\]"),
    ],
)
def test_other_state_dicts_are_refused(state, options, words):
    tensors = {name: torch.ones(shape) for name, shape in state.items()}
    with pytest.raises(ValueError, match=words):
        from_published(tensors, TINY, prompt_format=PROMPTS, **options)


class Payload:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(Payload(), protocol=2)])
def test_a_file_that_is_no_plain_state_dict_is_refused(tmp_path, content, capsys):
    file = tmp_path / "head.pt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=str(file)):
        read_published(file)
    torch.save({"x": Payload()}, file)
    with pytest.raises(ValueError, match="safe to read"):
        read_published(file)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="holds no state dict"):
        read_published(file)
    assert "this ran" not in capsys.readouterr().out


# ---------------------------------------------------------------- tokens


def sequence(prompt: int, response: int) -> TrainingSequence:
    return TrainingSequence(
        token_ids=np.arange(prompt + response, dtype=np.int32),
        prompt_length=prompt,
        is_demonstration=False,
        advantages=np.zeros(response, np.float32),
        correct=False,
        group=0,
    )


def test_the_tokens_that_count_are_the_responses_own():
    batch = pack([sequence(2, 3), sequence(1, 1), sequence(4, 0), sequence(2, 2)], (3, 1, 0, 2), 16)
    # Laid out as sequences 3, 1, 0, 2: prompt, response | ...: [2, 2], [1, 1], [2, 3], [4, 0], padding
    assert scored_sequences(batch, "included").tolist() == [[2, 4], [5, 6], [8, 11], [15, 15]]
    assert scored_sequences(batch, "excluded").tolist() == [[2, 3], [5, 5], [8, 10], [15, 15]]
    for (start, end), index in zip(scored_sequences(batch, "included").tolist(), batch.sequence_ids, strict=True):
        own = [sequence(2, 3), sequence(1, 1), sequence(4, 0), sequence(2, 2)][index]
        assert batch.token_ids[start:end].tolist() == own.token_ids[own.prompt_length :].tolist()


def test_no_sequences_no_ranges():
    assert scored_sequences(pack([], (), 4), "included").shape == (0, 2)
