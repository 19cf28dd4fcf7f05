"""A vlarft policy behind lerobot's interface. Its weights file is vlarft's own: `VLAPolicy.load` reads what this saves.

Shapes: B batch, T chunk steps, A action dim, P proprio dim.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies import PreTrainedPolicy
from lerobot.utils.feature_utils import dataset_to_policy_features
from torch import Tensor

from vlarft.data.lerobot_meta import read_grippers, read_info
from vlarft.policy import PRESETS, PolicyConfig, VLAPolicy
from vlarft.run.checkpoint import checkpoint_file, load_model

from .attempts import attempts_text
from .batches import ACTION, IMAGES, STATE, camera_keys, images_of, observations, padded_actions, state_and_tasks
from .configuration_vlarft import VlarftConfig

IMAGE_FACTS = "camera", "image_size", "mean_frame"  # of `image_convention`; they hold for images of the same size


class VlarftPolicy(PreTrainedPolicy):
    """Policy of a vlarft checkpoint, or for lerobot-train a new one.

    Args:
        config: its `checkpoint` is loaded, unless `checkpoint` is given; with `size`, a new policy is made.
        dataset_stats, dataset_meta: of the data set of lerobot-train; otherwise None.
        checkpoint: run folder or model.safetensors.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: neither checkpoint nor size; no policy of vlarft; a robot, cameras or units that do not fit.
    """

    config_class = VlarftConfig
    name = "vlarft"

    def __init__(
        self,
        config: VlarftConfig,
        dataset_stats: Mapping[str, Mapping[str, Any]] | None = None,
        dataset_meta: Any = None,
        checkpoint: str | Path | None = None,
    ) -> None:
        super().__init__(config)
        config.validate_features()
        checkpoint = checkpoint or config.checkpoint
        about = _about(dataset_meta)
        if checkpoint is not None:
            self.model, self.facts = load_model(checkpoint, VLAPolicy, PolicyConfig, config.device)
        elif config.size is not None:
            self.model, self.facts = _new_model(config, dataset_stats, dataset_meta, about).to(config.device), {}
        else:
            raise ValueError(
                "a vlarft policy needs weights: give --policy.checkpoint RUN or --policy.path FOLDER, or --policy.size "
                "to train a new one with lerobot-train"
            )
        sizes, trained = _image_sizes(self._cameras, config, dataset_meta), self.facts.get("image_size")
        _warn_other_size(trained, sizes, checkpoint)
        if dataset_meta is not None:  # the header's lists of episodes are those of another training
            kept = IMAGE_FACTS if all(size == trained for size in sizes.values()) else ()
            before = {key: self.facts[key] for key in kept if key in self.facts}
            if "instructions" in self.facts and dataset_meta.tasks is not None:
                before["instructions"] = sorted({*self.facts["instructions"], *map(str, dataset_meta.tasks.index)})
            self.facts = {**before, "lerobot": {"dataset": dataset_meta.repo_id}}
            if "intended_action" in dataset_meta.features:
                warnings.warn(
                    f"{dataset_meta.repo_id} has intended_action, the demonstrator's actions before noise was added; "
                    "lerobot-train imitates the noisy ones in action: train_sft.py is better here",
                    stacklevel=2,
                )
        _check_robot(self.model, config, checkpoint)
        if dataset_stats is not None:
            _check_units(self.model, dataset_stats)
        if dataset_stats is not None and dataset_meta is not None:
            _check_grippers(self.model, dataset_stats, dataset_meta, about)
            if text := attempts_text(Path(dataset_meta.root)):
                warnings.warn(text, stacklevel=2)
        if not config.input_features:
            size = trained or [self.model.vlm.image_size] * 2  # height and width
            images = {f"{IMAGES}s.{c}": PolicyFeature(FeatureType.VISUAL, (3, *size)) for c in self._cameras}
            state = PolicyFeature(FeatureType.STATE, (self.model.cfg.flow.proprio_dim,))
            config.input_features = {**images, STATE: state}
        if not config.output_features:
            actions = (self.model.cfg.flow.action_dim,)
            config.output_features = {ACTION: PolicyFeature(FeatureType.ACTION, actions)}
        repeated = torch.full((self.model.cfg.flow.action_dim,), bool(about.get("absolute", False)))
        repeated[[*self.model.normalizer.gripper_dims, *(about.get("held_dims") or ())]] = True
        self.register_buffer("repeated", repeated, persistent=False)  # see `padded_actions`
        for vit in self.model.vlm.vits:
            vit.freeze_unread()
        if config.train == "head":
            self.model.requires_grad_(False).head.requires_grad_(True)
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: VlarftConfig | None = None,
        dataset_stats: Mapping[str, Mapping[str, Any]] | None = None,
        dataset_meta: Any = None,
        strict: bool = True,
        **hub: Any,
    ) -> VlarftPolicy:
        """Load a policy, in eval mode.

        Args:
            pretrained_name_or_path: run folder or model.safetensors of vlarft, folder that `save_pretrained` wrote, or
                repository of the Hub with such files.
            config: None = that of the folder's config.json, if it is lerobot's, else the defaults.
            dataset_stats, dataset_meta: see the class.
            strict: weights that do not fit are an error in any case.
            hub: options of hf_hub_download: revision, cache_dir, local_files_only, ...

        Raises:
            FileNotFoundError: no such folder, file or repository.
            ValueError: see the class.
        """
        file = _weights_file(pretrained_name_or_path, hub)
        if config is None:
            place = file.with_name("config.json")  # of a vlarft run: the script's options, without a type
            stored = json.loads(place.read_text()) if place.is_file() else {}
            config = PreTrainedConfig.from_pretrained(file.parent) if "type" in stored else VlarftConfig()
            if not isinstance(config, VlarftConfig):
                raise ValueError(f"{place} is of a policy of type {config.type}, expected vlarft")
        return cls(config, dataset_stats, dataset_meta, checkpoint=file).eval()

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write config.json (lerobot's) and model.safetensors (vlarft's); `state_dict`: whole sharded tensors."""
        replace(self.config, checkpoint=None, size=None, pretrained_path=None)._save_pretrained(save_directory)
        weights = None if state_dict is None else {k.removeprefix("model."): v for k, v in state_dict.items()}
        self.model.save(Path(save_directory) / "model.safetensors", self.facts, weights)

    @property
    def _cameras(self) -> tuple[str, ...]:
        return self.model.cfg.cameras

    def get_optim_params(self) -> list[dict[str, Any]]:
        """Return the trained parameters in two groups: weight decay on matrices only, as in train_sft.py."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def reset(self) -> None:
        """Forget the rest of the chunk; called when episodes begin."""
        self._queue: deque[Tensor] = deque()

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """Compute the flow-matching loss, Eq. (4), of a batch of lerobot's data loader.

        Args:
            batch: see batches.py; actions raw, (B, T, A).
            reduction: "mean" over B, T, A; lerobot's weights per sample are not supported.

        Returns:
            The scalar loss and {"flow_mse"}.

        Raises:
            ValueError: an entry is missing or has another shape; another reduction.
        """
        if reduction != "mean":
            raise ValueError(f"reduction {reduction!r}: the loss is a mean; leave out lerobot's sample weighting")
        actions = padded_actions(batch, self.repeated, self.model.cfg.flow.chunk)
        state, tasks = state_and_tasks(batch)
        images = [self.model.preprocess(x) for x in images_of(batch, self._cameras).values()]  # (B, 1, 3, S, S) each
        loss, metrics = self.model(torch.cat(images, dim=1), tasks, state, actions)
        return loss, {name: float(value) for name, value in metrics.items()}

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], noise: Tensor | None = None, **_: Any) -> Tensor:
        """Compute the chunks that `VLAPolicy.act` gives for these observations.

        Args:
            batch: see batches.py.
            noise: (B, T, A), x_0; None = as `config.noise` says, sampled from torch's generator.

        Returns:
            (B, T, A) raw actions, float32: grippers -1 open or +1 close.

        Raises:
            ValueError: an entry is missing or has another shape.
        """
        seen = observations(batch, self._cameras)
        if noise is None:
            noise = self.model.initial_noise(self.config.noise, len(seen))
        return self.model.act(seen, noise=noise, num_steps=self.config.num_flow_steps)

    def select_action(self, batch: dict[str, Any], noise: Tensor | None = None, **_: Any) -> Tensor:
        """Return the next actions (B, A) of the chunk, which is made anew every `n_action_steps` calls.

        Raises:
            ValueError: see `predict_action_chunk`; or another B than that of the chunk, without a `reset` between.
        """
        if not self._queue:
            chunk = self.predict_action_chunk(batch, noise)[:, : self.config.n_action_steps]  # (B, T, A)
            self._queue.extend(chunk.unbind(1))
        rows = len(state_and_tasks(batch)[0])
        if len(self._queue[0]) != rows:
            raise ValueError(
                f"batch: {rows} observations, the chunk in play is of {len(self._queue[0])}: call reset() when "
                "episodes begin"
            )
        return self._queue.popleft()


def _weights_file(place: str | Path, hub: dict[str, Any]) -> Path:
    """Return model.safetensors of a folder, a file or a repository of the Hub, whose config.json comes along."""
    if Path(place).exists():
        return checkpoint_file(place)
    try:
        with contextlib.suppress(EntryNotFoundError):  # weights alone are enough
            hf_hub_download(str(place), "config.json", **hub)
        return Path(hf_hub_download(str(place), "model.safetensors", **hub))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"no vlarft policy at {place}: neither a run folder, nor a model.safetensors, nor a repository of the Hub "
            f"with one ({error})"
        ) from error


def _about(dataset_meta: Any) -> dict[str, Any]:
    """Return what vlarft's label in meta/info.json says of the actions, {} without one; see data/lerobot.py."""
    return {} if dataset_meta is None else read_info(Path(dataset_meta.root)).get("vlarft") or {}


