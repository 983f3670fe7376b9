"""The engine on servers with real ones, two `megatron-srft serve` on this machine: against transformers and the local
engine, in a run of two ranks, and with servers that are killed, stopped and started anew at the worst moments.

Servers take long to start, so one scenario does everything that needs them (fixture `found`), and the tests look at
what it found. What needs no vLLM is in tests/rollout/test_vllm_server.py.
"""

import signal
import time
from dataclasses import replace

import pytest
import torch
from spawning import spawn
from vllm_runs import CORRUPTED, make_prompts, message, plain, requests_for
from vllm_server_runs import (
    Served,
    acting,
    after_answers,
    engine_for,
    first_answers,
    free_port,
    half_an_update,
    train_on_servers,
    weights_of,
    write_server_run,
)

from megatron_srft import config as configuration
from megatron_srft.config import as_local
from megatron_srft.evaluate import evaluate_folder
from megatron_srft.metrics import read_metrics
from megatron_srft.rollout import load_dump
from megatron_srft.rollout.servers import engine as servers_engine
from megatron_srft.rollout.servers import routes
from megatron_srft.rollout.servers.client import Server

pytestmark = pytest.mark.slow

PARITY = {"every": 1, "max_mean_difference": 1e-3, "max_difference": 1e-2}
STEPS = 5
SMALL = 4096
"""Bytes of a bucket: a sync takes many, so that a server can die between them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="module")
def ports():
    return [free_port(), free_port()]


@pytest.fixture(scope="module")
def path(folder, ports):
    settings = {"rollout": {"stop": ["no such"], "dump_every": 1}, "parity": PARITY, "steps": STEPS}
    return write_server_run(folder / "calm", ports, name="calm", **settings)


@pytest.fixture(scope="module")
def servers(folder, ports, path):
    torch.set_num_threads(1)
    made = [Served(path, port, folder / f"{port}.log") for port in ports]
    try:
        yield [server.wait() for server in made]
    finally:
        for server in made:
            server.kill()


@pytest.fixture(scope="module")
def found(servers, path, folder):
    """Everything, in an order that starts few servers: first what they survive, then what ends one of them."""
    first, second = servers
    config = configuration.load(path)
    many = requests_for(make_prompts(), samples=10)
    found = {}

    found["without a key"] = without_a_key(first)
    both = engine_for(config)
    both.update_weights(weights_of(config), 0)
    found["answers"] = first_answers(both, config)
    found["many"] = plain(both.generate(many, config.rollout))
    found["unlike"] = both.unlike(weights_of(config)), both.unlike(weights_of(config, 1.01))
    found["evaluated"] = [evaluated(each) for each in (config, replace(config, rollout=as_local(config.rollout)))]
    one = engine_for(config, servers=(first.url,))
    one.update_weights(weights_of(config), 0)
    found["one server"] = plain(one.generate(requests_for(make_prompts()), config.rollout))
    found["foreign"] = message(both.generate, many, config.rollout)
    found["corrupted"] = corrupted(both, config)
    merged = 1 + [name for name, _ in weights_of(config)].index("model.layers.0.mlp.gate_proj.weight")
    found["left"] = half_an_update(first, weights_of(config, 1.2), merged)
    found["after it"] = message(both.update_weights, weights_of(config), 2), plain(both.generate(many, config.rollout))
    found["other model"] = other_model(folder, second)

    spawn(2, train_on_servers, path, None)
    ahead = {
        "steps: 5": "steps: 3",
        "  dump_every: 1": "  steps_ahead: 1",
        "parity:": "parity:\n  correction: truncate",
    }
    spawn(2, train_on_servers, renamed(folder, path, "ahead", ahead), None)

    # Stopped: in the midst of a sync, then in the midst of generation.
    stopped = engine_for(config, server_timeout=15.0, bucket_bytes=SMALL)
    begun = time.monotonic()
    stopped.update_weights(acting(weights_of(config, 1.3), 9, lambda: first.signal(signal.SIGSTOP)), 1)
    found["stopped in a sync"] = state(stopped), time.monotonic() - begun
    first.signal(signal.SIGCONT)
    stopped.update_weights(weights_of(config), 2)
    found["continued"] = state(stopped), plain(stopped.generate(many, config.rollout))
    with after_answers(stopped, first, 3, lambda: first.signal(signal.SIGSTOP)):
        found["stopped"] = plain(stopped.generate(many, config.rollout)), state(stopped)
    first.signal(signal.SIGCONT)

    # Killed in the midst of generation of a run, and started anew; then in the midst of a sync.
    spawn(2, train_on_servers, renamed(folder, path, "disturbed"), first)
    found["fresh"] = first.log.with_suffix(".versions").read_text()
    killed = engine_for(config, bucket_bytes=SMALL)
    killed.update_weights(acting(weights_of(config), 9, lambda: second.signal(signal.SIGKILL)), 7)
    found["killed in a sync"] = state(killed), plain(killed.generate(many, config.rollout))
    return found


def state(engine):
    """Which servers are in use, why the others are not, and the figures."""
    return [server.dead for server in engine.servers], engine.take_metrics()


def without_a_key(served):
    """What a stranger gets: from a route that samples, from one that changes weights, from one that runs methods."""
    stranger = Server(served.url, 60.0)
    posts = [message(stranger.post, path) for path in ("/inference/v1/generate", "/start_weight_update", "/pause")]
    return [*posts, message(stranger.call_workers, "srft_settings")]


def evaluated(config):
    """The command's evaluation of the run's own problems, without a run."""
    problems = replace(config.evaluation, files=config.data.train)
    return evaluate_folder(config.model.path, replace(config, evaluation=problems))


def corrupted(engine, config):
    """What is said when a tensor changes behind the trainer's checksums."""
    right = servers_engine.buckets

    def wrong(tensors, limit):
        return right(((name, t * 1.5 if name == CORRUPTED else t) for name, t in tensors), limit)

    servers_engine.buckets = wrong
    try:
        return message(engine.update_weights, weights_of(config), 1)
    finally:
        servers_engine.buckets = right


