"""Sharing prompts over ranks: same groups, same order, on every rank and for every number of ranks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from spawning import spawn
from tiny_models import make_tokenizer

from megatron_srft.config import ModelConfig, SamplingConfig
from megatron_srft.rollout import collect, load_local_engine
from megatron_srft.rollout.collect import first_samples, share
from megatron_srft.sample import Demonstration, Score

SAMPLING = SamplingConfig(max_response_tokens=10)


def score_by_length(groups):
    from dataclasses import replace

    return [replace(g, scores=tuple(Score(reward=float(len(c.token_ids))) for c in g.completions)) for g in groups]


def collect_here(folder, prompts, world):
    demonstrations = [Demonstration(token_ids=np.array([i, 1], np.int32), text=str(i)) for i in range(len(prompts))]
    demonstrations[2] = None
    engine = load_local_engine(ModelConfig(path=str(folder)), make_tokenizer(), torch.device("cpu"), 16)
    groups = collect(engine, prompts, demonstrations, 3, SAMPLING, 5, 2, world, score=score_by_length)
    return [
        (
            g.prompt.id,
            g.demonstration.text if g.demonstration else None,
            [(c.token_ids.tolist(), c.rollout_logprobs, c.finish_reason, c.policy_version) for c in g.completions],
            [s.reward for s in g.scores],
        )
        for g in groups
    ]


def collect_on_a_rank(folder, prompts):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    groups = collect_here(folder, prompts, dist.group.WORLD)
    own = share([len(p.token_ids) for p in prompts], 2, dist.get_rank())
    dist.destroy_process_group()
    return groups, own


def test_two_ranks_make_what_one_makes(folders, prompts):
    prompts = prompts[:7]
    alone = collect_here(folders["qwen2"], prompts, None)
    results = spawn(2, collect_on_a_rank, folders["qwen2"], prompts)
    shares = [own for _, own in results]
    assert sorted(shares[0] + shares[1]) == list(range(7))
    assert {len(own) for own in shares} == {3, 4}
    for groups, _ in results:
        for (ident, text, completions, rewards), other in zip(alone, groups, strict=True):
            assert (ident, text, rewards) == (other[0], other[1], other[3])
            for mine, theirs in zip(completions, other[2], strict=True):
                assert (mine[0], mine[2:]) == (theirs[0], theirs[2:])
                np.testing.assert_allclose(mine[1], theirs[1], atol=1e-5)
    assert [g[0] for g in alone] == [p.id for p in prompts]
    assert alone[2][1] is None


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 20])
def test_every_prompt_has_one_rank_and_long_ones_are_spread(prompts, ranks):
    shares = [share([len(p.token_ids) for p in prompts], ranks, rank) for rank in range(ranks)]
    assert sorted(i for own in shares for i in own) == list(range(len(prompts)))
    counts = [len(own) for own in shares]
    assert max(counts) - min(counts) <= 1
    if ranks <= 3:
        tokens = [sum(len(prompts[i].token_ids) for i in own) for own in shares]
        assert max(tokens) - min(tokens) <= 4


def test_a_prompt_that_an_earlier_draw_of_the_step_had_gets_further_samples(prompts):
    once, twice, fresh = prompts[:3]
    assert first_samples([once, fresh, twice, once], 4, sampled=[twice, once, twice]) == [4, 0, 8, 8]


def test_a_prompt_that_stands_twice_in_a_step_gets_other_completions(folders, prompts):
    """A step that straddles two epochs; the same samples twice would be one group counted double."""
    once = [c[2] for c in collect_here(folders["qwen2"], [*prompts[:3]], None)]
    twice = [c[2] for c in collect_here(folders["qwen2"], [*prompts[:3], prompts[1]], None)]
    tokens = [[completion[0] for completion in group] for group in twice]
    assert tokens[:3] == [[completion[0] for completion in group] for group in once]
    assert not any(sample in tokens[1] for sample in tokens[3])
