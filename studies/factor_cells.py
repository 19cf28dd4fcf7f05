"""The cells of `rft_factors.py`: what each changes, and where it starts."""

from typing import Literal, NamedTuple


class Cell(NamedTuple):
    """Flags of `train_rft.py`, an arm of `world_model.py` and one of `sft_study.py`; or flags of `train_sft.py`; or no
    script, for the policy as it is.

    x0: where the flow starts when the policy is played and its true error measured.
    """

    flags: tuple[str, ...] = ()
    world_model: str = "three times as long"
    policy: str = "twice as long"
    script: str | None = "train_rft.py"
    x0: Literal["sampled", "zero", "gripper"] = "sampled"


def sft(*flags: str, policy: str = "twice as long") -> Cell:
    """More supervised training, at a tenth of the peak learning rate."""
    return Cell(("--lr", "3e-4", "--warmup", "10", *flags), policy=policy, script="train_sft.py")


TWO_STEPS = ("--noisy-steps", "8", "9", "--sigma-min", "0.04", "--sigma-max", "0.12")
SLOW = ("--steps", "80", "--lr", "3e-5", "--sigma-lr", "3e-4")
HEAD = ("--train", "head", "--key-batch", "0")
REGRESSION = ("--objective", "regression", "--lr", "1e-4", "--steps", "200", "--noise-samples", "3", *HEAD)
PLATEAU, ATTEMPTS = "four times as long", "three times as long with on-policy attempts"


def plateau(*flags: str, world_model: str = "three times as long", steps: int = 80) -> Cell:
    """From the policy at its plateau."""
    return Cell(("--steps", str(steps), *flags), world_model, policy=PLATEAU)


PER_STEP = ("--credit", "frame", "--ratio-per", "step")
TO_GO = ("--credit", "to_go", "--ratio-per", "step")
HELD = ("--mse-weight", "1")
SHARED = ("--group-x0", "shared")
MIRRORED = ("--mirrored",)
BROAD = ("--starts", "24", "--group", "4")
QUARTER = ("--sigma-min", "0.02", "--sigma-max", "0.05")
COSINE = ("--decay", "cosine")
QUARTER_RATE = ("--lr", "2.5e-5", "--sigma-lr", "2.5e-4")


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
    """From the long-trained policy of `rft_study.py`, or its early one, with the settings of its fine-tunings."""
    return Cell(("--steps", "80", *BROAD, *flags), world_model, policy=policy)


