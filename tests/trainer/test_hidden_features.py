"""States of a Megatron model for training a reward head: their gradients are those of stacked Hugging Face states."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from spawning import spawn
from tiny_models import make_model
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from transformers import AutoModelForCausalLM

from megatron_srft.config import (
    BatchConfig,
    DataConfig,
    LocalRolloutConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SftConfig,
)
from megatron_srft.hidden_reward import BaseModel, HeadConfig
from megatron_srft.hidden_reward.descent import Descent
from megatron_srft.hidden_reward.fit import FitSettings, fit
from megatron_srft.hidden_reward.parametrisation import Parametrisation
from megatron_srft.hidden_reward.parts import Responses, questions_of
from megatron_srft.hidden_reward.states import StackedStates
from megatron_srft.sample import TrainingSequence
from megatron_srft.trainer import parallel
from megatron_srft.trainer.hidden_features import Recomputed, lm_head, scored_lengths
from megatron_srft.trainer.states_cache import Cached, cache_bytes
from megatron_srft.trainer.trainer import Trainer

LAYOUTS = [
    ParallelConfig(tensor=2),
    ParallelConfig(tensor=2, sequence_parallel=True),
    ParallelConfig(pipeline=2),
    ParallelConfig(),  # two data ranks
]
BASE = BaseModel(name="tiny", fingerprint="", num_layers=4, hidden_size=32, vocab_size=99, dtype="float32")
HEADS = [
    HeadConfig(base=BASE, layers=(0, 1, 2, 3, 4), prompt_format=""),
    HeadConfig(base=BASE, layers=(1, 4), normalisation="rms", epsilon=0.1, last_token="included", prompt_format=""),
    HeadConfig(base=BASE, layers=(0,), prompt_format=""),  # nothing on the second stage
]
LOSSES = {0: "bce", 1: "pairwise", 2: "bce"}


def made_up(questions: int = 5) -> tuple[list[TrainingSequence], Responses]:
    """Four responses each, of 2 to 13 tokens."""
    random = np.random.default_rng(0)
    sequences = []
    for question in range(questions):
        prompt = random.integers(3, 90, random.integers(2, 9))
        for _ in range(4):
            response = random.integers(3, 90, random.integers(2, 14))
            sequences.append(
                TrainingSequence(
                    token_ids=np.concatenate([prompt, response]).astype(np.int32),
                    prompt_length=len(prompt),
                    is_demonstration=False,
                    advantages=np.zeros(len(response), np.float32),
                    correct=False,
                    group=question,
                )
            )
    labels = np.arange(len(sequences)) % 3 == 0
    names = [f"response {index}" for index in range(len(sequences))]
    return sequences, Responses(labels=labels, questions=np.array([s.group for s in sequences]), names=names)


def a_head(config: HeadConfig) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(len(config.layers), 2, 32, generator=generator) / 8, torch.tensor([0.3, -0.2])


def trainer_of(folder: Path, layout: ParallelConfig):
    config = RunConfig(
        model=ModelConfig(path=str(folder)),
        parallel=layout,
        batch=BatchConfig(tokens_per_microbatch=40),
        data=DataConfig(max_prompt_tokens=16),
        rollout=LocalRolloutConfig(max_response_tokens=16),
        objective=SftConfig(),
    )
    groups = parallel.start(layout, seed=0)
    return Trainer(config, groups)


def stacked_states(folder: Path, config: HeadConfig, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """[layers, scored tokens, hidden] of each response by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    found = []
    for one in made_up()[0]:
        with torch.no_grad():
            hidden = model(
                torch.from_numpy(one.token_ids.astype(np.int64))[None], output_hidden_states=True
            ).hidden_states
        end = len(one.token_ids) - (config.last_token == "excluded")
        found.append(torch.stack([hidden[layer][0, one.prompt_length : end] for layer in config.layers]))
    return found


def expected_gradient(folder: Path, config: HeadConfig, loss: str) -> list[torch.Tensor]:
    """Of the weight and the bias, and the loss's scores, in float64 over whole states."""
    _, responses = made_up()
    weight, bias = (one.double().requires_grad_() for one in a_head(config))
    scores = []
    for states in stacked_states(folder, config):
        if config.normalisation == "rms":
            states = states / (states.square().mean(-1, keepdim=True) + config.epsilon).sqrt()
        gate, reward = (torch.einsum("lrh,lth->tr", weight, states) + bias).unbind(1)
        scores.append((gate.sigmoid() * reward).sum() / gate.sigmoid().sum())
    scores, labels = torch.stack(scores), torch.from_numpy(responses.labels)
    if loss == "bce":
        total = binary_cross_entropy_with_logits(scores, labels.double())
    else:
        numbers = torch.from_numpy(responses.questions)
        pairs = [
            -logsigmoid(scores[i] - scores[j])
            for i in range(len(scores))
            for j in range(len(scores))
            if labels[i] and not labels[j] and numbers[i] == numbers[j]
        ]
        total = torch.stack(pairs).mean()
    return [*torch.autograd.grad(total, (weight, bias)), scores.detach()]


