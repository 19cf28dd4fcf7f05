"""checkpoint: files are restored as written; files that are broken or of other programs are refused."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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


def test_bfloat16_file_loads_as_float32(tmp_path):
    """Parameters are rounded in the file; buffers, such as action ranges, are not."""
    net = Net(NetConfig(5))
    net.register_buffer("ranges", torch.tensor([1.001]))
    path = tmp_path / "m.safetensors"
    checkpoint.save_model(path, net, NetConfig(5), dtype=torch.bfloat16)
    stored = load_file(path)
    assert stored["linear.weight"].dtype == stored["linear.bias"].dtype == torch.bfloat16
    assert torch.equal(stored["ranges"], net.ranges) and net.linear.weight.dtype == torch.float32
    del stored["ranges"]  # Net has none of its own
    save_file(stored, path, safe_open(path, "pt").metadata())
    loaded, _ = checkpoint.load_model(path, Net, NetConfig)
    assert loaded.linear.weight.dtype == loaded.linear.bias.dtype == torch.float32
    assert torch.equal(loaded.linear.weight, net.linear.weight.bfloat16().float())
    assert not torch.equal(loaded.linear.weight, net.linear.weight)


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


def test_a_model_that_was_replaced_is_not_taken_for_the_same(tmp_path):
    def opened() -> object:
        return checkpoint.open_run(config.out_dir, config, models=("policy",))

    @dataclasses.dataclass(frozen=True)
    class Tuning(RunConfig):
        policy: str | None = str(tmp_path / "model.safetensors")

    config, net = Tuning(str(tmp_path / "run")), Net(NetConfig())
    checkpoint.save_model(config.policy, net, NetConfig())
    opened()
    torch.nn.init.ones_(net.linear.weight)
    checkpoint.save_model(config.policy, net, NetConfig())
    opened()  # nothing was trained yet
    checkpoint.save_train_state(config.out_dir, {"step": 2})
    opened()
    torch.nn.init.zeros_(net.linear.weight)
    checkpoint.save_model(config.policy, net, NetConfig())
    with pytest.raises(ValueError, match="--policy .*model.safetensors is another model today than when the run in"):
        opened()
    os.remove(config.policy)
    assert opened() is not None  # what is gone is not compared, and what began without a model has none
    assert checkpoint.open_run(tmp_path / "none", Tuning(str(tmp_path), policy=None), models=("policy",)) is None


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
    for damaged in (b"{", b"\xff", b"[1]", b"[" * 99999):
        (tmp_path / "config.json").write_bytes(damaged)
        with pytest.raises(ValueError, match="config.json (is not readable JSON|holds a list).*damaged"):
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


def test_equal_models_make_equal_files(tmp_path):
    net = Net(NetConfig())
    for number in range(6):
        checkpoint.save_model(tmp_path / f"{number}.safetensors", net, NetConfig(), {"a": 1, "b": [2]})
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_model_is_known_by_what_it_computes_with(tmp_path):
    path, net = tmp_path / "m.safetensors", Net(NetConfig())
    checkpoint.save_model(path, net, NetConfig(), {"out_dir": "here"})
    one = checkpoint.model_digest(path)
    checkpoint.save_model(path, net, NetConfig(), {"out_dir": "there", "more": 1})
    assert checkpoint.model_digest(path) == one
    checkpoint.save_model(path, Other(NetConfig()), NetConfig(), state_dict=net.state_dict())
    assert checkpoint.model_digest(path) != one
    with torch.no_grad():
        net.linear.bias.add_(1)
    checkpoint.save_model(path, net, NetConfig())
    assert checkpoint.model_digest(path) != one


def test_files_of_older_versions_have_three_entries(tmp_path):
    net, path = Net(NetConfig(5)), tmp_path / "m.safetensors"
    save_file(net.state_dict(), path, {"class": "Net", "config": '{"width": 5}', "extra": '{"split": ["a"]}'})
    assert checkpoint.read_header(path) == ("Net", {"width": 5}, {"split": ["a"]})
    assert torch.equal(checkpoint.load_model(path, Net, NetConfig)[0].linear.weight, net.linear.weight)
    checkpoint.model_digest(path)


@pytest.mark.parametrize(
    "header", ["{", "[1]", '{"class": "Net"}', '{"class": "Net", "config": 3, "extra": {}}', "[" * 9999]
)
def test_a_damaged_header_is_refused(tmp_path, header):
    save_file({"w": torch.zeros(1)}, tmp_path / "f.safetensors", metadata={"vlarft": header})
    with pytest.raises(ValueError, match="f.safetensors was not written by vlarft"):
        checkpoint.read_header(tmp_path / "f.safetensors")


def test_sizes_are_compared_before_they_are_allocated(tmp_path):
    """A terabyte, by the configuration; and sizes that no network can have."""
    path = tmp_path / "m.safetensors"
    tensors = Net(NetConfig()).state_dict()
    checkpoint.save_model(path, Net(NetConfig()), NetConfig(2**38), state_dict=tensors)
    with pytest.raises(ValueError, match=r"linear.weight has shape \(1, 2\), expected \(1, 274877906944\)"):
        checkpoint.load_model(path, Net, NetConfig)
    checkpoint.save_model(path, Net(NetConfig()), NetConfig(-1), state_dict=tensors)
    with pytest.raises(ValueError, match="m.safetensors: no Net has the sizes of its config"):
        checkpoint.load_model(path, Net, NetConfig)


def test_a_model_of_far_more_numbers_than_its_file_is_not_built(tmp_path, monkeypatch):
    built, path = [], tmp_path / "m.safetensors"

    class Net(nn.Module):
        def __init__(self, cfg):
            super().__init__()
            self.linear = nn.Linear(cfg.width, 1)
            built.append(self.linear.weight.is_meta)

    net = Net(NetConfig())
    checkpoint.save_model(path, net, NetConfig(1000))
    monkeypatch.setattr(checkpoint, "SPARE", 0)
    with pytest.raises(ValueError, match=r"linear.weight has shape \(1, 2\), expected \(1, 1000\)"):
        checkpoint.load_model(path, Net, NetConfig)
    assert built == [False, True]  # the first one is `net`
    checkpoint.save_model(path, net, NetConfig())
    monkeypatch.setattr(checkpoint, "SPARE", -20)  # whatever its reason, a model that fits its file is loaded
    loaded, _ = checkpoint.load_model(path, Net, NetConfig)
    assert torch.equal(loaded.linear.weight, net.linear.weight) and built[2:] == [True, False]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_of_a_diverged_run_are_refused(tmp_path, value):
    net = Net(NetConfig())
    torch.nn.init.constant_(net.linear.bias, value)
    checkpoint.save_model(tmp_path / "m.safetensors", net, NetConfig())
    with pytest.raises(ValueError, match="m.safetensors has NaN or infinite weights, first in linear.bias"):
        checkpoint.load_model(tmp_path / "m.safetensors", Net, NetConfig)


def test_a_run_folder_that_lacks_a_file(tmp_path, capsys):
    config = RunConfig(str(tmp_path))
    checkpoint.open_run(tmp_path, config)
    (tmp_path / "model.safetensors").write_bytes(b"trained")
    assert checkpoint.open_run(tmp_path, config) is None
    assert "train_state.pt is missing: the run starts anew; its model is kept as" in capsys.readouterr().err
    assert (tmp_path / "model_before.safetensors").read_bytes() == b"trained"
    (tmp_path / "train_state.pt").touch()
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has train_state.pt but no config.json"):
        checkpoint.open_run(tmp_path, config)


def test_a_line_that_cannot_be_written_names_its_file():
    with (
        open("/dev/full", "ab", buffering=0) as file,
        pytest.raises(OSError, match="write /dev/full .*free some space"),
    ):
        checkpoint.append_line(file, "x")


def test_only_a_full_disk_is_to_be_freed(tmp_path):
    def refused(tmp):
        raise PermissionError(13, "Permission denied")

    def full(tmp):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 640 vs 534")  # torch's

    with pytest.raises(OSError, match=r"could not write .*a.json \(.*denied\). What was saved before is untouched$"):
        checkpoint.write_atomic(tmp_path / "a.json", refused)
    with pytest.raises(OSError, match=r"GiB were free.*: free some space"):
        checkpoint.write_atomic(tmp_path / "a.pt", full)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / "run.tmp").mkdir()
    (tmp_path / "run.tmp" / "left").touch()  # by a kill
    with checkpoint.new_folder(tmp_path / "run") as folder:
        (folder / "a").touch()
        assert not (tmp_path / "run").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "a"]
    with pytest.raises(FileExistsError, match="run exists"), checkpoint.new_folder(tmp_path / "run"):
        pytest.fail("it is there")
    with checkpoint.new_folder(tmp_path / "both") as folder:
        (folder / "a").touch()
        with (
            pytest.raises(ValueError, match="both is being written by another process"),
            checkpoint.new_folder(tmp_path / "both"),
        ):
            pytest.fail("its first writer is at work")
        assert (folder / "a").exists()
    full = OSError(28, "No space")
    for error, text in ((full, r"could not write .*other \(.*No space"), (KeyboardInterrupt(), None)):
        with pytest.raises(type(error), match=text), checkpoint.new_folder(tmp_path / "other"):
            raise error
    assert {path.name for path in tmp_path.iterdir()} == {"run", "both"}
