"""What the cells of `rft_factors.py` gained, from their outcomes start by start, and their tables.

Outcomes are text as in outcomes.py. Cells of the first versions of the script have counts instead: under "success", for
each kind of start, episodes, wins, and starts that only the policy before or only the cell wins; under "against" the
same two counts over all starts, against other cells.
"""

import re
from collections.abc import Iterable, Sequence

import torch
from labels import STARTS, cell, note
from outcomes import ALL, paired, rate
from table_text import difference, percent, points, share, shift, table


def success(before: dict, after: dict) -> dict[str, dict]:
    """Compute a cell's rates on each kind of start and on all, with the paired differences to the policy before."""
    if "outcomes" in after:
        first, second = ({**of["outcomes"], ALL: "".join(of["outcomes"].values())} for of in (before, after))
        return {kind: {**rate(won), "against": paired(first[kind], won)} for kind, won in second.items()}
    names = "won", "episodes", "only_before", "only_after"
    counts = {kind: [found[name] for name in names] for kind, found in after["success"].items()}
    counts[ALL] = [sum(column) for column in zip(*counts.values())]
    return {
        kind: {**share(won, episodes), "against": difference(*alone, episodes)}
        for kind, (won, episodes, *alone) in counts.items()
    }


def base_rates(before: dict) -> dict[str, dict]:
    """Compute the rates of a policy that cells go on from, on each kind of start and on all of them."""
    if "outcomes" in before:
        counts = {kind: [text.count("1"), len(text)] for kind, text in before["outcomes"].items()}
    else:
        counts = {kind: [found["won"], found["episodes"]] for kind, found in before["success"].items()}
    counts[ALL] = [sum(column) for column in zip(*counts.values())]
    return {kind: share(*found) for kind, found in counts.items()}


def against(cells: dict[str, dict], rival: str, name: str) -> dict | None:
    """Compute the paired difference of a cell to another one over all starts; None where it was not recorded."""
    first, second = cells[rival], cells[name]
    if "outcomes" in first and "outcomes" in second and name != rival:
        return paired(*("".join(of["outcomes"][kind] for kind in second["outcomes"]) for of in (first, second)))
    if rival in second.get("against", {}):
        episodes = sum(found["episodes"] for found in second["success"].values())
        return difference(*second["against"][rival], episodes)
    return None


def repeated(base: dict[str, dict], cells: dict[str, dict]) -> dict[str, dict]:
    """Compare cells that were run with several seeds of the fine-tuning to their policy and to each other: "runs", the
    differences seed by seed, and their mean with a 95 % interval over the starts. That interval does not cover what
    other seeds would do: see how far the runs lie apart.
    """
    groups: dict[str, list[dict]] = {}
    for name, found in cells.items():
        if "outcomes" in found:
            groups.setdefault(re.sub(r", seed \d+$", "", name), []).append(found)
    groups = {name: group for name, group in groups.items() if len(group) > 1}
    won = {name: _wins(group) for name, group in groups.items()}
    before = {start: _wins([of]) for start, of in base.items() if "outcomes" in of}
    found = {}
    for name, after in won.items():
        start = groups[name][0]["policy"]
        others = {other: of for other, of in won.items() if other != name and groups[other][0]["policy"] == start}
        runs = (after.double() - before[start].double()).mean(1).tolist()
        found[name] = {"runs": runs, "against_base": over_starts(before[start], after)}
        found[name]["against"] = {other: over_starts(of, after) for other, of in others.items()}
    return found


def _wins(group: Sequence[dict]) -> torch.Tensor:
    """Stack the outcomes of policies on the same starts, (runs, starts)."""
    return torch.tensor([[won == "1" for won in "".join(of["outcomes"].values())] for of in group])


def over_starts(first: torch.Tensor, second: torch.Tensor) -> dict[str, float]:
    """Compute the mean difference of outcomes (runs, starts) on the same starts, with its 95 % interval; each start
    counts once, with the mean of its runs.
    """
    change = second.double().mean(0) - first.double().mean(0)
    mean, half = change.mean().item(), 1.96 * change.std().item() / len(change) ** 0.5
    return {"difference": mean, "low": mean - half, "high": mean + half}


def cell_table(report: dict, names: Iterable[str] | None = None, rival: str | None = None) -> str:
    """Make a table with one row per cell: success on all starts, the gain over the policy before, what changed in the
    chunks.

    Args:
        report: a JSON file of `rft_factors.py`.
        names: its cells, in this order; None for all of them.
        rival: a cell that the others are compared with, start by start.
    """
    cells, base = report["cells"], report["base"]
    names = list(cells if names is None else names)
    gated = any(cells[name]["gate"] for name in names)
    rows = []
    for name in names:
        found, chunks = success(base[cells[name]["policy"]], cells[name])[ALL], cells[name]["chunks"]
        row = [cell(name), percent(found), points(found["against"])]
        row += [points(against(cells, rival, name))] if rival else []
        row += [shift(kind, chunks[kind]) for kind in ("played", "zero", "std")]
        minutes, gate = cells[name]["minutes"], cells[name]["gate"].get("gate")
        row += ["" if minutes is None else f"{minutes:.1f}"]
        row += ["" if gate is None else f"{gate:.2f}"] if gated else []
        rows.append(row)
    heads = ["cell", "success", "gain", *([f"against {cell(rival)}"] if rival else [])]
    heads += ["true error [mm]", "true error from x_0 = 0 [mm]", "std over x_0", "minutes"]
    return table([*heads, "trust gate"] if gated else heads, rows) + note(names)


def start_table(report: dict, names: Iterable[str] | None = None) -> str:
    """Tabulate the gains of cells on each kind of start, with the rates of the policies that they go on from in the
    first rows.
    """
    cells, base = report["cells"], report["base"]
    names = list(cells if names is None else names)
    found = {name: success(base[cells[name]["policy"]], cells[name]) for name in names}
    kinds = list(next(iter(found.values())))
    starts = dict.fromkeys(cells[name]["policy"] for name in names)
    rows = [["the policy before", *(percent(base_rates(base[start])[kind]) for kind in kinds)] for start in starts]
    rows += [[cell(name), *(points(found[name][kind]["against"]) for kind in kinds)] for name in names]
    return table(["cell", *(STARTS[kind] for kind in kinds)], rows) + note(names)


def repeated_table(report: dict) -> str:
    """Tabulate cells with several seeds of the fine-tuning: mean gain over starts, by run, and against each other."""
    found = repeated(report["base"], report["cells"])
    rows = []
    for name, of in found.items():
        runs = ", ".join(f"{100 * gain:+.1f}" for gain in of["runs"])
        others = "; ".join(f"{points(apart)} against {cell(other)}" for other, apart in of["against"].items())
        rows.append([cell(name), runs, points(of["against_base"]), others])
    return table(["cell", "gain by seed", "mean gain, interval over the starts", "compared"], rows) + note(found)
