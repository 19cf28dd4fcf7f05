"""checkpoint: files are restored as written; files that are broken or of other programs are refused."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vlarft.run import checkpoint


@dataclasses.dataclass(frozen=True)
class NetConfig:
    width: int = 2


class Net(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.linear = nn.Linear(cfg.width, 1)


class Other(Net):
    pass


@dataclasses.dataclass(frozen=True)
class RunConfig:
    out_dir: str
    steps: int = 3
    workers: int = 1


def test_round_trip(tmp_path):
    net = Net(NetConfig(5))
    checkpoint.save_model(tmp_path / "m.safetensors", net, NetConfig(5), {"split": ["a"]})
    loaded, extra = checkpoint.load_model(tmp_path / "m.safetensors", Net, NetConfig)
    assert torch.equal(loaded.linear.weight, net.linear.weight)
    assert extra == {"split": ["a"]}
    assert not loaded.training
    assert checkpoint.read_header(tmp_path / "m.safetensors") == ("Net", {"width": 5}, {"split": ["a"]})
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]  # no temporary file stays
    checkpoint.save_model(tmp_path / "run" / "model.safetensors", net, NetConfig(5))
    loaded, _ = checkpoint.load_model(tmp_path / "run", Net, NetConfig)  # a run folder serves as well
    assert torch.equal(loaded.linear.weight, net.linear.weight)
    (tmp_path / "plain").touch()
    assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing"):
        checkpoint.load_model(tmp_path / "nothing", Net, NetConfig)
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {tmp_path}/model.safetensors; give a run folder or"):
        checkpoint.load_model(tmp_path, Net, NetConfig)


@pytest.mark.parametrize("length", [0, 5, 60, -3])  # nothing, half a length, half a header, half a tensor
def test_truncated_file(tmp_path, length):
    path = tmp_path / "m.safetensors"
    checkpoint.save_model(path, Net(NetConfig()), NetConfig())
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="not a readable safetensors file.*truncated"):
        checkpoint.load_model(path, Net, NetConfig)


def test_foreign_file(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "f.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="was not written by vlarft.*format"):
        checkpoint.load_model(tmp_path / "f.safetensors", Net, NetConfig)


def test_another_class(tmp_path):
    checkpoint.save_model(tmp_path / "m.safetensors", Other(NetConfig()), NetConfig())
    with pytest.raises(ValueError, match="holds a Other, expected a Net"):
        checkpoint.load_model(tmp_path / "m.safetensors", Net, NetConfig)


def test_other_tensors_are_listed(tmp_path):
    path = tmp_path / "m.safetensors"
    tensors = {"linear.weight": torch.zeros(1, 3), "linear.scale": torch.zeros(1)}
    checkpoint.save_model(path, Net(NetConfig()), NetConfig(), state_dict=tensors)
    with pytest.raises(ValueError) as error:
        checkpoint.load_model(path, Net, NetConfig)
    for part in ("missing linear.bias", "unexpected linear.scale", "linear.weight has shape (1, 3), expected (1, 2)"):
        assert part in str(error.value)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.save_model(path, Net(NetConfig()), NetConfig())
    before = path.read_bytes()

    def fail(tmp):
        tmp.write_bytes(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        checkpoint.write_atomic(path, fail)
    assert path.read_bytes() == before


def test_run_folder(tmp_path):
    config = RunConfig(str(tmp_path / "run"))
    assert checkpoint.open_run(config.out_dir, config) is None
    checkpoint.save_train_state(config.out_dir, {"step": 2, "x": torch.ones(3)})
    state = checkpoint.open_run(config.out_dir, config)
    assert checkpoint.load_train_state(state)["step"] == 2


def test_run_folder_from_before_an_option_existed(tmp_path):
    checkpoint.open_run(tmp_path, RunConfig(str(tmp_path)))
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["steps"]  # whose default is 3
    (tmp_path / "config.json").write_text(json.dumps(stored))
    checkpoint.open_run(tmp_path, RunConfig(str(tmp_path)))
    with pytest.raises(ValueError, match="another configuration: steps: 3 against 4"):
        checkpoint.open_run(tmp_path, RunConfig(str(tmp_path), 4))


def test_run_folder_of_another_configuration(tmp_path):
    checkpoint.open_run(tmp_path, RunConfig(str(tmp_path)))
    with pytest.raises(ValueError, match="another configuration: steps: 3 against 4.*--out-dir"):
        checkpoint.open_run(tmp_path, RunConfig(str(tmp_path), steps=4))
    checkpoint.open_run(tmp_path, RunConfig("elsewhere", workers=8), ignore=("workers",))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        checkpoint.open_run(tmp_path, RunConfig(str(tmp_path)))


def test_run_folder_with_other_spellings_of_its_paths(tmp_path, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Reads:
        policy: str
        others: tuple[str, ...] = ("a",)

    (tmp_path / "sft").mkdir()
    monkeypatch.chdir(tmp_path)
    checkpoint.open_run("run", Reads("sft", ("sft", "b")))
    checkpoint.open_run("run", Reads(f"{tmp_path}/sft/model.safetensors", ("../" + tmp_path.name + "/sft", "./b")))
    with pytest.raises(ValueError, match=r"another configuration: policy: 'sft' against 'sft2'"):
        checkpoint.open_run("run", Reads("sft2", ("sft", "b")))
    with pytest.raises(ValueError, match=r"another configuration: others: \['sft', 'b'\] against \['sft'\]"):
        checkpoint.open_run("run", Reads("sft", ("sft",)))


def test_run_folder_with_options_that_change_nothing(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Free:
        lr: float = 0.1
        save_interval: int = 3
        keep_interval: int | None = None

    checkpoint.open_run(tmp_path, Free())
    checkpoint.open_run(tmp_path, Free(save_interval=7, keep_interval=2))
    with pytest.raises(ValueError, match="another configuration: lr: 0.1 against 0.2"):
        checkpoint.open_run(tmp_path, Free(lr=0.2))


def test_truncated_training_state(tmp_path):
    checkpoint.save_train_state(tmp_path, {"x": torch.ones(300)})
    path = tmp_path / "train_state.pt"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="not a readable training state.*remove it"):
        checkpoint.load_train_state(path)
    path.write_bytes(b"an essay")
    with pytest.raises(ValueError, match="not a readable training state"):
        checkpoint.load_train_state(path)


def test_json_is_readable(tmp_path):
    checkpoint.write_json(tmp_path / "deep" / "a.json", {"x": [1]})
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == {"x": [1]}
