"""Find runs and read what their scripts wrote; errors name the file."""

import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FILES = "config.json", "log.jsonl", "results.json", "summary.json", "stages.json"  # one of which tells a run


class Kind(NamedTuple):
    """What a script's runs are told by, and what the page shows of them.

    field: an option that this script alone has.
    options: the most telling ones.
    curves: title -> metrics of log.jsonl.
    """

    title: str
    script: str
    field: str
    options: tuple[str, ...] = ()
    curves: Mapping[str, tuple[str, ...]] = {}


_OPTIMISATION = ("steps", "max_minutes", "batch_size", "lr", "seed")
KINDS = (
    Kind(
        "Tokenizer", "train_tokenizer.py", "gan_start", ("demos", "size", *_OPTIMISATION),
        {
            "training loss": ("loss",),
            "reconstruction error, context and future frames": ("context_error", "future_error"),
            "held-out PSNR [dB]": ("val_psnr_context", "val_psnr_future", "val_psnr_moving", "val_psnr_moving_copy"),
        },
    ),
    Kind(
        "World model", "train_wm.py", "factored_tokens", ("demos", "tokenizer", "init", "size", *_OPTIMISATION),
        {
            "cross-entropy [nats]": ("loss", "val_loss", "val_shuffled_loss"),
            "accuracy on tokens that change": ("accuracy_changed", "val_accuracy_changed"),
            "PSNR of moving pixels, imagined and copied [dB]": ("rollout_psnr_moving", "copy_psnr_moving"),
        },
    ),
    Kind("World model, evaluated", "eval_wm.py", "segments", ("world_model", "demos", "segments", "episodes", "seed")),
    Kind(
        "Policy, SFT", "train_sft.py", "key_weight", ("demos", "init", "size", "objective", *_OPTIMISATION),
        {
            "flow-matching loss (Eq. 4)": ("flow_mse", "val_flow_mse"),
            "loss of the key head": ("key_loss", "val_key_loss"),
        },
    ),
    Kind(
        "Policy, RFT", "train_rft.py", "gate_starts",
        ("policy", "world_model", "demos", "reward", "imagination", "starts", "group", "steps", "lr", "seed"),
        {
            "verified reward (Eq. 11)": ("reward", "reward_mean_action"),
            "standard deviation of the reward within groups": ("reward_std",),
            "standard deviation of a flow step": ("sigma",),
            "flow-matching term (Eq. 13)": ("mse",),
        },
    ),
    Kind(
        "Success model", "train_success.py", "false_successes", ("demos", "world_model", "size", *_OPTIMISATION),
        {
            "training loss": ("loss",),
            "held-out episodes judged right": ("real_agreement", "decoded_agreement", "imagined_agreement"),
        },
    ),
    Kind(
        "Policy, closed-loop RL", "train_rl.py", "late_starts",
        ("policy", "world", "world_model", "success_model", "demos", "starts", "group", "steps", "lr", "seed"),
        {
            "share of episodes that succeed": ("success",),
            "share of groups of one outcome": ("constant_groups",),
            "actions of an episode": ("episode_steps",),
        },
    ),
    Kind("Rounds of closed-loop RL", "rl_rounds.py", "refresh_steps", ("policy", "world_model", "demos", "rounds")),
    Kind(
        "Policies, evaluated", "eval_libero.py", "num_flow_steps",
        ("suites", "tasks", "episodes", "noise", "execute", "plan", "perturb", "seed"),
    ),
)  # fmt: skip


@contextlib.contextmanager
def named(path: Path, expected: str) -> Iterator[None]:
    """Name the file whose content is not as expected."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, EOFError, OSError, zipfile.BadZipFile) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not {expected} ({what}); remove it, or write it again with its script") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if there is no such file."""
    if not path.is_file():
        return {}
    with named(path, "a JSON object"):
        if not isinstance(value := json.loads(path.read_text()), dict):
            raise TypeError(f"found a {type(value).__name__}")
    return value


def read_log(folder: Path) -> dict[str, np.ndarray]:
    """Read a run's log.jsonl: metric -> rows of (step, value), (n, 2), of the steps that have it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line that no run wrote; the message has its number.
    """
    path, found = folder / "log.jsonl", {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
            step = row.pop("step")
            for name, value in row.items():
                found.setdefault(name, []).append((float(step), float(value)))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number} is no line of a log ({type(error).__name__}: {error}): remove the line, or "
                "give the training's command again, which drops lines that were cut short"
            ) from error
    return {name: np.array(rows) for name, rows in found.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """Read a run's configuration, which an evaluation may have in its results; {} if there is none."""
    config = read_json(folder / "config.json") or read_json(folder / "results.json").get("config")
    return config if isinstance(config, dict) else {}


def _kind(folder: Path, config: Mapping[str, Any]) -> Kind | None:
    """Tell which script wrote a folder; None: a folder that is no run.

    Raises:
        ValueError: it has a log or results, but of no known script.
    """
    for kind in KINDS:
        if kind.field in config:
            return kind
    for name in ("log.jsonl", "results.json"):
        if (folder / name).is_file():
            raise ValueError(
                f"{folder} has a {name}, but no configuration of a script that the report knows: expected config.json "
                f"(or results.json with one) of {', '.join(kind.script for kind in KINDS)}"
            )
    return None


def find_runs(run: Path) -> list[tuple[Kind | None, Path]]:
    """Find the runs in a folder and up to two folders below, in the order of the pipeline, each with its kind; None:
    a folder of demo.py.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: there is no run in it.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"no run folder {run}{' (it is a file)' if run.exists() else ''}: give one of a stage")
    found = []
    for folder in sorted({run, *(path for pattern in ("*", "*/*") for path in run.glob(pattern) if path.is_dir())}):
        if any((folder / name).is_file() for name in FILES):
            kind = _kind(folder, read_config(folder))
            if kind or (folder / "stages.json").is_file() or (folder / "summary.json").is_file():
                found.append((kind, folder))
    if not found:
        has = ", ".join(sorted(path.name for path in run.iterdir())[:10]) or "nothing"
        raise ValueError(f"{run} holds no run: expected one of {', '.join(FILES)} of a stage in it, found {has}")
    return sorted(found, key=lambda pair: -1 if pair[0] is None else KINDS.index(pair[0]))
