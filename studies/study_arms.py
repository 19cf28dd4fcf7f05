"""The arms of `rft_study.py`: flags of `train_rft.py` or `variants.py`, and of `train_sft.py` for the controls."""

from collections.abc import Sequence

FULL_MSE = ["--mse-weight", 1]  # beside one advantage per chunk; per step, the policy's term is 8 times smaller
PER_STEP = ["--per-step"]
RFT_ARMS = {
    "RWR": ["--variant", "rwr", *FULL_MSE],
    "RFT R1": ["--reward", "r1", *FULL_MSE],
    "RFT R2": ["--reward", "r2", *FULL_MSE],
    "RFT R3": ["--reward", "r3", *FULL_MSE],
    "RFT R1 per step": ["--reward", "r1", *PER_STEP],
    "RFT divergence": ["--reward", "divergence", *PER_STEP],
    "RFT R1 per step, 400 steps": ["--reward", "r1", *PER_STEP, "--steps", 400],  # the paper's number
    "RFT R3, symmetric": ["--reward", "r3", *FULL_MSE, "--variant", "symmetric"],
    "RFT divergence, symmetric": ["--reward", "divergence", *PER_STEP, "--variant", "symmetric"],
    "RFT R3, on-policy": ["--reward", "r3", *FULL_MSE],
    "RFT divergence, on-policy": ["--reward", "divergence", *PER_STEP],
    "RFT R3, demonstrations only": ["--reward", "r3", *FULL_MSE],
    "RFT divergence, demonstrations only": ["--reward", "divergence", *PER_STEP],
}
EXTRA_ARMS = {
    "extra SFT": ["--lr", 3e-4],
    "regression": [
        "--lr",
        1e-4,
        "--train",
        "head",
        "--key-batch",
        0,
        "--objective",
        "regression",
        "--noise-samples",
        3,
    ],
    "extra SFT, 400 steps": ["--lr", 3e-4],  # takes the wall time of a fine-tuning of 400 steps
}
NO_END = 1_000_000  # steps: time ends these trainings
ARMS = (*EXTRA_ARMS, *RFT_ARMS)
LONG_ARMS = tuple(name for name in ARMS if name.endswith("400 steps"))  # as long as the paper's, in equal wall time
ON_POLICY = tuple(name for name in ARMS if "on-policy" in name)  # in a world model that saw attempts of the policy
EXPERTS_ONLY = tuple(name for name in ARMS if "demonstrations only" in name)  # in one that saw nothing else
SYMMETRIC = tuple(name for name in ARMS if "symmetric" in name)
OPTIONAL = (*ON_POLICY, *EXPERTS_ONLY, *SYMMETRIC, *LONG_ARMS)  # run where --arms names them


def timed_arm(arms: Sequence[str], extra: str) -> str:
    """Return the fine-tuning that an arm of `EXTRA_ARMS` takes its wall time from: of 400 steps, if the arm is one of
    `LONG_ARMS`, the first that is run; otherwise "RFT R3", or the first that is run.

    Raises:
        ValueError: there is none.
    """
    for name in ("RFT R3", *arms):
        if name in RFT_ARMS and name in arms and (name in LONG_ARMS) == (extra in LONG_ARMS):
            return name
    raise ValueError(f"{extra} takes its wall time from a fine-tuning: add one that is as long to --arms")
