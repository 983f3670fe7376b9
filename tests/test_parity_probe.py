"""A run whose engine is made wrong is stopped before its first update, and told what is wrong. (vLLM: rollout/vllm.)"""

import pytest
import torch
from runs import write_inputs

from megatron_srft import config as configuration
from megatron_srft.advantages import to_sequences
from megatron_srft.rollout.parity import ParityError
from megatron_srft.session import Session
from megatron_srft.trainer import parallel

NAME = "model.layers.1.mlp.down_proj.weight"


def scale_one_tensor(model):
    model.get_parameter(NAME).mul_(1.5)


def scale_all(model):
    for parameter in model.parameters():
        parameter.mul_(1.5)


def turn_faster(model):
    """rope_theta 100 in the place of 10,000."""
    frequencies = model.model.rotary_emb.inv_freq
    frequencies.copy_(100.0 ** (-torch.arange(len(frequencies)) / len(frequencies)))


def stretch_positions(model):
    """Every token but the first gets another position id."""
    forward = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **options: forward(
        *args, position_ids=None if position_ids is None else position_ids * 2, **options
    )


def change_the_norms(model):
    """Neither a weight nor a position: what every token goes through."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = write_inputs(tmp_path_factory.mktemp("run"), steps=1, objective={"kind": "grpo"}, parity=dict(
        max_mean_difference=1e-4, max_difference=1e-3
    ))  # fmt: skip
    config = configuration.load(path)
    groups = parallel.start(config.parallel, config.seed)
    try:
        with Session(config, groups) as session:
            session.begin_stage(session.remaining_stages()[0])
            yield session
    finally:
        parallel.stop()


def first_step(run) -> None:
    """The lines of `train.train` that come before the first update, with the engine's weights fresh."""
    run.sampler.synced_version, run.parity.due = None, True
    run.measure(to_sequences(run.score(run.roll_out(run.next_prompts()))), 0)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (scale_one_tensor, [f"1 tensor(s) differ, {NAME}", "corrupted"]),
        (scale_all, ["26 tensor(s) differ", "a weight sync that did not arrive"]),
        (turn_faster, ["holds the trainer's weights, all of them", "rope settings"]),
        (stretch_positions, ["holds the trainer's weights, all of them", "position ids"]),
        (change_the_norms, ["holds the trainer's weights, all of them", "rope is not the cause"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_wrong_is_named(run, fault, words):
    engine = run.sampler.engine
    arrive = type(engine).update_weights

    def arrive_and_break(tensors, version):
        arrive(engine, tensors, version)
        with torch.no_grad():
            fault(engine.model)

    engine.update_weights = arrive_and_break
    with pytest.raises(ParityError) as caught:
        first_step(run)
    found = str(caught.value).split("Likely causes:")[0]
    assert all(word in found for word in words), found
    run.sampler.engine = run.sampler.build_engine()  # without the fault, which may have changed more than weights
    first_step(run)
