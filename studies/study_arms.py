"""The arms of `rft_study.py`: flags of `train_rft.py`, and of `train_sft.py` for the controls."""

import re
from collections.abc import Sequence

HELD = ["--mse-weight", 1]  # what docs/study.md found from the plateau; per step, the policy's term is 8 times smaller
PER_STEP = ["--credit", "frame", "--ratio-per", "step"]
AVERAGED = ["--ema", 0.97]  # over some 30 steps
STEADY = ["--noisy-dims", *range(6), *AVERAGED]  # the gripper, open or closed, takes no noise and has no log-prob
WHOLE = ["--vlm-lr", 1e-4, *AVERAGED]  # as the head's
RFT_ARMS = {
    "RWR": ["--algorithm", "rwr", *HELD],
    "RFT R1": ["--reward", "r1", *HELD],
    "RFT R2": ["--reward", "r2", *HELD],
    "RFT R3": ["--reward", "r3", *HELD],
    "RFT R1 per step": ["--reward", "r1", *PER_STEP],
    "RFT divergence": ["--reward", "divergence", *PER_STEP],
    "RFT R1 per step, 400 steps": ["--reward", "r1", *PER_STEP, "--steps", 400],  # the paper's number
    "RFT R3, 400 steps": ["--reward", "r3", *HELD, "--steps", 400],
    "RFT divergence, 400 steps": ["--reward", "divergence", *PER_STEP, "--steps", 400],
    "RFT R3, symmetric": ["--reward", "r3", *HELD, "--symmetric"],
    "RFT divergence, symmetric": ["--reward", "divergence", *PER_STEP, "--symmetric"],
    "RFT R1 per step, averaged": ["--reward", "r1", *PER_STEP, *AVERAGED],
    "RFT R3, averaged": ["--reward", "r3", *HELD, *AVERAGED],
    "RFT divergence, averaged": ["--reward", "divergence", *PER_STEP, *AVERAGED],
    "RFT divergence, gripper left out": ["--reward", "divergence", *PER_STEP, "--noisy-dims", *range(6)],
    "RFT divergence, steady": ["--reward", "divergence", *PER_STEP, *STEADY],
    "RFT R1 per step, whole policy": ["--reward", "r1", *PER_STEP, *WHOLE],
    "RFT divergence, whole policy": ["--reward", "divergence", *PER_STEP, *WHOLE],
    "RFT R1 per step, whole policy, 400 steps": ["--reward", "r1", *PER_STEP, *WHOLE, "--steps", 400],
    "RFT R3, on-policy": ["--reward", "r3", *HELD],
    "RFT divergence, on-policy": ["--reward", "divergence", *PER_STEP],
    "RFT R3, on-policy, averaged": ["--reward", "r3", *HELD, *AVERAGED],
    "RFT divergence, on-policy, averaged": ["--reward", "divergence", *PER_STEP, *AVERAGED],
    "RFT R3, on-policy, 400 steps": ["--reward", "r3", *HELD, "--steps", 400],
    "RFT divergence, on-policy, 400 steps": ["--reward", "divergence", *PER_STEP, "--steps", 400],
    "RFT R3, demonstrations only": ["--reward", "r3", *HELD],
    "RFT divergence, demonstrations only": ["--reward", "divergence", *PER_STEP],
    "RFT R3, demonstrations only, 400 steps": ["--reward", "r3", *HELD, "--steps", 400],
    "RFT divergence, demonstrations only, 400 steps": ["--reward", "divergence", *PER_STEP, "--steps", 400],
}
HEAD = ["--train", "head", "--key-batch", 0]
REGRESSION = ["--objective", "regression", "--noise-samples", 3]
EXTRA_ARMS = {
    "extra SFT": ["--lr", 3e-4],
    "extra SFT head": ["--lr", 3e-4, *HEAD],
    "regression": ["--lr", 1e-4, *HEAD, *REGRESSION],
    "regression, whole policy": ["--lr", 3e-4, *REGRESSION],
    "extra SFT, 400 steps": ["--lr", 3e-4],  # of fine-tuning, whose wall time it has
    "extra SFT head, 400 steps": ["--lr", 3e-4, *HEAD],
}
NO_END = 1_000_000  # steps: time ends these trainings
ARMS = (*EXTRA_ARMS, *RFT_ARMS)
LONG_ARMS = tuple(name for name in ARMS if name.endswith("400 steps"))
ON_POLICY = tuple(name for name in ARMS if "on-policy" in name)  # in a world model that saw attempts of the policy
EXPERTS_ONLY = tuple(name for name in ARMS if "demonstrations only" in name)  # in one that saw nothing else
LATER = tuple(name for name in ARMS if re.search("symmetric|averaged|steady|left out|whole", name))
OPTIONAL = ("extra SFT head", *ON_POLICY, *EXPERTS_ONLY, *LATER, *LONG_ARMS)  # run where they are asked for
# as long as the paper's, in equal wall time
LONG_RIVALS = "extra SFT, 400 steps", "extra SFT head, 400 steps", "RFT R1 per step, 400 steps"


def timed_arm(arms: Sequence[str], extra: str) -> str:
    """The fine-tuning that an arm of `EXTRA_ARMS` takes its wall time from: of 400 steps, if the arm is one of
    `LONG_ARMS`, the first that is run; otherwise "RFT R3", or the first that is run.

    Raises:
        ValueError: there is none.
    """
    for name in ("RFT R3", *arms):
        if name in RFT_ARMS and name in arms and (name in LONG_ARMS) == (extra in LONG_ARMS):
            return name
    raise ValueError(f"{extra} takes its wall time from a fine-tuning: add one that is as long to --arms")
