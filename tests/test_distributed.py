"""distributed: two gloo processes match one process, and each resumes what the other number of processes saved."""

import copy
import dataclasses
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from vlarft.nets.transformer import Decoder, TransformerConfig
from vlarft.run import distributed
from vlarft.run.checkpoint import read_header
from vlarft.run.config import parse

ROOT = Path(__file__).resolve().parents[1]


def here(script: str, *arguments: object) -> None:
    """Run a script in this process."""
    module = importlib.import_module(script.removesuffix(".py"))
    module.main(parse(module.Config, module.PRESETS, [str(argument) for argument in arguments]))


def launch(processes: int, script: str, *arguments: object, stop: Path | None = None) -> None:
    """Run a script under the variables that torchrun sets; fails with the output of the first process that failed.

    With `stop`, the run's folder, the first process alone is told to stop as training starts: all leave after one step.
    """
    with tempfile.TemporaryDirectory() as scratch:
        texts = [Path(scratch, f"{rank}.txt") for rank in range(processes)]
        workers = ranks.start_script(ROOT / script, [str(word) for word in arguments], texts)
        try:
            while stop and not (stop / "config.json").exists():
                assert workers[0].is_alive(), texts[0].read_text()[-3000:]
                time.sleep(0.01)
            if stop:
                os.kill(workers[0].pid, signal.SIGTERM)
            for worker in workers:
                worker.join(240)
        finally:  # what still runs waits for the others, up to an hour
            for worker in workers:
                worker.kill()
        outputs = [text.read_text() for text in texts]
    for worker, output in zip(workers, outputs):
        assert worker.exitcode == (75 if stop else 0), output[-3000:]
    if stop:
        said = rf"told to stop: saved step \d+ in {stop}; the same command goes on from there"
        assert re.search(said, outputs[0]), outputs[0][-3000:]


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_model(one: Path, two: Path) -> None:
    """Equal on average to 1 % of what 4 steps of Adam move (a gradient near zero may change sign by rounding alone)."""
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert a.keys() == b.keys()
    assert read_header(one / "model.safetensors").cls == read_header(two / "model.safetensors").cls
    for key in a:
        assert (a[key].float() - b[key].float()).abs().mean() < 5e-5, key


def assert_same_log(one: Path, two: Path, rel: float = 2e-3) -> None:
    """Of runs of which the second was stopped and went on: the same steps, once each, and losses."""
    logs = log_of(one), log_of(two)
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]] != []
    assert [row["loss"] for row in logs[0]] == pytest.approx([row["loss"] for row in logs[1]], rel=rel, abs=2e-4)


def assert_same_run(one: Path, two: Path) -> None:
    assert_same_log(one, two)
    assert_same_model(one, two)


