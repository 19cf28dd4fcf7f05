"""What tables and figures call the arms of `rft_study.py`, the cells of `rft_factors.py` and the starts that they play.

The names on the left are those of the command line and of the JSON files. `GONE` holds those that used an option which
has been removed since: their runs stay in the tables, and commit 5747157 can repeat them.
"""

from collections.abc import Iterable

GONE_NOTE = "† used an option that is gone; commit 5747157 can repeat the run."
ARMS = {
    "SFT early": "SFT, 800 steps",
    "SFT": "SFT",
    "SFT, other x_0": "SFT, other samples of x_0",
    "RWR": "+ RWR",
    "RFT R1": "+ R1, one advantage per chunk",
    "RFT R2": "+ R2",
    "RFT R3": "+ R3",
    "RFT R1 per step": "+ R1",
    "RFT divergence": "+ divergence",
    "RFT R1 per step, 400 steps": "+ R1, 400 steps",
    "RFT R3, symmetric": "+ R3, symmetric reward",
    "RFT divergence, symmetric": "+ divergence, symmetric reward",
    "RFT R3, averaged": "+ R3, averaged weights",
    "RFT divergence, averaged": "+ divergence, averaged weights",
    "RFT divergence, steady": "+ divergence, averaged weights, no noise on the gripper",
    "RFT R1 per step, whole policy": "+ R1, vision-language model trained too, averaged weights",
    "RFT R1 per step, whole policy, 400 steps": "+ R1, 400 steps, vision-language model trained too, averaged weights",
    "RFT R3, on-policy": "+ R3, world model saw the policy's attempts",
    "RFT divergence, on-policy": "+ divergence, world model saw the policy's attempts",
    "RFT divergence, on-policy, averaged": "+ divergence, world model saw the policy's attempts, averaged weights",
    "RFT R3, demonstrations only": "+ R3, world model of demonstrations alone",
    "RFT divergence, demonstrations only": "+ divergence, world model of demonstrations alone",
    "extra SFT": "+ extra SFT, time of R3",
    "extra SFT, 400 steps": "+ extra SFT, time of R1 with 400 steps",
    "regression": "+ regression, time of R3",
}
X_0 = {", x_0 = 0": ", from x_0 = 0", ", gripper sampled": ", from x_0 = 0 but for the gripper"}
STARTS = {
    "none": "plain",
    "object:2.5": "objects moved 2.5 cm",
    "object:5": "objects moved 5 cm",
    "goal:2.5": "goal moved 2.5 cm",
    "goal:5": "goal moved 5 cm",
    "robot:20": "hand moved 20 mm",
    "robot:50": "hand moved 50 mm",
    "all:2.5/2.5/20": "all moved, 2.5 cm, 2.5 cm, 20 mm",
    "all:5/5/50": "all moved, 5 cm, 5 cm, 50 mm",
    "all": "all starts",
}
CELLS = {
    # from the SFT policy of 2600 steps
    "R3": "R3",
    "extra SFT": "extra SFT",
    "extra SFT head": "extra SFT of the action head",
    "R1": "R1, one advantage per chunk",
    "simulator's true error": "the simulator's true error as the reward",
    "simulator, two steps, lr 3e-5": "the simulator's true error, noise on the last two flow steps only",
    "R3, two steps, lr 3e-5": "R3, noise on the last two flow steps only",
    "policy: half the steps, x_0 = 0": "SFT policy of 1300 steps, no training, from x_0 = 0",
    # from the SFT policy of 5200 steps
    "plateau, x_0 = 0": "no training, from x_0 = 0",
    "plateau, extra SFT": "extra SFT",
    "plateau, regression": "regression, 200 steps",
    "plateau, RWR": "RWR",
    "plateau, R3, 40 steps, flow-matching weight 0.1": "R3, flow-matching weight 0.1, 40 steps",
    "plateau, R3": "R3",
    "plateau, R3, credit per step": "R3, one advantage per step",
    "plateau, divergence, credit per step": "divergence",
    "plateau, divergence, credit per step, quarter of the noise": "divergence, a quarter of the noise",
    "plateau, divergence, credit per step, mirrored, 24 starts of 4, slow": (
        "divergence, antithetic noise, 24 starts x 4 rollouts, a quarter of the learning rate for 320 steps"
    ),
    "plateau, R1": "R1, one advantage per chunk",
    "plateau, R1, credit per step": "R1",
    "plateau, R1, credit per step, 24 starts of 4": "R1, 24 starts x 4 rollouts",
    "plateau, R1, credit per step, mirrored": "R1, antithetic noise",
    "plateau, R1, credit per step, mirrored, 24 starts of 4": "R1, antithetic noise, 24 starts x 4 rollouts",
    "plateau, R1, credit per step, mirrored, slow": (
        "R1, antithetic noise, a quarter of the learning rate for 320 steps"
    ),
    "plateau, R1, credit per step, shared x_0": "R1, one x_0 for all rollouts of a start",
    "plateau, R1, credit per step, cosine": "R1, learning rate falls to 0 (cosine)",
    "plateau, R1, credit per step, quarter of the noise": "R1, a quarter of the noise",
    "plateau, simulator": "the simulator's true error as the reward, flow-matching weight 1",
    "plateau, simulator, flow-matching weight 0.1": "the simulator's true error, flow-matching weight 0.1",
    "plateau, simulator, flow-matching weight 0": "the simulator's true error, flow-matching weight 0",
    # from the policies of rft_study.py
    "study, x_0 = 0": "no training, from x_0 = 0",
    "study, gripper sampled": "no training, from x_0 = 0 but for the gripper",
    "study, extra SFT": "extra SFT, 600 steps",
    "study, regression": "regression, 200 steps",
    "study, R1": "R1",
    "study, R1, Flow-SDE": "R1, Flow-SDE noise",
    "study, R1, half the noise": "R1, half the noise",
    "study, R1, twice the noise": "R1, twice the noise",
    "study, R1, 8 starts of 12": "R1, 8 starts x 12 rollouts",
    "study, R1, lr 3e-5": "R1, learning rate 3e-5",
    "study, R1, lr 3e-4": "R1, learning rate 3e-4",
    "study, R1, advantage without std": "R1, advantage not divided by the standard deviation",
    "study, R1, KL to the policy": "R1, KL term to the SFT policy",
    "study, R1, gripper sampled": "R1, x_0 = 0 but for the gripper, in training too",
    "study, R3": "R3",
    "study, R3, common random numbers": "R3, common random numbers for the rollouts of a start",
    "study, R3, no perceptual term": "R3, no perceptual term",
    "study, R3, demonstrations only": "R3, world model of demonstrations alone",
    "study, R3, short world model": "R3, world model of 1500 steps",
    "study, R3, long world model": "R3, world model of 13500 steps",
    "study, R3, long world model, seed 1": "R3, world model of 13500 steps, seed 1",
    "study, divergence": "divergence",
    "study, divergence, demonstrations only": "divergence, world model of demonstrations alone",
    "study, divergence, short world model": "divergence, world model of 1500 steps",
    "study, divergence, short world model, seed 1": "divergence, world model of 1500 steps, seed 1",
    "study, divergence, short world model, seed 2": "divergence, world model of 1500 steps, seed 2",
    "study, divergence, long world model": "divergence, world model of 13500 steps",
    "study, divergence, long world model, seed 1": "divergence, world model of 13500 steps, seed 1",
    "study, divergence, long world model, seed 2": "divergence, world model of 13500 steps, seed 2",
    "study, early, x_0 = 0": "SFT policy of fewer steps, no training, from x_0 = 0",
    "study, early, R1": "R1 from the SFT policy of 800 steps",
    "study, early, R1, gripper left out": "R1 from the SFT policy of 800 steps, no noise on the gripper",
}
GONE = {
    "larger",
    "RFT R3, averaged",
    "RFT divergence, averaged",
    "RFT divergence, on-policy, averaged",
    "RFT divergence, steady",
    "RFT R1 per step, whole policy",
    "RFT R1 per step, whole policy, 400 steps",
    "simulator, two steps, lr 3e-5",
    "R3, two steps, lr 3e-5",
    "plateau, divergence, credit per step, mirrored, 24 starts of 4, slow",
    "plateau, R1, credit per step, mirrored",
    "plateau, R1, credit per step, mirrored, 24 starts of 4",
    "plateau, R1, credit per step, mirrored, slow",
    "plateau, R1, credit per step, shared x_0",
    "plateau, R1, credit per step, cosine",
    "study, early, R1, gripper left out",
}


