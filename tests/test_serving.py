"""The policy server: a client written from the protocol, openpi's own where it is installed, and whom it refuses."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import serve_policy
from vlarft.policy import VLAPolicy
from vlarft.serving import Keys, pack, policy_server, unpack

msgpack = pytest.importorskip("msgpack")
websockets = pytest.importorskip("websockets")
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

ROOT = Path(__file__).parents[1]
KEYS = Keys({"agentview": "observation/image"}, ("observation/state",), "prompt")


def array_to_map(array: np.ndarray) -> dict:
    return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": list(array.shape)}


def map_to_array(value: dict) -> object:
    if b"__ndarray__" in value:
        return np.frombuffer(value[b"data"], np.dtype(value[b"dtype"])).reshape(value[b"shape"])
    return value


class Client:
    """The protocol from its description, without this project's code."""

    def __init__(self, port: int, key: str | None = None) -> None:
        headers = {"Authorization": f"Api-Key {key}"} if key else None
        url = f"ws://127.0.0.1:{port}"
        self.stack = ExitStack()
        connection = connect(url, additional_headers=headers, compression=None, max_size=None, proxy=None)
        self.connection = self.stack.enter_context(connection)
        self.metadata = msgpack.unpackb(self.connection.recv(timeout=60), object_hook=map_to_array)

    def ask(self, message: object) -> object:
        """The answer's content, or its text if it is an error."""
        self.connection.send(msgpack.packb(message, default=array_to_map))
        answer = self.connection.recv(timeout=60)
        return answer if isinstance(answer, str) else msgpack.unpackb(answer, object_hook=map_to_array)

    def close(self) -> None:
        self.stack.close()


def observation(seed: int = 0) -> dict:
    """As openpi's LIBERO client sends it: two cameras, a float64 state."""
    rng = np.random.default_rng(seed)
    images = {k: rng.integers(0, 256, (64, 64, 3), np.uint8) for k in ("observation/image", "observation/wrist_image")}
    return {**images, "observation/state": rng.normal(size=8), "prompt": "push the red square"}


@contextmanager
def running(server):
    """The port of a server that runs in a thread."""
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.socket.getsockname()[1]
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture()
def config(policy_file):
    return serve_policy.Config(policy=str(policy_file), port=0, noise="zero", max_megabytes=1)


def simple_server(infer=lambda message: np.zeros((2, 3), np.float32), **others):
    return policy_server(infer, {}, **{"host": "127.0.0.1", "port": 0, "api_key": None, "max_bytes": 10**6, **others})


def test_serves_what_act_computes(config, policy_file, capsys):
    policy = VLAPolicy.load(policy_file)
    with running(serve_policy.make_server(config)) as port, closing(Client(port)) as client:
        assert client.metadata["action_horizon"] == 8 and client.metadata["action_dim"] == 7
        assert set(client.metadata["observation"]) == {"observation/image", "observation/state", "prompt"}
        timings = []
        for seed in range(2):
            sent = observation(seed)
            answer = client.ask(sent)
            obs = {"agentview": sent["observation/image"], "proprio": sent["observation/state"].astype(np.float32)}
            expected = policy.act({**obs, "instruction": sent["prompt"]}, noise=torch.zeros(8, 7))
            # the served policy has its weights stored by column, which rounds differently
            torch.testing.assert_close(torch.tensor(answer["actions"]), expected, atol=1e-5, rtol=1e-5)
            timings.append(answer["server_timing"])
        assert list(timings[0]) == ["infer_ms"] and list(timings[1]) == ["infer_ms", "prev_total_ms"]
        assert timings[1]["prev_total_ms"] > timings[0]["infer_ms"] > 0
    out = capsys.readouterr().out
    assert f"ws://127.0.0.1:{port}: 8 actions in " in out and "observation/image: uint8 (H, W, 3)" in out


