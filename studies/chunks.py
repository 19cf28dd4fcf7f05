"""How good a deterministic policy's chunks are at held-out starts: a much finer measure than success."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from simulator_reward import SimulatorReward

from vlarft.data import WindowSampler, load_episodes
from vlarft.flow import sample_ode
from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.run.checkpoint import load_model, write_json

# which dimensions of x_0 are sampled; the last is the gripper
NOISE_DIMS = {"sampled": torch.ones(7), "zero": torch.zeros(7), "gripper": torch.eye(7)[6]}


def measure(
    path: Path, policy: Path, demos: str | Path, starts: int, draws: int, x0s: Sequence[str] = ("sampled", "zero")
) -> dict[str, list[float]]:
    """Measure the chunks of a policy against the demonstrations', with the same starts and x_0 for all policies.

    Args:
        path: JSON file of the result: what is there is read, what is missing is added.
        policy: checkpoint, whose held-out episodes give the starts.
        demos: Tabletop demonstrations with states.
        starts: how many.
        draws: chunks that the policy samples at each of them.
        x0s: where the flow starts, as `eval_libero.py --noise` names it.

    Returns:
        Per start: the true error of the chunks from x_0 of each kind [m], which every verified reward approximates;
        and "std", the standard deviation over the sampled x_0 of the chunks' translations [normalised units].
    """
    found = json.loads(path.read_text()) if path.is_file() else {}
    if missing := [x0 for x0 in x0s if x0 not in found]:
        model, extra = load_model(policy, VLAPolicy, PolicyConfig)
        episodes = load_episodes(str(demos), names=extra["held_out_episodes"], with_states=True)
        batch = WindowSampler(episodes, 9, 8).spread(starts)
        simulator = SimulatorReward(episodes)
        with torch.no_grad():
            context = model.encode_frames(batch.frames[:, 0], batch.instructions)
            for x0 in missing:
                count = 1 if x0 == "zero" else draws
                cond = model.condition(context, batch.proprio).repeat(count)
                noise = torch.randn((cond.num_rows, 8, 7), generator=torch.Generator().manual_seed(0))
                noise = noise * NOISE_DIMS[x0]
                x = sample_ode(model.head, cond, noise=noise, num_steps=model.cfg.flow.num_steps)
                x = x.unflatten(0, (-1, count))  # (S, D, T, A)
                chunks = model.normalizer.decode_actions(x)
                found[x0] = (-simulator(batch, chunks).mean((1, 2))).tolist()
                if x0 == "sampled":
                    found["std"] = x[..., :3].std(1).mean((1, 2)).tolist()
        write_json(path, found)
    return found


def difference(before: list[float], after: list[float]) -> dict[str, float]:
    """Compute the mean difference of two policies at the same starts, its standard error, and the mean of the first."""
    change = torch.tensor(after) - torch.tensor(before)
    error = change.std().item() / len(change) ** 0.5
    return {"mean": change.mean().item(), "standard_error": error, "starts": len(change), "before": mean(before)}
