"""Success rates and paired differences over the runs of `rft_study.py`, and their tables.

Outcomes are text, "1" for a success and "0" for a failure, start by start in one order for all policies of a run. A run
is a suite and a seed: its policies play the same starts, so differences are paired start by start, and pairs of several
runs are pooled.
"""

from collections import Counter
from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

import torch
from labels import STARTS, arm, in_order, note
from table_text import difference, percent, points, share, shift, signed, table

from vlarft.statistics import spearman

ALL = "all"  # suites, or kinds of starts
ZERO, GRIPPER, RESAMPLED = "SFT, x_0 = 0", "SFT, gripper sampled", "SFT, other x_0"  # SFT again, played otherwise
LONG = "RFT R1 per step, 400 steps"
# starts by whether SFT wins them from the sampled x_0, and from x_0 = 0
FATES = {
    "01": "SFT wins from x_0 = 0 alone",
    "00": "SFT wins from neither",
    "10": "SFT wins from the sampled x_0 alone",
    "11": "SFT wins from both",
}


def rate(outcomes: str) -> dict[str, float]:
    """Compute the success rate of outcomes, with its interval."""
    return share(outcomes.count("1"), len(outcomes))


def paired(first: str, second: str) -> dict[str, float]:
    """Compute the success rate of `second` minus that of `first` on the same starts."""
    pairs = Counter(zip(first, second, strict=True))
    return difference(pairs["1", "0"], pairs["0", "1"], len(first))


def played(runs: dict[str, dict[str, dict]], suite: str = ALL, kind: str = ALL) -> list[dict[str, str]]:
    """Return the outcomes of each run of a suite on one kind of start, name -> outcomes; or on all kinds, one after the
    other, of the policies that played every kind.
    """
    entries = [entry for name, seeds in runs.items() if suite in (name, ALL) for entry in seeds.values()]
    return [_all_kinds(e["outcomes"]) if kind == ALL else e["outcomes"].get(kind, {}) for e in entries]


def _all_kinds(outcomes: dict[str, dict[str, str]]) -> dict[str, str]:
    names = [name for name in next(iter(outcomes.values())) if all(name in found for found in outcomes.values())]
    return {name: "".join(found[name] for found in outcomes.values()) for name in names}


def against(runs: Sequence[dict[str, str]], first: str, second: str) -> dict | None:
    """Compute the paired difference of two policies over the runs that have both: pooled, and run by run; None without
    a run.
    """
    pairs = [(run[first], run[second]) for run in runs if first in run and second in run]
    if not pairs:
        return None
    apart = [paired(*pair)["difference"] for pair in pairs]
    return {**paired("".join(a for a, _ in pairs), "".join(b for _, b in pairs)), "runs": apart}


def compare(runs: Sequence[dict[str, str]], rivals: Sequence[str] = ("SFT",)) -> dict[str, dict]:
    """Compute the rates of each policy, pooled and run by run, and paired differences to `rivals`.

    Args:
        runs: name -> outcomes of each run.
        rivals: a policy is compared with each of them over the runs that have both.
    """
    found: dict[str, dict] = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        outcomes = [run[name] for run in runs if name in run]
        found[name] = {"all": rate("".join(outcomes)), "runs": [rate(text) for text in outcomes]}
        for rival in rivals:
            if rival != name and (apart := against(runs, rival, name)):
                found[name][f"against {rival}"] = apart
    return found


def summarise(runs: dict[str, dict[str, dict]], rivals: Sequence[str] = ("SFT",)) -> dict[str, dict]:
    """Run `compare` for the seeds of each suite and of all suites, for each kind of start and all kinds together."""
    found = {}
    for suite in (*runs, ALL):
        entries = [e for name, seeds in runs.items() if suite in (name, ALL) for e in seeds.values()]
        kinds = list(dict.fromkeys(kind for e in entries for kind in e["outcomes"]))
        found[suite] = {kind: compare(played(runs, suite, kind), rivals) for kind in (*kinds, ALL)}
    return found


def fates(runs: Sequence[dict[str, str]]) -> dict[str, dict[str, dict]]:
    """Compute the rates of each policy among the starts of each of `FATES`: name -> fate -> rate.

    A start that SFT loses from the sampled x_0 alone is won with another x_0, or with less variance over x_0; one that
    it loses from x_0 = 0 as well needs better actions. `RESAMPLED` shows what chance alone would win.
    """
    won: dict[str, dict[str, str]] = {}
    for run in (run for run in runs if ZERO in run):
        for name in run.keys() - {"SFT", ZERO}:
            groups = won.setdefault(name, dict.fromkeys(FATES, ""))
            for sampled, zero, outcome in zip(run["SFT"], run[ZERO], run[name]):
                groups[sampled + zero] += outcome
    return {name: {fate: rate(groups[fate]) for fate in FATES} for name, groups in won.items() if all(groups.values())}