def other_model(folder, server):
    path = write_server_run(folder / "other", [server.port], name="other", family="qwen3")
    return message(engine_for, configuration.load(path))


def renamed(folder, path, name, changes=()):
    """The same run under another name, with changes of its text."""
    text = path.read_text()
    for old, new in {"name: calm": f"name: {name}", **dict(changes)}.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


def without_version(completions):
    return [completion[:3] for completion in completions]


# ---------------------------------------------------------------- completions


def test_a_stranger_gets_nothing_from_a_server_with_a_key(found):
    assert all("it asks for a key" in text for text in found["without a key"]), found["without a key"]


@pytest.mark.parametrize("sampling", ["plain", "cut", "greedy"])
def test_logprobs_are_those_of_the_whole_sequence(found, sampling):
    assert 0 < found["answers"]["differences"][sampling] < 1e-5
    assert {finish for _, _, finish, _ in found["answers"]["plain"]} == {"stop", "length"}


@pytest.mark.parametrize("kind", ["greedy", "stopped"])
def test_they_are_the_local_engines_token_for_token(found, kind):
    assert without_version(found["answers"][kind]) == without_version(found["answers"][f"local {kind}"])


def test_the_number_of_servers_changes_nothing(found):
    assert found["answers"]["plain"] == found["one server"]


def test_an_evaluation_on_servers_is_that_of_the_local_engine(found):
    by_servers, by_local = found["evaluated"]
    assert by_servers.greedy_answers == by_local.greedy_answers
    assert by_servers.files == by_local.files


def test_checksums_and_weights_agree(found):
    same, others = found["unlike"]
    assert same == []
    assert len(others) == 2 * 27  # every part of every tensor, on both


# ---------------------------------------------------------------- runs


def steps_of(folder, name):
    return [line for line in read_metrics(folder / "calm" / "runs" / name) if "loss" in line]


def test_a_run_of_two_ranks_trains_on_what_servers_sample(folder, found):
    steps = steps_of(folder, "calm")
    assert [line["step"] for line in steps] == [*range(STEPS)]
    assert all(0 < line["parity/max_difference"] < 1e-3 for line in steps)
    assert all(line["count/servers"] == 2 and line["count/requests_resent"] == 0 for line in steps)
    assert any(line["grad_norm"] > 0 for line in steps)


