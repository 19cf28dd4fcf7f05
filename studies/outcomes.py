"""Rates and paired differences over the runs that rft_study.py gathers: suites and seeds.

    python studies/outcomes.py results/rft_study.json docs/images/trust_gate.png

prints the tables of docs/study.md, and draws what the trust gate said of a reward before the first step against what
fine-tuning with it gained.

Outcomes are text, "1" for a success and "0" for a failure, start by start in one order for all policies.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from stages import rate, show_rate
from tables import percent, points, shift, table_row

from vlarft.statistics import paired_difference, spearman

ALL = "all"  # suites, or kinds of starts
MIDDLE, GRIPPER, REDRAWN = "SFT, x_0 = 0", "SFT, gripper drawn", "SFT, other x_0"
CONTROLS = "extra SFT", "extra SFT, 400 steps", "RWR", "regression"
LONG = "RFT R1 per step, 400 steps"
# that the others are compared with
RIVALS = "SFT", *CONTROLS, "RFT R3", "RFT R1 per step", LONG
RIVALS += MIDDLE, GRIPPER, "extra SFT, 400 steps, x_0 = 0", f"{LONG}, x_0 = 0"
# starts by what SFT did there: from the x_0 that was drawn, and from the middle of the noise
FATES = {"01": "lost by the draw", "00": "lost either way", "10": "won by the draw", "11": "won either way"}


def compare(runs: Sequence[dict[str, str]]) -> dict[str, dict]:
    """Rates of each policy, and paired differences to `RIVALS`.

    Args:
        runs: of each seed and suite, name -> outcomes start by start, "0" or "1". A policy is compared with a rival
            over the runs that have both.
    """
    found: dict[str, dict] = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        own = [run[name] for run in runs if name in run]
        found[name] = {"all": _rate("".join(own)), "runs": [_rate(outcomes) for outcomes in own]}
        for rival in RIVALS:
            pairs = [(run[rival], run[name]) for run in runs if rival in run and name in run]
            if pairs and rival != name:
                pooled = _against("".join(a for a, _ in pairs), "".join(b for _, b in pairs))
                apart = [_against(*pair)["difference"] for pair in pairs]
                found[name][f"against {rival}"] = {**pooled, "runs": apart}
    return found


def _rate(outcomes: str) -> dict[str, float]:
    return rate([won == "1" for won in outcomes])


def _against(first: str, second: str) -> dict[str, float]:
    return paired_difference([won == "1" for won in first], [won == "1" for won in second])._asdict()


def summarise(runs: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """`compare` of the seeds of each suite, and of all suites, for each kind of start and for all kinds together."""
    found = {}
    for suite in (*runs, ALL):
        entries = [e for name, seeds in runs.items() if suite in (name, ALL) for e in seeds.values()]
        kinds = list(dict.fromkeys(kind for e in entries for kind in e["outcomes"]))
        found[suite] = {kind: compare([e["outcomes"].get(kind, {}) for e in entries]) for kind in kinds}
        found[suite][ALL] = compare([_all_kinds(e["outcomes"]) for e in entries])
    return found


def _all_kinds(outcomes: dict[str, dict[str, str]]) -> dict[str, str]:
    """Outcomes of the policies that played every kind of start, one kind after the other."""
    names = [name for name in next(iter(outcomes.values())) if all(name in found for found in outcomes.values())]
    return {name: "".join(found[name] for found in outcomes.values()) for name in names}


def fates(runs: Sequence[dict[str, str]]) -> dict[str, dict[str, dict]]:
    """Rates of each policy where SFT won and lost, from the x_0 that was drawn and from 0: name -> `FATES` -> rate.

    A start that is lost by the draw alone is won by another draw, or with less spread; one that is lost either way
    needs a better middle. `REDRAWN` says how many of them chance alone would win.
    """
    won: dict[str, dict[str, str]] = {}
    for run in (run for run in runs if MIDDLE in run):
        for name in run.keys() - {"SFT", MIDDLE}:
            groups = won.setdefault(name, dict.fromkeys(FATES, ""))
            for drawn, middle, outcome in zip(run["SFT"], run[MIDDLE], run[name]):
                groups[drawn + middle] += outcome
    return {name: {fate: _rate(groups[fate]) for fate in FATES} for name, groups in won.items() if all(groups.values())}


def fates_table(report: dict) -> str:
    """Markdown of `fates` over all runs and kinds of starts."""
    entries = [_all_kinds(e["outcomes"]) for seeds in report["runs"].values() for e in seeds.values()]
    lines = [table_row(["policy", *FATES.values()]), "|---" * (1 + len(FATES)) + "|"]
    order = list(dict.fromkeys(name for entry in entries for name in entry))
    for name, found in sorted(fates(entries).items(), key=lambda item: order.index(item[0])):
        cells = [f"{percent(found[fate])} of {found[fate]['episodes']}" for fate in FATES]
        lines.append(table_row([_label(name), *cells]))
    return "\n".join(lines)


def table(summary: dict) -> str:
    """One row per policy, suite and kind of start."""
    lines = []
    for suite, kinds in summary.items():
        for kind, found in kinds.items():
            lines.append(f"{suite}, starts: {kind}")
            for name, values in found.items():
                lines.append(f"  {name:<16} {show_rate(values['all'], values.get('against SFT'))}")
    return "\n".join(lines)


def markdown(report: dict, suite: str) -> str:
    """The tables of one suite: success, and what changed in the chunks; or of all suites, success of the policies that
    more than one of them has.
    """
    kinds, seeds = report["summary"][suite], report["runs"].get(suite, {})
    shared = set(kinds["none"])
    if suite == ALL and len(report["runs"]) > 1:
        having = Counter(name for of in report["runs"] for name in report["summary"][of]["none"])
        shared = {name for name, count in having.items() if count > 1}
    perturbed = [kind for kind in kinds if kind not in ("none", ALL)]
    lines = [table_row(["policy", "plain starts", "difference", "seeds", *perturbed, "all starts"])]
    lines += ["|---" * lines[0].count(" | ") + "|---|"]
    for name in (name for name in kinds["none"] if name in shared):
        plain = kinds["none"][name]
        apart = plain.get("against SFT")
        rates = apart["runs"] if apart else [found["rate"] for found in plain["runs"]]
        signed = "+.1f" if apart else ".1f"
        cells = [
            _label(name),
            percent(plain["all"]),
            points(apart),
            ", ".join(f"{100 * r:{signed}}" for r in rates),
        ]
        for kind in (*perturbed, ALL):
            found = kinds[kind].get(name)
            apart = (found or {}).get("against SFT")
            cells.append(points(apart) if apart else f"{100 * found['all']['rate']:.1f} %" if found else "")
        lines.append(table_row(cells))
    names = [
        name
        for name in kinds["none"]
        if any("change" in e["chunks"].get(name, {}).get("spread", {}) for e in seeds.values())
    ]
    if names:
        heads = [f"{what}, seed {seed}" for what in ("true error", "from x_0 = 0", "spread") for seed in seeds]
        lines += ["", table_row(["change of", *heads, "minutes", "trust gate"]), "|---" * (len(heads) + 3) + "|"]
        lines += [
            table_row([_label(name), *_changes(seeds, name), _minutes(seeds, name), _gates(seeds, name)])
            for name in names
        ]
    return "\n".join(lines)


def _changes(seeds: dict[str, dict], name: str) -> list[str]:
    cells = []
    for kind in "sampled", "zero", "spread":
        for entry in seeds.values():
            change = entry["chunks"].get(name, {}).get(kind, {}).get("change")
            cells.append("" if change is None else shift(kind, change))
    return cells


def _minutes(seeds: dict[str, dict], name: str) -> str:
    return f"{mean(e['minutes'][name] for e in seeds.values() if name in e['minutes']):.1f}"


def _gates(seeds: dict[str, dict], name: str) -> str:
    """What the trust gate said before the first step, seed by seed."""
    found = [entry["trust_gate"].get(name, {}).get("gate") for entry in seeds.values()]
    return ", ".join(f"{value:.2f}" for value in found if value is not None)


def _label(name: str) -> str:
    return name if name.startswith("SFT") else "+ " + name.removeprefix("RFT ")


class GatedRun(NamedTuple):
    """A fine-tuning of one suite and seed: what the gate said before, and its paired difference to SFT."""

    suite: str
    seed: str
    arm: str
    gate: float
    against_sft: dict[str, float]


def gated_runs(report: dict) -> list[GatedRun]:
    """All fine-tunings by GRPO that had a trust gate, on plain starts."""
    return [
        GatedRun(suite, seed, arm, gates["gate"], _against(plain["SFT"], plain[arm]))
        for suite, seeds in report["runs"].items()
        for seed, entry in seeds.items()
        for arm, gates in entry["trust_gate"].items()
        for plain in [entry["outcomes"]["none"]]
        if arm != "RWR"
    ]


def show_gates(gated: Sequence[GatedRun]) -> None:
    """Print gates and gains, and how they go together."""
    for run in sorted(gated, key=lambda run: run.gate):
        print(f"{run.suite}, seed {run.seed}, {run.arm}: gate {run.gate:.2f}, {points(run.against_sft)}")
    gates, gains = (torch.tensor(x) for x in zip(*((run.gate, run.against_sft["difference"]) for run in gated)))
    shuffled = gains[torch.rand(100_000, len(gains), generator=torch.Generator().manual_seed(0)).argsort(1)]
    order, by_chance = spearman(gates, gains), spearman(gates.expand_as(shuffled), shuffled)
    chance = (by_chance >= order - 1e-9).double().mean()
    print(f"rank correlation of gate and gain, {len(gated)} runs: {order:.2f}, p = {chance:.2g} (permutations)")


def draw_gates(runs: Sequence[GatedRun], path: Path) -> None:
    """PNG of gains against gates, with 95 % intervals; one colour an arm, one mark a suite."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms, suites = (list(dict.fromkeys(getattr(run, name) for run in runs)) for name in ("arm", "suite"))
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    axis.axhline(0, color="grey", linewidth=0.8)
    for arm, suite in dict.fromkeys((run.arm, run.suite) for run in runs):
        own = [run for run in runs if (run.arm, run.suite) == (arm, suite)]
        ends = [[100 * run.against_sft[end] for run in own] for end in ("difference", "low", "high")]
        bars = [[m - low for m, low in zip(*ends[:2])], [high - m for m, high in zip(ends[0], ends[2])]]
        style = {
            "fmt": "osD^v"[suites.index(suite)],
            "color": plt.get_cmap("tab20")(arms.index(arm) % 20),
            "capsize": 2,
        }
        label = f"{arm.removeprefix('RFT ')}, {suite.removeprefix('tabletop_')}"
        axis.errorbar([run.gate for run in own], ends[0], bars, label=label, **style)
    axis.set(xlabel="trust gate before the first step", ylabel="success against SFT, points")
    figure.legend(fontsize=8, loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    study, picture = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name in study["summary"]:
        print(f"{name}\n\n{markdown(study, name)}\n")
    print(f"where SFT won and lost\n\n{fates_table(study)}\n")
    if gated := gated_runs(study):
        show_gates(gated)
        draw_gates(gated, picture)
