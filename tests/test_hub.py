"""Models on the Hub: a folder, a round trip through a small server, the cache without it, and each error."""

import dataclasses
import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import fake_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlarft import FrameTokenizer, VLAPolicy, WorldModel
from vlarft.pretrained.__main__ import main as convert
from vlarft.run import hub as names
from vlarft.run.checkpoint import model_digest, read_header, save_model, write_json
from vlarft.run.config import parse, to_dict
from vlarft.success import PRESETS as JUDGES
from vlarft.success import SuccessModel
from vlarft.tokenizer import PRESETS as TOKENIZERS

huggingface_hub = pytest.importorskip("huggingface_hub")
CONSTANTS = pytest.importorskip("huggingface_hub.constants")
NOWHERE = "http://127.0.0.1:9"  # a port where nothing listens


@pytest.fixture(scope="module")
def server():
    with fake_hub.running() as hub:
        yield hub


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """An empty hub, an empty cache, and a token. What huggingface_hub reads from the environment once is set here."""
    server.__init__(server.address)
    places = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "no_token")}
    for name, value in {**places, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(CONSTANTS, name, value)
    point_to(server.address, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", server.token)
    names.model_file.cache_clear()
    return server


def point_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does; without waiting between tries."""
    monkeypatch.setattr(CONSTANTS, "ENDPOINT", address)
    pattern = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(CONSTANTS, "HUGGINGFACE_CO_URL_TEMPLATE", pattern)
    monkeypatch.setattr("time.sleep", lambda _: None)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    weights = one.state_dict(), other.state_dict()
    return weights[0].keys() == weights[1].keys() and all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


def observation() -> dict:
    image = torch.arange(64 * 64 * 3, dtype=torch.uint8).reshape(64, 64, 3).numpy()
    return {"agentview": image, "proprio": torch.arange(8.0).numpy(), "instruction": "push the red square"}


def card(hub: fake_hub.FakeHub, repo: str = "user/pick") -> tuple[dict, str]:
    """The metadata and the text of a repository's card."""
    text = hub.repos[repo][-1]["README.md"].decode()
    return huggingface_hub.ModelCard(text).data.to_dict(), text


def test_push_then_load_then_offline(hub, policy_file, monkeypatch, tmp_path):
    policy = VLAPolicy.load(policy_file)
    assert policy.push_to_hub("user/pick", license="mit") == f"{hub.address}/user/pick"
    assert hub.repos["user/pick"][-1].keys() == {"README.md", "config.json", "model.safetensors"}
    loaded = VLAPolicy.from_pretrained("user/pick")
    chunks = [model.act(observation(), noise=torch.zeros(8, 7)) for model in (policy, loaded)]
    assert torch.equal(*chunks) and not loaded.training
    assert read_header(loaded.checkpoint) == read_header(policy_file)
    assert model_digest(loaded.checkpoint) == model_digest(policy_file)

    asked = len(hub.requests)
    assert same(VLAPolicy.from_pretrained("user/pick", local_files_only=True), policy)
    monkeypatch.setattr(CONSTANTS, "HF_HUB_OFFLINE", True)
    assert same(VLAPolicy.load("hf:user/pick"), policy)
    assert len(hub.requests) == asked
    monkeypatch.setattr(CONSTANTS, "HF_HUB_OFFLINE", False)
    point_to(NOWHERE, monkeypatch)  # a connection that fails is as good as none
    assert same(VLAPolicy.from_pretrained("user/pick"), policy)

    # by the environment, as users do it, in another process
    environment = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": NOWHERE}
    code = "from vlarft import VLAPolicy; print(VLAPolicy.from_pretrained('user/pick').checkpoint)"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert Path(run.stdout.strip()) == loaded.checkpoint, run.stderr


def test_revisions(hub, policy_file):
    policy = VLAPolicy.load(policy_file)
    policy.push_to_hub("user/pick")
    hub.branches["user/pick"] = {"v1": len(hub.repos["user/pick"]) - 1}
    other = VLAPolicy(policy.cfg)
    other.push_to_hub("user/pick")
    assert same(VLAPolicy.from_pretrained("user/pick"), other)
    assert same(VLAPolicy.from_pretrained("user/pick", revision="v1"), policy)
    assert same(VLAPolicy.from_pretrained("user/pick/model.safetensors@v1"), policy)
    assert same(VLAPolicy.load("hf:user/pick@v1"), policy)
    assert read_header("hf:user/pick@v1").extra["held_out_episodes"]


def test_every_class_of_models(hub, world_model_file, tmp_path):
    """A world model's file has its tokenizer; a model from memory is pushed, without facts."""
    model = WorldModel.load(world_model_file)
    model.push_to_hub("user/wm")
    loaded = WorldModel.from_pretrained("user/wm")
    assert same(loaded, model) and same(loaded.tokenizer, model.tokenizer)
    metadata, text = card(hub, "user/wm")
    assert "Its frame tokenizer is part of the file" in text and "world-model" in metadata["tags"]
    for fresh in (FrameTokenizer(TOKENIZERS["smoke"]), SuccessModel(JUDGES["smoke"])):
        name = f"user/{type(fresh).__name__}"
        fresh.push_to_hub(name)
        assert same(type(fresh).from_pretrained(name), fresh)
        assert card(hub, name)[0]["library_name"] == "vlarft"
    with pytest.raises(ValueError, match="holds a WorldModel, expected a VLAPolicy"):
        VLAPolicy.from_pretrained("user/wm")


@pytest.fixture
def run_folder(policy_file, tmp_path) -> Path:
    """A run folder of train_sft.py and an evaluation of its policy, as the scripts write them."""
    import eval_libero
    import train_sft

    policy, folder = VLAPolicy.load(policy_file), tmp_path / "sft"
    config = dataclasses.replace(train_sft.PRESETS["smoke"], demos=("my demos",), out_dir=str(folder))
    extra = {**read_header(policy_file).extra, "sft": to_dict(config), "metrics": {"val_flow_mse": 0.25}}
    policy.save(folder / "model.safetensors", extra)
    write_json(folder / "config.json", to_dict(config))
    (folder / "log.jsonl").write_text('{"step": 0, "minutes": 1.0}\n{"step": 9, "minutes": 7.25}\n{"step": 9}\n')
    cfg = dataclasses.replace(eval_libero.PRESETS["smoke"], policies=(str(folder), "random"), noise="zero")
    digests = {str(folder): model_digest(folder), "random": "random"}
    start = {"suite": "tabletop_object", "task": 0, "rejected_starts": 0, "worker_deaths": 0}
    records = [
        {**start, "policy": p, "digest": d, "init_state": s, "success": s == 1 and p != "random"}
        for p, d in digests.items()
        for s in (0, 1)
    ]
    write_json(tmp_path / "eval" / "results.json", eval_libero.summarise(cfg, records, digests))
    return folder


def test_card_states_training_and_success(hub, run_folder, tmp_path):
    import train_sft

    policy = VLAPolicy.load(run_folder)
    policy.push_to_hub("user/pick", results=tmp_path / "eval", license="apache-2.0")
    metadata, text = card(hub)
    assert metadata["pipeline_tag"] == "robotics" and metadata["license"] == "apache-2.0"
    assert {"vlarft", "robotics", "vision-language-action"} <= set(metadata["tags"])
    assert "- minutes of the last stage: 7.2\n" in text and "| val_flow_mse | 0.25 |" in text
    assert "| tabletop_object | 1 | 50.0 % [9.5, 90.5] | 2 | 64 | zero |" in text  # Wilson's interval of 1 in 2
    assert "VLAPolicy.from_pretrained('user/pick')" in text
    (command,) = [line for line in text.splitlines() if line.startswith("python train_")]
    script, *words = shlex.split(command)[1:]
    assert script == "train_sft.py"
    assert to_dict(parse(train_sft.Config, train_sft.PRESETS, words)) == read_header(run_folder).extra["sft"]
    # what is published again states the same
    VLAPolicy.from_pretrained("user/pick").push_to_hub("user/again", license="apache-2.0")
    again = card(hub, "user/again")[1].replace("again", "pick")
    assert again == text
    config = json.loads(hub.repos["user/pick"][-1]["config.json"])
    assert config["class"] == "VLAPolicy" and config["extra"]["train_episodes"] == 4


@pytest.mark.parametrize("name", ["tokenizer", "wm", "sft", "rft", "rl", "success"])
@pytest.mark.parametrize("preset", ["paper", "smoke"])
def test_a_cards_command_is_the_runs(name, preset):
    """Of every training script: the command gives back each field of the configuration."""
    from vlarft.run.hub_model import command

    script = importlib.import_module(f"train_{name}")
    config = script.PRESETS.get(preset, next(iter(script.PRESETS.values())))
    words = shlex.split(command(name, to_dict(config)))
    assert words[:2] == ["python", f"train_{name}.py"]
    assert parse(script.Config, script.PRESETS, words[2:]) == config


def test_run_folder_of_a_tokenizer(tmp_path):
    import train_tokenizer

    config = dataclasses.replace(train_tokenizer.PRESETS["smoke"], out_dir=str(tmp_path))
    model = FrameTokenizer(TOKENIZERS["smoke"])
    save_model(tmp_path / "model.safetensors", model, model.cfg, {"train_episodes": ["a"]})
    write_json(tmp_path / "config.json", to_dict(config))
    FrameTokenizer.load(tmp_path).save_pretrained(tmp_path / "hub")
    assert "python train_tokenizer.py --demos" in (tmp_path / "hub" / "README.md").read_text()


def test_local_folder(policy_file, tmp_path):
    policy = VLAPolicy.load(policy_file)
    policy.save_pretrained(tmp_path / "pick")
    assert same(VLAPolicy.from_pretrained(tmp_path / "pick"), policy)
    with pytest.raises(ValueError, match="local folder, which has no revision 'v1'"):
        VLAPolicy.from_pretrained(tmp_path / "pick", revision="v1")


def test_a_changed_model_is_not_published_as_its_file(policy_file, tmp_path):
    policy = VLAPolicy.load(policy_file)
    with torch.no_grad():
        policy.head.output.bias.add_(1.0)
    with pytest.raises(ValueError, match="no longer that of .*model.safetensors, whose training"):
        policy.save_pretrained(tmp_path / "pick")
    assert not (tmp_path / "pick").exists()


def test_bfloat16(hub, run_folder, tmp_path):
    """A rounded file loads as float32, says so, is published again as it is, without the exact weights' success."""
    exact = VLAPolicy.load(run_folder)
    exact.push_to_hub("user/exact", results=tmp_path / "eval")
    with pytest.raises(
        ValueError, match="results are of the weights before rounding: save_pretrained with dtype alone"
    ):
        exact.save_pretrained(tmp_path / "half", dtype=torch.bfloat16, results=tmp_path / "eval")
    with pytest.raises(ValueError, match="dtype is torch.float16, expected torch.bfloat16"):
        exact.save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()
    exact = VLAPolicy.from_pretrained("user/exact")
    exact.push_to_hub("user/half", dtype=torch.bfloat16, text="Played *once*.")
    sizes = [len(hub.repos[name][-1]["model.safetensors"]) for name in ("user/exact", "user/half")]
    assert sizes[1] < 0.6 * sizes[0]
    text = card(hub, "user/half")[1]
    assert "rounded to bfloat16" in text and "Played *once*." in text and "Success, with" not in text
    half = VLAPolicy.from_pretrained("user/half")
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    for name, value in exact.named_parameters():
        assert torch.equal(half.get_parameter(name), value.bfloat16().float())
    for name, value in exact.named_buffers():
        assert torch.equal(half.get_buffer(name), value)
    half.push_to_hub("user/again")
    assert hub.repos["user/again"][-1]["model.safetensors"] == hub.repos["user/half"][-1]["model.safetensors"]


def test_results_of_others(run_folder, policy_file, tmp_path):
    policy = VLAPolicy(VLAPolicy.load(policy_file).cfg)
    with pytest.raises(ValueError, match="load the model from the one that eval_libero.py played"):
        policy.save_pretrained(tmp_path / "pick", results=tmp_path / "eval")
    policy.save(tmp_path / "other.safetensors")
    other = VLAPolicy.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no episodes of this policy, but of .*sft, random: evaluate the file"):
        other.save_pretrained(tmp_path / "pick", results=tmp_path / "eval")
    with pytest.raises(FileNotFoundError, match="no results at .*nowhere"):
        other.save_pretrained(tmp_path / "pick", results=tmp_path / "nowhere")
    write_json(tmp_path / "strange.json", {"config": {}})
    with pytest.raises(ValueError, match=r"strange.json is no results.json of eval_libero.py \(KeyError"):
        other.save_pretrained(tmp_path / "pick", results=tmp_path / "strange.json")


def test_named_errors_of_reading(hub, policy_file, monkeypatch):
    VLAPolicy.load(policy_file).push_to_hub("user/pick", private=True)
    assert hub.private == {"user/pick"}
    hub.repos["user/empty"] = [{}]
    for name, error, text in (
        ("user/none", FileNotFoundError, "has no model user/none, or it is private and the token.*hf auth login"),
        ("user/empty", FileNotFoundError, "hf:user/empty/model.safetensors: .* has no file model.safetensors"),
        ("user/pick@v9", FileNotFoundError, "user/pick has no branch, tag or commit v9"),
        ("user", ValueError, "hf:user is no place on the Hub: expected hf:user/name"),
        ("user/pick/../x", ValueError, "is no place on the Hub"),
        ("user/a--b", ValueError, "hf:user/a--b/model.safetensors: Cannot have -- or .. in repo_id"),
    ):
        with pytest.raises(error, match=text):
            VLAPolicy.load(f"hf:{name}")
    with pytest.raises(FileNotFoundError, match="user/pick has no branch, tag or commit v9"):
        VLAPolicy.from_pretrained("user/pick", revision="v9")
    with pytest.raises(FileNotFoundError, match="user/pick/model.safetensors is not in the cache .* HF_HUB_OFFLINE"):
        VLAPolicy.from_pretrained("user/pick", local_files_only=True)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(FileNotFoundError, match="or it is private"):
        VLAPolicy.from_pretrained("user/pick")
    point_to(NOWHERE, monkeypatch)
    with pytest.raises(FileNotFoundError, match="127.0.0.1:9 was not asked or not reached .*check the connection"):
        VLAPolicy.from_pretrained("user/pick")


def test_named_errors_of_writing(hub, policy_file, monkeypatch):
    policy = VLAPolicy.load(policy_file)
    hub.repos["user/other"] = [{}]
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(PermissionError, match="answers 401: .*with a token that may write to user/pick"):
        policy.push_to_hub("user/pick")
    assert "user/pick" not in hub.repos
    with pytest.raises(ValueError, match="hf:pick is no place on the Hub"):
        policy.push_to_hub("pick")
    with pytest.raises(ValueError, match="user/pick@v1: expected user/name, a repository's main branch"):
        policy.push_to_hub("user/pick@v1")
    point_to(NOWHERE, monkeypatch)
    with pytest.raises(OSError, match="hf:user/pick: http://127.0.0.1:9 is not reached .*check the connection"):
        policy.push_to_hub("user/pick")
    monkeypatch.setattr(CONSTANTS, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE=1 allows no request"):
        policy.push_to_hub("user/pick")


def test_only_safetensors_are_read(hub, policy_file, tmp_path):
    """Code and pickles of a repository are not even downloaded; a file of another program is refused."""
    tensors = load_file(policy_file)
    save_file(tensors, tmp_path / "plain.safetensors")
    files = {"model.safetensors": (tmp_path / "plain.safetensors").read_bytes()}
    hub.repos["user/evil"] = [{**files, "modeling.py": b"raise SystemExit", "pytorch_model.bin": b"x"}]
    with pytest.raises(ValueError, match="was not written by vlarft"):
        VLAPolicy.from_pretrained("user/evil")
    assert not [line for line in hub.requests if line.endswith((".py", ".bin"))]


def test_converter_downloads_weights_and_no_code(hub, tmp_path):
    """The public layout of a tokenizer has the names that it has here."""
    model = FrameTokenizer(dataclasses.replace(TOKENIZERS["smoke"], image_size=(64, 64)))
    cfg = model.cfg
    public = {
        "block_out_channels": list(cfg.block_channels),
        "layers_per_block": cfg.res_blocks,
        "latent_channels": cfg.latent_channels,
        "norm_num_groups": cfg.norm_groups,
        "resolution": 64,
        "patch_size": cfg.future_patch,
    }
    reference = importlib.import_module("vlarft.pretrained").tokenizer_config(public)
    model = FrameTokenizer(reference)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    files = {"config.json": json.dumps(public).encode(), "w.safetensors": (tmp_path / "w.safetensors").read_bytes()}
    nested = {f"a/{name}": content for name, content in files.items()}
    hub.repos["user/public"] = [{**files, **nested, "code.py": b"raise SystemExit", "b/c.bin": b"x"}]
    for number, name in enumerate(("hf:user/public", "hf:user/public/a", "hf:user/public/a/w.safetensors@main")):
        out = tmp_path / f"{number}.safetensors"
        convert(["tokenizer", name, "--out", str(out)])
        assert same(FrameTokenizer.load(out), model)
        assert read_header(out).extra == {"source": name}
    read = {line.rpartition("/")[2] for line in hub.requests if line.startswith("GET /user/public/resolve")}
    assert read == {"config.json", "w.safetensors"}
    hub.branches["user/public"] = {"v1": 0}
    hub.repos["user/public"].append({"README.md": b"emptied"})
    convert(["tokenizer", "hf:user/public@v1", "--out", str(tmp_path / "v1.safetensors")])
    with pytest.raises(FileNotFoundError, match="hf:user/public/z: the repository has no z"):
        convert(["tokenizer", "hf:user/public/z", "--out", str(tmp_path / "z.safetensors")])


def test_a_script_takes_names_of_the_hub(hub, policy_file, tmp_path):
    """Where a checkpoint is expected: here the evaluation's, which a second command finds complete."""
    import eval_libero

    VLAPolicy.load(policy_file).push_to_hub("user/pick")
    cfg = dataclasses.replace(
        eval_libero.PRESETS["smoke"], policies=("hf:user/pick",), episodes=1, workers=0, out_dir=str(tmp_path / "eval")
    )
    results = eval_libero.main(cfg)
    assert results["policies"][0]["digest"] == model_digest(policy_file)
    before = (tmp_path / "eval" / "episodes.jsonl").read_text()
    eval_libero.main(cfg)
    assert (tmp_path / "eval" / "episodes.jsonl").read_text() == before


def test_missing_package_is_named(policy_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'need huggingface_hub: pip install -e ".\[hub\]"'):
        VLAPolicy.from_pretrained("user/pick")