@pytest.fixture(scope="module")
def tokenizer(demos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    flags = ["--preset", "smoke", "--demos", demos, "--steps", 2, "--validation-fraction", 0.2]
    here("train_tokenizer.py", *flags, "--out-dir", folder)
    return folder / "model.safetensors"


def test_tokenizer(demos, tmp_path):
    """Also with a GAN and augmentation, and the two processes with two micro-batches each, recomputing activations."""
    flags = ["--preset", "smoke", "--demos", demos, "--steps", 4, "--log-interval", 1, "--validation-fraction", 0.2]
    flags += ["--gan-start", 1, "--augment", "full", "--weighting", "uniform", "--context-lookback", 5]
    here("train_tokenizer.py", *flags, "--out-dir", tmp_path / "1")
    launch(2, "train_tokenizer.py", *flags, "--out-dir", tmp_path / "2", "--accumulate", 2, "--checkpoint-activations")
    assert_same_model(tmp_path / "1", tmp_path / "2")
    logs = [log_of(tmp_path / str(n)) for n in (1, 2)]
    for name in ("loss", "adversarial", "hinge", "gradient_penalty", "balance"):
        one, two = ([row[name] for row in log if name in row] for log in logs)
        assert len(one) == (4 if name == "loss" else 3) and one == pytest.approx(two, rel=1e-3), name
    launch(2, "train_tokenizer.py", *flags, "--out-dir", tmp_path / "3", stop=tmp_path / "3")
    here("train_tokenizer.py", *flags, "--out-dir", tmp_path / "3")
    assert_same_run(tmp_path / "1", tmp_path / "3")
    discriminators = [torch.load(tmp_path / n / "train_state.pt")["networks"]["discriminator"] for n in ("1", "3")]
    for key, one in discriminators[0].items():
        assert (one - discriminators[1][key]).abs().mean() < 5e-5, key


def test_torchrun(demos, tmp_path):
    """A killed process: all start again from the last checkpoint. SIGTERM: saved, and another number goes on."""
    flags = ["--preset", "smoke", "--demos", demos, "--steps", 30, "--log-interval", 1, "--validation-fraction", 0.2]
    flags += ["--save-interval", 4, "--validation-interval", 30]
    folder = tmp_path / "parts"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", str(ROOT / "train_tokenizer.py"), *map(str, flags), "--out-dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as torchrun:
        await_steps(torchrun, folder, 5)
        workers = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        second = [int(w) for w in workers if "LOCAL_RANK=1\0" in Path(f"/proc/{w}/environ").read_text()]
        os.kill(second[0], signal.SIGKILL)
        await_steps(torchrun, folder, 10)
        torchrun.terminate()
        output = torchrun.communicate(timeout=240)[0]
    assert torchrun.returncode != 0 and output.count("told to stop: saved step") == 1, output[-3000:]
    assert output.count("tokenizer  1/30  loss") == 1, output[-3000:]  # it did not start anew
    here("train_tokenizer.py", *flags, "--out-dir", folder)
    here("train_tokenizer.py", *flags, "--out-dir", tmp_path / "whole")
    # codes are rounded, and two processes round some another way than one: the longer they ran, the more it shows;
    # another batch would be off by a tenth
    assert_same_log(tmp_path / "whole", folder, rel=2e-2)


def await_steps(process: subprocess.Popen, folder: Path, steps: int) -> None:
    log = folder / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < steps:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.005)


def test_world_model(demos, tokenizer, tmp_path):
    """The two processes with two micro-batches each, recomputing activations."""
    flags = ["--preset", "smoke", "--demos", demos, "--tokenizer", tokenizer, "--steps", 4, "--log-interval", 1]
    flags += ["--validation-fraction", 0.2, "--context-lookback", 5]
    here("train_wm.py", *flags, "--out-dir", tmp_path / "1")
    launch(2, "train_wm.py", *flags, "--out-dir", tmp_path / "2", "--accumulate", 2, "--checkpoint-activations")
    assert_same_model(tmp_path / "1", tmp_path / "2")
    losses = [[row["loss"] for row in log_of(tmp_path / str(n))] for n in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    launch(2, "train_wm.py", *flags, "--out-dir", tmp_path / "3", "--async-save", stop=tmp_path / "3")
    here("train_wm.py", *flags, "--out-dir", tmp_path / "3")
    launch(1, "train_wm.py", *flags, "--out-dir", tmp_path / "4", stop=tmp_path / "4")
    launch(2, "train_wm.py", *flags, "--out-dir", tmp_path / "4", "--frozen", "replicate")
    for n in ("3", "4"):
        assert_same_run(tmp_path / "1", tmp_path / n)


def test_sft_two_processes_are_two_accumulated_batches(demos, tmp_path):
    flags = ["--preset", "smoke", "--demos", demos, "--steps", 4, "--log-interval", 1, "--validation-fraction", 0.2]
    here("train_sft.py", *flags, "--accumulate", 2, "--out-dir", tmp_path / "1")
    launch(2, "train_sft.py", *flags, "--out-dir", tmp_path / "2")
    assert_same_model(tmp_path / "1", tmp_path / "2")


def test_sft_with_adapters(demos, tmp_path):
    """The frozen rest whole on both processes; the one that goes on accumulates what two did."""
    flags = ["--preset", "smoke", "--demos", demos, "--steps", 4, "--log-interval", 1, "--validation-fraction", 0.2]
    flags += ["--lora-rank", 2]
    here("train_sft.py", *flags, "--out-dir", tmp_path / "1", "--accumulate", 2)
    launch(2, "train_sft.py", *flags, "--out-dir", tmp_path / "3", "--frozen", "replicate", stop=tmp_path / "3")
    here("train_sft.py", *flags, "--out-dir", tmp_path / "3", "--accumulate", 2)
    assert_same_run(tmp_path / "1", tmp_path / "3")


def test_rft(demos, policy_file, world_model_file, tmp_path):
    """Two processes with micro-batches do what one does: the draws are those of the whole batch."""
    flags = ["--preset", "smoke", "--demos", demos, "--policy", policy_file, "--world-model", world_model_file]
    flags += ["--starts", 4, "--epochs", 2, "--imagination", "sample"]
    here("train_rft.py", *flags, "--out-dir", tmp_path / "1")
    launch(2, "train_rft.py", *flags, "--out-dir", tmp_path / "2", "--micro-starts", 1)
    launch(2, "train_rft.py", *flags, "--out-dir", tmp_path / "3", "--frozen", "shard", stop=tmp_path / "3")
    here("train_rft.py", *flags, "--out-dir", tmp_path / "3")
    assert_same_run(tmp_path / "1", tmp_path / "3")
    assert_same_model(tmp_path / "1", tmp_path / "2")
    one, two = (log_of(tmp_path / n) for n in ("1", "2"))
    assert [row["step"] for row in two] == [0, 1]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        numbers = [{k: v for k, v in row.items() if not k.endswith(("_s", "minutes"))} for row in (a, b)]
        assert numbers[0] == pytest.approx(numbers[1], rel=2e-3, abs=2e-4)
    before, after = load_file(policy_file), load_file(tmp_path / "2" / "model.safetensors")
    assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith("head."))