def arm(name: str) -> str:
    """Name an arm of `rft_study.py`, perhaps played from another x_0, as tables do.

    Raises:
        KeyError: a name without a label.
    """
    base, suffix = _parts(name)
    return ARMS[base] + X_0.get(suffix, "") + (" †" if base in GONE else "")


def cell(name: str) -> str:
    """Name a cell of `rft_factors.py` as tables do.

    Raises:
        KeyError: a name without a label.
    """
    return CELLS[name] + (" †" if name in GONE else "")


def training(name: str) -> str:
    """Name an arm of `sft_study.py` or `wm_study.py` as tables do."""
    return name + (" †" if name in GONE else "")


def in_order(names: Iterable[str]) -> list[str]:
    """Sort arms into the order of `ARMS`, each played from the sampled x_0 first."""
    places, endings = list(ARMS), ["", *X_0]
    return sorted(names, key=lambda name: (places.index(_parts(name)[0]), endings.index(_parts(name)[1])))


def note(names: Iterable[str]) -> str:
    """Return the line below a table of these arms or cells, where one of them is gone."""
    return f"\n\n{GONE_NOTE}" if any(name in GONE or _parts(name)[0] in GONE for name in names) else ""


def _parts(name: str) -> tuple[str, str]:
    suffix = next((ending for ending in X_0 if name.endswith(ending) and name not in CELLS), "")
    return name.removesuffix(suffix), suffix
