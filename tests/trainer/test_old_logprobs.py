"""What the importance ratio is taken to, and that correcting by it or beside it is the same gradient.

With old log-probs of the engine the ratio is r = p / p_engine and its gradient r grad(log p). With those of the trainer
it is 1 in the first update, and an importance weight w = p / p_engine makes the gradient w grad(log p): the same one.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_models import make_model
from training_sequences import VOCAB, make_sequences

from megatron_srft import config as configuration
from megatron_srft.config import ConfigError

UNCLIPPED = {"clip_low": math.inf, "clip_high": math.inf}


def gradients(folder: str, parity: dict, objective: dict, groups: list) -> tuple[list, list, dict]:
    """(what `prepare` makes of the groups' sequences, what `measure` finds, gradient of one step by parameter)."""
    from megatron.core import parallel_state

    from megatron_srft.trainer import parallel
    from megatron_srft.trainer.trainer import Trainer

    config = configuration.from_dict(
        {
            "model": {"path": folder},
            "batch": {"prompts_per_step": len(groups), "tokens_per_microbatch": 40},
            "data": {"max_prompt_tokens": 16},
            "rollout": {"max_response_tokens": 16},
            "optimizer": {"lr": 0.0, "clip_grad": 0.0},
            "objective": objective,
            "parity": parity,
        }
    ).resolved()
    try:
        trainer = Trainer(config, parallel.start(config.parallel, seed=1))
        prepared = trainer.prepare([replace(s, old_logprobs=None) for s in make_sequences(groups, 3)])
        measured = trainer.measure(prepared)
        trainer.step(prepared, 0)
        grads = {name: p.main_grad.clone() for name, p in trainer.models[0].named_parameters()}
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return prepared, measured, grads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("old") / "model"
    return str(make_model("qwen2", path, vocab=VOCAB, tokenizer=False))


@pytest.mark.parametrize(
    ("objective", "groups"),
    [
        ({"kind": "grpo", **UNCLIPPED}, [(False, False), (False, False)]),
        ({"kind": "srft", "preset": "srft-released"}, [(False, False, True), (False, False)]),
    ],
    ids=["grpo", "srft-released, with demonstrations"],
)
def test_a_ratio_to_the_engine_is_an_importance_weight_before_the_first_update(folder, objective, groups):
    *_, plain = gradients(folder, {}, objective, groups)
    prepared, measured, of_engine = gradients(folder, {"old_logprobs": "engine"}, objective, groups)
    *_, weighted = gradients(folder, {"correction": "truncate", "importance_limit": 1e9}, objective, groups)
    assert any(not torch.allclose(plain[name], of_engine[name], rtol=1e-2, atol=1e-6) for name in plain)
    for name, grad in of_engine.items():
        assert torch.allclose(grad, weighted[name], rtol=1e-4, atol=1e-7 + 1e-5 * grad.abs().max()), name
    for sequence, stats in zip(prepared, measured, strict=True):
        expected = stats.logprobs if sequence.is_demonstration else sequence.rollout_logprobs
        np.testing.assert_array_equal(sequence.old_logprobs, expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"parity": {"old_logprobs": "engine", "correction": "mask"}}, "nothing to correct"),
        (
            {"parity": {"old_logprobs": "engine"}, "objective": {"kind": "srft", "preset": "srft-paper"}},
            "without an importance ratio",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        configuration.from_dict({"objective": {"kind": "grpo"}, "model": {"path": "x"}, **settings})
