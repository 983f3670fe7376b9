"""Weights over a TCP connection, from a trainer's rank into the workers of one `vllm serve`, a bucket at a time.

The trainer listens, on a new port for every sync; each worker connects, sends the sync's token, and reads until it has
every tensor. vLLM's own routes carry the rest (when, from where, under which version): see feed.py for the
trainer's side and worker.py for the worker's.

    worker   -> trainer   token, 64 characters
    trainer  -> worker    bucket, bucket, ..., end

    bucket   4 bytes n, n bytes JSON [[name, dtype, shape, first byte, bytes], ...], then the bytes of these pieces
    end      4 bytes n, n bytes JSON {"tensors": how many were sent}

A tensor larger than a bucket comes in pieces. Nothing on the wire is code: JSON and raw numbers.
"""

import hmac
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

TOKEN_CHARACTERS = 64
HEADER_LIMIT = 64 << 20
"""Longest JSON that is believed to be one."""

SLICE_BYTES = 1 << 20
"""Bytes that must get through within the timeout."""

POLL_SECONDS = 0.2
"""How often a wait looks whether it is still wanted."""

TOKEN_SECONDS = 10.0
"""In which a worker that has come must have said its token."""

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


class WireError(RuntimeError):
    """The other end does not keep to the protocol, or has gone; the message says which."""


@dataclass(eq=False)
class Bucket:
    """Pieces of tensors, laid end to end."""

    data: torch.Tensor
    """[bytes] uint8, on the host."""
    used: int = 0
    pieces: list[list[Any]] = field(default_factory=list)

    def fill(self, piece: list[Any], data: torch.Tensor) -> None:
        """Args:
        data: [bytes] uint8, on any device.
        """
        self.data[self.used : self.used + len(data)].copy_(data)
        self.used += len(data)
        self.pieces.append(piece)


def buckets(tensors: Iterable[tuple[str, torch.Tensor]], limit: int) -> Iterator[Bucket]:
    """All tensors' bytes on the host, in buckets of at most `limit` bytes."""
    bucket = _empty(limit)
    for name, tensor in tensors:
        if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
            raise ValueError(f"weight '{name}' is {tensor.dtype}, which is not sent to servers; they take {[*DTYPES]}")
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        start = 0
        while start < len(flat):
            count = min(len(flat) - start, limit - bucket.used)
            dtype = str(tensor.dtype).removeprefix("torch.")
            bucket.fill([name, dtype, list(tensor.shape), start, count], flat[start : start + count])
            start += count
            if bucket.used == limit:
                yield bucket
                bucket = _empty(limit)
    if bucket.used:
        yield bucket


def _empty(limit: int) -> Bucket:
    return Bucket(torch.empty(limit, dtype=torch.uint8, pin_memory=torch.cuda.is_available()))