def shared(runs: dict[str, dict[str, dict]]) -> list[str]:
    """List the policies of more than one suite; of a study of one suite, all of them."""
    names = [{name for run in played(runs, suite, "none") for name in run} for suite in runs]
    having = Counter(name for of_suite in names for name in of_suite)
    return in_order(name for name, count in having.items() if count > 1 or len(runs) == 1)


def success_table(runs: dict[str, dict[str, dict]], suite: str = ALL) -> str:
    """Tabulate SFT's rates and the gains of the other policies over it, for each kind of start; pooled over the suites,
    those of the policies that more than one suite has.
    """
    kinds = summarise(runs)[suite]
    names = in_order(kinds["none"]) if suite != ALL else shared(runs)
    heads = [f"gain, {STARTS[kind]}" for kind in kinds]
    rows = []
    for name in names:
        gains = [kinds[kind].get(name, {}) for kind in kinds]
        cells = [points(of["against SFT"]) if "against SFT" in of else percent(of["all"]) if of else "" for of in gains]
        every = gains[-1] or gains[0]  # all starts, or the plain ones of a policy that played no others
        apart = every.get("against SFT")
        runs_of = signed(apart["runs"]) if apart else ", ".join(f"{100 * of['rate']:.1f}" for of in every["runs"])
        if not apart:
            cells[0] = ""
        rows.append([arm(name), str(len(every["runs"])), percent(gains[0]["all"]), *cells, runs_of])
    return table(["policy", "runs", "success, plain", *heads, "by run"], rows) + note(names)


def chunk_table(seeds: dict[str, dict]) -> str:
    """Tabulate what changed in the chunks of a suite's policies, seed by seed; minutes of training; the trust gate."""
    names = in_order({name for e in seeds.values() for name, of in e["chunks"].items() if "change" in of["std"]})
    heads = ["policy", "true error [mm]", "true error from x_0 = 0 [mm]", "std over x_0", "minutes", "trust gate"]
    rows = [[arm(name), *_changes(seeds, name), _minutes(seeds, name), _gates(seeds, name)] for name in names]
    return table(heads, rows) + note(names)


def _changes(seeds: dict[str, dict], name: str) -> list[str]:
    having = [entry["chunks"][name] for entry in seeds.values() if name in entry["chunks"]]
    return ["; ".join(shift(kind, of[kind]["change"]) for of in having) for kind in ("sampled", "zero", "std")]


def _minutes(seeds: dict[str, dict], name: str) -> str:
    return f"{mean(entry['minutes'][name] for entry in seeds.values() if name in entry['minutes']):.1f}"


def _gates(seeds: dict[str, dict], name: str) -> str:
    found = [entry["trust_gate"].get(name, {}).get("gate") for entry in seeds.values()]
    return ", ".join(f"{value:.2f}" for value in found if value is not None)


def rivals_table(runs: dict[str, dict[str, dict]], pairs: Sequence[tuple[str, str]]) -> str:
    """Tabulate pairs of policies compared start by start on all kinds of starts: over all runs that have both, and by
    suite.
    """
    rows = []
    suites = list(runs) if len(runs) > 1 else []
    for first, second in pairs:
        apart = [against(played(runs, suite), second, first) for suite in (ALL, *suites)]
        named = " against ".join(arm(name).removeprefix("+ ") for name in (first, second))
        rows.append([named, str(len(apart[0]["runs"])), *map(points, apart), signed(apart[0]["runs"])])
    return table(["compared", "runs", "all suites" if suites else "difference", *suites, "by run"], rows)


def fates_table(runs: dict[str, dict[str, dict]]) -> str:
    """Tabulate `fates` over all runs and kinds of starts, of the policies that more than one suite has."""
    found = fates(played(runs))
    names = [name for name in shared(runs) if name in found]
    rows = [
        [arm(name), *(f"{percent(found[name][fate])} of {found[name][fate]['episodes']}" for fate in FATES)]
        for name in names
    ]
    return table(["policy", *FATES.values()], rows) + note(names)


def starts_table(seeds: dict[str, dict]) -> str:
    """Make a table with one row per kind of start, one column per policy: SFT's rate, the gains of the others. For many
    kinds.
    """
    kinds = summarise({"": seeds})[ALL]
    names = [name for name in in_order(kinds[ALL]) if name != "SFT"]
    rows = [
        [STARTS[kind], percent(found["SFT"]["all"]), *(points(found[name]["against SFT"]) for name in names)]
        for kind, found in kinds.items()
    ]
    return table(["starts", "SFT", *map(arm, names)], rows) + note(names)


