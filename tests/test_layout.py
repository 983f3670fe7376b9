"""Layout arithmetic against numbers worked out by hand for Qwen2.5-7B (hidden 3584, 28 layers, 28/4 heads of 128)."""

import dataclasses

import pytest

from megatron_srft import layout
from megatron_srft.config import OpsConfig, from_dict
from megatron_srft.ops import linear_chunks, linear_token_logprob
from megatron_srft.weights.architecture import Architecture, Rope

QWEN_7B = Architecture(
    family="qwen2", num_layers=28, hidden_size=3584, ffn_size=18944, num_heads=28, num_kv_heads=4, head_dim=128,
    vocab_size=152064, norm_epsilon=1e-6, qkv_bias=True, qk_norm=False, tied=False, rope=Rope(theta=1e6),
    max_positions=32768,
)  # fmt: skip

PER_LAYER = 3584 * (3584 + 2 * 512) + (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944 + 2 * 3584
MATRIX = 152064 * 3584


def run(**sections):
    return from_dict({"model": {"path": "m"}, **sections}).resolved()


def test_parameters_of_qwen2_5_7b():
    assert layout.parameters_on(run(), QWEN_7B, 0, 152064) == 7_615_616_512  # the published model's count
    assert 28 * PER_LAYER + 2 * MATRIX + 3584 == 7_615_616_512


def test_tensor_ranks_cut_the_matrices_and_copy_the_norms():
    config = run(parallel={"tensor": 2})
    norms = 28 * 2 * 3584 + 3584
    assert layout.parameters_on(config, QWEN_7B, 0, 152064) == (7_615_616_512 - norms) // 2 + norms


def test_pipeline_stages_hold_their_layers_and_their_end_of_the_vocabulary():
    config = run(parallel={"pipeline": 4})
    stages = [layout.parameters_on(config, QWEN_7B, stage, 152064) for stage in range(4)]
    assert stages == [7 * PER_LAYER + MATRIX, 7 * PER_LAYER, 7 * PER_LAYER, 7 * PER_LAYER + MATRIX + 3584]
    assert sum(stages) == 7_615_616_512


def test_a_tied_head_is_copied_to_the_last_stage():
    tied = dataclasses.replace(QWEN_7B, tied=True)
    one = layout.parameters_on(run(), tied, 0, 152064)
    two = [layout.parameters_on(run(parallel={"pipeline": 2}), tied, stage, 152064) for stage in range(2)]
    assert one == 28 * PER_LAYER + MATRIX + 3584
    assert sum(two) == one + MATRIX


def test_ranks_are_dealt_tensor_first_then_data_then_pipeline():
    config = run(parallel={"tensor": 2, "pipeline": 2})
    table = [(p.rank, p.pipeline, p.data, p.tensor) for p in layout.places(config, 28, 8)]
    assert table == [
        (0, 0, 0, 0), (1, 0, 0, 1), (2, 0, 1, 0), (3, 0, 1, 1),
        (4, 1, 0, 0), (5, 1, 0, 1), (6, 1, 1, 0), (7, 1, 1, 1),
    ]  # fmt: skip


def test_context_ranks_are_neighbours_of_tensor_ranks():
    config = run(parallel={"tensor": 2, "context": 2})
    table = [(p.rank, p.data, p.context, p.tensor) for p in layout.places(config, 28, 8)]
    assert table == [(4 * data + 2 * context + tensor, data, context, tensor)
                     for data in (0, 1) for context in (0, 1) for tensor in (0, 1)]  # fmt: skip


def test_virtual_stages_are_dealt_round_robin_and_cover_every_layer_once():
    config = run(parallel={"pipeline": 2, "virtual_pipeline": 2})
    first, second = layout.stage_layers(config, 8, 0), layout.stage_layers(config, 8, 1)
    assert first == ((0, 2), (4, 6))
    assert second == ((2, 4), (6, 8))


def test_memory_of_bfloat16_with_the_optimizer_sharded_over_4_data_ranks():
    config = run(
        model={"dtype": "bfloat16"},
        parallel={"tensor": 2, "distributed_optimizer": True},
        batch={"tokens_per_microbatch": 8192, "prompts_per_step": 64, "rollouts_per_prompt": 8},
        data={"max_prompt_tokens": 1024, "max_demonstration_tokens": 3072},
        rollout={"kind": "local", "max_response_tokens": 3072, "max_concurrent_sequences": 256},
    )
    numbers = layout.parameters_on(config, QWEN_7B, 0, 152064)
    got = layout.memory(config, QWEN_7B, 0, 8, 152064)
    assert got.parameters == 2 * numbers
    assert got.gradients == 4 * numbers
    assert got.optimizer == 12 * numbers // 4
    # per token and layer: 4 x 3584, and (2 x 3584 + 2 x 512 + 4 x 18944) / 2 on each of two tensor ranks
    assert got.activations == 8192 * 28 * (14336 + (7168 + 1024 + 75776) // 2) * 2
    # 8192 x 76032 logits in bfloat16 are 1.16 GiB, within the budget: kept for the backward pass
    assert got.head == 8192 * 76032 * 2 + (32 << 20) + 76032 * 3584 * 2 + 8192 * 3584 * 4
    assert got.engine == 2 * 7_615_616_512
    # 64 x 8 rollouts over 8 ranks, 4096 tokens each, 28 layers x 2 x 4 heads x 128 in bfloat16
    assert got.cache == 64 * 4096 * 28 * 2 * 4 * 128 * 2
    standing = got.parameters + got.gradients + got.optimizer + got.engine
    assert got.peak == standing + max(got.cache, got.activations + got.head)


def test_vllm_holds_its_share_of_the_model_and_its_cache_all_the_time():
    native = {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 3 << 30}
    got = layout.memory(run(rollout={"kind": "vllm", "vllm": native}), QWEN_7B, 0, 8, 152064)
    assert got.engine == 4 * 7_615_616_512 // 2 + (3 << 30)
    standing = got.parameters + got.gradients + got.optimizer + got.engine
    assert got.peak == standing + got.activations + got.head


def test_memory_of_float32_without_sharding():
    config = run(parallel={"distributed_optimizer": False}, objective={"kind": "sft"})
    got = layout.memory(config, QWEN_7B, 0, 2, 152064)
    numbers = 7_615_616_512
    assert (got.parameters, got.gradients, got.optimizer) == (4 * numbers, 4 * numbers, 8 * numbers)
    assert (got.engine, got.cache) == (0, 0)  # SFT samples nothing


def test_sequence_parallelism_and_recomputation_shrink_the_activations():
    def elements(**parallel):
        return layout.activation_elements(run(parallel=parallel), QWEN_7B, 0, 1)

    layer = 14336 + 7168 + 1024 + 75776
    assert elements() == 28 * layer
    assert elements(tensor=2) == 28 * (14336 + (layer - 14336) / 2)
    assert elements(tensor=2, sequence_parallel=True) == 28 * layer / 2
    assert elements(recompute="full") == 28 * 3584 + layer
    gathered = 2 * 512  # keys and values of all tokens
    assert elements(context=4) == 28 * (layer / 4 + gathered)
    assert elements(context=4, tensor=2) == 28 * ((14336 + (layer - 14336) / 2) / 4 + gathered / 2)
    assert elements(context=4, recompute="full") == 28 * 3584 / 4 + layer / 4 + gathered


@pytest.mark.parametrize(
    ("parallel", "stage", "expected"),
    [
        (dict(), 0, 28),
        (dict(pipeline=4), 0, 28),  # 7 layers x 4 micro-batches
        (dict(pipeline=4), 3, 7),
        (dict(pipeline=2, virtual_pipeline=2), 0, 7 * 5),  # warm-up (2 - 0 - 1) * 2 + (2 - 1) * 2, plus the current one
        (dict(pipeline=2, virtual_pipeline=2), 1, 7 * 3),
    ],
)
def test_layers_in_flight(parallel, stage, expected):
    assert layout.layers_in_flight(run(parallel=parallel), 28, stage) == expected


def test_batch_arithmetic_by_hand():
    config = run(
        batch={"prompts_per_step": 64, "rollouts_per_prompt": 8, "updates_per_step": 2, "tokens_per_microbatch": 8192},
        data={"max_prompt_tokens": 1024},
        rollout={"kind": "local", "max_response_tokens": 3072},
    )
    got = layout.batch_arithmetic(config, data_ranks=4, prompt_tokens=99.0)
    assert (got.rollouts, got.demonstrations, got.sequences_per_update) == (512, 64, 288)
    assert got.longest_sequence == 4096
    assert got.tokens_per_update == (288 * 100, 288 * 4096)
    # 72 sequences on each data rank: 7,200 tokens fit into one micro-batch; two of the longest fit into one
    assert got.microbatches_per_update == (1, 36)


def test_the_two_answers_of_a_pair_share_a_micro_batch():
    config = run(
        objective={"kind": "dpo"},
        batch={"prompts_per_step": 12, "tokens_per_microbatch": 100},
        data={"max_prompt_tokens": 10, "max_demonstration_tokens": 20},
        rollout={"kind": "local", "max_response_tokens": 5},
    )
    got = layout.batch_arithmetic(config, data_ranks=5, prompt_tokens=9.0)
    assert (got.pairs, got.demonstrations, got.rollouts, got.sequences_per_update) == (12, 0, 0, 24)
    # Three pairs a rank: 60 tokens at least; at most 60 tokens each, so that no two fit together.
    assert got.microbatches_per_update == (1, 3)


def test_interleaved_schedules_need_a_multiple_of_the_stages():
    config = run(
        parallel={"pipeline": 4, "virtual_pipeline": 2},
        batch={"prompts_per_step": 1, "rollouts_per_prompt": 4, "tokens_per_microbatch": 10},
    )
    # 5 sequences (one is a demonstration): at 2 tokens each they fit into one micro-batch; the longest never share
    assert layout.batch_arithmetic(config, 1, 1.0).microbatches_per_update == (4, 8)


def test_constants_are_the_ops_defaults():
    assert OpsConfig().saved_logits_gib * 2**30 == linear_token_logprob.SAVED_LOGITS_BYTES
    assert layout.CHUNK_BYTES == linear_chunks.CHUNK_BYTES
    assert layout.NARROWEST_CHUNK == linear_chunks.NARROWEST_CHUNK


def test_disk():
    assert layout.checkpoint_bytes(run(model={"dtype": "bfloat16"}), QWEN_7B) == 14 * 7_615_616_512
    assert layout.checkpoint_bytes(run(), QWEN_7B) == 16 * 7_615_616_512
    assert layout.hf_folder_bytes(run(), QWEN_7B) == 4 * 7_615_616_512


def test_a_critic_is_a_second_model_without_an_lm_head_and_with_an_optimizer():
    head = MATRIX - 3584  # an LM head in the policy, one output in the critic
    for parallel, stage, missing in (({}, 0, head), ({"pipeline": 2}, 0, 0), ({"pipeline": 2}, 1, head)):
        config = run(parallel=parallel, objective={"kind": "ppo"}, model={"dtype": "bfloat16"})
        got = layout.memory(config, QWEN_7B, stage, 8, 152064)
        numbers = layout.parameters_on(config, QWEN_7B, stage, 152064) - missing
        assert got.critic == pytest.approx(numbers * (2 + 4 + 12 * config.parallel.pipeline / 8), abs=1)
        standing = got.parameters + got.gradients + got.optimizer + got.engine + got.critic
        assert got.peak == standing + max(got.cache, got.activations + got.head)
        assert layout.checkpoint_bytes(config, QWEN_7B) == 14 * (2 * 7_615_616_512 - head)
    tied = dataclasses.replace(QWEN_7B, tied=True)
    assert layout.critic_parameters_on(run(), tied, 0, 152064) == 28 * PER_LAYER + MATRIX + 2 * 3584


def test_a_reference_policy_is_in_host_memory_and_on_disk():
    config = run(kl={"coefficient": 0.01}, objective={"kind": "grpo"})
    got, without = (layout.memory(c, QWEN_7B, 0, 1, 152064) for c in (config, run(objective={"kind": "grpo"})))
    assert (got.reference, without.reference) == (2 * 4 * 7_615_616_512, 0)
    assert got.peak == without.peak
    assert layout.checkpoint_bytes(config, QWEN_7B) == 20 * 7_615_616_512
