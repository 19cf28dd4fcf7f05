"""train_state: saved by any number of processes, resumed by any other, complete whenever it is killed."""

import errno
import os
import random
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from vlarft.run import checkpoint, distributed
from vlarft.run.checkpoint import load_train_state, read_header, save_model
from vlarft.run.ema import EMA
from vlarft.run.log import RunLog
from vlarft.run.train_state import TrainState, check_same_episodes


@dataclass(frozen=True)
class NetConfig:
    width: int = 5


class Net(nn.Module):
    """A frozen layer, whole on every process, and two that train."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.blocks = nn.Linear(3, width), nn.ModuleList([nn.Linear(width, 4), nn.Linear(4, 1)])
        self.frozen.requires_grad_(False)
        distributed.shard(self, self.blocks, frozen="replicate")
        self.trained = [p for p in self.parameters() if p.requires_grad]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](self.frozen(x)).tanh())


def train(folder: Path, steps: int, asynchronous: bool = False, dies: int | None = None) -> None:
    """Some more steps, each saved; in step `dies` the second process ends."""
    net = Net()
    optimizer, ema = torch.optim.AdamW(net.trained, lr=0.1, fused=True), EMA(net.trained, 0.9)
    state = TrainState(folder, {"networks": {"net": net}, "optimizer": optimizer, "ema": ema}, asynchronous)
    before, metrics = state.load(step=0, metrics={})
    assert metrics == ({"loss": 0.5} if before else {})
    for step in range(before + 1, before + steps + 1):
        optimizer.zero_grad()
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step)) + 1
        if step == dies and distributed.rank() == 1:
            os._exit(9)
        net(inputs.chunk(distributed.world_size())[distributed.rank()]).square().mean().backward()
        optimizer.step()
        ema.update(step)
        if state.due(step, 1):
            state.save({"step": step, "metrics": {"loss": 0.5}}, net, NetConfig(), {"step": step})
    state.wait()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "asynchronous"])
def test_resumed_by_another_number_of_processes(tmp_path, asynchronous):
    train(tmp_path / "whole", 8)
    parts = tmp_path / "parts"
    for processes in (1, 2, 1, 2):
        ranks.run(processes, train, parts, 2, asynchronous)
        state = load_train_state(parts / "train_state.pt")
        assert ("shards" in state) == (processes == 2)  # and what they were read from is removed
        files = ["model.safetensors", *(["shards_b"] if processes == 2 else []), "train_state.pt"]
        assert sorted(p.name for p in parts.iterdir()) == files
        assert (state["networks"]["net"]["frozen.weight"].is_meta, state["step"] % 2) == (processes == 2, 0)
    train(parts, 0)  # nothing is saved
    ranks.run(1, compare, tmp_path / "whole", parts)


def compare(one: Path, two: Path) -> None:
    """Weights, moments and averages of two runs, after loading."""
    states = []
    for folder in (one, two):
        net = Net()
        optimizer, ema = torch.optim.AdamW(net.trained), EMA(net.trained, 0.9)
        state = TrainState(folder, {"networks": {"net": net}, "optimizer": optimizer, "ema": ema})
        assert state.load(step=0)[0] == 8
        moments = {f"{i}.{k}": v for i, slots in optimizer.state_dict()["state"].items() for k, v in slots.items()}
        states.append({**net.state_dict(), **moments, **{f"ema.{i}": v for i, v in ema.state_dict().items()}})
        weights = load_file(folder / "model.safetensors")
        assert all(torch.equal(weights[k], v) for k, v in net.state_dict().items())
    assert states[0].keys() == states[1].keys() and len(states[0]) == 6 + 4 * 3 + 4
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], msg=lambda m, key=key: f"{key}: {m}")


def keep_saving(folder: Path, asynchronous: bool, saved) -> None:
    """Save without end a state whose every number is its step; `saved` is the last that was reported as saved."""
    net = nn.Linear(500, 400)
    distributed.shard(net)
    state = TrainState(folder, {"net": net}, asynchronous)
    (step,) = state.load(step=0)
    assert all((p == step).all() for p in map(whole, net.parameters())) or step == 0
    while True:
        step += 1
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(step)
        state.save({"step": step}, net, NetConfig(), {"step": step})
        if distributed.is_main():
            saved.value = step - asynchronous


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize(
    ("processes", "asynchronous"), [(1, False), (1, True), (2, False)], ids=["one", "asynchronous", "two processes"]
)
def test_killed_at_random_points_of_saving(tmp_path, processes, asynchronous):
    """Eight kills each. What is found is whole, never older than what was reported as saved, and goes on."""
    rng, saved, unfinished = random.Random(processes + 2 * asynchronous), ranks.CONTEXT.Value("i", 0), 0
    for _ in range(8):
        before = saved.value
        started = ranks.start(processes, keep_saving, tmp_path, asynchronous, saved)
        deadline = time.monotonic() + 60
        while saved.value < before + 2:
            assert time.monotonic() < deadline and all(p.is_alive() for p in started)
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        rng.shuffle(started)
        for process in started:
            process.kill()
        for process in started:
            process.join()
        net = nn.Linear(500, 400)
        state = TrainState(tmp_path, {"net": net})
        (step,) = state.load(step=0)
        assert step >= saved.value and all((p == step).all() for p in net.parameters())
        model = load_file(tmp_path / "model.safetensors")
        of_model = read_header(tmp_path / "model.safetensors").extra["step"]
        assert step <= of_model <= step + 1 and all((value == of_model).all() for value in model.values())
        names = {path.name for path in tmp_path.iterdir()}
        unfinished += names > {"model.safetensors", "train_state.pt", state.shards} - {None}
    assert unfinished > 0  # the kills did strike in the middle


def test_full_disk_leaves_the_last_state(tmp_path, monkeypatch):
    train(tmp_path, 1)

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    message = r"could not write .*train_state.pt \(.*No space left.*\), .* GiB were free.*is untouched: free some space"
    with pytest.raises(OSError, match=message):
        train(tmp_path, 1)
    with pytest.raises(OSError, match=message):  # the thread's
        train(tmp_path, 1, asynchronous=True)
    monkeypatch.undo()
    assert load_train_state(tmp_path / "train_state.pt")["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "train_state.pt"]
    train(tmp_path, 1)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "asynchronous"])
def test_copies_of_the_model_are_kept(tmp_path, asynchronous):
    net = Net()
    state = TrainState(tmp_path, {"net": net}, asynchronous, keep_interval=2)
    saved = []
    for step in range(1, 6):
        with torch.no_grad():
            net.blocks[0].weight.fill_(step)
        if state.due(step, 3):
            state.save({"step": step}, net, NetConfig(), {"step": step})
            saved.append(step)
    state.finish(RunLog(tmp_path, 5, "test"))
    assert saved == [2, 3, 4]
    names = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert names == ["model.safetensors", "model_000002.safetensors", "model_000004.safetensors"]
    for step in (2, 4):
        path = tmp_path / f"model_{step:06d}.safetensors"
        assert (load_file(path)["blocks.0.weight"] == step).all() and read_header(path).extra == {"step": step}


def limit_file_size(size: int) -> None:
    """From here on this process can write no more than so many bytes of a file: a full disk, as libraries see it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fill_the_disk(folder: Path, rank: int) -> None:
    train(folder, 1)
    if distributed.rank() == rank:
        limit_file_size(100)
    try:
        train(folder, 1)
    except OSError as error:
        assert rank < 0 or ("could not write" in str(error) and "before is untouched" in str(error)), error
        os._exit(7)


