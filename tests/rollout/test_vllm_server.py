"""The engine on servers against servers that speak vLLM's routes without vLLM: what is sent where, and every fault that
needs no real one. tests/rollout/vllm/test_server.py does the rest with real servers."""

import asyncio
import contextlib
import socket
import threading
import time
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from spawning import spawn
from tiny_models import make_model, make_tokenizer
from vllm_endpoint import Endpoint, expected_tokens, same

from megatron_srft import cli
from megatron_srft.config import ConfigError, DataConfig, ModelConfig, RunConfig, SamplingConfig, from_dict
from megatron_srft.config.rollouts import VllmServerRolloutConfig
from megatron_srft.rollout import Request, build_engine
from megatron_srft.rollout.engine import RolloutError
from megatron_srft.rollout.servers import serve, wire
from megatron_srft.rollout.servers.client import ServerFailed
from megatron_srft.rollout.servers.engine import check_engine
from megatron_srft.rollout.servers.guard import KeyGuard
from megatron_srft.rollout.vllm.common import SyncError, seed
from megatron_srft.sample import Prompt
from megatron_srft.weights.folder import HfFolder

SAMPLING = SamplingConfig(max_response_tokens=6)
CORRUPTED = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("qwen2", tmp_path_factory.mktemp("model") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def weights(model):
    folder = HfFolder(model)
    return {name: folder.tensor(name) for name in folder.shapes()}


@pytest.fixture
def endpoints(model, weights):
    """Makes servers, and ends them."""
    made = []

    def make(count=1, **settings):
        shapes = {"shapes": {name: list(tensor.shape) for name, tensor in weights.items()}}
        made.extend(new := [Endpoint(model, **shapes | settings) for _ in range(count)])
        return new

    yield make
    for endpoint in made:
        endpoint.silent.clear()
        if not endpoint.dead:
            endpoint.kill()


def make_engine(model, endpoints, **settings):
    settings = {"server_timeout": 5.0, "start_timeout": 1.0, "bucket_bytes": 4096} | settings
    rollout = VllmServerRolloutConfig(servers=tuple(e.url for e in endpoints), max_response_tokens=6, **settings)
    config = RunConfig(model=ModelConfig(path=str(model), dtype="float32"), data=DataConfig(), rollout=rollout)
    return build_engine(config, make_tokenizer(), torch.device("cpu"))


def requests_for(prompts=6, samples=4):
    return [
        Request(
            prompt=Prompt(id=f"p{p}", text="", token_ids=np.arange(3, 5 + p, dtype=np.int32), answer="", source="test"),
            sample=s,
            seed=0,
            step=1,
        )
        for p in range(prompts)
        for s in range(samples)
    ]


def expected(requests, limit=6):
    return [expected_tokens(r.prompt.token_ids.tolist(), seed(r), limit) for r in requests]


def tokens(completions):
    return [completion.token_ids.tolist() for completion in completions]


def answered(*endpoints):
    return sum((endpoint.asked for endpoint in endpoints), Counter())


# ---------------------------------------------------------------- without faults


def test_weights_arrive_bit_by_bit_and_answers_in_order(model, weights, endpoints):
    """The largest tensor is larger than a bucket."""
    servers = endpoints(2)
    engine, requests = make_engine(model, servers), requests_for()
    engine.update_weights(weights.items(), 7)
    assert all(same(server.weights, weights) for server in servers)
    assert max(t.numel() * 4 for t in weights.values()) > 4096
    completions = engine.generate(requests, SAMPLING)
    assert tokens(completions) == expected(requests)
    assert {c.policy_version for c in completions} == {7}
    assert answered(*servers) == Counter({(tuple(r.prompt.token_ids.tolist()), seed(r)): 1 for r in requests})
    assert all(server.asked for server in servers)
    assert engine.take_metrics() == {"count/servers": 2, "count/servers_dropped": 0, "count/requests_resent": 0}


def test_samples_of_a_prompt_go_to_one_server(model, weights, endpoints):
    servers = endpoints(3)
    engine, requests = make_engine(model, servers), requests_for(prompts=9)
    engine.update_weights(weights.items(), 0)
    engine.generate(requests, SAMPLING)
    prompts = [{prompt for prompt, _ in server.asked} for server in servers]
    assert [len(p) for p in prompts] == [3, 3, 3]
    assert len(set().union(*prompts)) == 9


def test_no_more_requests_at_a_time_than_allowed_and_a_fast_server_takes_more(model, weights, endpoints):
    """The slow one answers nothing until the fast one has answered all but what the slow one could begin."""
    slow, fast = endpoints(2)
    engine, requests = make_engine(model, [slow, fast], max_concurrent_requests=2), requests_for(prompts=20)
    most, deadline = len(requests) - 8, time.monotonic() + 30

    def wait(endpoint):
        while fast.asked.total() < most and time.monotonic() < deadline:
            time.sleep(0.01)

    slow.on_generate = wait
    engine.update_weights(weights.items(), 0)
    assert tokens(engine.generate(requests, SAMPLING)) == expected(requests)
    assert slow.most_busy == 2
    assert fast.asked.total() >= most and time.monotonic() < deadline


def test_completions_do_not_depend_on_the_number_of_servers(model, weights, endpoints):
    requests = requests_for()
    found = []
    for count in (1, 3):
        engine = make_engine(model, endpoints(count))
        engine.update_weights(weights.items(), 0)
        found.append(tokens(engine.generate(requests, SAMPLING)))
    assert found[0] == found[1]


def test_requests_travel_while_the_caller_does_other_things(model, weights, endpoints):
    (server,), gate = endpoints(), threading.Event()
    server.on_generate = lambda endpoint: gate.wait()
    engine, requests = make_engine(model, [server]), requests_for(prompts=2)
    engine.update_weights(weights.items(), 0)
    launched = engine.launch(requests, SAMPLING)
    with pytest.raises(AssertionError, match="must be gathered before the weights change"):
        engine.update_weights(weights.items(), 1)
    gate.set()
    assert tokens(engine.gather(launched)) == expected(requests)
    engine.update_weights(weights.items(), 1)


def test_sync_calls_come_in_vllms_order(model, weights, endpoints):
    (server,) = endpoints()
    engine = make_engine(model, [server])
    server.calls.clear()
    engine.update_weights(weights.items(), 0)
    paths = [path for path in server.calls if path != "/collective_rpc"]
    assert paths == [
        "/pause?mode=abort",
        "/update_weight_version",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/resume",
    ]


def test_a_server_is_asked_what_it_is_once_and_again_when_it_was_started_anew(model, weights, endpoints):
    (server,) = endpoints()
    asked, settings = [], server.srft_settings
    server.srft_settings = lambda: asked.append(1) or settings()
    engine = make_engine(model, [server])
    engine.update_weights(weights.items(), 0)
    assert len(asked) == 2, "at the start, and before its first weights"
    engine.update_weights(weights.items(), 1)
    assert len(asked) == 2
    server.version = "default"
    engine.update_weights(weights.items(), 2)
    assert len(asked) == 3
    server.version, server.settings["dtype"] = "default", "bfloat16"
    with pytest.raises(RolloutError, match="none of rollout.servers has taken the weights: .*dtype bfloat16"):
        engine.update_weights(weights.items(), 3)


def test_three_buckets_are_held_however_long_servers_take_and_many_they_are(model, weights, endpoints, monkeypatch):
    made, held = weakref.WeakSet(), []
    empty, total = wire._empty, sum(tensor.numel() * tensor.itemsize for tensor in weights.values())

    def counted(limit):
        made.add(bucket := empty(limit))
        held.append(len(made))
        return bucket

    monkeypatch.setattr(wire, "_empty", counted)
    servers = endpoints(3)
    take = servers[1].take_weights
    servers[1].take_weights = lambda info: (time.sleep(1), take(info))
    engine = make_engine(model, servers, bucket_bytes=2048)
    engine.update_weights(weights.items(), 0)
    assert all(same(server.weights, weights) for server in servers)
    assert len(held) == -(-total // 2048) > 30
    assert max(held) <= 3


def test_unlike_names_tensors_and_servers(model, weights, endpoints):
    (server,) = endpoints()
    engine = make_engine(model, [server])
    engine.update_weights(weights.items(), 0)
    assert engine.unlike(weights.items()) == []
    (named,) = engine.unlike((weights | {CORRUPTED: weights[CORRUPTED] * 1.01}).items())
    assert named.startswith(CORRUPTED) and server.url in named


# ---------------------------------------------------------------- faults while sampling


def kill_after(count):
    """A server that dies at its count-th request, with those that it is busy with."""
    left = iter(range(count))
    lock = threading.Lock()

    def act(endpoint):
        with lock:
            last = next(left, None) is None
        if last and not endpoint.dead:
            endpoint.kill()
        while endpoint.dead:
            time.sleep(0.01)
            raise ConnectionError

    return act


def test_requests_of_a_server_that_dies_are_answered_by_others_once(model, weights, endpoints):
    doomed, other = endpoints(2)
    engine, requests = make_engine(model, [doomed, other], max_concurrent_requests=4), requests_for(prompts=10)
    engine.update_weights(weights.items(), 0)
    doomed.on_generate = kill_after(5)
    completions = engine.generate(requests, SAMPLING)
    assert tokens(completions) == expected(requests)
    assert doomed.asked.total() == 5
    assert set(answered(doomed, other)) == {(tuple(r.prompt.token_ids.tolist()), seed(r)) for r in requests}
    metrics = engine.take_metrics()
    assert metrics["count/servers"] == metrics["count/servers_dropped"] == 1
    assert 1 <= metrics["count/requests_resent"] <= 4
    assert engine.take_metrics() == {"count/servers": 1, "count/servers_dropped": 0, "count/requests_resent": 0}


def test_a_server_that_falls_silent_is_dropped(model, weights, endpoints):
    doomed, other = endpoints(2)
    engine, requests = make_engine(model, [doomed, other], server_timeout=1.0), requests_for()
    engine.update_weights(weights.items(), 0)
    doomed.silent.set()
    assert tokens(engine.generate(requests, SAMPLING)) == expected(requests)
    assert [s.dead is None for s in engine.servers] == [False, True]
    assert "/health: no answer within 1 s" in engine.servers[0].dead


def test_a_request_that_takes_too_long_drops_its_server(model, weights, endpoints):
    (doomed, other), gate = endpoints(2), threading.Event()
    engine, requests = make_engine(model, [doomed, other], request_timeout=2.0), requests_for()
    engine.update_weights(weights.items(), 0)
    doomed.on_generate = lambda endpoint: gate.wait()
    assert tokens(engine.generate(requests, SAMPLING)) == expected(requests)
    assert "/inference/v1/generate: no answer within 2 s" in engine.servers[0].dead
    gate.set()


def test_when_none_is_left_each_is_named_with_its_reason(model, weights, endpoints):
    servers = endpoints(2)
    engine = make_engine(model, servers)
    engine.update_weights(weights.items(), 0)
    for server in servers:
        server.kill()
    with pytest.raises(RolloutError, match="none of rollout.servers is left") as caught:
        engine.generate(requests_for(), SAMPLING)
    assert all(server.url in str(caught.value) for server in servers)


def test_a_passing_error_is_tried_again_and_a_lasting_one_ends_the_run(model, weights, endpoints):
    (server,), failures = endpoints(), iter([True, True])

    def fail(endpoint):
        if next(failures, False):
            raise ValueError("no")

    engine, requests = make_engine(model, [server]), requests_for()
    engine.update_weights(weights.items(), 0)
    server.on_generate = fail
    assert tokens(engine.generate(requests, SAMPLING)) == expected(requests)
    assert engine.take_metrics()["count/requests_resent"] == 2
    failures = iter(lambda: True, False)
    with pytest.raises(RolloutError, match=r"sent 4 times without an answer \(rollout.retries\).*ValueError: no"):
        engine.generate(requests, SAMPLING)


def test_a_server_that_was_started_anew_is_not_used_before_it_has_weights(model, weights, endpoints):
    anew, other = endpoints(2)
    engine, requests = make_engine(model, [anew, other]), requests_for()
    engine.update_weights(weights.items(), 3)
    anew.version = "default"
    assert tokens(engine.generate(requests, SAMPLING)) == expected(requests)
    assert "started anew" in engine.servers[0].dead
    engine.update_weights(weights.items(), 4)
    assert engine.servers[0].dead is None
    assert {c.policy_version for c in engine.generate(requests, SAMPLING)} == {4}


def test_two_runs_on_one_server_are_told(model, weights, endpoints):
    (server,) = endpoints()
    first, second = make_engine(model, [server]), make_engine(model, [server])
    first.update_weights(weights.items(), 0)
    second.update_weights(weights.items(), 0)
    with pytest.raises(RolloutError, match="another run sends its weights to this server"):
        first.generate(requests_for(), SAMPLING)


def test_requests_that_an_error_left_behind_do_not_disturb_the_next_sync(model, weights, endpoints):
    """The sync aborts them; what their threads make of that must not take the server out."""
    (foreign, busy), gate = endpoints(2), threading.Event()
    engine = make_engine(model, [foreign, busy])
    engine.update_weights(weights.items(), 0)
    foreign.version = "other:1"
    foreign.on_generate = lambda endpoint: time.sleep(0.3)  # until the other one has begun
    busy.on_generate = lambda endpoint: gate.wait()

    def abort(endpoint):
        endpoint.finish_reason = "abort"
        gate.set()
        time.sleep(1)  # their threads come first

    busy.on_pause = abort
    with pytest.raises(RolloutError, match="another run"):
        engine.generate(requests_for(), SAMPLING)
    assert busy.busy > 0
    engine.update_weights(weights.items(), 1)
    assert [server.dead for server in engine.servers] == [None, None]


# ---------------------------------------------------------------- faults in a sync


def test_a_server_that_dies_in_a_sync_is_dropped_and_taken_back_when_it_returns(model, weights, endpoints):
    doomed, other = endpoints(2)
    engine, requests = make_engine(model, [doomed, other]), requests_for()
    doomed.on_update = lambda endpoint: endpoint.kill()
    engine.update_weights(weights.items(), 0)
    assert [s.dead is None for s in engine.servers] == [False, True]
    assert tokens(engine.generate(requests, SAMPLING)) == expected(requests)
    shapes = doomed.settings["shapes"]
    back = Endpoint(model, doomed.port, shapes=shapes)
    new = {name: tensor + 1 for name, tensor in weights.items()}
    engine.update_weights(new.items(), 1)
    assert same(back.weights, new) and same(other.weights, new)
    assert tokens(engine.generate(requests, SAMPLING)) == expected(requests)
    assert back.asked and engine.take_metrics() == {
        "count/servers": 2, "count/servers_dropped": 1, "count/requests_resent": 0,
    }  # fmt: skip
    back.kill()


def test_a_server_that_falls_silent_in_a_sync_holds_up_the_others_for_its_timeout(model, weights, endpoints):
    doomed, other = endpoints(2)
    engine = make_engine(model, [doomed, other], server_timeout=1.0)
    doomed.on_update = lambda endpoint: endpoint.silent.set()
    begun = time.monotonic()
    engine.update_weights(weights.items(), 0)
    assert 1 <= time.monotonic() - begun < 20
    assert same(other.weights, weights)
    assert "has not taken the weights 1 s after" in engine.servers[0].dead


def test_a_server_whose_worker_fails_says_why(model, weights, endpoints):
    doomed, other = endpoints(2)

    def fail(endpoint):
        raise MemoryError("no room for weights")

    doomed.on_update = fail
    engine = make_engine(model, [doomed, other])
    engine.update_weights(weights.items(), 0)
    assert "worker 0 did not get the weights: MemoryError: no room for weights" in engine.servers[0].dead


def test_checksums_name_the_tensor_and_the_server(model, weights, endpoints):
    good, bad = endpoints(2)
    bad.corrupted = CORRUPTED
    engine = make_engine(model, [good, bad])
    with pytest.raises(SyncError) as caught:
        engine.update_weights(weights.items(), 0)
    assert str(caught.value).startswith(f"{bad.url}: 1 of {len(weights)} tensors are not in vLLM")
    assert CORRUPTED in str(caught.value) and good.url not in str(caught.value)


def test_weights_that_are_missing_are_named_and_nothing_hangs(model, weights, endpoints):
    engine = make_engine(model, endpoints(2))
    with pytest.raises(ValueError, match="1 weights of the rollout model did not arrive"):
        engine.update_weights(list(weights.items())[1:], 0)


# ---------------------------------------------------------------- two ranks


def two_ranks(model, urls):
    """Two syncs, of which one server does not survive the first; each rank's own requests, then those of rank 0 alone
    while another server dies."""
    dist.init_process_group("gloo")
    rank, folder = dist.get_rank(), HfFolder(model)
    rollout = VllmServerRolloutConfig(servers=tuple(urls), max_response_tokens=6, max_concurrent_requests=3)
    config = RunConfig(model=ModelConfig(path=str(model), dtype="float32"), data=DataConfig(), rollout=rollout)
    engine = build_engine(config, make_tokenizer(), torch.device("cpu"), dist.group.WORLD)
    found = {"fed": [server.url for server in engine._own()]}
    engine.update_weights(((name, folder.tensor(name)) for name in folder.shapes()), 0)
    found["dead"] = [server.url for server in engine.servers if server.dead]
    share = requests_for(prompts=8)[rank::2]
    found["right"] = tokens(engine.generate(share, SAMPLING)) == expected(share)
    found["metrics"] = engine.take_metrics()
    found["versions"] = {server.version for server in engine.live}
    if rank == 0:
        with contextlib.suppress(ServerFailed):
            engine.servers[2].post("/kill")
        more = requests_for(prompts=5)
        found["right"] &= tokens(engine.generate(more, SAMPLING)) == expected(more)
    found["later"] = [engine.take_metrics()]
    engine.update_weights(((name, folder.tensor(name)) for name in folder.shapes()), 1)
    found["later"].append(engine.take_metrics())
    dist.destroy_process_group()
    return found


def test_ranks_feed_different_servers_and_agree_on_which_are_left(model, weights, endpoints):
    servers = endpoints(3)
    servers[1].on_update = lambda endpoint: endpoint.kill()
    first, second = spawn(2, two_ranks, model, [server.url for server in servers])
    assert first["fed"] == [servers[0].url, servers[2].url] and second["fed"] == [servers[1].url]
    assert first["dead"] == second["dead"] == [servers[1].url]
    assert first["right"] and second["right"]
    assert len(answered(*servers)) == 32
    assert max(server.most_busy for server in servers) <= 2, "3 at a time are 1 of each rank"
    assert first["metrics"] == second["metrics"] == {
        "count/servers": 2, "count/servers_dropped": 1, "count/requests_resent": 0,
    }  # fmt: skip
    assert first["versions"] == second["versions"] and len(first["versions"]) == 1
    assert first["later"] == second["later"], "counted once, though rank 1 learns of it in the sync"
    assert [step["count/servers_dropped"] for step in first["later"]] == [1, 0]
    assert [step["count/servers"] for step in first["later"]] == [1, 1]


# ---------------------------------------------------------------- the start


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "bfloat16"}, "it was started with dtype bfloat16, and this run needs float32"),
        ({"logprobs_mode": "processed_logprobs"}, "logprobs_mode processed_logprobs, and this run needs raw_logprobs"),
        ({"transfer": "nccl"}, "transfer nccl, and this run needs srft_tcp"),
        ({"vllm": "0.99.0"}, "it runs vLLM 0.99.0, and this project knows"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_before_anything_is_trained(model, endpoints, settings, words):
    good, bad = *endpoints(), *endpoints(**settings)
    with pytest.raises(ConfigError) as caught:
        make_engine(model, [good, bad])
    assert words in str(caught.value) and bad.url in str(caught.value) and good.url not in str(caught.value)


def test_another_model_is_refused(model, endpoints):
    (server,) = endpoints()
    server.settings["hf_config"] = server.settings["hf_config"] | {"num_hidden_layers": 3}
    with pytest.raises(ConfigError, match="num_layers is 3 in the server and 2 in the trainer"):
        make_engine(model, [server])


def test_a_server_that_is_not_there_is_waited_for_and_named(model, endpoints):
    (server,) = endpoints()
    server.kill()
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=f"cannot start with these servers.*{server.url}"):
        make_engine(model, [server])
    assert time.monotonic() - begun >= 1