def counted_table(starts: dict[str, dict[str, dict]]) -> str:
    """Tabulate success and gains of a study that kept counts: kind of start -> policy -> episodes that it won, and
    under "against" the starts that only SFT and only the policy wins.
    """
    names = in_order(starts["none"])
    rows = []
    for name in names:
        cells = []
        for found in starts.values():
            of = found.get(name)
            alone = of["against"].get("SFT") if of else None
            cells.append(points(difference(*alone, of["episodes"])) if alone else "")
            if of and not alone:
                cells[-1] = percent(share(of["won"], of["episodes"]))
        plain = starts["none"][name]
        rows.append([arm(name), percent(share(plain["won"], plain["episodes"])), *cells])
    rows[names.index("SFT")][2] = ""
    return table(["policy", "success, plain", *(f"gain, {STARTS[kind]}" for kind in starts)], rows) + note(names)


def course_table(runs: dict[str, dict[str, dict]], suite: str, names: Sequence[str]) -> str:
    """Tabulate the true error of the deterministic policy while it is fine-tuned, as older versions of `train_rft.py`
    logged it: at the first step, the lowest, the last.
    """
    rows = []
    for name in names:
        for seed, entry in runs[suite].items():
            if "true_error" in entry["courses"].get(name, {}):
                steps, errors = (entry["courses"][name][column] for column in ("step", "true_error"))
                lowest = errors.index(min(errors))
                ends = [f"{1e3 * errors[at]:.1f} (step {steps[at]})" for at in (0, lowest, -1)]
                apart = points(paired(*(_all_kinds(entry["outcomes"])[of] for of in ("SFT", name))))
                rows.append([arm(name), seed, *ends, apart])
    return table(["policy", "seed", "first [mm]", "lowest [mm]", "last [mm]", "all starts"], rows) + note(names)


def dimension_table(runs: dict[str, dict[str, dict]], suite: str) -> str:
    """Tabulate the standard deviation over x_0 of each dimension, at the last diagnostics of a fine-tuning against the
    first.
    """
    axes = "x", "y", "z", "gripper"
    rows = []
    for name in dict.fromkeys(name for entry in runs[suite].values() for name in entry["courses"]):
        for seed, entry in runs[suite].items():
            course = entry["courses"].get(name, {})
            if "std_gripper" in course:
                ends = [(course[f"std_{axis}"][0], course[f"std_{axis}"][-1]) for axis in axes]
                rows.append([arm(name), seed, *(f"{100 * (last / first - 1):+.0f} %" for first, last in ends)])
    return table(["policy", "seed", *axes], rows)


class GatedRun(NamedTuple):
    """A fine-tuning of one suite and seed: what the gate said before it, and its paired difference to SFT."""

    suite: str
    seed: str
    arm: str
    gate: float
    against_sft: dict[str, float]


def gated_runs(runs: dict[str, dict[str, dict]]) -> list[GatedRun]:
    """List all fine-tunings by GRPO that had a trust gate, on plain starts."""
    return [
        GatedRun(suite, seed, arm, gates["gate"], paired(plain["SFT"], plain[arm]))
        for suite, seeds in runs.items()
        for seed, entry in seeds.items()
        for arm, gates in entry["trust_gate"].items()
        for plain in [entry["outcomes"]["none"]]
        if arm != "RWR"
    ]


def gate_correlation(gated: Sequence[GatedRun]) -> tuple[float, float]:
    """Compute the rank correlation of gate and gain, and its one-sided p-value by permutations."""
    gates, gains = (torch.tensor(x) for x in zip(*((run.gate, run.against_sft["difference"]) for run in gated)))
    shuffled = gains[torch.rand(20_000, len(gains), generator=torch.Generator().manual_seed(0)).argsort(1)]
    order, by_chance = spearman(gates, gains), spearman(gates.expand_as(shuffled), shuffled)
    return order.item(), (by_chance >= order - 1e-9).double().mean().item()


def gain_table(gated: Sequence[GatedRun], threshold: float) -> str:
    """Tabulate gates and gains by reward: how they go together, and what a threshold would have stopped."""
    rows = []
    for name in ("all", "R2", "R3", "divergence"):
        of = [run for run in gated if name == "all" or name in run.arm]
        order, chance = gate_correlation(of)
        below = [run.against_sft["difference"] for run in of if run.gate < threshold]
        stopped = f"{sum(gain < 0 for gain in below)} losses, {sum(gain > 0 for gain in below)} gains"
        gates = [run.gate for run in of]
        gains = [100 * run.against_sft["difference"] for run in of]
        spans = f"{min(gates):.2f} to {max(gates):.2f}", f"{min(gains):+.1f} to {max(gains):+.1f}"
        rows.append([name, str(len(of)), *spans, f"{order:.2f} (p = {chance:.2g})", stopped])
    heads = ["reward", "runs", "gates", "gains, plain starts", "rank correlation", f"gate below {threshold}"]
    return table(heads, rows)