def _new_model(
    config: VlarftConfig, stats: Mapping[str, Mapping[str, Any]] | None, meta: Any, about: dict[str, Any]
) -> VLAPolicy:
    """Make a policy of a named size for the data set's robot, its quantiles from the data set's statistics."""
    if stats is None or meta is None:
        raise ValueError(
            f"policy.size {config.size} makes a new policy for lerobot-train; else give --policy.checkpoint"
        )
    for key in (ACTION, STATE):
        if missing := [q for q in ("q01", "q99") if q not in stats.get(key, {})]:
            raise ValueError(
                f"{meta.root}: meta/stats.json has no {' and '.join(missing)} of {key}, the ranges that the policy "
                "needs: compute them anew with lerobot, or convert the data set with python -m vlarft.data.convert"
            )
    sizes, width = PRESETS[config.size], config.action_feature.shape[0]
    grippers, _ = read_grippers(about, meta.features[ACTION], width, Path(meta.root) / "meta" / "info.json")
    cameras = tuple(key.rpartition(".")[2] for key in config.image_features)
    flow = replace(sizes.flow, action_dim=width, proprio_dim=config.robot_state_feature.shape[0])
    vlm = replace(sizes.vlm, num_cameras=len(cameras))
    model = VLAPolicy(replace(sizes, vlm=vlm, flow=flow, cameras=cameras, gripper_dims=grippers))
    actions, state = ({k: torch.as_tensor(v) for k, v in stats[key].items()} for key in (ACTION, STATE))
    motion = model.normalizer.motion
    ranges = actions["q01"][motion], actions["q99"][motion], state["q01"], state["q99"]
    model.normalizer.set_quantiles(*(x.float() for x in ranges))
    return model


