"""The cells of `rft_factors.py`: what each changes, and where it starts. labels.py says what they are in words."""

from typing import Literal, NamedTuple


class Cell(NamedTuple):
    """Flags of `train_rft.py` or `variants.py`, an arm of `wm_study.py` and one of `sft_study.py`; or flags of
    `train_sft.py`; or no script, for the policy as it is.

    x0: where the flow starts when the policy is played and its true error measured.
    """

    flags: tuple[str, ...] = ()
    world_model: str = "three times as long"
    policy: str = "twice as long"
    script: str | None = "train_rft.py"
    x0: Literal["sampled", "zero", "gripper"] = "sampled"


def sft(*flags: str, policy: str = "twice as long") -> Cell:
    """Make a cell of more supervised training, at a tenth of the peak learning rate."""
    return Cell(("--lr", "3e-4", "--warmup", "10", *flags), policy=policy, script="train_sft.py")


HEAD = ("--train", "head", "--key-batch", "0")
REGRESSION = ("--objective", "regression", "--lr", "1e-4", "--steps", "200", "--noise-samples", "3", *HEAD)
PLATEAU = "four times as long"
PER_STEP = ("--per-step",)
FULL_MSE = ("--mse-weight", "1")
BROAD = ("--starts", "24", "--group", "4")
QUARTER_NOISE = ("--sigma-min", "0.02", "--sigma-max", "0.05")


def plateau(*flags: str) -> Cell:
    """Make a cell that goes on from the policy at its plateau."""
    return Cell(("--steps", "80", *flags), policy=PLATEAU)


class Training(NamedTuple):
    """A world model of its own."""

    steps: int
    flags: tuple[str, ...] = ()


WORLD_MODELS = {
    "short": Training(1500),
    "long": Training(13500),
    "demonstrations only": Training(4500, ("--experts-only",)),
}


def study(*flags: str, world_model: str = "wm", policy: str = "sft") -> Cell:
    """Make a cell that goes on from the long-trained policy of `rft_study.py`, or its early one, with the settings of
    its fine-tunings.
    """
    return Cell(("--steps", "80", *BROAD, *flags), world_model, policy=policy)


R1, R3 = ("--reward", "r1", *PER_STEP), ("--reward", "r3", *FULL_MSE)
DIVERGENCE = ("--reward", "divergence", *PER_STEP)
STUDY = {
    "extra SFT": sft("--steps", "600", policy="sft"),
    "regression": sft(*REGRESSION, policy="sft"),
    "x_0 = 0": Cell(policy="sft", script=None, x0="zero"),
    "gripper sampled": Cell(policy="sft", script=None, x0="gripper"),
    "R1": study(*R1),
    "R1, gripper sampled": study(*R1, "--variant", "gripper_x0")._replace(x0="gripper"),
    "R1, 8 starts of 12": study(*R1, "--starts", "8", "--group", "12"),
    "R1, half the noise": study(*R1, "--sigma-min", "0.04", "--sigma-max", "0.1"),
    "R1, twice the noise": study(*R1, "--sigma-min", "0.16", "--sigma-max", "0.4"),
    "R1, Flow-SDE": study(*R1, "--variant", "flow_sde"),
    "R1, lr 3e-5": study(*R1, "--lr", "3e-5"),
    "R1, lr 3e-4": study(*R1, "--lr", "3e-4"),
    "R1, advantage without std": study(*R1, "--no-divide-by-std"),
    "R1, KL to the policy": study(*R1, "--variant", "kl"),
    "R3": study(*R3),
    "R3, common random numbers": study(*R3, "--imagination", "common"),
    "R3, no perceptual term": study(*R3, "--perceptual", "none"),
    "R3, short world model": study(*R3, world_model="short"),
    "R3, long world model": study(*R3, world_model="long"),
    "R3, long world model, seed 1": study(*R3, "--seed", "1", world_model="long"),
    "R3, demonstrations only": study(*R3, world_model="demonstrations only"),
    "divergence": study(*DIVERGENCE),
    "divergence, short world model": study(*DIVERGENCE, world_model="short"),
    "divergence, short world model, seed 1": study(*DIVERGENCE, "--seed", "1", world_model="short"),
    "divergence, short world model, seed 2": study(*DIVERGENCE, "--seed", "2", world_model="short"),
    "divergence, long world model": study(*DIVERGENCE, world_model="long"),
    "divergence, long world model, seed 1": study(*DIVERGENCE, "--seed", "1", world_model="long"),
    "divergence, long world model, seed 2": study(*DIVERGENCE, "--seed", "2", world_model="long"),
    "divergence, demonstrations only": study(*DIVERGENCE, world_model="demonstrations only"),
    "early, R1": study(*R1, policy="early"),
    "early, x_0 = 0": Cell(policy="early", script=None, x0="zero"),
}
CELLS = {
    "R3": Cell(),
    "extra SFT": sft("--steps", "1000"),
    "extra SFT head": sft("--steps", "1000", *HEAD),
    "R1": Cell(("--reward", "r1")),
    "simulator's true error": Cell(("--variant", "simulator")),
    "policy: half the steps, x_0 = 0": Cell(policy="default", script=None, x0="zero"),
    "plateau, x_0 = 0": Cell(policy=PLATEAU, script=None, x0="zero"),
    "plateau, extra SFT": sft("--steps", "1000", policy=PLATEAU),
    "plateau, regression": sft(*REGRESSION, policy=PLATEAU),
    "plateau, RWR": plateau("--variant", "rwr", *FULL_MSE),
    "plateau, R3, 40 steps, flow-matching weight 0.1": Cell(policy=PLATEAU),
    "plateau, R3": plateau(*FULL_MSE),
    "plateau, R3, credit per step": plateau("--reward", "r3", *PER_STEP),
    "plateau, divergence, credit per step": plateau("--reward", "divergence", *PER_STEP),
    "plateau, divergence, credit per step, quarter of the noise": plateau(
        "--reward", "divergence", *PER_STEP, *QUARTER_NOISE
    ),
    "plateau, R1": plateau("--reward", "r1", *FULL_MSE),
    "plateau, R1, credit per step": plateau("--reward", "r1", *PER_STEP),
    "plateau, R1, credit per step, 24 starts of 4": plateau("--reward", "r1", *PER_STEP, *BROAD),
    "plateau, R1, credit per step, quarter of the noise": plateau("--reward", "r1", *PER_STEP, *QUARTER_NOISE),
    "plateau, simulator": plateau("--variant", "simulator", *FULL_MSE),
    "plateau, simulator, flow-matching weight 0.1": plateau("--variant", "simulator"),
    "plateau, simulator, flow-matching weight 0": plateau("--variant", "simulator", "--mse-weight", "0"),
} | {f"study, {name}": cell for name, cell in STUDY.items()}