@pytest.mark.parametrize(("processes", "rank"), [(1, 0), (2, 1)], ids=["one", "two processes"])
def test_writes_that_fail_halfway(tmp_path, processes, rank):
    started = ranks.start(processes, fill_the_disk, tmp_path, rank)
    for process in started:
        process.join(60)
    assert [p.exitcode for p in started] == [7] * processes
    assert load_train_state(tmp_path / "train_state.pt")["step"] == 1
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp") or p.name == "shards_b"]
    ranks.run(processes, train, tmp_path, 1)


def test_a_rank_that_dies_stops_the_others(tmp_path):
    started = ranks.start(2, train, tmp_path, 10, False, 3)
    for process in started:
        process.join(60)
    assert started[0].exitcode == 1 and started[1].exitcode == 9
    assert load_train_state(tmp_path / "train_state.pt")["step"] == 2


def own_folders(folder: Path) -> None:
    """Two nodes without a common file system."""
    own = folder / str(distributed.rank())
    own.mkdir()
    if distributed.rank() == 1:
        net = nn.Linear(1, 1)
        checkpoint.save_train_state(own, {"step": 3, "net": net.state_dict()})
    dist.barrier()
    with pytest.raises(ValueError, match=r"different steps, 0 to 3: .* must be a folder that all nodes share"):
        TrainState(own, {"net": nn.Linear(1, 1)}).load(step=0)