R1, R3 = ("--reward", "r1", *PER_STEP), ("--reward", "r3", *HELD)
DIVERGENCE = ("--reward", "divergence", *PER_STEP)
STUDY = {
    "extra SFT": sft("--steps", "600", policy="sft"),
    "regression": sft(*REGRESSION, policy="sft"),
    "x_0 = 0": Cell(policy="sft", script=None, x0="zero"),
    "gripper drawn": Cell(policy="sft", script=None, x0="gripper"),
    "R1": study(*R1),
    "R1, gripper drawn": study(*R1, "--group-x0", "gripper")._replace(x0="gripper"),
    "R3, gripper drawn": study(*R3, "--group-x0", "gripper")._replace(x0="gripper"),
    "divergence, gripper drawn": study(*DIVERGENCE, "--group-x0", "gripper")._replace(x0="gripper"),
    "R1, 8 starts of 12": study(*R1, "--starts", "8", "--group", "12"),
    "R1, 48 starts of 2": study(*R1, "--starts", "48", "--group", "2"),
    "R1, half the noise": study(*R1, "--sigma-min", "0.04", "--sigma-max", "0.1"),
    "R1, twice the noise": study(*R1, "--sigma-min", "0.16", "--sigma-max", "0.4"),
    "R1, Flow-SDE": study(*R1, "--noise", "flow_sde"),
    "R1, lr 3e-5": study(*R1, "--lr", "3e-5"),
    "R1, lr 3e-4": study(*R1, "--lr", "3e-4"),
    "R1, advantage without std": study(*R1, "--no-divide-by-std"),
    "R1, no flow-matching term": study(*R1, "--mse-weight", "0"),
    "R1, flow-matching weight 1": study(*R1, "--mse-weight", "1"),
    "R1, KL to the policy": study(*R1, "--kl-weight", "0.1"),
    "R1, gripper left out": study(*R1, "--noisy-dims", "0", "1", "2", "3", "4", "5"),
    "R1, two chunks": study(*R1, "--chunks", "2"),
    "R3": study(*R3),
    "R3, two chunks": study(*R3, "--chunks", "2"),
    "R3, common random numbers": study(*R3, "--imagination", "common"),
    "R3, independent draws": study(*R3, "--imagination", "sample"),
    "R3, no perceptual term": study(*R3, "--perceptual", "none"),
    "R3, short world model": study(*R3, world_model="short"),
    "R3, long world model": study(*R3, world_model="long"),
    "R3, demonstrations only": study(*R3, world_model="demonstrations only"),
    "divergence": study(*DIVERGENCE),
    "divergence, short world model": study(*DIVERGENCE, world_model="short"),
    "divergence, long world model": study(*DIVERGENCE, world_model="long"),
    "divergence, demonstrations only": study(*DIVERGENCE, world_model="demonstrations only"),
    "early, R1": study(*R1, policy="early"),
    "early, R1, gripper left out": study(*R1, "--noisy-dims", "0", "1", "2", "3", "4", "5", policy="early"),
    "early, R3": study(*R3, policy="early"),
    "early, extra SFT": sft("--steps", "600", policy="early"),
    "early, x_0 = 0": Cell(policy="early", script=None, x0="zero"),
}
STUDY |= {  # one fine-tuning in the world model is one draw: the same with other seeds of its own
    f"{reward}{model}, seed {seed}": cell._replace(flags=(*cell.flags, "--seed", str(seed)))
    for reward in ("R3", "divergence")
    for model in ("", ", short world model", ", long world model")
    for cell in [STUDY[f"{reward}{model}"]]
    for seed in (1, 2)
}
CELLS = {
    "R3": Cell(),
    "extra SFT": sft("--steps", "1000"),
    "extra SFT head": sft("--steps", "1000", *HEAD),
    "R1": Cell(("--reward", "r1")),
    "R2": Cell(("--reward", "r2")),
    "RWR": Cell(("--algorithm", "rwr")),
    "simulator's true error": Cell(("--reward", "simulator")),
    "simulator, noise on two steps": Cell(("--reward", "simulator", *TWO_STEPS)),
    "simulator, two steps, lr 3e-5": Cell(("--reward", "simulator", *TWO_STEPS, *SLOW)),
    "R3, noise on two steps": Cell(TWO_STEPS),
    "R3, two steps, lr 3e-5": Cell((*TWO_STEPS, *SLOW)),
    "Flow-SDE": Cell(("--noise", "flow_sde")),
    "100 steps": Cell(("--steps", "100")),
    "seed 1": Cell(("--seed", "1")),
    "seed 2": Cell(("--seed", "2")),
    "world model: a third of the steps": Cell(world_model="default"),
    "world model: demonstrations only": Cell(world_model="demonstrations only"),
    "world model: no stale frames": Cell(world_model="no stale frames"),
    "plateau, divergence, credit per step, on-policy attempts": plateau(
        "--reward", "divergence", *PER_STEP, world_model=ATTEMPTS
    ),
    "plateau, R3, on-policy attempts": plateau(*HELD, world_model=ATTEMPTS),
    "plateau, R3, 40 steps, flow-matching weight 0.1": Cell(policy=PLATEAU),
    "plateau, x_0 = 0": Cell(policy=PLATEAU, script=None, x0="zero"),
    "plateau, R3": plateau(*HELD),
    "plateau, divergence": plateau("--reward", "divergence", *HELD),
    "plateau, R1": plateau("--reward", "r1", *HELD),
    "plateau, simulator": plateau("--reward", "simulator", *HELD),
    "plateau, simulator, flow-matching weight 0.1": plateau("--reward", "simulator"),
    "plateau, simulator, flow-matching weight 0": plateau("--reward", "simulator", "--mse-weight", "0"),
    "plateau, divergence, credit per step": plateau("--reward", "divergence", *PER_STEP),
    "plateau, R1, credit per step": plateau("--reward", "r1", *PER_STEP),
    "plateau, R3, credit per step": plateau("--reward", "r3", *PER_STEP),
    "plateau, R1, credit per step, shared x_0": plateau("--reward", "r1", *PER_STEP, *SHARED),
    "plateau, R3, credit per step, shared x_0": plateau("--reward", "r3", *PER_STEP, *SHARED),
    "plateau, divergence, credit per step, shared x_0": plateau("--reward", "divergence", *PER_STEP, *SHARED),
    "plateau, R1, credit per step, mirrored": plateau("--reward", "r1", *PER_STEP, *MIRRORED),
    "plateau, R1, credit per step, 24 starts of 4": plateau("--reward", "r1", *PER_STEP, *BROAD),
    "plateau, R1, credit per step, mirrored, 24 starts of 4": plateau("--reward", "r1", *PER_STEP, *MIRRORED, *BROAD),
    "plateau, R3, mirrored, 24 starts of 4": plateau(*HELD, *MIRRORED, *BROAD),
    "plateau, divergence, credit per step, mirrored, 24 starts of 4": plateau(
        "--reward", "divergence", *PER_STEP, *MIRRORED, *BROAD
    ),
    "plateau, R3, credit per step, mirrored": plateau("--reward", "r3", *PER_STEP, *MIRRORED),
    "plateau, R3, mirrored": plateau(*HELD, *MIRRORED),
    "plateau, divergence, credit per step, mirrored": plateau("--reward", "divergence", *PER_STEP, *MIRRORED),
    "plateau, R1, credit per step, quarter of the noise": plateau("--reward", "r1", *PER_STEP, *QUARTER),
    "plateau, R3, credit per step, quarter of the noise": plateau("--reward", "r3", *PER_STEP, *QUARTER),
    "plateau, divergence, credit per step, quarter of the noise": plateau(
        "--reward", "divergence", *PER_STEP, *QUARTER
    ),
    "plateau, R1, credit per step, cosine": plateau("--reward", "r1", *PER_STEP, *COSINE),
    "plateau, R1, credit per step, mirrored, slow": plateau(
        "--reward", "r1", *PER_STEP, *MIRRORED, *QUARTER_RATE, steps=320
    ),
    "plateau, divergence, credit per step, mirrored, slow": plateau(
        "--reward", "divergence", *PER_STEP, *MIRRORED, *QUARTER_RATE, steps=320
    ),
    "plateau, divergence, credit per step, mirrored, 24 starts of 4, slow": plateau(
        "--reward", "divergence", *PER_STEP, *MIRRORED, *BROAD, *QUARTER_RATE, steps=320
    ),
    "plateau, R3, mirrored, slow": plateau(*HELD, *MIRRORED, *QUARTER_RATE, steps=320),
    "plateau, R3, two chunks": plateau(*HELD, "--chunks", "2"),
    "plateau, R3, credit to go": plateau(*TO_GO),
    "plateau, simulator, credit to go": plateau("--reward", "simulator", *TO_GO),
    "plateau, extra SFT": sft("--steps", "1000", policy=PLATEAU),
    "plateau, regression": sft(*REGRESSION, policy=PLATEAU),
    "plateau, RWR": plateau("--algorithm", "rwr", *HELD),
    "policy: half the steps": Cell(policy="default"),
    "policy: half the steps, x_0 = 0": Cell(policy="default", script=None, x0="zero"),
    "policy: half the steps, extra SFT": sft("--steps", "1000", policy="default"),
    "common random numbers": Cell(("--imagination", "common")),
    "independent draws": Cell(("--imagination", "sample")),
    "no perceptual term": Cell(("--perceptual", "none")),
    "advantage without std": Cell(("--no-divide-by-std",)),
    "executed actions as reference": Cell(("--reference", "executed")),
    "group of 6": Cell(("--group", "6")),
    "half the noise": Cell(("--sigma-min", "0.04", "--sigma-max", "0.1")),
    "twice the noise": Cell(("--sigma-min", "0.16", "--sigma-max", "0.4")),
    "gripper left out": Cell(("--noisy-dims", "0", "1", "2", "3", "4", "5")),
    "lr 3e-5": Cell(("--lr", "3e-5")),
    "lr 3e-4": Cell(("--lr", "3e-4")),
    "no flow-matching term": Cell(("--mse-weight", "0")),
    "flow-matching weight 1": Cell(("--mse-weight", "1")),
    "KL to the policy": Cell(("--kl-weight", "0.1")),
    "last frame only": Cell(("--over-frames", "last")),
} | {f"study, {name}": cell for name, cell in STUDY.items()}