def fine_tune_all(settings: dict) -> None:
    import variants

    variants.main(variants.Config(**settings, variant="whole_policy"))


def test_rft_of_the_whole_policy(rft_config, tmp_path):
    changes = {"starts": 4, "epochs": 2, "reward": "r1", "warmup": 0}
    settings = {**dataclasses.asdict(rft_config), **changes}
    fine_tune_all({**settings, "out_dir": str(tmp_path / "1")})
    ranks.run(2, fine_tune_all, {**settings, "out_dir": str(tmp_path / "2")})
    assert_same_model(tmp_path / "1", tmp_path / "2")
    one, two = (log_of(tmp_path / n)[-1] for n in ("1", "2"))
    for name in ("loss", "grad_norm"):
        assert one[name] == pytest.approx(two[name], rel=2e-3), name


def blocks_in_bfloat16() -> None:
    """Two ranks with a half of the rows each, in two micro-batches, against the plain decoder on all rows."""
    cfg = TransformerConfig(depth=2, width=32, num_heads=2, num_kv_heads=2, ffn_dim=64)
    torch.manual_seed(0)
    plain, rows = Decoder(cfg), torch.randn(8, 6, 32)
    plain.layers[0].requires_grad_(False)
    sharded, whole = copy.deepcopy(plain), copy.deepcopy(plain)
    distributed.shard(sharded, sharded.layers, bf16=True)
    distributed.shard(whole, whole.layers, frozen="replicate", bf16=True)
    with torch.autocast("cpu", torch.bfloat16):
        plain(rows).square().mean().backward()
    norm = nn.utils.clip_grad_norm_(plain.parameters(), 1e9)
    for net, frozen in ((sharded, True), (whole, False)):
        seen = []
        net.layers[0].mlp.up_proj.register_forward_pre_hook(lambda m, _, seen=seen: seen.append(m.weight.dtype))
        net.norm.register_forward_pre_hook(lambda m, _, seen=seen: seen.append(m.weight.dtype))
        counts = []
        for micro, part in enumerate(rows[4 * distributed.rank() :][:4].split(2)):
            distributed.sync_gradients(net, micro == 1)
            with CommDebugMode() as messages, torch.autocast("cpu", torch.bfloat16):
                (net(part).square().mean() / 2).backward()
            counts.append({str(k).split(".")[-1]: n for k, n in messages.get_comm_counts().items()})
        assert seen == [torch.bfloat16 if frozen else torch.float32, torch.float32] * 2  # gathered so, or not at all
        # gradients travel once, those of the last block and of the final norm; of the frozen block there are none
        assert [sum(n for k, n in c.items() if "reduce_scatter" in k) for c in counts] == [0, 2]
        # every unit, forward and again backward (one without a backward is fetched ahead of it all the same)
        gathers = [sum(n for k, n in c.items() if "gather" in k) for c in counts]
        assert gathers == [6 if frozen else 4] * 2
        assert {p.dtype for p in net.parameters()} == {torch.float32}
        assert hasattr(net.layers[0].mlp.up_proj.weight, "device_mesh") == frozen
        trained = [p for p in net.parameters() if p.requires_grad]
        assert distributed.clip_grad_norm(trained, 1e9) == pytest.approx(float(norm), rel=1e-2)
        for name, parameter in plain.named_parameters():
            grad = net.get_parameter(name).grad
            if parameter.grad is None:
                assert grad is None, name
                continue
            grad = grad.full_tensor()
            assert (grad - parameter.grad).norm() < 1e-2 * parameter.grad.norm(), name
            assert (grad != grad.bfloat16()).any(), name  # the mean over processes was taken in float32


