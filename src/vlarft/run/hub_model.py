"""Models as folders of the Hugging Face Hub: `from_pretrained`, `save_pretrained`, `push_to_hub`, and the model card.

    config.json          class, configuration, how it was trained
    model.safetensors    the model's file as everywhere here; it alone is read
    README.md            the card: what it is, data, commands, minutes, success with intervals

A card states what files say and nothing else: the model's header, the run folder that it was loaded from, and the
results.json of evaluations.
"""

import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn

from vlarft.run.checkpoint import model_digest, read_header, save_model, write_atomic, write_json
from vlarft.run.config import to_dict
from vlarft.run.hub import MODEL, HubName, download, import_hub, is_hub_name, parse_name, upload
from vlarft.run.results import reading_results
from vlarft.run.stages import Stage


class Kind(NamedTuple):
    """What a class of models is, for its card; `sizes` is a format of `model` and its `cameras`."""

    text: str
    sizes: str
    tags: tuple[str, ...]


KINDS = {
    "VLAPolicy": Kind(
        "A vision-language-action policy: camera images, an instruction and proprioception to a chunk of actions.",
        "images of {cameras}, {model.vlm.image_size} px; proprio ({model.cfg.flow.proprio_dim},); "
        "{model.cfg.flow.chunk} actions ({model.cfg.flow.action_dim},), raw",
        ("vision-language-action", "reinforcement-learning"),
    ),
    "WorldModel": Kind(
        "A world model: a first frame and actions to imagined frames. Its frame tokenizer is part of the file.",
        "images {model.cfg.tokenizer.image_size} px; chunks of {model.cfg.chunk} actions ({model.cfg.action_dim},), "
        "raw; context frame of {model.layout.context_length} tokens, then {model.layout.frame_length} a frame",
        ("world-model",),
    ),
    "FrameTokenizer": Kind(
        "A frame tokenizer of a world model: camera images to tokens and back.",
        "images {model.cfg.image_size} px",
        ("world-model", "image-tokenizer"),
    ),
    "SuccessModel": Kind(
        "A judge of episodes: a frame, the first frame and an instruction to the probability of success.",
        "images {model.cfg.encoder.image_size} px",
        ("reward-model",),
    ),
}
STAGES = ("sft", "rft", "rl", "success")  # configurations that headers hold, of train_<name>.py, in this order
OWN_STAGE = {"FrameTokenizer": "tokenizer", "WorldModel": "wm"}  # in config.json of the run folder