def test_says_once_what_was_not_trained_on(config, policy_file, tmp_path, capsys):
    policy, path = VLAPolicy.load(policy_file), str(tmp_path / "policy.safetensors")
    policy.save(path, {"instructions": ["Push the red square"], "image_size": [64, 80]})
    server = serve_policy.make_server(dataclasses.replace(config, policy=path))
    with running(server) as port, closing(Client(port)) as client:
        for prompt in ("push the red square ", "open the door", "open the door"):
            client.ask({**observation(), "prompt": prompt})
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"{path} was trained on images of 64x80; those of agentview have 64x64, which are resized otherwise",
        f"{path} was trained on 1 instructions, and not on 'open the door'",
    ]


@pytest.mark.parametrize("noise", ["sampled", "gripper"])
def test_sampled_noise_follows_the_seed(config, noise):
    def two_chunks(seed: int) -> np.ndarray:
        server = serve_policy.make_server(dataclasses.replace(config, noise=noise, seed=seed))
        with running(server) as port, closing(Client(port)) as client:
            return np.stack([client.ask(observation())["actions"] for _ in range(2)])

    first = two_chunks(0)
    np.testing.assert_array_equal(first, two_chunks(0))
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first, two_chunks(1))


def test_openpi_client(config, tmp_path):
    """The real one, unchanged, with a key; its LIBERO example plays 5 actions of a chunk."""
    client = pytest.importorskip("openpi_client.websocket_client_policy", reason="openpi-client is not installed")
    broker = pytest.importorskip("openpi_client.action_chunk_broker")
    (tmp_path / "key").write_text("secret\n")
    config = dataclasses.replace(config, api_key_file=str(tmp_path / "key"))
    with running(serve_policy.make_server(config)) as port:
        policy = client.WebsocketClientPolicy("127.0.0.1", port, api_key="secret")
        assert policy.get_server_metadata()["action_horizon"] == 8
        chunk = policy.infer(observation())["actions"]
        assert chunk.shape == (8, 7) and chunk.dtype == np.float32
        one_by_one = broker.ActionChunkBroker(policy, action_horizon=5)
        played = [one_by_one.infer(observation())["actions"] for _ in range(5)]
        np.testing.assert_array_equal(played, chunk[:5])
        with pytest.raises(RuntimeError, match="no observation/state, prompt among observation/image"):
            policy.infer({"observation/image": observation()["observation/image"]})
        np.testing.assert_array_equal(policy.infer(observation())["actions"], chunk)
        with pytest.raises(InvalidStatus, match="401"):
            client.WebsocketClientPolicy("127.0.0.1", port, api_key="other")
        policy._ws.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "no prompt among observation/image, observation/wrist_image, observation/state; send obs"),
        ({"observation/image": np.zeros((3, 64, 64), np.uint8)}, r"image is uint8 (3, 64, 64), expected uint8 (H, W"),
        ({"observation/image": np.zeros((64, 64, 3), np.float32)}, "observation/image is float32 (64, 64, 3), expec"),
        ({"observation/image": [1, 2]}, "observation/image is a list, expected uint8 (H, W, 3)"),
        ({"observation/state": np.zeros(7)}, "observation/state: 7 numbers, expected 8: another robot's?"),
        ({"observation/state": np.zeros((1, 8))}, "observation/state is float64 (1, 8), expected numbers"),
        ({"observation/state": "x"}, "observation/state is a str, expected numbers"),
        ({"observation/state": np.full(8, np.nan)}, "observation/state: NaN or infinity"),
        ({"prompt": 3}, "prompt is a int, expected a string"),
    ],
)
def test_a_bad_entry_is_named(change, message):
    sent = {k: v for k, v in {**observation(), **change}.items() if v is not None}
    with pytest.raises(ValueError) as error:
        KEYS.read(sent, 8)
    assert message in str(error.value)


def test_a_bad_message_ends_neither_connection_nor_server(config, capsys):
    with running(serve_policy.make_server(config)) as port, closing(Client(port)) as client:
        good = client.ask(observation())["actions"]
        assert client.ask({}).startswith("ValueError: observation: no observation/image, observation/state, prompt")
        assert client.ask([1]).startswith("ValueError: observation: a list, expected a map with observation/image")
        client.connection.send("hello")
        assert client.connection.recv(timeout=60).startswith("ValueError: message: text of 5 characters")
        client.connection.send(b"\xc1")
        assert client.connection.recv(timeout=60).startswith("ValueError: message of 1 bytes: not msgpack")
        np.testing.assert_array_equal(client.ask(observation())["actions"], good)
    assert "no observation/image, observation/state, prompt" in capsys.readouterr().err


