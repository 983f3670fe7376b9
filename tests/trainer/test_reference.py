"""The reference policy: what it remembers, that the policy comes back bit for bit, and when it is taken anew."""

import numpy as np
import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from tiny_models import make_model
from training_sequences import VOCAB, make_sequences

from megatron_srft import config as configuration
from megatron_srft.trainer import parallel
from megatron_srft.trainer.trainer import Trainer

SEQUENCES = make_sequences([(False, False), (False, False, False)], seed=11)
MIXED = make_sequences([(False, False, True), (False, True)], seed=12)


@pytest.fixture(params=["float32", "bfloat16"])
def trainer(tmp_path, request):
    folder = make_model("qwen2", tmp_path / "model", tied=True, vocab=VOCAB, tokenizer=False, num_hidden_layers=2)
    config = configuration.from_dict(
        {
            "model": {"path": str(folder), "dtype": request.param},
            "batch": {"tokens_per_microbatch": 30},
            "data": {"max_prompt_tokens": 16},
            "rollout": {"kind": "local", "max_response_tokens": 16},
            "objective": {"kind": "grpo", "preset": "dapo"},
            "kl": {"coefficient": 0.5, "refresh_every": 3},
            "optimizer": {"lr": 0.05},
        }
    ).resolved()
    try:
        yield Trainer(config, parallel.start(config.parallel, seed=1))
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def weights(trainer) -> dict[str, np.ndarray]:
    return {name: tensor.float().numpy().copy() for name, tensor in trainer.hf_weights()}


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    for name, tensor in left.items():
        np.testing.assert_array_equal(tensor, right[name], err_msg=name)


def test_the_reference_is_the_starting_policy_and_the_policy_comes_back_bit_for_bit(trainer):
    start = [s.logprobs for s in trainer.measure(SEQUENCES)]
    for step in range(2):
        trainer.step(trainer.prepare(SEQUENCES), step)
    moved = weights(trainer)
    prepared = trainer.prepare(SEQUENCES)
    assert_same(weights(trainer), moved)
    now = trainer.measure(SEQUENCES)
    for before, after, s in zip(start, now, prepared, strict=True):
        assert np.abs(before - after.logprobs).max() > 1e-2
        np.testing.assert_array_equal(s.reference_logprobs, before)


def test_demonstrations_have_no_reference(trainer):
    prepared = trainer.prepare(MIXED)
    assert [s.reference_logprobs is None for s in prepared] == [s.is_demonstration for s in MIXED]
    metrics = trainer.step(prepared, 0)
    assert metrics["loss/kl"] == pytest.approx(0.0, abs=1e-3)
    assert np.isfinite(metrics["grad_norm"])


def test_it_also_comes_back_after_an_error(trainer):
    before = weights(trainer)
    with pytest.raises(ZeroDivisionError), trainer.reference.in_place():
        raise ZeroDivisionError
    assert_same(weights(trainer), before)


def test_a_stage_starts_with_the_policy_as_it_is_for_a_reference(trainer):
    trainer.step(trainer.prepare(SEQUENCES), 0)
    trained = weights(trainer)
    trainer.begin_stage(trainer.config, 100)
    trainer.step(trainer.prepare(SEQUENCES), 0)
    with trainer.reference.in_place():
        assert_same(weights(trainer), trained)


def test_it_is_refreshed_every_third_step_of_the_stage_and_not_at_its_start(trainer):
    taken = []
    for step in range(7):
        before = trainer.reference.weights
        trainer.refresh_reference(step)
        taken.append(trainer.reference.weights is not before)
    assert taken == [False, False, False, True, False, False, True]
    trainer.step(trainer.prepare(SEQUENCES), 0)
    now = [s.logprobs for s in trainer.measure(SEQUENCES)]
    trainer.refresh_reference(3)
    for s, logprobs in zip(trainer.prepare(SEQUENCES), now, strict=True):
        np.testing.assert_array_equal(s.reference_logprobs, logprobs)


def test_the_first_update_has_a_divergence_of_zero_and_later_ones_have_not(trainer):
    first = trainer.step(trainer.prepare(SEQUENCES), 0)
    second = trainer.step(trainer.prepare(SEQUENCES), 1)
    assert (first["kl/reference_k1"], first["loss/kl"]) == pytest.approx((0.0, 0.0), abs=1e-6)
    assert second["loss/kl"] == pytest.approx(0.5 * second["kl/reference_k3"], rel=1e-5)
    assert second["loss/kl"] > 1e-4
