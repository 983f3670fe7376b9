"""Packing: every token once, budgets kept, rows pointing at the right labels."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_srft.data.packing import pack, padded_length, plan_microbatches, plan_sequences
from megatron_srft.sample import TrainingSequence, count


def sequence(tokens, prompt_length, *, demonstration=False, group=0):
    response = len(tokens) - prompt_length
    return TrainingSequence(
        token_ids=np.array(tokens, np.int32),
        prompt_length=prompt_length,
        is_demonstration=demonstration,
        advantages=np.arange(response, dtype=np.float32) + 10 * group,
        correct=not demonstration,
        group=group,
        rollout_logprobs=None if demonstration else -np.arange(response, dtype=np.float32),
    )


@pytest.mark.parametrize("data_ranks", [1, 2, 3])
@pytest.mark.parametrize("multiple", [1, 4])
def test_plan_keeps_every_sequence_once_and_the_budget(data_ranks, multiple):
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 60, 57)] + [250]
    plan = plan_microbatches(lengths, 100, data_ranks, multiple)
    flat = [i for bins in plan for indices in bins for i in indices]
    assert sorted(flat) == list(range(58))
    assert len({len(bins) for bins in plan}) == 1 and len(plan[0]) % multiple == 0
    for bins in plan:
        for indices in bins:
            assert sum(lengths[i] for i in indices) <= 100 or indices == (57,)
    loads = [sum(lengths[i] for indices in bins for i in indices) for bins in plan]
    assert max(loads) - min(loads) <= 250


@pytest.mark.parametrize("data_ranks", [1, 2])
def test_a_pair_is_never_torn_apart(data_ranks):
    random = np.random.default_rng(1)
    sequences = [sequence([1, 2, 3], 1, group=30)]
    for group in range(30):
        prompt = random.integers(1, 4)
        for preferred in (True, False):
            tokens = list(range(prompt + random.integers(1, 60 if group == 7 else 12)))
            answer = sequence(tokens, prompt, demonstration=True, group=group)
            sequences.append(replace(answer, preferred=preferred))
    plan = plan_sequences(sequences, 30, data_ranks)
    assert sorted(i for share in plan for indices in share for i in indices) == list(range(61))
    for indices in (indices for share in plan for indices in share):
        members = [sequences[i] for i in indices]
        pairs = [s for s in members if s.preferred is not None]
        assert [s.preferred for s in pairs] == [True, False] * (len(pairs) // 2)
        assert [s.group for s in pairs[::2]] == [s.group for s in pairs[1::2]]
        assert sum(len(s.token_ids) for s in members) <= 30 or len(members) == 2


def test_plan_of_nothing_is_one_empty_microbatch_per_rank():
    assert plan_microbatches([], 100, 2) == [[()], [()]]


def test_pack_places_rows_on_the_tokens_that_predict_the_response():
    sequences = [sequence([5, 6, 9], 2), sequence([5, 7, 1], 1, demonstration=True, group=1)]
    batch = pack(sequences, (0, 1), 8)
    assert batch.token_ids.tolist() == [5, 6, 9, 5, 7, 1, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 8]
    assert batch.rows.tolist() == [1, 3, 4] and batch.labels.tolist() == [9, 7, 1]
    assert torch.equal(batch.token_ids[batch.rows + 1], batch.labels)
    assert batch.sequence.tolist() == [0, 1, 1]
    assert batch.is_demonstration.tolist() == [False, True, True]
    assert batch.advantages.tolist() == [0, 10, 11]
    assert batch.response_lengths.tolist() == [1, 2, 2]
    assert batch.rollout_logprobs.tolist() == [0, 0, 0]
    assert batch.old_logprobs is None and batch.pooled_entropy is None


def test_an_empty_microbatch_is_padding_only():
    batch = pack([sequence([1, 2], 1)], (), padded_length(0, 4))
    assert batch.token_ids.tolist() == [0] * 4 and batch.cu_seqlens.tolist() == [0, 4]
    assert len(batch.rows) == len(batch.labels) == len(batch.advantages) == len(batch.correct) == 0


def test_counts_split_the_populations():
    sequences = [sequence([5, 6, 9], 2), sequence([5, 7, 1], 1, demonstration=True), sequence([5, 6, 9, 9], 1)]
    counts = count(sequences)
    assert (counts.rollout_tokens, counts.rollout_sequences) == (4, 2)
    assert (counts.demonstration_tokens, counts.demonstration_sequences) == (2, 1)