def test_a_failure_of_the_policy_sends_its_traceback():
    def infer(message):
        if message == "fail":
            raise RuntimeError("out of memory")
        return np.zeros((2, 3), np.float32)

    with running(simple_server(infer)) as port, closing(Client(port)) as client, closing(Client(port)) as other:
        text = client.ask("fail")
        assert text.startswith("Traceback") and text.endswith("RuntimeError: out of memory\n")
        with pytest.raises(ConnectionClosedError, match="1011"):
            client.connection.recv(timeout=60)
        assert other.ask("go on")["actions"].shape == (2, 3)


def test_refuses_wrong_keys_and_oversized_messages():
    with running(simple_server(api_key="secret", max_bytes=1000)) as port:
        for key in (None, "Secret", "secret2"):
            with pytest.raises(InvalidStatus, match="401"):
                Client(port, key)
        with closing(Client(port, "secret")) as client:
            assert client.ask(b"x" * 900)["actions"].shape == (2, 3)
            with pytest.raises(ConnectionClosed, match="1009"):
                client.ask(b"x" * 1000)
        with closing(Client(port, "secret")) as client:
            client.ask(0)
        browser = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with browser.open(f"http://127.0.0.1:{port}/healthz", timeout=60) as response:
            assert (response.status, response.read()) == (200, b"OK\n")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            browser.open(f"http://127.0.0.1:{port}/", timeout=60)


