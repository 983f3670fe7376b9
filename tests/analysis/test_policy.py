"""Teacher forcing: log-probs and entropies are those of transformers' logits, whatever was loaded before."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from megatron_srft import config as configuration
from megatron_srft import convert
from megatron_srft.analysis import sequences
from megatron_srft.analysis.policy import PolicySource, common_tokenizer, measuring, reading
from megatron_srft.config import LocalRolloutConfig, ModelConfig, ParallelConfig
from megatron_srft.sample import Prompt
from megatron_srft.trainer.manifest import CheckpointError

TEXTS = (("7+15=", "s22#2"), ("1+1=", "2"), ("abc", "defghijk"))


def make_texts():
    """Prompt and response as tokens, with an end token."""
    tokenizer = make_tokenizer()
    found = []
    for number, (prompt, answer) in enumerate(TEXTS):
        ids = np.array(tokenizer(prompt)["input_ids"], np.int32)
        row = Prompt(id=str(number), text=prompt, token_ids=ids, answer=None, source="t")
        response = np.array([*tokenizer(answer)["input_ids"], 1], np.int32)
        found.append(sequences.sequence(row, response, number, is_demonstration=True))
    return found


def make_settings(temperature=1.0):
    return configuration.from_dict(
        {
            "data": {"max_prompt_tokens": 16},
            "rollout": {"kind": "local", "max_response_tokens": 8, "temperature": temperature},
            "objective": {"kind": "sft"},
            "batch": {"tokens_per_microbatch": 16},
        }
    )


def make_source(folder: Path, path: Path | None = None) -> PolicySource:
    return PolicySource(path=path or folder, model=ModelConfig(path=str(folder)), run=folder.name, step=0)


def reference(folder: Path, temperature: float = 1.0) -> list[tuple[np.ndarray, np.ndarray]]:
    """(log-probs, entropies) of the responses in float64, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    found = []
    for text in make_texts():
        with torch.no_grad():
            logits = model(torch.tensor(text.token_ids[None].astype(np.int64))).logits[0] / temperature
        logprobs = logits.log_softmax(-1)[text.prompt_length - 1 : -1]
        taken = logprobs.gather(1, torch.tensor(sequences.response(text).astype(np.int64))[:, None])[:, 0]
        found.append((taken.numpy(), -(logprobs.exp() * logprobs).sum(-1).numpy()))
    return found


def assert_equal(stats, expected):
    for measured, (logprobs, entropies) in zip(stats, expected, strict=True):
        np.testing.assert_allclose(measured.logprobs, logprobs, atol=2e-5)
        np.testing.assert_allclose(measured.entropy, entropies, atol=2e-5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Two models of one shape, one with another rope base, and one with another tokenizer."""
    root = tmp_path_factory.mktemp("models")
    found = {
        "first": make_model("qwen2", root / "first", tied=True, num_hidden_layers=2),
        "second": make_model("qwen2", root / "second", tied=True, num_hidden_layers=2, seed=1),
        "rope": make_model("qwen2", root / "rope", tied=True, num_hidden_layers=2, rope_theta=50.0),
        "words": make_model("qwen2", root / "words", tied=True, num_hidden_layers=2, tokenizer=False),
    }
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["wait"])
    tokenizer.save_pretrained(found["words"])
    return found


@pytest.fixture(scope="module")
def checkpoint(folders, tmp_path_factory) -> Path:
    """The second model as a checkpoint."""
    return convert.to_checkpoint(folders["second"], tmp_path_factory.mktemp("run") / "run", ParallelConfig())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_statistics_are_those_of_transformers_logits(folders, temperature):
    with reading(make_settings(temperature), ParallelConfig()) as reader:
        stats = reader.teacher_forced(make_source(folders["first"]), make_texts())
        assert reader.teacher_forced(make_source(folders["first"]), []) == []
    assert_equal(stats, reference(folders["first"], temperature))


def test_weights_are_exchanged_between_folders_and_checkpoints_and_models(folders, checkpoint):
    """Each source gives its own figures, whatever was loaded before; another rope base is another model."""
    order = [
        (make_source(folders["first"]), "first"),
        (make_source(folders["first"], checkpoint), "second"),
        (make_source(folders["rope"]), "rope"),
        (make_source(folders["first"]), "first"),
        (make_source(folders["second"]), "second"),
    ]
    with reading(make_settings(), ParallelConfig()) as reader:
        for source, name in order:
            assert_equal(reader.teacher_forced(source, make_texts()), reference(folders[name]))


def test_samples_come_from_the_source_and_greedy_ones_are_its_likeliest_tokens(folders, checkpoint):
    settings = make_settings()
    settings = replace(settings, rollout=replace(settings.rollout, temperature=0.0))
    prompts = [Prompt(id="a", text="7+1", token_ids=make_texts()[0].token_ids[:3], answer=None, source="t")]
    model = AutoModelForCausalLM.from_pretrained(folders["second"], dtype=torch.float64)
    with reading(settings, ParallelConfig()) as reader:
        reader.sample(make_source(folders["first"]), prompts, 1)
        (group,) = reader.sample(make_source(folders["first"], checkpoint), prompts, 1)
        (text,) = sequences.completions([group])
        (stats,) = reader.teacher_forced(make_source(folders["first"], checkpoint), [text])
    logits = model(torch.tensor(text.token_ids[None].astype(np.int64))).logits[0, 2:-1]
    assert logits.argmax(-1).tolist() == sequences.response(text).tolist()
    expected = logits.log_softmax(-1).max(-1).values.detach().numpy()  # measured at temperature 1
    np.testing.assert_allclose(stats.logprobs, expected, atol=2e-5)


@pytest.mark.parametrize("settings", [
    {"objective": {"kind": "ppo"}, "kl": {"coefficient": 0.1, "place": "reward", "estimator": "k1"}},
    {"objective": {"kind": "grpo"}, "batch": {"dynamic_sampling": True}, "kl": {"coefficient": 0.1}},
    {"objective": {"kind": "psft", "warmup_steps": 3}, "steps": 5},
    {"objective": {"kind": "luffy"}, "rewards": [{"kind": "exact"}, {"kind": "cosine"}]},
])  # fmt: skip
def test_settings_of_every_method_can_be_measured_with_greedily(settings):
    """Nothing of a method is left that would have something against measuring, or against temperature 0."""
    config = configuration.from_dict(settings).resolved()
    found = measuring(config, LocalRolloutConfig(temperature=0.0))
    assert found.rewards == config.rewards and not found.samples_rollouts


def test_a_damaged_checkpoint_and_another_tokenizer_are_refused(folders, checkpoint, tmp_path):
    copy = convert.to_checkpoint(folders["second"], tmp_path / "run", ParallelConfig())
    (copy / "common.pt").write_bytes(b"x")
    with reading(make_settings(), ParallelConfig()) as reader, pytest.raises(CheckpointError, match="is damaged"):
        reader.teacher_forced(make_source(folders["first"], copy), make_texts())
    assert common_tokenizer([make_source(folders[n]) for n in ("first", "second")]).eos_token_id == 1
    with pytest.raises(ValueError, match="have different tokenizers"):
        common_tokenizer([make_source(folders["first"]), make_source(folders["words"])])