class Outlet:
    """The trainer's end for one server: a port that its workers come to, and the connections to them."""

    def __init__(self, address: str, workers: int, timeout: float):
        """
        Args:
            address: of this machine, as the server sees it.
            workers: connections to wait for.
            timeout: seconds in which a worker must come, and in which it must take each MiB.
        """
        self.workers, self.timeout, self.token = workers, timeout, secrets.token_hex(TOKEN_CHARACTERS // 2)
        self.listener = socket.create_server((address, 0), family=_family(address))
        self.connections: list[socket.socket] = []

    @property
    def invitation(self) -> dict[str, Any]:
        """What a worker is told, over vLLM's route: the first arguments of `receive`."""
        host, port = self.listener.getsockname()[:2]
        return {"host": host, "port": port, "token": self.token}

    def accept(self, given_up: Callable[[], bool] = lambda: False) -> None:
        """Wait for the workers. Whoever does not know the token is sent away, and does not count.

        Args:
            given_up: asked several times a second whether there is anything left to wait for.

        Raises:
            WireError: they do not come in time.
        """
        deadline = time.monotonic() + self.timeout
        self.listener.settimeout(POLL_SECONDS)
        while len(self.connections) < self.workers:
            if time.monotonic() > deadline or given_up():
                raise WireError(f"{len(self.connections)} of {self.workers} workers came for the weights")
            try:
                connection, _ = self.listener.accept()
            except TimeoutError:
                continue
            if not self._knows_token(connection):
                connection.close()
                continue
            connection.settimeout(self.timeout)
            self.connections.append(connection)

    def _knows_token(self, connection: socket.socket) -> bool:
        connection.settimeout(min(self.timeout, TOKEN_SECONDS))
        try:
            return hmac.compare_digest(_read(connection, TOKEN_CHARACTERS), self.token.encode())
        except (OSError, WireError):
            return False

    def send(self, bucket: Bucket) -> None:
        """Raises WireError when a worker has gone, or takes nothing for too long."""
        data = bucket.data.numpy()[: bucket.used]
        self._send(json.dumps(bucket.pieces).encode(), memoryview(data))

    def end(self, tensors: int) -> None:
        """Args:
        tensors: how many there were, for the worker to compare.
        """
        self._send(json.dumps({"tensors": tensors}).encode(), memoryview(b""))

    def _send(self, header: bytes, data: memoryview) -> None:
        for connection in self.connections:
            try:
                connection.sendall(len(header).to_bytes(4, "big") + header)
                for start in range(0, len(data), SLICE_BYTES):
                    connection.sendall(data[start : start + SLICE_BYTES])
            except OSError as error:
                raise WireError(f"a worker stopped taking weights ({error})") from None

    def close(self) -> None:
        """The workers find out at their next read."""
        for end in (self.listener, *self.connections):
            end.close()


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def receive(host: str, port: int, token: str, timeout: float) -> Iterator[tuple[str, torch.Tensor]]:
    """The worker's end: every tensor, as soon as it is complete.

    Args:
        timeout: seconds without a byte after which the trainer is taken for gone.

    Raises:
        WireError: the trainer goes away, or what it sends is not what this protocol says.
    """
    try:
        with socket.create_connection((host, port), timeout=timeout) as connection:
            connection.sendall(token.encode())
            yield from _tensors(connection)
    except OSError as error:
        raise WireError(f"the trainer at {host}:{port} does not send its weights ({error})") from None


def _tensors(connection: socket.socket) -> Iterator[tuple[str, torch.Tensor]]:
    name, tensor, came, tensors = "", torch.empty(0), 0, 0
    while True:
        header = json.loads(_read(connection, _length(connection)))
        if isinstance(header, dict):
            if came or header != {"tensors": tensors}:
                raise WireError(f"the trainer says that it sent {header} and {tensors} tensors have arrived")
            return
        for piece_of, dtype, shape, start, count in header:
            if start == 0:
                name, tensor, came = piece_of, torch.empty(shape, dtype=DTYPES[dtype]), 0
            size = prod(shape) * tensor.itemsize
            if piece_of != name or start != came or came + count > size or list(tensor.shape) != shape:
                raise WireError(f"a piece of {piece_of} came out of order, behind {came} bytes of {name}")
            _read_into(connection, tensor.view(-1).view(torch.uint8)[start : start + count])
            came += count
            if came == size:
                tensors, came = tensors + 1, 0
                yield name, tensor


def _length(connection: socket.socket) -> int:
    length = int.from_bytes(_read(connection, 4), "big")
    if length > HEADER_LIMIT:
        raise WireError(f"a header of {length} bytes; the trainer speaks another protocol")
    return length


def _read(connection: socket.socket, count: int) -> bytes:
    data = torch.empty(count, dtype=torch.uint8)
    _read_into(connection, data)
    return data.numpy().tobytes()


def _read_into(connection: socket.socket, target: torch.Tensor) -> None:
    view, done = memoryview(target.numpy()), 0
    while done < len(view):
        count = connection.recv_into(view[done:])
        if count == 0:
            raise WireError("the other end closed the connection early")
        done += count