def test_a_run_goes_on_with_the_episodes_that_it_began_with(tmp_path):
    frame = np.full((8, 8, 3), 0.5)
    facts = {
        "train_episodes": ["a", "b"],
        "episode_digests": {"a": "0f"},
        "mean_frame": frame.tolist(),
        "camera": "front",
    }
    save_model(tmp_path / "model.safetensors", Net(), NetConfig(), facts)
    check_same_episodes(tmp_path, {**facts, "episode_digests": {"a": "1f"}})  # no state to go on from
    (tmp_path / "train_state.pt").touch()
    for same in (
        {},
        {"mean_frame": (frame + 0.01).tolist()},
        {"train_episodes": ["b", "a"]},
        {"held_out_episodes": []},
        {"episode_digests": {"b": "1f"}},
    ):
        check_same_episodes(tmp_path, {**facts, **same})
    for other in ({"episode_digests": {"a": "1f"}}, {"mean_frame": (frame + 0.05).tolist()}):
        with pytest.raises(ValueError, match="was begun with other contents of these episodes"):
            check_same_episodes(tmp_path, {**facts, **other})
    with pytest.raises(ValueError, match=r"begun with 2 train episodes, today there are 1 \(first that differs: b\)"):
        check_same_episodes(tmp_path, {**facts, "train_episodes": ["a"]})
    save_model(tmp_path / "model.safetensors", Net(), NetConfig(), {"train_episodes": ["a", "b"]})  # of before
    check_same_episodes(tmp_path, facts)


def test_states_that_differ_between_nodes(tmp_path):
    ranks.run(2, own_folders, tmp_path)


def test_states_that_do_not_fit(tmp_path):
    ranks.run(2, train, tmp_path, 1)
    net = Net()
    with pytest.raises(ValueError, match=r"train_state.pt lacks net, balance: another version .* remove it"):
        TrainState(tmp_path, {"net": net}).load(step=0, balance=0.0)
    (tmp_path / "shards_a" / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"shards_a, the tensors of .*train_state.pt, is not readable"):
        TrainState(tmp_path, {"networks": {"net": net}}).load(step=0)


def saved_net(folder: Path) -> tuple[nn.Module, torch.optim.Optimizer, TrainState]:
    net = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = TrainState(folder, {"net": net, "optimizer": optimizer})
    state.save({"step": 1}, net, NetConfig(), {})
    return net, optimizer, state


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_saved(tmp_path, value):
    net, _, state = saved_net(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    torch.nn.init.constant_(net.bias, value)
    with pytest.raises(FloatingPointError, match=r"NaN or infinite weights after 2 steps \(bias\): not saved"):
        state.save({"step": 2}, net, NetConfig(), {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def changed_state(folder: Path, change) -> None:
    state = load_train_state(folder / "train_state.pt")
    change(state)
    checkpoint.save_train_state(folder, state)


def test_a_folder_that_the_state_names_is_one_of_the_runs(tmp_path):
    """A later save would remove it."""
    net, optimizer, _ = saved_net(tmp_path / "run")
    (tmp_path / "victim").mkdir()
    changed_state(tmp_path / "run", lambda state: state.update(shards="../victim"))
    with pytest.raises(ValueError, match="names the folder '../victim', expected shards_a or shards_b"):
        TrainState(tmp_path / "run", {"net": net, "optimizer": optimizer}).load(step=0)
    assert (tmp_path / "victim").is_dir()


def test_moments_of_another_shape_are_refused(tmp_path):
    """A fused optimizer would write beyond them."""
    net, optimizer, _ = saved_net(tmp_path)
    changed_state(tmp_path, lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(1, 1)))
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 has shape \(1, 1\), expected \(2, 3\)"):
        TrainState(tmp_path, {"net": net, "optimizer": optimizer}).load(step=0)


def test_averages_of_another_shape_are_refused():
    parameters = list(nn.Linear(3, 2).parameters())
    with pytest.raises(ValueError, match=r"the saved average of weight 1 has shape \(1,\)"):
        EMA(parameters, 0.9).load_state_dict({0: torch.zeros(2, 3), 1: torch.zeros(1)})