def _check_grippers(model: VLAPolicy, stats: Mapping[str, Mapping[str, Any]], meta: Any, about: dict[str, Any]) -> None:
    """Refuse data whose grippers are other dimensions than the policy's, or no commands of -1 and +1."""
    width, place = model.cfg.flow.action_dim, Path(meta.root) / "meta" / "info.json"
    ours, theirs = model.normalizer.gripper_dims, read_grippers(about, meta.features[ACTION], width, place)[0]
    if theirs is not None and list(theirs) != list(ours):
        raise ValueError(f"{place} has the gripper dimensions {list(theirs)}, the policy {list(ours)}: another robot")
    actions = {k: torch.as_tensor(v) for k, v in stats.get(ACTION, {}).items()}
    for i in ours if {"mean", "std", "min", "max"} <= set(actions) else ():
        square = float(actions["mean"][i] ** 2 + actions["std"][i] ** 2)  # the mean square: 1 if all are -1 or +1
        if not (actions["min"][i] >= -1.001 and actions["max"][i] <= 1.001 and square > 0.73):
            raise ValueError(
                f"{place}: the gripper (action dimension {i}) lies in [{float(actions['min'][i]):.3g}, "
                f"{float(actions['max'][i]):.3g}], expected the commands -1 (open) and +1 (close): convert the data "
                "set with python -m vlarft.data.convert --gripper OPEN CLOSED, or say what it is with --held-dims"
            )


