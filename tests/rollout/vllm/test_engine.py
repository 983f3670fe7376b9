"""vLLM in the trainer's own processes, against transformers, the local engine and the trainer; and its faults.

Each fixture is one group of processes with as few engine starts as it takes (tests/vllm_runs.py).
"""

import pytest
from spawning import spawn
from vllm_runs import CORRUPTED, alone, families, pair, write_run

from megatron_srft.metrics import read_metrics

pytestmark = pytest.mark.slow

PARITY = {"every": 1, "max_mean_difference": 1e-3, "max_difference": 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def one(folder):
    """What one rank found. Stop strings, so that vLLM has a tokenizer."""
    rollout = {"stop": ["no such"], "checksum_every": 0}
    return spawn(1, alone, write_run(folder / "one", name="one", rollout=rollout, parity=PARITY))[0]


@pytest.fixture(scope="module")
def two(folder):
    """What two tensor-parallel ranks found, with one engine over both."""
    rollout = {"vllm": {"kv_cache_memory_bytes": 64 << 20, "tensor_parallel_size": 2}, "checksum_every": 1}
    path = write_run(folder / "two", name="two", rollout=rollout, parity=PARITY, parallel={"tensor": 2})
    return spawn(2, pair, path)


KINDS = [
    ("qwen3", False, "bfloat16", {}),
    ("llama3", True, "float32", {}),
    ("mistral", False, "float32", {"sliding_window": 8}),
]


@pytest.fixture(scope="module")
def kinds(folder):
    return dict(zip([kind[0] for kind in KINDS], spawn(1, families, folder / "kinds", KINDS)[0], strict=True))


# ---------------------------------------------------------------- completions


def without_version(completions):
    return [completion[:3] for completion in completions]


@pytest.mark.parametrize("sampling", ["plain", "cut", "greedy"])
def test_logprobs_are_those_of_the_whole_sequence(one, sampling):
    """Also with top-p and top-k, before which they are taken."""
    assert 0 < one["differences"][sampling] < 1e-5
    assert {finish for _, _, finish, _ in one["plain"]} == {"stop", "length"}


@pytest.mark.parametrize(("family", "rounding"), [("qwen3", 0.1), ("llama3", 1e-5), ("mistral", 1e-5)])
def test_families_have_their_weights_and_log_probs_in_vllm(kinds, family, rounding):
    """Qwen3 in bfloat16 with its own output layer, scaled rope with a tied one, a window shorter than the text."""
    found = kinds[family]
    assert found["same"] == []
    assert found["changed"] == ["model.layers.1.self_attn.v_proj.weight (in model.layers.1.self_attn.qkv_proj)"]
    assert 0 < found["difference"] < rounding


@pytest.mark.parametrize(("family", "rounding"), [("qwen3", 0.05), ("llama3", 1e-5), ("mistral", 1e-5)])
def test_families_have_a_heads_scores_in_vllm(kinds, family, rounding):
    """Beside transformers' stacked states in float64, of the same weights."""
    found = kinds[family]
    assert found["scored"] > 3
    assert 0 < found["scores"] < rounding


def test_greedy_is_the_local_engine_token_for_token(one):
    assert without_version(one["greedy"]) == without_version(one["local greedy"])


def test_a_stop_string_ends_the_same_tokens_and_text_as_in_the_local_engine(one):
    assert without_version(one["stopped"]) == without_version(one["local stopped"])
    cut = [a for a, b in zip(one["stopped"], one["greedy"], strict=True) if a[0] != b[0]]
    assert cut and {finish for _, _, finish, _ in cut} == {"stop"}


def test_a_completion_does_not_depend_on_the_others(one):
    assert one["plain"] == one["reversed"] == one["one by one"]
    first_prompt = one["plain"][3:6]
    assert len({tuple(tokens) for tokens, *_ in first_prompt}) == 3, "samples of one prompt differ"


def test_the_number_of_engines_and_their_tensor_parallel_size_change_nothing(one, two):
    alone_, (first, second) = one["plain"], two
    assert first == second
    for cut in ("one engine", "two engines"):
        assert [c for group in first[cut] for c in without_version(group)] == without_version(alone_), cut


def test_the_trainers_random_numbers_are_left_alone(one):
    assert one["drawn"] is False


def test_requests_beyond_the_engine_are_refused_with_what_to_do(one):
    assert "p4 has 13 tokens" in one["too long"]
    assert "rollout.vllm.max_model_len" in one["too long"]


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_run_trains_on_what_vllm_samples(folder, one, two, name):
    steps = [line for line in read_metrics(folder / name / "runs" / name) if "loss" in line]
    assert [line["step"] for line in steps] == [0, 1]
    assert any(line["grad_norm"] > 0 for line in steps)
    assert all(0 < line["parity/max_difference"] < 1e-3 for line in steps)
    assert all(line["time/sync"] > 0 for line in steps)


def test_with_sleep_mode_every_step_wakes_for_new_weights_and_sleeps_before_the_update(one):
    """The CPU build only stops to schedule when it sleeps; the memory is a matter of GPUs."""
    version = one["naps"][0][1]
    awake = [("wake", "weights"), ("wake", "kv_cache")]
    assert one["naps"] == [("sleep", version), *awake, ("sleep", version + 1)]


# ---------------------------------------------------------------- faults, each before the first update


def test_an_engine_that_was_not_started_for_a_head_refuses_one(one):
    assert one["head"].startswith("ConfigError: this vLLM was not started for a reward head")


def test_without_a_fault_nothing_is_found(one):
    assert one["faults"]["none"] == ""


def test_checksums_name_a_corrupted_tensor(one):
    text = one["faults"]["corrupted", "checksums"]
    assert text.startswith("SyncError: rank 0: 1 of 27 tensors")
    assert CORRUPTED in text


def test_checksums_name_the_packed_output_layer_that_vllm_forgets(one):
    """The embedding itself arrives; the copy that the logits are made with does not (vLLM's CPU build)."""
    text = one["faults"]["unpacked", "checksums"]
    assert "1 of 27 tensors" in text
    assert "model.embed_tokens.weight (in lm_head)" in text


def test_checksums_find_a_sync_that_did_not_arrive(one):
    assert "27 of 27 tensors" in one["faults"]["lost", "checksums"]


def test_checksums_on_one_rank_end_all_of_them(two):
    for found in two:
        assert found["corrupted on rank 1"].startswith("SyncError: rank 1: 1 of ")
        assert CORRUPTED in found["corrupted on rank 1"]


def test_the_parity_gate_names_a_corrupted_tensor(one):
    text = one["faults"]["corrupted", "parity"]
    assert text.startswith("ParityError")
    assert f"1 tensor(s) differ, {CORRUPTED}" in text


def test_the_parity_gate_names_a_sync_that_did_not_arrive(one):
    text = one["faults"]["lost", "parity"]
    assert text.startswith("ParityError")
    assert "27 tensor(s) differ" in text


def test_the_parity_gate_names_a_wrong_rope_base(one):
    text = one["faults"]["rope", "parity"]
    assert text.startswith("ParityError")
    assert "holds the trainer's weights, all of them" in text
    assert "with more context they do not: rope settings" in text


def test_a_rope_base_of_its_own_is_refused_at_the_start(one):
    assert one["faults"]["rope", "start"].startswith("ConfigError")
    assert "rope is Rope(theta=100.0" in one["faults"]["rope", "start"]


def test_another_tokenizer_is_refused(one):
    assert "do not have the same tokenizer: 1 entries" in one["faults"]["tokenizer"]
    assert "unheard" in one["faults"]["tokenizer"]


def test_a_sync_that_takes_too_long_names_rank_phase_and_tensor(one):
    """tests/test_deadline.py sees the process end."""
    (text,) = one["slow"]
    assert text.startswith("rank 0: weight sync of policy version 4 took longer than 1 s")
    assert "gathering the trainer's shards, tensor after model.layers.0." in text
    assert "(after 3 tensors)" in text
    assert "rollout.sync_timeout" in text


def test_weights_that_are_missing_are_named_and_nothing_is_sampled(one):
    assert one["faults"]["missing"].startswith("ValueError: 1 weights of the rollout model did not arrive")
    assert "update_weights must succeed" in one["refused"]