def test_something_else_at_the_address_is_told(model, endpoints):
    (server,) = endpoints()
    server.answer = lambda path, body: {"detail": "Not Found"}
    with pytest.raises(ConfigError, match="has `megatron-srft serve` of this version started it"):
        make_engine(model, [server])


# ---------------------------------------------------------------- megatron-srft serve


def test_a_port_in_use_is_one_sentence(model, tmp_path, capfd):
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {{path: {model}}}\nrollout: {{kind: vllm_server, servers: ['http://127.0.0.1:1']}}\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(config), "--port", str(port)]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: a server cannot listen on 127.0.0.1:{port} (Address already in use)")
    assert error.count("\n") == 1


def test_another_kind_is_refused(model):
    with pytest.raises(ConfigError, match="needs rollout.kind vllm_server, not local"):
        serve.command(RunConfig(model=ModelConfig(path=str(model))), "127.0.0.1", 1)


@pytest.mark.parametrize(
    ("name", "value", "flags"),
    [
        ("max_model_len", 40, ["--max-model-len", "40"]),
        ("enforce_eager", True, ["--enforce-eager"]),
        ("enable_prefix_caching", False, ["--no-enable-prefix-caching"]),
        ("hf_overrides", {"a": {"b": 1}}, ["--hf-overrides", '{"a": {"b": 1}}']),
        ("limit", None, []),
        ("cudagraph_sizes", [1, 2], ["--cudagraph-sizes", "1", "2"]),
    ],
)
def test_native_arguments_become_flags(name, value, flags):
    assert serve.flag(name, value) == flags


