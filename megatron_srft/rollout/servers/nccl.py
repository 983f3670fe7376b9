"""Weights from the trainer's GPU into a server's, by vLLM's own NCCL weight transfer engine. Never run yet: written
from vLLM's source, on machines without GPUs. vllm is imported only inside functions.

Every server is in a group of its own with the rank that feeds it (rank 0), so that one which dies breaks no other's.
A bucket's names are announced over HTTP, and its tensors broadcast one by one while the server works on that request.
"""

import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from megatron_srft.rollout.background import Call
from megatron_srft.rollout.servers.client import Server, ServerFailed

POLL_SECONDS = 0.01


def device_buckets(tensors: Iterable[tuple[str, torch.Tensor]], limit: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Copies of the tensors on their own device, `limit` bytes at a time or a single larger one."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        count = tensor.numel() * tensor.itemsize
        if bucket and size + count > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor.detach().clone(memory_format=torch.contiguous_format)))
        size += count
    if bucket:
        yield bucket


class NcclGroup:
    """A rank of the trainer with the workers of one server. Call it from one thread."""

    def __init__(self, server: Server):
        """
        Raises:
            ServerFailed: the server does not join, or there is no NCCL here.
        """
        from vllm.distributed.weight_transfer import nccl_common

        self.server = server
        address = server.own_address()
        with socket.create_server((address, 0)) as probe:
            port = probe.getsockname()[1]
        world = {"master_address": address, "master_port": port, "world_size": 1 + server.workers}
        joined = Call(lambda: server.post("/init_weight_transfer_engine", {"init_info": world | {"rank_offset": 1}}))
        try:
            self.communicator: Any = nccl_common.trainer_init(world)
        except Exception as error:  # torch.distributed's and NCCL's own
            raise ServerFailed(f"no NCCL group with it ({type(error).__name__}: {error})") from error
        if self.communicator.disabled:
            raise ServerFailed("vLLM finds no NCCL library in the trainer; set rollout.transfer to tcp")
        joined.result()

    def send(self, bucket: list[tuple[str, torch.Tensor]], timeout: float) -> None:
        """Raises ServerFailed when the server does not take it in time; the group is of no use afterwards."""
        announced = {
            "names": [name for name, _ in bucket],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
        }
        taken = Call(lambda: self.server.post("/update_weights", {"update_info": announced}, timeout))
        for _, tensor in bucket:
            self.communicator.broadcast(tensor, src=0)
        sent, deadline = torch.cuda.Event(), time.monotonic() + timeout
        sent.record()
        while not sent.query():  # a server that died would never let the stream go on
            if taken.failed or time.monotonic() > deadline:
                self.close()
                break
            time.sleep(POLL_SECONDS)
        taken.result()

    def close(self) -> None:
        """Also ends a broadcast that waits for the server."""
        self.communicator.destroy()
