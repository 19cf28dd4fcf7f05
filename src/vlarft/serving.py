"""A policy behind a websocket, in the protocol of openpi's policy server, so that its robot clients work. Not in the
paper.

    client                                        server
    GET /healthz                              ->  200 OK
    connect, Authorization: Api-Key KEY       ->  metadata, or 401
    observation                               ->  {"actions": (T, A), "server_timing": {"infer_ms", "prev_total_ms"}}
                                                  or a text frame: an error

Messages are msgpack, a numpy array a map of its bytes, dtype and shape. Nothing is compressed. `infer_ms` is the time
of the policy, `prev_total_ms` that between the arrival of the connection's previous request and its answer [ms].

An observation that the policy cannot take is answered by one line, and the connection goes on. Anything else that fails
is answered by its traceback, and the connection closes, as openpi's does; the server goes on in both cases.

Shapes: T chunk steps, A action dim, P proprio dim.
"""

from __future__ import annotations

import hmac
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlarft.run.optional import optional

if TYPE_CHECKING:
    from websockets.http11 import Request, Response
    from websockets.sync.server import Server, ServerConnection

_NEED = "serving a policy needs websockets and msgpack"
_GOING_AWAY, _INTERNAL_ERROR = 1001, 1011  # of websockets' close codes


class Keys(NamedTuple):
    """Under which keys a client sends what the policy observes."""

    images: Mapping[str, str]  # camera of the policy -> key
    state: tuple[str, ...]  # their values, one after the other, are the proprio
    prompt: str

    def describe(self, proprio_dim: int) -> dict[str, str]:
        """Say what is expected under each key, for the metadata and for people."""
        images = {key: f"uint8 (H, W, 3), RGB: camera {camera}" for camera, key in self.images.items()}
        parts = [""] if len(self.state) == 1 else [f"part {i} of " for i in range(1, len(self.state) + 1)]
        state = {k: f"numbers, raw: {part}proprio ({proprio_dim},)" for k, part in zip(self.state, parts, strict=True)}
        return {**images, **state, self.prompt: "string: instruction"}

    def read(self, message: Any, proprio_dim: int) -> dict[str, Any]:
        """Turn a client's message into an observation of `VLAPolicy.observe`; further entries are ignored.

        Args:
            message: from `unpack`.
            proprio_dim: P.

        Raises:
            ValueError: an entry is missing or has another type or shape; the message names the client's key.
        """
        expected = self.describe(proprio_dim)
        if not isinstance(message, dict):
            raise ValueError(f"observation: a {type(message).__name__}, expected a map with {', '.join(expected)}")
        if missing := [key for key in expected if key not in message]:
            raise ValueError(
                f"observation: no {', '.join(missing)} among {', '.join(map(str, message)) or 'no entries'}; send "
                + "; ".join(f"{key}, {what}" for key, what in expected.items())
            )
        for key in self.images.values():
            image = message[key]
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"observation: {key} is {_kind(image)}, expected {expected[key]}")
        parts = []
        for key in self.state:
            part = np.asarray(message[key])
            if part.dtype.kind not in "iuf" or part.ndim > 1:
                raise ValueError(f"observation: {key} is {_kind(message[key])}, expected {expected[key]}")
            parts.append(part.reshape(-1).astype(np.float32))
        proprio, names = np.concatenate(parts), " and ".join(self.state)
        if len(proprio) != proprio_dim:
            raise ValueError(f"observation: {names}: {len(proprio)} numbers, expected {proprio_dim}: another robot's?")
        if not np.isfinite(proprio).all():
            raise ValueError(f"observation: {names}: NaN or infinity in {proprio.tolist()}")
        if not isinstance(message[self.prompt], str):
            raise ValueError(f"observation: {self.prompt} is {_kind(message[self.prompt])}, expected a string")
        images = {camera: message[key] for camera, key in self.images.items()}
        return {**images, "proprio": proprio, "instruction": str(message[self.prompt])}


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return f"a {type(value).__name__}"


def pack(message: Any) -> bytes:
    """Encode numbers, strings, lists, maps and numpy arrays of numbers as msgpack.

    Raises:
        ImportError: msgpack is missing.
        TypeError: a value of another type.
    """
    with optional(_NEED, "serve"):
        import msgpack
    return msgpack.packb(message, default=_encode)