# ---------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ({}, "rollout.servers names no server"),
        ({"servers": ["localhost:8000"]}, "'localhost:8000' is no address of a server; write it as http://host:port"),
        ({"servers": ["http://a:1", "http://a:1"]}, "rollout.servers names http://a:1 twice"),
        ({"servers": ["http://a:1"], "retries": -1}, "rollout.retries must be a number of at least 0"),
        ({"servers": ["http://a:1"], "vllm": {"dtype": "float16"}}, "rollout.vllm.dtype is reserved"),
        ({"servers": ["http://a:1"], "vllm": {"data_parallel_size": 2}}, "start one server for each"),
        ({"servers": ["http://a:1"], "temperature": 0.7, "top_p": 0.9}, "rollout.kind vllm_server has no log-probs"),
    ],
)
def test_mistakes_are_told_with_their_key(rollout, words):
    with pytest.raises(ConfigError) as caught:
        from_dict({"rollout": {"kind": "vllm_server", **rollout}})
    assert words in str(caught.value)


# ---------------------------------------------------------------- the servers' key


def test_with_their_key_servers_are_used_and_without_it_not(model, weights, endpoints, monkeypatch):
    servers, requests = endpoints(2), requests_for(2)
    for server in servers:
        server.key = "open sesame"
    monkeypatch.setenv("KEY_OF_SERVERS", "open sesame")
    engine = make_engine(model, servers, api_key_variable="KEY_OF_SERVERS")
    engine.update_weights(weights.items(), 0)
    assert tokens(engine.generate(requests, SAMPLING)) == expected(requests)

    with pytest.raises(ConfigError, match=f"{servers[0].url}: it asks for a key; rollout.api_key_variable names"):
        make_engine(model, servers)
    monkeypatch.setenv("KEY_OF_SERVERS", "open")
    with pytest.raises(ConfigError, match=f"{servers[1].url}: it has another key than this one"):
        make_engine(model, servers, api_key_variable="KEY_OF_SERVERS")