def under_every_layout(folder: str, expected: list, cache: str) -> list:
    """Checks gradients on both ranks; returns the weights that a short training gives under each layout."""
    torch.set_num_threads(1)
    sequences, responses = made_up()
    questions = questions_of(responses, np.arange(len(sequences)))
    trained = []
    for layout in LAYOUTS:
        trainer = trainer_of(Path(folder), layout)
        for number, config in enumerate(HEADS):
            recomputed = Recomputed(trainer, sequences, config)
            place = Path(cache) / str(number)
            cached = Cached(recomputed, questions, place)
            assert not (place / f"rank-{dist.get_rank():05d}").exists(), "the cache was to be unlinked"
            parameters = Parametrisation.of_head(*a_head(config), gate=True)
            for states in (recomputed, cached):
                descent = Descent(states, responses, parameters, None, loss=LOSSES[number])
                scores, shut = torch.zeros(len(sequences), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
                gradient = descent.gradient(questions, scores, shut)
                dist.all_reduce(scores, group=trainer.groups.data)
                for own, wanted in zip((*gradient, scores), expected[number], strict=True):
                    error = (own.double() - wanted).abs().max() / wanted.abs().max()
                    assert error < 2e-5, f"{layout}, head {number}, {type(states).__name__}: {error}"
            assert sum(len(q) for q in recomputed.share(questions)) <= len(sequences)
        fitted = fit(cached, responses, FitSettings(lr=0.01, epochs=2, validation_share=0.3, batch=8, standardise=True))
        trained.append((fitted.weight.numpy(), [epoch.validation_loss for epoch in fitted.epochs]))
        assert lm_head(trainer).shape == (99, 32)
        parallel_state.destroy_model_parallel()
    return trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model("qwen2", tmp_path_factory.mktemp("features") / "model", vocab=99, tied=False)


@pytest.mark.slow
def test_gradients_and_training_are_the_same_under_every_layout(folder, tmp_path):
    expected = [expected_gradient(folder, config, LOSSES[number]) for number, config in enumerate(HEADS)]
    first, second = spawn(2, under_every_layout, str(folder), expected, str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())
    _, responses = made_up()
    settings = FitSettings(lr=0.01, epochs=2, validation_share=0.3, batch=8, standardise=True)
    whole = fit(StackedStates(stacked_states(folder, HEADS[2], torch.float32)), responses, settings)
    for weight, losses in (*first, *second):
        np.testing.assert_allclose(weight, whole.weight.numpy(), atol=1e-4)
        np.testing.assert_allclose(losses, [epoch.validation_loss for epoch in whole.epochs], atol=1e-4)


def test_one_rank_reads_what_transformers_gives_and_counts_bytes(folder, tmp_path):
    sequences, responses = made_up()
    trainer = trainer_of(folder, ParallelConfig())
    try:
        states = Recomputed(trainer, sequences, HEADS[1])
        order = [7, 2, 19]
        found, wanted = states.read(order), stacked_states(folder, HEADS[1])
        for place, layer in enumerate(found.layers):
            expected = torch.cat([wanted[index][place] for index in order])
            torch.testing.assert_close(layer.double(), expected, atol=2e-5, rtol=1e-4)
        tokens = sum(s.response_length for s in sequences)
        assert cache_bytes(states) == tokens * 2 * 32 * 4
        written = Cached(states, questions_of(responses, np.arange(20)), tmp_path / "cache")
        assert written._numbers.nbytes == cache_bytes(states)
        excluded = replace(HEADS[1], last_token="excluded")
        assert scored_lengths(sequences, excluded).tolist() == [s.response_length - 1 for s in sequences]
    finally:
        parallel.stop()


def test_a_full_disk_is_one_sentence_and_leaves_nothing(folder, tmp_path):
    sequences, responses = made_up()
    trainer = trainer_of(folder, ParallelConfig())
    try:
        states = Recomputed(trainer, sequences, HEADS[0])
        place = tmp_path / "cache"
        place.mkdir()
        (place / "rank-00000").symlink_to("/dev/full")  # every write to it finds no space left
        with pytest.raises(ValueError, match="cannot be cached: .*rank-00000: No space left on device.* --cache-gib 0"):
            Cached(states, questions_of(responses, np.arange(20)), place)
        assert not place.exists()
    finally:
        parallel.stop()
