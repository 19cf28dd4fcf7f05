"""Robot state in imagination: a small network predicts the proprio after each action. Not in the paper.

A world model imagines frames, but a policy that acts in them for a whole episode also reads its proprio; and where the
hand is tells a world model more than the last action does. This network adds up the robot's motion,
x_t+1 = x_t + f(x_t, x_t - x_t-1, a_t); the last motion stands for the velocity. It is fitted to recorded episodes
within a minute, and is a part of the world model. It does not see the scene: what the robot bumps into or holds shows
in the frames only.

Shapes: B rows, T steps, P proprio dim, A action dim.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlarft.data.episode import Episode, RobotState
from vlarft.run.random import numpy_generator, seed_of


class ProprioModel(nn.Module):
    """Two hidden layers on standardised proprio, last motion and action.

    Args:
        proprio_dim, action_dim: P and A.
        hidden: width.
    """

    def __init__(self, proprio_dim: int, action_dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2 * proprio_dim + action_dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, proprio_dim),
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)
        for name, size in (("proprio", proprio_dim), ("motion", proprio_dim), ("action", action_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def forward(self, proprio: Tensor, motion: Tensor, action: Tensor) -> Tensor:
        """Predict the next motion (B, P) from proprio (B, P), the last motion (B, P) and the action (B, A), all raw."""
        parts = [
            (value - getattr(self, f"{name}_mean")) / getattr(self, f"{name}_std")
            for name, value in (("proprio", proprio), ("motion", motion), ("action", action))
        ]
        return self.motion_mean + self.motion_std * self.net(torch.cat(parts, dim=1))

    def rollout(self, state: RobotState, actions: Tensor) -> tuple[Tensor, RobotState]:
        """Predict the proprio after each of several actions.

        Args:
            state: of B robots, before the first action.
            actions: (B, T, A), raw.

        Returns:
            Proprio (B, T, P) after every action, and the state after the last.
        """
        (proprio, motion), after = state, []
        for action in actions.unbind(1):
            motion = self(proprio, motion, action)
            proprio = proprio + motion
            after.append(proprio)
        return torch.stack(after, dim=1), RobotState(proprio, motion)


def fit_proprio_model(
    episodes: Sequence[Episode], seed: int, *, steps: int = 1500, horizon: int = 8, batch_size: int = 256
) -> ProprioModel:
    """Fit a proprio model to recorded episodes, each of which is taken to begin at rest: the error over `horizon` steps
    that follow one another.

    Args:
        episodes: of one robot.
        seed: seed of the weights and the batches.
        steps, batch_size: of AdamW.
        horizon: steps that are added up in the loss, fewer if all episodes are shorter; others are left out.

    Returns:
        The model, in eval mode, on the CPU.

    Raises:
        ValueError: no episode has three steps.
    """
    horizon = min(horizon, max(map(len, episodes), default=0) - 2)
    if horizon < 1:
        raise ValueError("no episode has three steps: too short to learn how the robot moves")
    long_enough = [e for e in episodes if len(e) > horizon + 1]
    torch.manual_seed(seed_of("proprio model", seed))
    model = ProprioModel(long_enough[0].proprio.shape[1], long_enough[0].actions.shape[1])
    motions = np.concatenate([np.diff(e.proprio, axis=0) for e in long_enough])
    columns = {
        "proprio": np.concatenate([e.proprio for e in long_enough]),
        "motion": motions,
        "action": np.concatenate([e.actions for e in long_enough]),
    }
    for name, values in columns.items():
        getattr(model, f"{name}_mean").copy_(torch.from_numpy(values.mean(0)))
        getattr(model, f"{name}_std").copy_(torch.from_numpy(values.std(0)).clamp_min(1e-4))
    paths = [np.concatenate([e.proprio[:1], e.proprio]) for e in long_enough]  # an episode begins at rest
    starts = [(i, t) for i, e in enumerate(long_enough) for t in range(len(e) - horizon)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        rng = numpy_generator("proprio batch", seed, step)
        rows = [starts[k] for k in rng.integers(len(starts), size=batch_size)]
        proprio = torch.from_numpy(np.stack([paths[i][t : t + horizon + 2] for i, t in rows]))
        actions = torch.from_numpy(np.stack([long_enough[i].actions[t : t + horizon] for i, t in rows]))
        # a quarter starts without the last motion, as where it is not known
        motion = (proprio[:, 1] - proprio[:, 0]) * torch.from_numpy(rng.random((batch_size, 1)) > 0.25)
        predicted, _ = model.rollout(RobotState(proprio[:, 1], motion), actions)
        loss = F.smooth_l1_loss(predicted / model.motion_std, proprio[:, 2:] / model.motion_std)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)