def test_a_key_that_changes_under_a_run_ends_it(model, weights, endpoints):
    (server,) = endpoints()
    engine = make_engine(model, [server])
    engine.update_weights(weights.items(), 0)
    server.key = "new"
    with pytest.raises(RolloutError, match=f"{server.url}: it asks for a key"):
        engine.generate(requests_for(1), SAMPLING)


@pytest.mark.parametrize("value", [None, ""])
def test_a_key_that_is_not_in_the_environment_is_told(monkeypatch, value):
    rollout = {"kind": "vllm_server", "servers": ["http://a:1"], "api_key_variable": "NO_SUCH_KEY"}
    config = from_dict({"rollout": rollout})
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("NO_SUCH_KEY", value)
    with pytest.raises(ConfigError, match="the environment has no NO_SUCH_KEY"):
        check_engine(config)
    with pytest.raises(ConfigError, match="the environment has no NO_SUCH_KEY"):
        serve.environment(config)


def ask_guarded(monkeypatch, scope):
    """What a server with the key "k" answers, and whether the application behind the guard was reached."""
    reached, sent = [], []

    async def app(scope, receive, send):
        reached.append(scope["path"])

    async def send(message):
        sent.append(message)

    monkeypatch.setenv("VLLM_API_KEY", "k")
    asyncio.run(KeyGuard(app)(scope, None, send))
    assert len(reached) + bool(sent) == 1
    return sent[0] if sent else None


@pytest.mark.parametrize("path", ["/update_weights", "/collective_rpc", "/inference/v1/generate", "/healthy", "/"])
def test_the_guard_lets_nothing_pass_without_the_key(monkeypatch, path):
    for headers in ([], [(b"authorization", b"Bearer x")], [(b"authorization", b"k")], [(b"authorization", b"Bearer ")],
                    [(b"authorization", b"Bearer k"), (b"authorization", b"Bearer x")]):  # fmt: skip
        answer = ask_guarded(monkeypatch, {"type": "http", "path": path, "headers": headers})
        assert answer["status"] == 401
    closed = ask_guarded(monkeypatch, {"type": "websocket", "path": path, "headers": []})
    assert closed == {"type": "websocket.close", "code": 1008}
    assert (
        ask_guarded(monkeypatch, {"type": "http", "path": path, "headers": [(b"authorization", b"Bearer k")]}) is None
    )


def test_health_needs_no_key(monkeypatch):
    assert ask_guarded(monkeypatch, {"type": "http", "path": "/health", "headers": []}) is None