class HubModel:
    """Mixed into the models that have `cfg` and `load`."""

    checkpoint: Path | None = None  # the file that the model was loaded from

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Any:
        """Load a model from the Hub or from a folder, in eval mode; only its `model.safetensors` is read.

        Args:
            name: "user/name" on the Hub ("user/name/path" for a file or folder in it), or a local folder or file, which
                goes first if there are both.
            revision: branch, tag or commit on the Hub; None: main.
            device: where its weights go.
            local_files_only: take it from the cache, without a request; so does HF_HUB_OFFLINE=1.
            token: of the Hub; None takes HF_TOKEN or what `hf auth login` stored.

        Raises:
            FileNotFoundError, PermissionError, OSError: see `hub.hub_errors`.
            ValueError: a name of another form, a revision of a local folder, and the errors of `load_model`.
        """
        if Path(name).exists():
            if revision is not None:
                raise ValueError(f"{name} is a local folder, which has no revision {revision!r}: leave it out")
            return cls.load(name, device)
        text = str(name) if is_hub_name(name) else f"hf:{name}"
        place = parse_name(text if revision is None else f"{text}@{revision}")
        return cls.load(download(place, local_files_only, token), device)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        results: str | Path | Sequence[str | Path] = (),
        license: str = "unknown",
        text: str = "",
        dtype: torch.dtype | None = None,
        name: str = "user/name",
    ) -> None:
        """Write the folder that `push_to_hub` uploads, for example to read its card first.

        Args:
            folder: created if it is missing; its three files are replaced.
            results: results.json of eval_libero.py, or their folders, whose rates of this policy the card states.
            license: of the weights, as the Hub spells it: mit, apache-2.0, ...
            text: Markdown that the card has below its description.
            dtype: torch.bfloat16 halves the file: parameters are rounded, buffers are not, and all load as float32.
                None: as in the file that the model was loaded from.
            name: on the Hub, for the card's example.

        Raises:
            ValueError: weights that are no longer those of the file that the model was loaded from, results of other
                policies or of weights before rounding, or another dtype.
            FileNotFoundError: no such results.
            ImportError: huggingface_hub is missing.
        """
        import_hub()
        folder, file = Path(folder), self.checkpoint
        paths = [results] if isinstance(results, str | Path) else results
        if paths and file is None:
            raise ValueError("results are of a file: load the model from the one that eval_libero.py played")
        if dtype not in (None, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}, expected torch.bfloat16, or None for that of the model's file")
        if paths and dtype is not None:
            raise ValueError(
                "results are of the weights before rounding: save_pretrained with dtype alone, evaluate that folder, "
                "and publish what load returns of it with results"
            )
        extra = {} if file is None else {**read_header(file).extra, **_training(file)}
        stored = None if file is None else load_file(file)
        if stored is not None and not _equal(stored, self.state_dict()):
            raise ValueError(
                f"the model is no longer that of {file}, whose training the card would state: write it with "
                "vlarft.run.checkpoint.save_model, and publish what load returns of that file"
            )
        if rows := [row for path in paths for row in _rates(Path(path), model_digest(file))]:
            extra["evaluations"] = rows
        if dtype is not None:
            extra = {k: v for k, v in extra.items() if k != "evaluations"} | {"rounded": "bfloat16"}
        save_model(folder / MODEL, self, self.cfg, extra, stored, dtype=dtype)
        counts = {key: len(value) for key, value in extra.items() if key.endswith("_episodes")}
        facts = {key: value for key, value in extra.items() if key != "mean_frame"} | counts
        about = {"library_name": "vlarft", "class": type(self).__name__, "config": to_dict(self.cfg), "extra": facts}
        write_json(folder / "config.json", about)
        card = model_card(self, extra, license, name, text)
        write_atomic(folder / "README.md", lambda tmp: tmp.write_text(card))

    def push_to_hub(
        self,
        name: str,
        *,
        results: str | Path | Sequence[str | Path] = (),
        license: str = "unknown",
        text: str = "",
        dtype: torch.dtype | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        message: str = "Upload a model of vlarft",
    ) -> str:
        """Upload the model and its card by one commit; the repository is created if it is new.

        The card and the header have the paths of the training command as they were given.

        Args:
            name: "user/name".
            results, license, text, dtype: see `save_pretrained`.
            private: visibility of a new repository; None: the account's default.
            token: one that may write; None takes HF_TOKEN or what `hf auth login` stored.
            message: of the commit.

        Returns:
            The address of the repository.

        Raises:
            ValueError, FileNotFoundError, PermissionError, OSError: see `save_pretrained` and `hub.hub_errors`.
        """
        place = parse_name(f"hf:{name}")
        if place != HubName(place.repo, "", None):
            raise ValueError(f"{name}: expected user/name, a repository's main branch")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, results=results, license=license, text=text, dtype=dtype, name=name)
            files = {file.name: file for file in sorted(Path(folder).iterdir())}
            return upload(name, files, private, token, message)