def test_one_message_at_a_time():
    inside, most = [0], [0]

    def infer(message):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        inside[0] -= 1
        return np.zeros((1, 1))

    with running(simple_server(infer)) as port:
        clients = [Client(port) for _ in range(3)]
        threads = [threading.Thread(target=lambda c=c: [c.ask(0) for _ in range(4)]) for c in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for client in clients:
            client.close()
    assert most == [1]


def test_prefetch_of_the_docs_plays_every_action_at_its_time(monkeypatch):
    """docs/your_robot.md, with a server whose actions are the numbers of the steps that they are for."""
    block = next(
        b for b in re.findall(r"```python\n(.*?)```", (ROOT / "docs/your_robot.md").read_text(), re.S) if "submit" in b
    )
    played, module = [], ModuleType("openpi_client.websocket_client_policy")
    module.WebsocketClientPolicy = lambda host, port: SimpleNamespace(
        infer=lambda now: {"actions": np.arange(now, now + 8)}
    )
    monkeypatch.setitem(sys.modules, "openpi_client", ModuleType("openpi_client"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    robot = SimpleNamespace(send=played.append)
    names = {
        "robot": robot,
        "observe": lambda: len(played),
        "done": lambda: len(played) > 30,
        "wait": lambda seconds: 0,
    }
    exec(block, names)
    assert played == list(range(len(played))) and len(played) > 30


def test_messages_round_trip():
    message = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": [1, 2.5, None, True, "x", {"c": np.uint8([[1]])}],
        "n": np.float32(0.5),
        "empty": np.zeros((0, 3)),
        "scalar": np.array(2.0),
    }
    back = unpack(pack(message))
    assert back["b"][:5] == message["b"][:5] and back["n"] == 0.5 and back["n"].dtype == np.float32
    for ours, sent in ((back["a"], message["a"]), (back["b"][5]["c"], np.uint8([[1]]))):
        np.testing.assert_array_equal(ours, sent)
        assert ours.dtype == sent.dtype and ours.flags.writeable
    assert back["empty"].shape == (0, 3) and back["scalar"].shape == ()
    big_endian = unpack(pack(np.arange(3, dtype=">f4")))
    assert big_endian.dtype.isnative and big_endian.tolist() == [0, 1, 2]
    with pytest.raises(TypeError, match="cannot send a object"):
        pack(object())
    with pytest.raises(TypeError, match=r"cannot send object \(1,\)"):
        pack(np.array([None]))


@pytest.mark.parametrize(
    "array",
    [
        {b"dtype": "|O", b"shape": [1], b"data": b"\0" * 8},
        {b"dtype": "<f4", b"shape": [1000], b"data": b"\0" * 8},
        {b"dtype": "<f4", b"shape": [1], b"data": b"\0" * 8},
        {b"dtype": "<f4", b"shape": [2**63], b"data": b""},
        {b"dtype": "nonsense", b"shape": [1], b"data": b"\0"},
        {b"dtype": "<f4", b"shape": "x", b"data": b""},
        {b"dtype": "<f4", b"shape": [1], b"data": "text"},
        {b"dtype": [["a", "<f4"]], b"shape": [1], b"data": b"\0" * 4},
        {},
    ],
    ids=str,
)
def test_hostile_arrays_are_errors(array):
    with pytest.raises(ValueError, match="not msgpack with numpy arrays of numbers"):
        unpack(msgpack.packb({"a": {b"__ndarray__": True, **array}}))


def test_keys_of_a_camera_and_of_a_state_in_parts(config):
    droid = dataclasses.replace(serve_policy.PRESETS["droid"], policy="p")
    cameras = ("exterior_image_1_left", "wrist_image_left")
    keys = serve_policy.client_keys(droid, cameras)
    image = np.zeros((4, 4, 3), np.uint8)
    sent = {
        "observation/exterior_image_1_left": image,
        "observation/wrist_image_left": image + 1,
        "observation/joint_position": np.arange(7.0),
        "observation/gripper_position": 7.0,
        "prompt": "go",
    }
    read = keys.read(sent, 8)
    assert set(read) == {*cameras, "proprio", "instruction"} and read["wrist_image_left"].max() == 1
    assert read["proprio"].tolist() == list(range(8)) and read["proprio"].dtype == np.float32
    with pytest.raises(ValueError, match="names no entry for camera front of p; add front=KEY"):
        serve_policy.client_keys(droid, ("front",))
    with pytest.raises(ValueError, match="--image-keys front: expected CAMERA=KEY"):
        serve_policy.client_keys(dataclasses.replace(droid, image_keys=("front",)), ("front",))
    with pytest.raises(ValueError, match="--image-keys gives camera front twice: a and b"):
        serve_policy.client_keys(dataclasses.replace(droid, image_keys=("front=a", "front=b")), ("front",))
    with pytest.raises(ValueError, match="prompt is given twice"):
        serve_policy.client_keys(dataclasses.replace(droid, image_keys=("front=prompt",)), ("front",))


def test_errors_before_serving(config, tmp_path):
    (tmp_path / "key").write_text("\n")
    with pytest.raises(ValueError, match="key is empty; write the key into it"):
        serve_policy.make_server(dataclasses.replace(config, api_key_file=str(tmp_path / "key")))
    with running(serve_policy.make_server(config)) as port, pytest.raises(OSError, match=f":{port} .*choose another"):
        serve_policy.make_server(dataclasses.replace(config, port=port))


def test_says_when_it_listens_to_the_network_without_a_key(config, capsys):
    with running(serve_policy.make_server(dataclasses.replace(config, host="0.0.0.0"))):
        assert "--api-key-file asks for a key" in capsys.readouterr().err
    with running(serve_policy.make_server(config)):
        assert "--api-key-file" not in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "msgpack", None)
    for use in (lambda: pack({}), lambda: unpack(b""), simple_server):
        with pytest.raises(ImportError, match=r"needs websockets and msgpack: pip install -e \".\[serve\]\""):
            use()


@pytest.mark.slow
def test_the_command_serves_until_interrupted(policy_file):
    command = [sys.executable, "-u", str(ROOT / "serve_policy.py"), "--policy", str(policy_file), "--port", "0"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    port = int(process.stdout.readline().partition("ws://127.0.0.1:")[2].partition(":")[0])
    with closing(Client(port)) as client:
        assert client.ask(observation())["actions"].shape == (8, 7)
        process.send_signal(signal.SIGINT)  # while a client is connected
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and err == "stopped\n"