def unpack(data: bytes | str) -> Any:
    """Decode a message of `pack` or of openpi's client; its arrays are writable.

    Raises:
        ImportError: msgpack is missing.
        ValueError: other data, or an array of anything but numbers.
    """
    with optional(_NEED, "serve"):
        import msgpack
    if isinstance(data, str):
        raise ValueError(f"message: text of {len(data)} characters, expected msgpack in a binary frame")
    try:
        return msgpack.unpackb(data, object_hook=_decode)
    except (ValueError, TypeError, KeyError, OverflowError, msgpack.UnpackException) as error:
        raise ValueError(
            f"message of {len(data)} bytes: not msgpack with numpy arrays of numbers ({type(error).__name__}: {error})"
        ) from error


def _encode(value: Any) -> dict[bytes, Any]:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"cannot send {_kind(value)}: numbers, strings, lists, maps and arrays of numbers only")


def _decode(value: dict) -> Any:
    if b"__ndarray__" in value:
        dtype, data = np.dtype(value[b"dtype"]), value[b"data"]
        if dtype.kind not in "biuf":  # objects would be pointers of the sender's choice
            raise ValueError(f"an array of dtype {dtype}")
        array = np.ndarray(value[b"shape"], dtype, data)
        if array.nbytes != len(data):
            raise ValueError(f"an array {dtype} {array.shape} of {len(data)} bytes")
        return array.astype(dtype.newbyteorder("="))  # a copy: the message is read-only; and torch wants native bytes
    if b"__npgeneric__" in value:
        dtype = np.dtype(value[b"dtype"])
        if dtype.kind not in "biufU":
            raise ValueError(f"a number of dtype {dtype}")
        return dtype.type(value[b"data"])
    return value


def policy_server(
    infer: Callable[[Any], np.ndarray],
    metadata: Mapping[str, Any],
    *,
    host: str,
    port: int,
    api_key: str | None,
    max_bytes: int,
) -> Server:
    """Open a server, to be used as `with policy_server(...) as server: server.serve_forever()`.

    Args:
        infer: a client's message -> actions (T, A), raw; called for one message at a time. A ValueError says what is
            wrong with the message.
        metadata: what a client is sent first.
        host, port: address to listen at; port 0 takes a free one, which `server.socket` knows.
        api_key: what clients have to send; None = nothing.
        max_bytes: connections with larger messages are closed.

    Raises:
        ImportError: websockets or msgpack is missing.
        OSError: the address is in use or none of this machine's.
    """
    with optional(_NEED, "serve"):
        import msgpack  # noqa: F401  (before the first client connects)
        from websockets.exceptions import ConnectionClosed
        from websockets.sync.server import serve
    one_at_a_time = threading.Lock()  # clients have a thread each, the policy one device

    def admit(connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/healthz":
            return connection.respond(200, "OK\n")
        given = request.headers.get("Authorization", "")
        if api_key is not None and not hmac.compare_digest(given.encode(), f"Api-Key {api_key}".encode()):
            return connection.respond(401, "no key or a wrong one: send the header Authorization: Api-Key KEY\n")
        return None

    def answer(connection: ServerConnection) -> None:
        connection.send(pack(metadata))
        total_ms = None
        for data in connection:
            arrived = time.perf_counter()
            try:
                message = unpack(data)
                with one_at_a_time:
                    started = time.perf_counter()
                    actions = infer(message)
                    timing = {"infer_ms": 1000 * (time.perf_counter() - started)}
            except ValueError as error:
                print(f"{connection.remote_address}: {error}", file=sys.stderr)
                connection.send(f"ValueError: {error}")
                continue
            except Exception:  # of the policy: the client is told, the other clients are served
                connection.send(traceback.format_exc())
                connection.close(_INTERNAL_ERROR, "the policy failed; the frame before has the traceback")
                raise  # websockets logs it
            if total_ms is not None:
                timing["prev_total_ms"] = total_ms
            connection.send(pack({"actions": actions, "server_timing": timing}))
            total_ms = 1000 * (time.perf_counter() - arrived)

    connected = set()

    def handle(connection: ServerConnection) -> None:
        connected.add(connection)
        try:
            answer(connection)
        except ConnectionClosed as closed:
            print(f"{connection.remote_address}: connection lost: {closed}", file=sys.stderr)
        finally:
            connected.discard(connection)

    try:
        server = serve(handle, host, port, process_request=admit, compression=None, max_size=max_bytes)
        shutdown = server.shutdown

        def shut_down(*args: Any, **options: Any) -> None:
            shutdown(*args, **options)
            for connection in tuple(connected):  # before websockets 17 each of them would keep the process alive
                connection.close(_GOING_AWAY)

        server.shutdown = shut_down
        return server
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot listen at {host}:{port} ({reason}); choose another --host or --port") from error