def _check_robot(model: VLAPolicy, config: VlarftConfig, checkpoint: str | Path | None) -> None:
    """Compare the features of lerobot's data set or environment, where they are known, with the policy's."""
    flow, where = model.cfg.flow, checkpoint or "the new policy"
    if flow.chunk != config.chunk_size:
        raise ValueError(f"policy.chunk_size is {config.chunk_size}, {where} has chunks of {flow.chunk} steps")
    for name, feature, width in (
        (STATE, config.robot_state_feature, flow.proprio_dim),
        (ACTION, config.action_feature, flow.action_dim),
    ):
        if feature is not None and tuple(feature.shape) != (width,):
            raise ValueError(f"{name} has shape {tuple(feature.shape)}, {where} takes ({width},): another robot's?")
    if config.input_features:
        camera_keys(model.cfg.cameras, config.input_features)


def _image_sizes(cameras: tuple[str, ...], config: VlarftConfig, meta: Any) -> dict[str, list[int]]:
    """Return key -> [height, width] of the cameras' images in the data set; without one, in the configuration."""
    # the configuration may be that of an earlier training
    features = (config.input_features or {}) if meta is None else dataset_to_policy_features(meta.features)
    sizes = {key: list(feature.shape[1:]) for key, feature in features.items() if key.startswith(IMAGES)}
    with contextlib.suppress(ValueError):  # of other names, which --rename_map translates: all images
        return {key: sizes[key] for key in camera_keys(cameras, sizes).values()}
    return sizes


def _warn_other_size(trained: list[int] | None, sizes: dict[str, list[int]], checkpoint: str | Path | None) -> None:
    """Warn where lerobot's images are not of the size (height, width) that the policy was trained on."""
    for key, size in sizes.items():
        if trained and size != trained:
            warnings.warn(
                f"{key} is of {'x'.join(map(str, size))} pixels, {checkpoint} was trained on images of "
                f"{'x'.join(map(str, trained))}: resized ones look different (--env.image_size)",
                stacklevel=3,
            )


def _check_units(model: VLAPolicy, stats: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse data whose medians, or means where they have none, lie outside the policy's quantiles: half of the values
    would be clipped. Refuse data that move in a dimension that is constant by the policy's quantiles, too.
    """
    scale = model.normalizer
    for key, low, high, dims in (
        (ACTION, scale.action_low, scale.action_high, scale.motion.tolist()),
        (STATE, scale.proprio_low, scale.proprio_high, range(len(scale.proprio_low))),
    ):
        for i, a, b in zip(dims, low.tolist(), high.tolist(), strict=True):
            middle = next((n for n in ("q50", "mean") if n in stats.get(key, {})), None)
            if middle is None:
                raise ValueError(f"{key}: the data set's statistics have neither q50 nor mean, which tell its units")
            value, name = float(stats[key][middle][i]), {"q50": "median"}.get(middle, middle)
            ends = [torch.as_tensor(stats[key][q][i]).float() for q in ("q01", "q99") if q in stats[key]]
            if b - a < 1e-6 and ends and float(ends[-1] - ends[0]) >= 1e-6:
                raise ValueError(
                    f"{key}: dimension {i} moves in the data set and is always {a:.3g} by the policy's quantiles, so "
                    "that the policy leaves it out: another robot, or other units"
                )
            if b - a >= 1e-6 and not a - 1e-4 <= value <= b + 1e-4:
                raise ValueError(
                    f"{key}: the data set's {name} of dimension {i}, {value:.3g}, lies outside [{a:.3g}, {b:.3g}], "
                    "the policy's 1 % and 99 % quantiles: another robot, or other units"
                )
