"""Within a group: does imagination tell which of several episodes from one start succeed?

    python studies/imagined_groups.py --policy runs/sft --demos demos own --world-model runs/wm2 \\
        --success-model runs/success

The gate of closed-loop learning compares episodes of many starts. A policy gradient compares episodes of one start,
which differ by the noise of the flow alone: some millimetres where the fingers close. So groups are played as
train_rl.py plays them, from the first frames of recorded attempts that neither world model nor success model has seen,
and each episode's actions are then played in the simulator from the same state. Said of the groups of which
imagination has both outcomes, which are those that teach:

- within groups: correlation of imagined and true outcomes, both without their group's mean. At 1 it would be the
  simulator's own gradient; at 0 imagination teaches nothing, and below 0 the contrary.
- the judge on true frames: the same of the success model's verdict where the world model has no part.
- between starts: correlation of the mean outcomes of all groups.

With 95 % intervals (bootstrap over starts). Writes a JSON file with outcomes start by start, one string of 0 and 1
(success) for each group, and beside it pictures of imagined successes, those that are true and those that are not:
true frames above imagined ones.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from records import write
from stage_tables import groups_table
from stages import commit, machine
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the stage scripts are, which are no package

import train_rl
from vlarft.closed_loop import Answer, play
from vlarft.data import load_episodes
from vlarft.data.episode import Episode
from vlarft.imagined_world import ImaginedWorld
from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.run.checkpoint import load_model, read_header
from vlarft.run.config import opt, parse, to_dict
from vlarft.run.pictures import grid, save_png
from vlarft.run.precision import in_bf16
from vlarft.run.random import generator
from vlarft.sim.simulated_world import Place, environment
from vlarft.success import SuccessModel

SHOWN, EVERY = 4, 6  # episodes of a picture, steps between its frames


@dataclass(frozen=True)
class Config:
    policy: str = opt("runs/sft", "policy whose episodes are imagined: run folder or file")
    demos: tuple[str, ...] = opt(("demos", "own"), "folders with its recorded attempts, of Tabletop")
    world_model: str = opt("runs/wm2", "world model: run folder or file")
    success_model: str = opt("runs/success", "success model: run folder or file")
    all_episodes: bool = opt(False, "start from all attempts of --demos, which neither model must have seen")
    starts: int = opt(64, "starts, of held-out attempts of a policy, at most")
    group: int = opt(8, "episodes from each start")
    out: str = opt("runs/imagined_groups.json", "JSON file to write")
    stage_preset: str = opt("tiny", "preset of train_rl.py")


PRESETS = {"paper": Config(), "smoke": Config(starts=4, group=2, stage_preset="smoke")}


class Watched:
    """A world of imagination that keeps what was done and seen in it.

    actions: of each episode, the raw actions that were played
    frames: of each episode, the imagined frames after them
    """

    def __init__(self, world: ImaginedWorld) -> None:
        self.world, rollout = world, world.model.rollout

        def kept(*args: object, **options: object) -> object:
            self.rollout = rollout(*args, **options)
            return self.rollout

        world.model.rollout = kept  # the world shows its policy the last frame only

    @property
    def names(self) -> Sequence[str]:
        return self.world.names

    def begin(self, group: int, *numbers: int) -> list[dict]:
        observations = self.world.begin(group, *numbers)
        self.actions, self.frames = ([[] for _ in observations] for _ in range(2))
        return observations

    def step(self, episodes: Sequence[int], actions: Tensor) -> Answer:
        answer = self.world.step(episodes, actions)
        frames = self.rollout.frames.flatten(0, 1).float()  # (E, T, C, H, W)
        for row, (episode, steps) in enumerate(zip(episodes, answer.steps.tolist(), strict=True)):
            self.actions[episode] += list(actions[row, :steps].numpy())
            self.frames[episode] += list(frames[episode, :steps])
        return answer

    def close(self) -> None:
        self.world.close()


def held_out_attempts(cfg: Config) -> list[Episode]:
    """Recorded attempts of a policy that neither model was trained on, with their simulator states.

    Raises:
        ValueError: there are none.
    """
    judge, model = (read_header(path).extra for path in (cfg.success_model, cfg.world_model))
    unseen = set(judge.get("held_out_episodes", [])) - set(model.get("train_episodes", []))
    episodes = load_episodes(cfg.demos, successes_only=False, with_states=True)
    if not (found := [e for e in episodes if e.kind == "policy" and (cfg.all_episodes or e.name in unseen)]):
        raise ValueError(f"none of the {len(episodes)} episodes of {' '.join(cfg.demos)} is a held-out attempt")
    return found


def true_episode(episode: Episode, actions: Sequence[np.ndarray], more: int) -> tuple[bool, list[np.ndarray]]:
    """Play actions in the simulator from the episode's first state, and the last one `more` times, unless it succeeds
    before: whether it does, and its frames.
    """
    suite, task = (episode.env_args[name] for name in ("suite", "task"))
    env = environment(Place(suite, task, episode.images.shape[1], ("agentview",)))
    env.set_state(episode.states[0])
    success, frames = False, []
    for number, action in enumerate([*actions, *[actions[-1]] * more]):
        if success and number >= len(actions):
            break
        success |= env.step(action).success
        frames.append(env.observe()[env.cameras[0]])
    return success, frames


def draw(path: Path, shown: Sequence[tuple[list[np.ndarray], list[Tensor]]]) -> None:
    """PNG of up to `SHOWN` episodes, given as true and imagined frames: every sixth, and the last ones once more."""
    rows = []
    for true, imagined in shown[:SHOWN]:
        longest = max(len(true), len(imagined))
        at = [*range(0, longest, EVERY), longest - 1]
        real = [torch.from_numpy(frame).movedim(-1, 0) / 255 for frame in true]
        rows += [[frames[min(t, len(frames) - 1)] for t in at] for frames in (real, [f.clamp(0, 1) for f in imagined])]
    if rows:
        width = max(map(len, rows))
        save_png(
            path, grid([row + row[-1:] * (width - len(row)) for row in rows], ["true", "imagined"] * (len(rows) // 2))
        )


@torch.no_grad()
def main(cfg: Config) -> dict:
    """Measure; return what the JSON file holds."""
    device = torch.device("cpu")
    given = {name: getattr(cfg, name) for name in ("policy", "demos", "world_model", "success_model")}
    preset = train_rl.PRESETS[cfg.stage_preset]
    rl = replace(preset, **given, world="imagination", starts=cfg.starts, group=cfg.group)
    policy, extra = load_model(cfg.policy, VLAPolicy, PolicyConfig, device)
    world = train_rl.imagined_world(rl, policy, extra, episodes := held_out_attempts(cfg))
    world.episodes = episodes
    train_rl.make_trainable(rl, policy)
    watched, noise = Watched(world), partial(generator, device, "episode chains", 0, 0)
    options = {"from_zero": rl.noise == "zero", "bf16": in_bf16(rl.precision, device)}
    attempts = play(policy, watched, cfg.group, (0, 0), noise, **options)

    judge, by_name = SuccessModel.load(cfg.success_model), {e.name: e for e in episodes}
    rows, films = {}, {True: [], False: []}  # by start: three outcomes of each of its episodes
    for number, name in enumerate(watched.names):
        if name in rows:
            continue  # starts are chosen at random, some of them twice
        episode, rows[name] = by_name[name], []
        first = torch.from_numpy(np.ascontiguousarray(episode.images[0])).movedim(-1, 0) / 255
        for member in range(cfg.group):
            imagined, at = bool(attempts.success[number, member]), number * cfg.group + member
            true, frames = true_episode(episode, watched.actions[at], judge.cfg.hold)
            seen = torch.stack([first, *(torch.from_numpy(f).movedim(-1, 0) / 255 for f in frames)])
            judged = judge.highest(seen, episode.instruction) >= judge.cfg.threshold
            rows[name].append((imagined, true, judged))
            if imagined:
                films[true].append((frames, watched.frames[at]))
    outcomes = torch.tensor(list(rows.values())).movedim(-1, 0)  # (3, S, G)
    report = {
        "command": "python studies/imagined_groups.py",
        "machine": machine(),
        "commit": commit(),
        "settings": to_dict(cfg),
        "outcomes": {
            name: ["".join(str(int(won)) for won in row) for row in values.tolist()]
            for name, values in zip(("imagined", "true", "judged"), outcomes)
        },
    }
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, report)
    for true_one, shown in films.items():
        draw(out.with_name(f"{out.stem}_{'true' if true_one else 'false'}_successes.png"), shown)
    print("\n" + groups_table({cfg.world_model: report}))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
