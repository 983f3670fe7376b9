"""Weights over TCP, both ends in this process."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_srft.rollout.servers import wire
from megatron_srft.rollout.servers.wire import Outlet, WireError, buckets, receive

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7, dtype=torch.bfloat16),
    "c": torch.tensor(2.5),
    "d": torch.randn(40, 33).t(),  # not contiguous, larger than any bucket here
    "e": torch.randn(2, 2, 3).half(),
}


@pytest.fixture
def outlet():
    made = Outlet("127.0.0.1", 1, 5.0)
    yield made
    made.close()


def take(outlet, **changes):
    return dict(receive(**outlet.invitation | {"timeout": 5.0} | changes))


def send(outlet, limit=256, tensors=TENSORS, count=None):
    outlet.accept()
    for bucket in buckets(tensors.items(), limit):
        outlet.send(bucket)
    outlet.end(len(tensors) if count is None else count)


@pytest.mark.parametrize("limit", [64, 200, 1 << 20])
def test_tensors_arrive_bit_by_bit_on_every_worker(limit):
    outlet = Outlet("127.0.0.1", 2, 5.0)
    with ThreadPoolExecutor() as pool:
        workers = [pool.submit(take, outlet) for _ in range(2)]
        send(outlet, limit)
        for worker in workers:
            found = worker.result()
            assert [*found] == [*TENSORS]
            assert all(found[name].dtype == TENSORS[name].dtype for name in TENSORS)
            assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    outlet.close()


@pytest.mark.parametrize("limit", [64, 200, 4096])
def test_a_bucket_holds_no_more_than_its_limit(limit):
    made = list(buckets(TENSORS.items(), limit))
    total = sum(tensor.numel() * tensor.itemsize for tensor in TENSORS.values())
    assert len(made) == -(-total // limit)
    assert all(bucket.used <= limit == len(bucket.data) for bucket in made)
    assert sum(bucket.used for bucket in made) == total


def test_whoever_does_not_know_the_token_gets_nothing(outlet):
    with ThreadPoolExecutor() as pool:
        stranger = pool.submit(take, outlet, token="0" * wire.TOKEN_CHARACTERS)
        worker = pool.submit(take, outlet)
        send(outlet)
        with pytest.raises(WireError, match="does not send its weights|closed the connection early"):
            stranger.result()
        assert [*worker.result()] == [*TENSORS]


def test_workers_that_do_not_come_are_counted(monkeypatch):
    outlet = Outlet("127.0.0.1", 2, 0.3)
    with pytest.raises(WireError, match="0 of 2 workers came"):
        outlet.accept()
    with pytest.raises(WireError, match="0 of 2 workers came"):
        Outlet("127.0.0.1", 2, 60.0).accept(given_up=lambda: True)


def test_a_worker_learns_that_the_trainer_has_gone(outlet):
    with ThreadPoolExecutor() as pool:
        worker = pool.submit(take, outlet)
        outlet.accept()
        outlet.send(next(buckets(TENSORS.items(), 64)))
        outlet.close()
        with pytest.raises(WireError, match="closed the connection early|does not send its weights"):
            worker.result()


def test_a_worker_that_takes_nothing_is_noticed():
    outlet = Outlet("127.0.0.1", 1, 0.5)
    with socket.create_connection(outlet.listener.getsockname()) as idle:
        idle.sendall(outlet.token.encode())
        outlet.accept()
        with pytest.raises(WireError, match="a worker stopped taking weights"):
            for bucket in buckets({"large": torch.zeros(16 << 20)}.items(), 1 << 20):
                outlet.send(bucket)
    outlet.close()


def test_a_number_of_tensors_that_differs_is_told(outlet):
    with ThreadPoolExecutor() as pool:
        worker = pool.submit(take, outlet)
        send(outlet, count=4)
        with pytest.raises(WireError, match="'tensors': 4.* and 5 tensors have arrived"):
            worker.result()


@pytest.mark.parametrize(
    "header",
    [
        b'[["a", "float32", [4], 4, 4]]',  # begins in the middle
        b'[["a", "float32", [1], 0, 8]]',  # more than it can hold
    ],
)
def test_pieces_that_make_no_tensor_are_refused(outlet, header):
    with ThreadPoolExecutor() as pool:
        worker = pool.submit(take, outlet)
        outlet.accept()
        outlet._send(header, memoryview(bytes(8)))
        with pytest.raises(WireError, match="came out of order"):
            worker.result()


def test_a_type_that_servers_do_not_take_is_named():
    with pytest.raises(ValueError, match="weight 'x' is torch.int64"):
        list(buckets({"x": torch.zeros(2, dtype=torch.int64)}.items(), 64))


def test_threads_end(outlet):
    before = threading.active_count()
    with ThreadPoolExecutor() as pool:
        worker = pool.submit(take, outlet)
        send(outlet)
        worker.result()
    assert threading.active_count() == before
