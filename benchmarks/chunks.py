"""How good a deterministic policy's chunks are at held-out starts: a much finer measure than success."""

import json
from pathlib import Path
from statistics import mean

import torch

from vlarft.checkpoint import load_model, write_json
from vlarft.data import WindowSampler, load_episodes
from vlarft.flow import sample_ode
from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.sim.replay import SimulatorReward


def measure(path: Path, policy: Path, demos: str | Path, starts: int, draws: int) -> dict[str, list[float]]:
    """The chunks of a policy against the demonstrations', the same starts and x_0 for all policies.

    Args:
        path: JSON file of the result, which is read where it exists.
        policy: checkpoint, whose held-out episodes give the starts.
        demos: Tabletop demonstrations with states.
        starts: how many.
        draws: chunks that the policy samples at each of them.

    Returns:
        Per start: the state error of the chunks from x_0s that are "sampled" and from "zero" [m], what every verified
        reward stands for; and the "spread", the standard deviation of the former chunks' translations [normalised
        units].
    """
    if not path.is_file():
        model, extra = load_model(policy, VLAPolicy, PolicyConfig)
        episodes = load_episodes(str(demos), names=extra["validation_episodes"], with_states=True)
        batch = WindowSampler(episodes, 9, 8).spread(starts)
        simulator, found = SimulatorReward(episodes), {}
        with torch.no_grad():
            context = model.encode(model.preprocess(batch.frames[:, 0]), batch.instructions)
            for name, count in (("sampled", draws), ("zero", 1)):
                cond = model.condition(context, batch.proprio).repeat(count)
                noise = torch.randn((cond.num_rows, 8, 7), generator=torch.Generator().manual_seed(0))
                noise = noise * float(name == "sampled")
                x = sample_ode(model.head, cond, noise=noise, num_steps=model.cfg.flow.num_steps)
                x = x.unflatten(0, (-1, count))  # (S, D, T, A)
                chunks = model.normalizer.decode_actions(x)
                found[name] = (-simulator(batch.index, chunks, batch.intended).mean((1, 2))).tolist()
                if name == "sampled":
                    found["spread"] = x[..., :3].std(1).mean((1, 2)).tolist()
        write_json(path, found)
    return json.loads(path.read_text())


def difference(before: list[float], after: list[float]) -> dict[str, float]:
    """Mean difference of what was measured at the same starts, its standard error, and the mean before."""
    change = torch.tensor(after) - torch.tensor(before)
    error = change.std().item() / len(change) ** 0.5
    return {"mean": change.mean().item(), "standard_error": error, "starts": len(change), "before": mean(before)}
