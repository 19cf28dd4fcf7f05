"""Among attempts of one start, does the judge rank those that succeed first, and which link loses that?

    python collect_demos.py --preset tiny --demos-per-task 0 --noisy-per-task 0 --policy runs/sft \\
        --policy-per-task 128 --policy-group 8 --horizon 56 --seed 900000 --out-dir groups
    python studies/group_ranking.py --demos groups --world-model runs/wm2 --success-model runs/success

The gate of closed-loop learning compares episodes of many starts. A policy gradient compares episodes of one start,
which differ by the noise of the flow alone: some millimetres where the fingers close. So attempts are recorded in
groups, from starts of their own (another `--seed` than what the models were trained on), and each is judged by the
largest probability of success that it holds (success.py), whatever the threshold. It is judged on

- its recorded frames: what the judge itself loses;
- these frames encoded and decoded: what the tokenizer loses;
- its imagination, with the poses that were recorded and with those that the robot model predicts, where poses drive
  the frames: what the world model loses. The last is what train_rl.py learns from, but that the actions here answer
  recorded frames.

Of all pairs of a success and a failure of one start: the share in which the success is judged higher, 1/2 by chance,
with a 95 % interval (bootstrap over starts). Writes a JSON file with the judgements, and beside it pictures of failures
that were judged high and of successes that were judged low in imagination: recorded frames above imagined ones.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from records import rounded, write
from stage_tables import ranking_table
from stages import commit, machine
from torch import Tensor

from vlarft.data import load_episodes
from vlarft.data.consistency import check_outcomes
from vlarft.data.convention import image_convention
from vlarft.data.episode import Episode
from vlarft.imagined_episodes import imagined_episodes
from vlarft.run.config import opt, parse, to_dict
from vlarft.run.pictures import grid, save_png
from vlarft.run.precision import in_bf16
from vlarft.success import SuccessModel, check_judge
from vlarft.success_frames import decoded, to_uint8
from vlarft.world_model import WorldModel

SHOWN, EVERY = 4, 6  # episodes of a picture, steps between its frames
IMAGINED = "imagined"


@dataclass(frozen=True)
class Config:
    demos: tuple[str, ...] = opt(("groups",), "folders with a policy's attempts in groups")
    world_model: str = opt("runs/wm2", "world model: run folder or file")
    success_model: str = opt("runs/success", "success model: run folder or file")
    starts: int = opt(64, "starts with both outcomes to judge, at most, evenly spaced over the tasks")
    out: str = opt("runs/group_ranking.json", "JSON file to write")


PRESETS = {"paper": Config(), "smoke": Config(starts=2)}


def mixed_groups(cfg: Config) -> list[list[Episode]]:
    """Load attempts by start, of the starts that have both outcomes.

    Raises:
        ValueError: there are none, or an attempt does not say its outcome.
    """
    attempts = [e for e in load_episodes(cfg.demos, successes_only=False) if e.kind == "policy" and e.start]
    check_outcomes(attempts, " ".join(cfg.demos))
    groups: dict[str, list[Episode]] = {}
    for episode in attempts:
        groups.setdefault(episode.start, []).append(episode)
    mixed = [group for group in groups.values() if 0 < sum(e.success for e in group) < len(group)]
    if not mixed:
        raise ValueError(
            f"{' '.join(cfg.demos)}: none of {len(groups)} starts has a success and a failure: record attempts in "
            "groups (collect_demos.py --policy-group 8)"
        )
    picks = np.linspace(0, len(mixed) - 1, min(cfg.starts, len(mixed))).round().astype(int)
    return [mixed[i] for i in picks]


def versions(model: WorldModel, episodes: Sequence[Episode]) -> Iterator[tuple[str, Episode, Tensor]]:
    """Yield kinds of frames, episodes and their frames (L, C, H, W) in [0, 1]."""
    for episode in episodes:
        frames = torch.from_numpy(episode.images[:].copy()).movedim(-1, 1)  # (L, C, H, W)
        yield "recorded", episode, frames.float() / 255
        yield "decoded", episode, decoded(model, frames)
    kinds = {"imagined, recorded poses": True, IMAGINED: False} if model.cfg.pose_dims else {IMAGINED: True}
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=in_bf16("auto", torch.device("cpu")))
    for kind, recorded in kinds.items():
        for one in imagined_episodes(model, episodes, autocast=autocast, greedy=True, recorded_poses=recorded):
            yield kind, one.episode, one.imagined.float()


def draw(path: Path, shown: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write a PNG of up to `SHOWN` pairs of recorded and imagined frames (L, C, H, W), uint8: every sixth, and the
    last.
    """
    rows = []
    for pair in shown[:SHOWN]:
        at = [*range(0, len(pair[0]), EVERY), len(pair[0]) - 1]
        rows += [[frames[t] / 255 for t in at] for frames in pair]
    if rows:
        width = max(map(len, rows))
        titles = ["recorded", "imagined"] * (len(rows) // 2)
        save_png(path, grid([row + row[-1:] * (width - len(row)) for row in rows], titles))


@torch.no_grad()
def main(cfg: Config) -> dict:
    """Measure; return what the JSON file holds."""
    groups = mixed_groups(cfg)
    model, judge = WorldModel.load(cfg.world_model), SuccessModel.load(cfg.success_model)
    texts, size = [group[0].instruction for group in groups], model.cfg.tokenizer.image_size[0]
    images = image_convention([episode for group in groups for episode in group], "agentview")
    check_judge(cfg.success_model, texts, images, " ".join(cfg.demos), size, cfg.world_model)
    scores: dict[str, dict[str, float]] = {}  # kind of frames -> episode -> largest probability held
    frames: dict[str, dict[str, Tensor]] = {}
    for kind, episode, seen in versions(model.requires_grad_(False), [e for group in groups for e in group]):
        scores.setdefault(kind, {})[episode.name] = judge.highest(seen, episode.instruction)
        if kind in ("recorded", IMAGINED):
            frames.setdefault(kind, {})[episode.name] = to_uint8(seen)
    report = {
        "command": "python studies/group_ranking.py",
        "machine": machine(),
        "commit": commit(),
        "settings": to_dict(cfg),
        "outcomes": ["".join(str(int(e.success)) for e in group) for group in groups],
        "judged": rounded({kind: [[of[e.name] for e in group] for group in groups] for kind, of in scores.items()}),
    }
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, report)
    last = scores[IMAGINED]
    for success, name in ((False, "failures_judged_high"), (True, "successes_judged_low")):
        found = [e for group in groups for e in group if e.success == success]
        found.sort(key=lambda e: last[e.name], reverse=not success)
        draw(
            out.with_name(f"{out.stem}_{name}.png"),
            [(frames["recorded"][e.name], frames[IMAGINED][e.name]) for e in found],
        )
    print("\n" + ranking_table({cfg.world_model: report}))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