def test_blocks_gathered_in_bfloat16_and_reduced_in_float32():
    ranks.run(2, blocks_in_bfloat16)


def nan_on_one_rank(settings: dict) -> None:
    """Fine-tune with a loss that on one rank is no number."""
    import train_rft

    def loss(cfg, policy, rollouts):
        value, metrics = train_rft.grpo_loss(cfg, policy, rollouts)
        return (value * math.nan if distributed.rank() else value), metrics

    with pytest.raises(FloatingPointError, match=r"loss is nan.* at step 0 .*is from episodes"):
        train_rft.main(train_rft.Config(**settings), loss=loss)  # neither rank waits for the other


def test_all_ranks_stop_at_a_loss_of_one_that_is_no_number(rft_config):
    changed = dataclasses.replace(rft_config, reward="r1")
    ranks.run(2, nan_on_one_rank, dataclasses.asdict(changed))
    assert not (Path(rft_config.out_dir) / "model.safetensors").exists()


def test_setup_wants_a_gpu_for_every_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        ValueError, match="more processes than GPUs, of which it has 2: give torchrun --nproc-per-node 2"
    ):
        distributed.setup()


def test_one_process_is_plain():
    module = torch.nn.Linear(2, 2)
    assert distributed.shard(module) is module
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.mean_across_ranks({"a": torch.tensor(0.5)}) == {"a": 0.5}
    distributed.check_batch(6)


def test_batch_that_does_not_divide(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    distributed.check_batch(24)
    distributed.check_batch(24, 3)
    with pytest.raises(ValueError, match="batch size 6 does not divide by 4 processes; choose a multiple"):
        distributed.check_batch(6)
    for accumulate in (5, 0):
        with pytest.raises(ValueError, match=f"batch size 24 does not divide by 4 processes x {accumulate} micro"):
            distributed.check_batch(24, accumulate)


def test_recompute_gives_the_same_gradients_from_fewer_activations():
    torch.manual_seed(0)
    blocks = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Tanh()) for _ in range(3)]
    net = torch.nn.Sequential(*blocks)
    names = list(net.state_dict())

    def step() -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(1)
        saved: list[torch.Tensor] = []
        net.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            loss = net(torch.ones(4, 8)).square().sum()
        kept = len(saved)
        loss.backward()
        return [p.grad.clone() for p in net.parameters()], kept

    plain, kept = step()
    distributed.recompute(blocks)
    again, less = step()
    assert all(torch.equal(a, b) for a, b in zip(plain, again)) and less < kept
    assert list(net.state_dict()) == names
    with torch.no_grad():
        assert not net(torch.ones(1, 8)).requires_grad


def test_clip_grad_norm_by_hand():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert distributed.clip_grad_norm([weight], 1.0) == pytest.approx(5)
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]))


def test_optimizer_state_round_trip():
    def trained():
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(net.parameters())
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return net, optimizer

    net, optimizer = trained()
    state = optimizer.state_dict()
    fresh = torch.optim.AdamW(net.parameters())
    distributed.load_optimizer_state(fresh, state)
    for a, b in zip(fresh.state_dict()["state"].values(), optimizer.state_dict()["state"].values()):
        assert all(torch.equal(a[k], b[k]) for k in a)