def test_a_server_killed_in_generation_and_started_anew_changes_nothing_but_the_accounting(folder, found):
    """Completions, token for token, and figures are those of the undisturbed run."""
    calm, disturbed = steps_of(folder, "calm"), steps_of(folder, "disturbed")
    assert [line["count/servers"] for line in disturbed] == [2, 1, 1, 2, 2]
    assert [line["count/servers_dropped"] for line in disturbed] == [0, 1, 0, 0, 0]
    resent = [line["count/requests_resent"] for line in disturbed]
    assert resent[1] >= 1 and sum(resent) == resent[1]
    for step in range(STEPS):
        groups = [load_dump(folder / "calm" / "runs" / name / "rollouts" / f"step-{step:06d}.jsonl.zst")
                  for name in ("calm", "disturbed")]  # fmt: skip
        tokens = [[[c.token_ids.tolist() for c in group.completions] for group in run] for run in groups]
        assert tokens[0] == tokens[1]
        assert calm[step]["loss"] == pytest.approx(disturbed[step]["loss"], rel=1e-3, abs=1e-6)
        assert calm[step]["grad_norm"] == pytest.approx(disturbed[step]["grad_norm"], rel=1e-3, abs=1e-6)


def test_a_run_samples_a_step_ahead_on_servers(folder, found):
    steps = steps_of(folder, "ahead")
    assert [line["step"] for line in steps] == [0, 1, 2]
    assert all(line["ahead/seconds"] > 0 for line in steps[1:])
    assert all(line["count/servers"] == 2 for line in steps)


# ---------------------------------------------------------------- faults


def test_a_server_stopped_in_a_sync_is_dropped_and_taken_back_with_whole_weights(found):
    """What it had of the sync that it did not finish is left; checksums are compared in every sync here."""
    ((dead, alive), metrics), seconds = found["stopped in a sync"]
    assert dead and alive is None and 15 <= seconds
    assert metrics == {"count/servers": 1, "count/servers_dropped": 1, "count/requests_resent": 0}
    (state, _), completions = found["continued"]
    assert state == [None, None]
    assert without_version(completions) == without_version(found["many"])
    assert {version for *_, version in completions} == {2}


def test_half_an_update_of_a_trainer_that_died_is_left_behind(found):
    """It ends within a merged layer, of which vLLM keeps the half that came. Checksums are compared in every sync."""
    assert found["left"] == [{"failure": "WireError: the other end closed the connection early"}]
    problem, completions = found["after it"]
    assert problem == ""
    assert without_version(completions) == without_version(found["many"])


def test_requests_of_a_stopped_server_are_answered_by_the_other(found):
    completions, ((dead, alive), metrics) = found["stopped"]
    assert "no answer within 15 s" in dead and alive is None
    assert metrics["count/requests_resent"] >= 1
    assert without_version(completions) == without_version(found["many"])


def test_a_server_killed_in_a_sync_is_dropped_and_the_others_go_on(found):
    ((alive, dead), metrics), completions = found["killed in a sync"]
    assert alive is None and dead
    assert metrics["count/servers"] == 1
    assert without_version(completions) == without_version(found["many"])


def test_checksums_name_the_tensor_and_both_servers(found, servers):
    text = found["corrupted"]
    assert text.startswith("SyncError") and text.count(CORRUPTED) == 2
    assert all(f"{server.url}: 1 of 27 tensors" in text for server in servers)


def test_weights_of_another_run_are_found(found):
    assert found["foreign"].startswith("RolloutError") and "another run sends its weights" in found["foreign"]


def test_a_server_that_was_started_anew_says_that_it_has_no_weights(found):
    """tests/rollout/test_vllm_server.py shows what is done about it."""
    assert found["fresh"] == routes.FRESH


def test_a_server_of_another_model_is_refused(found):
    assert found["other model"].startswith("ConfigError")
    assert "family is qwen2 in the server and qwen3 in the trainer" in found["other model"]