def _equal(stored: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> bool:
    """Return whether a file's tensors are these weights, which are float32 where the file has bfloat16."""
    same_names = stored.keys() == weights.keys()
    return same_names and all(torch.equal(stored[name].to(v.dtype), v.cpu()) for name, v in weights.items())


def _training(file: Path) -> dict[str, Any]:
    """Return what the run folder of a model file says beyond its header; {} for a file elsewhere."""
    path, log = file.parent / "config.json", file.parent / "log.jsonl"
    config = json.loads(path.read_text()) if file.name == MODEL and path.is_file() else {}
    if "out_dir" not in config:  # a folder of the Hub, or of another program
        return {}
    stage = OWN_STAGE.get(read_header(file).cls)
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    minutes = [row["minutes"] for row in rows if "minutes" in row]
    return ({stage: config} if stage else {}) | ({"minutes": minutes[-1]} if minutes else {})


def _rates(path: Path, digest: str) -> list[dict[str, Any]]:
    """Return a policy's success rates per suite from a results.json of eval_libero.py."""
    with reading_results(path) as (file, found):
        settings = {key: found["config"][key] for key in ("noise", "execute", "perturb", "seed")}
        settings |= {key: found["config"].get(key, usual) for key, usual in (("plan", 1), ("horizon", None))}
        policies = {entry["digest"].split("+")[0]: entry for entry in found["policies"]}
        names = ", ".join(entry["policy"] for entry in policies.values())
        rows = {
            key: [
                {"suite": suite, "tasks": len(part["tasks"]), **part["all"], **settings}
                for suite, part in entry["suites"].items()
            ]
            for key, entry in policies.items()
        }
    if digest not in rows:
        raise ValueError(f"{file} has no episodes of this policy, but of {names}: evaluate the file that you publish")
    return rows[digest]


def command(stage: str, config: dict[str, Any]) -> str:
    """Return the command of train_<stage>.py that has a configuration, with every option."""
    return shlex.join(["python", f"train_{stage}.py", *Stage(stage, Path(), config).words()])


def model_card(model: nn.Module, extra: dict[str, Any], license: str, name: str, text: str = "") -> str:
    """Return the README.md of a model.

    Args:
        model: with `cfg`.
        extra: of its header, completed by `save_pretrained`.
        license: of the weights.
        name: on the Hub.
        text: Markdown below the description.
    """
    cls, size = type(model).__name__, sum(p.numel() for p in model.parameters())
    kind, cameras = KINDS[cls], ", ".join(getattr(model.cfg, "cameras", ()))
    metadata = import_hub().ModelCardData(
        library_name="vlarft", license=license, pipeline_tag="robotics", tags=["vlarft", "robotics", *kind.tags]
    )
    lines = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {name.partition('/')[2]}\n",
        f"{kind.text} {size:,} parameters.\n",
    ]
    lines += [f"{text.strip()}\n"] if text else []
    lines.append(f"- {kind.sizes.format(model=model, cameras=cameras)}")
    for key, what in (("train_episodes", "trained on"), ("held_out_episodes", "held out")):
        lines += [f"- {what}: {len(extra[key])} episodes"] if extra.get(key) else []
    lines += [f"- minutes of the last stage: {extra['minutes']:.1f}"] if "minutes" in extra else []
    if "rounded" in extra:
        lines.append(f"- parameters rounded to {extra['rounded']}, read as float32; held-out measures are from before")
    lines += [f"- converted from {extra['source']}"] if "source" in extra else []
    lines += [f"\n```python\nfrom vlarft import {cls}\n\nmodel = {cls}.from_pretrained({name!r})\n```"]
    configs = {stage: extra[stage] for stage in (*OWN_STAGE.values(), *STAGES) if isinstance(extra.get(stage), dict)}
    if configs:
        lines.append("\n## Commands\n\nPaths are those of the machine that trained it.\n\n```")
        lines += [command(stage, config) for stage, config in configs.items()]
        lines.append("```")
    if numbers := {k: v for k, v in extra.get("metrics", {}).items() if isinstance(v, float)}:
        lines.append("\n## On held-out episodes\n\n| measure | value |\n|---|---|")
        lines += [f"| {key} | {value:.4g} |" for key, value in numbers.items()]
    if rows := extra.get("evaluations"):
        lines.append("\n## Success, with 95 % Wilson intervals\n")
        heads = "suite", "tasks", "success", "episodes", "steps at most", "x_0", "actions of a chunk executed"
        lines.append(f"| {' | '.join(heads)} | chunks imagined | starts |\n{'|---' * 9}|")
        lines += [
            f"| {r['suite']} | {r.get('tasks', '')} | {100 * r['rate']:.1f} % [{100 * r['low']:.1f}, "
            f"{100 * r['high']:.1f}] | {r['episodes']} | {r.get('horizon') or 'as usual'} | {r['noise']} "
            f"| {r['execute']} | {r['plan']} | {r['perturb'] or 'unperturbed'} |"
            for r in rows
        ]
    return "\n".join(lines) + "\n"
