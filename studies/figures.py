"""The figures of the documentation: one message each, intervals drawn, colours that differ in grey as well."""

from collections.abc import Sequence
from pathlib import Path

from findings import gains
from outcomes import GatedRun, gate_correlation

DARK, ORANGE = "#1b4965", "#d1660a"


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    _pyplot().close(figure)


def _errors(found: Sequence[dict[str, float]]) -> tuple[list[float], list[list[float]]]:
    """Return differences and the lengths of their intervals below and above, in percentage points."""
    middle, low, high = ([100 * of[end] for of in found] for end in ("difference", "low", "high"))
    return middle, [[m - a for m, a in zip(middle, low)], [b - m for m, b in zip(middle, high)]]


def draw_findings(runs: dict[str, dict[str, dict]], path: Path) -> None:
    """Draw the gains of the eight policies over SFT, from the sampled x_0 and from x_0 = 0."""
    rows = gains(runs)
    figure, axis = _pyplot().subplots(figsize=(8, 4), layout="constrained")
    for name, colour, marker, shift in (("sampled", DARK, "o", 0.13), ("zero", ORANGE, "D", -0.13)):
        places = [len(rows) - 1 - at + shift for at, of in enumerate(rows) if getattr(of, name)]
        middle, errors = _errors([getattr(of, name) for of in rows if getattr(of, name)])
        label = {"sampled": "played from the sampled x_0", "zero": "played from x_0 = 0"}[name]
        axis.errorbar(middle, places, xerr=errors, fmt=marker, color=colour, capsize=3, linewidth=1.5, label=label)
    axis.set_yticks(range(len(rows))[::-1], [of.label for of in rows])
    axis.axvline(100 * rows[0].zero["difference"], color=ORANGE, linestyle="--", linewidth=1)
    axis.set(xlim=(0, 13), xlabel="gain over SFT [percentage points], 95 % interval")
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2, frameon=False)
    _save(figure, path)


def draw_gates(runs: Sequence[GatedRun], threshold: float, path: Path) -> None:
    """Draw the gains of fine-tunings against what the trust gate said before them, one mark a reward."""
    styles = {"R2": ("^", "0.55"), "R3": ("o", DARK), "divergence": ("s", ORANGE)}
    figure, axis = _pyplot().subplots(figsize=(8, 4.5), layout="constrained")
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.axvline(threshold, color="black", linestyle="--", linewidth=1)
    for reward, (marker, colour) in styles.items():
        if of := [run for run in runs if reward in run.arm]:
            middle, errors = _errors([run.against_sft for run in of])
            label = f"{reward}, {len(of)} runs: {gate_correlation(of)[0]:.2f}"
            bars = {"elinewidth": 0.7, "markersize": 5, "label": label}
            axis.errorbar([run.gate for run in of], middle, errors, fmt=marker, color=colour, **bars)
    order, chance = gate_correlation(runs)
    axis.text(threshold + 0.005, -24, "threshold", fontsize="small")
    axis.set(xlabel="trust gate before the first step (rank correlation, 12 starts)", ylim=(-26, 14))
    axis.set(ylabel="gain over SFT, plain starts\n[percentage points], 95 % interval")
    title = f"rank correlation of gate and gain: all {len(runs)} runs {order:.2f} (p = {chance:.2g}); by reward below"
    axis.set_title(title, fontsize="medium")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    _save(figure, path)
