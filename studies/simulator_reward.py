"""The simulator's true error as a reward: what a verified reward approximates.

It costs what the method exists to save, a simulator that can be set to any recorded state, and tells how much of a
result is due to the world model.

    train_rft.main(cfg, score=SimulatorReward(load_episodes(demos, names=train_episodes, with_states=True)))
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlarft.data import Batch
from vlarft.data.episodes import Episode
from vlarft.sim.replay import TabletopOutcomes


class SimulatorReward:
    """A scorer (`vlarft.reward.Scorer`): negative state error to what the demonstration's actions do.

    Args:
        episodes: of Tabletop, with states; those that the batches' `index` counts.
        outcomes: simulators to share.
    """

    def __init__(self, episodes: Sequence[Episode], outcomes: TabletopOutcomes | None = None) -> None:
        self.episodes, self.outcomes = episodes, outcomes or TabletopOutcomes()

    def __call__(self, batch: Batch, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Score raw actions (S, G, T, A): (S, G, T) float32 [m]."""
        chunks = torch.cat([batch.intended[:, None], actions], 1).cpu().numpy()  # the reference first
        errors = [
            self.outcomes.state_error(self.episodes[episode], step, rows)[1:]
            for (episode, step), rows in zip(batch.index.tolist(), chunks, strict=True)
        ]
        return -torch.stack(errors).float().to(actions.device)
