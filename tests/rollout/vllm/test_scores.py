"""A reward head read inside vLLM, eager and compiled, against the trainer and transformers' stacked states in float64.

The processes and engines are those of tests/vllm_score_runs.py.
"""

import pytest
from spawning import spawn
from vllm_score_runs import scored, write_model

pytestmark = pytest.mark.slow

HEADS = ("all layers", "some layers, rms", "last layer, no gate")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm-scores")
    return {family: str(write_model(family, folder / family)) for family in ("qwen2", "llama")}


@pytest.fixture(scope="module")
def found(folders, tmp_path_factory):
    """What every rank found, by model and layout. Compiled models are kept in a folder of the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("vllm-cache")))
        return find(folders)


def find(folders):
    two = spawn(2, scored, folders["qwen2"], {"tensor_parallel_size": 2})
    alone = {family: spawn(1, scored, folder, {}, family == "llama") for family, folder in folders.items()}
    return alone | {"tensor parallel": two}


RUNS = ("qwen2", "llama", "tensor parallel")


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("run", RUNS)
def test_scores_are_the_trainers_and_those_of_stacked_states(found, run, head, version):
    """Also of requests that were preempted, and after an update of the weights."""
    for rank in found[run]:
        trainer, stacked = rank["differences"][head, version]
        assert trainer < 1e-4 and stacked < 1e-4
        scores = rank["scores"][head, version]
        assert scores == found[run][0]["scores"][head, version]
        assert len({round(score, 3) for score in scores if score is not None}) > len(scores) / 2
        assert scores != rank["scores"][head, 1 - version]


@pytest.mark.parametrize("run", RUNS)
def test_requests_were_preempted_and_prompts_computed_in_chunks(found, run):
    for rank in found[run]:
        assert rank["preempted"] > 0
        longest, difference = rank["chunks"]
        assert longest == 16 and difference < 1e-4


@pytest.mark.parametrize("run", RUNS)
def test_completions_are_those_without_a_head(found, run):
    for rank in found[run]:
        assert rank["unchanged"]
        assert set(rank["without"]) == {None}


@pytest.mark.parametrize("run", RUNS)
def test_a_response_of_one_token_has_no_score(found, run):
    for rank in found[run]:
        assert set(rank["one token"]) == {None}
        scores = rank["scores"]["all layers", 0]
        assert [score is None for score in scores] == [length == 1 for length in rank["lengths"]]


def test_heads_that_do_not_fit_are_refused(found):
    (rank,) = found["llama"]
    assert rank["included"].startswith("ConfigError") and "last_token included" in rank["included"]
    assert rank["other model"].startswith("ValueError") and "num_layers 4" in rank["other model"]


def test_rows_of_other_requests_are_refused(found):
    (rank,) = found["llama"]
    assert rank["mixed up"].startswith("StatesError") and "as other tokens" in rank["mixed up"]


def check_faults(said):
    assert said["silent"].startswith("StatesError: of the 4 layers") and "read 3:" in said["silent"]
    assert said["untouched"].startswith("StatesError: of the 4 layers") and "read 0:" in said["untouched"]
    assert said["overwritten"].startswith("StatesError: vLLM's model no longer has the reward head's numbers")


def test_a_layer_that_is_not_read_is_refused(found):
    check_faults(found["llama"][0])


def test_a_compiled_model_gives_the_same_scores(found):
    """There hooks would see nothing."""
    compiled = found["llama"][0]["compiled"]
    assert len(compiled["differences"]) == 6 and max(compiled["differences"]) < 1e-4
    check_faults(compiled)
