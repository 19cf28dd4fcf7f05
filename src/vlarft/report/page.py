"""The page: a section for each run, with facts, tables, curves, films and pictures."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vlarft.report.figures import (
    Film,
    Picture,
    by_number,
    decimal,
    film,
    group_film,
    percent,
    picture,
    plot,
    rate_plot,
    span,
)
from vlarft.report.runs import Kind, find_runs, named, read_config, read_json, read_log
from vlarft.run.checkpoint import read_header, write_atomic
from vlarft.run.optional import optional

MOST_FILMS = 6  # of an evaluation


class Table(NamedTuple):
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Section:
    """What the page says of one folder; empty parts are left out."""

    title: str
    facts: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Picture] = field(default_factory=list)
    films: list[Film] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def _rates_table(entries: Mapping[str, Mapping[str, Any]]) -> Table:
    """Tabulate rows of eval_libero.py: the rate of each policy, and its difference to the first one."""
    rows = []
    for name, entry in entries.items():
        gain, against, p_value = entry.get("against_first"), "", ""
        if gain:
            against = f"{decimal(100 * gain['difference'], '+.1f')} {span(gain, '+.1f', 100)}"
            p_value = decimal(gain["p_value"], ".2g")
        rows.append((name, percent(entry["all"]), str(entry["all"]["episodes"]), against, p_value))
    header = "policy", "success, 95 % interval", "episodes", "difference on the same starts [points]", "p (McNemar)"
    if not any("against_first" in entry for entry in entries.values()):
        header, rows = header[:3], [row[:3] for row in rows]
    return Table("Success rates", header, rows)


def _correlation(spearman: float, standard_error: float, **_: float) -> str:
    return f"{decimal(spearman, '.2f')} ± {decimal(standard_error, '.2f')}"


def demo_section(folder: Path) -> Section:
    """Make the section of a demo: its summary.json, stages.json and pictures."""
    section, summary = Section(f"Pipeline: {folder.resolve().name}"), read_json(folder / "summary.json")
    with named(folder / "summary.json", "a summary of demo.py"):
        for name in ("config", "machine", "versions"):
            section.facts[name] = ", ".join(f"{key} {value}" for key, value in summary.get(name, {}).items())
        section.facts["minutes"] = decimal(summary["minutes"], ".1f") if "minutes" in summary else ""
        gate = summary.get("trust_gate", {})
        for family, chunks in (("policy", "of the policy"), ("dataset", "around the demonstrations'")):
            if f"gate_{family}" in gate:
                found = _correlation(gate[f"gate_{family}"], gate[f"gate_{family}_se"])
                section.facts[f"trust gate, chunks {chunks}"] = f"rank correlation of reward and action error {found}"
        if rows := summary.get("evaluation"):
            section.tables.append(_rates_table(rows))
            section.plots += rate_plot({name: row["all"] for name, row in rows.items()})
    ran = read_json(folder / "stages.json")
    with named(folder / "stages.json", "a record of stages"):
        stages = [
            (name, decimal(stage["seconds"] / 60, ".1f"), decimal(stage["peak_bytes"] / 2**30, ".2f"))
            for name, stage in ran.items()
            if stage.get("done")
        ]
    if stages:
        section.tables.append(Table("Stages that have ended", ("stage", "minutes", "peak memory [GiB]"), stages))
    if (path := folder / "before_after.gif").is_file():
        section.films.append(film("Starts that one policy alone wins: the earlier policy left", {"": path}))
    section.pictures += picture(folder / "demonstrations.png", "a demonstration of each task")
    return section


def train_section(folder: Path, kind: Kind, evaluated: bool) -> Section:
    """Make the section of a training run; `evaluated`: the page shows an evaluation of its world model, too."""
    section = Section(f"{kind.title}: {folder.resolve().name}")
    log = read_log(folder) if (folder / "log.jsonl").is_file() else {}
    if log:
        section.facts["steps done"] = str(int(max(rows[-1, 0] for rows in log.values())) + 1)
    elif kind.curves:
        section.notes.append("Nothing is logged yet.")
    if "minutes" in log:
        section.facts["minutes"] = decimal(log["minutes"][-1, 1], ".1f")
    if (folder / "model.safetensors").is_file():
        header = read_header(folder)
        section.facts["model"] = header.cls
        for name in ("train_episodes", "held_out_episodes"):
            if name in header.extra:
                section.facts[name.replace("_", " ")] = str(len(header.extra[name]))
    for title, names in kind.curves.items():
        series = {name: log[name] + (1, 0) for name in names if name in log}  # the log counts steps from 0
        section.plots += plot(title, series)
    section.pictures += picture(folder / "reconstructions.png", "true frames, and what the tokenizer decodes")
    section.pictures += picture(folder / "actions.png", "actions before and after (Fig. 4)")
    if kind.script == "train_rft.py" and (folder / "rollouts.npz").is_file():
        found, curves = group_film(folder / "rollouts.npz")
        section.films.append(found)
        section.plots += curves
    elif found := picture(folder / "rollouts.png", "best and worst imagination of a group, below their reference"):
        if kind.script == "train_wm.py":
            found = [found[0]._replace(caption="held-out segments: true, and imagined from the first frame")]
            if not evaluated:
                section.notes.append("No film: eval_wm.py writes films of true and imagined frames.")
        else:
            section.notes.append("No rewards per frame: the version that trained this kept the picture alone.")
        section.pictures += found
    return section


def _short_names(paths: Sequence[str]) -> list[str]:
    """Return the names of run folders where they tell policies apart, else their paths."""
    paths = [path.removesuffix("/model.safetensors") for path in paths]
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else paths


def eval_section(folder: Path, kind: Kind) -> Section:
    """Make the section of a run of eval_libero.py: its success rates, by task, and its films."""
    section, results = Section(f"{kind.title}: {folder.resolve().name}"), read_json(folder / "results.json")
    if not results:
        section.notes.append("The evaluation has not ended: there is no results.json yet.")
        return section
    with named(folder / "results.json", "a result of eval_libero.py"):
        entries = dict(zip(_short_names([e["policy"] for e in results["policies"]]), results["policies"], strict=True))
        section.tables.append(_rates_table(entries))
        if len(entries) > 1:
            section.plots += rate_plot({name: entry["all"] for name, entry in entries.items()})
        suites, tasks, rows = results["config"]["suites"], {}, []
        for suite in suites:
            names = list(next(iter(entries.values()))["suites"][suite]["tasks"])
            numbers = results.get("tasks", {}).get(suite) or results["config"]["tasks"] or range(len(names))
            tasks |= {(suite, str(number)): name.replace("_", " ") for number, name in zip(numbers, names)}
            for name in names:
                cells = [percent(entry["suites"][suite]["tasks"][name]) for entry in entries.values()]
                rows.append((name.replace("_", " ") + (f" ({suite})" if len(suites) > 1 else ""), *cells))
        if len(rows) > 1:
            section.tables.append(Table("Success by task, 95 % intervals", ("task", *entries), rows))
    section.films = _eval_films(folder, list(entries), tasks)
    if not section.films:
        section.notes.append(
            "No films: the evaluation's command with --animate 2 --animate-failed 2 writes some; no episode is played "
            "again."
        )
    return section


def _eval_films(folder: Path, policies: list[str], tasks: Mapping[tuple[str, str], str]) -> list[Film]:
    """Collect the films of eval_libero.py, all policies of a start side by side; those with both outcomes first."""
    found: dict[tuple, dict[str, Path]] = {}
    for path in sorted(folder.glob("policy*")):
        if match := re.fullmatch(r"policy(\d+)_(\w+)_(\d+)_(\d+)_(success|failure)\.(gif|mp4)", path.name):
            suite, task, state, outcome = match.groups()[1:5]
            if (number := int(match[1])) < len(policies):
                found.setdefault((suite, task, int(state)), {})[f"{policies[number]}: {outcome}"] = path
    outcomes = {start: {label.rpartition(" ")[2] for label in films} for start, films in found.items()}
    chosen = sorted(found, key=lambda start: (-len(outcomes[start]), -len(found[start]), start[2], start))
    failures = [start for start in chosen if outcomes[start] == {"failure"}][: MOST_FILMS // 3]
    chosen = [start for start in chosen if start not in failures][: MOST_FILMS - len(failures)] + failures
    titles = {start: f"{tasks.get(start[:2], f'{start[0]}, task {start[1]}')}, start {start[2]}" for start in chosen}
    return [film(title, found[start]) for start, title in titles.items()]


def eval_wm_section(folder: Path, kind: Kind) -> Section:
    """Make the section of a run of eval_wm.py: its metrics, and its films."""
    section, results = Section(f"{kind.title}: {folder.resolve().name}"), read_json(folder / "results.json")
    names = {
        "psnr_moving": "PSNR of moving pixels [dB]", "psnr": "PSNR [dB]", "ssim": "SSIM",
        "perceptual": "perceptual distance", "mse": "MSE", "still_error": "absolute error where nothing moves",
    }  # fmt: skip
    with named(folder / "results.json", "a result of eval_wm.py"):
        both = {
            "imagined": results["frames"]["all"]["imagined"],
            "first frame copied": results["frames"]["all"]["copy"],
        }
        section.facts["held-out episodes"] = str(results["held_out_episodes"])
        rows = [
            (text, *(decimal(found[name][-1]) for found in both.values()))
            for name, text in names.items()
            if name in both["imagined"]
        ]
        section.tables.append(Table("Frames, mean over a chunk", ("metric", *both), rows))
        series = {label: found["psnr_moving"][:-1] for label, found in both.items()}  # without the mean
        section.plots += plot(names["psnr_moving"], {k: by_number(v) for k, v in series.items()}, "frame")
        if whole := results.get("episodes"):
            last, rows = whole["last_chunk"], []
            for name, label in names.items():
                if name not in last["imagined"]:
                    continue
                cells = [last[method][name] for method in ("imagined", "copy", "difference")]
                rows.append((label, *(f"{decimal(cell['value'])} {span(cell)}" for cell in cells)))
            header = "metric", "imagined", "first frame copied", "difference"
            section.tables.append(Table("Whole episodes: the last chunk, 95 % intervals", header, rows))
            series = {"imagined": whole["chunks"]["imagined"], "first frame copied": whole["chunks"]["copy"]}
            curves = {label: by_number(found["psnr_moving"]) for label, found in series.items()}
            section.plots += plot(f"whole episodes: {names['psnr_moving']}", curves, "chunk")
            rows = [
                (frames, f"{decimal(100 * found['agreement'], '.1f')} % {span(found, '.1f', 100)}",
                 f"{found['false_successes']} of {found['true_failures']}",
                 f"{found['false_failures']} of {found['true_successes']}")
                for frames, found in whole["outcomes"].items()
            ]  # fmt: skip
            if rows:
                header = "frames", "judged right, 95 % interval", "false successes", "false failures"
                section.tables.append(Table("Outcomes by the success model", header, rows))
        if ranked := results.get("sensitivity"):
            rows = []
            for name in dict.fromkeys(name for found in ranked.values() for name in found):
                cells = [found[name]["all"] if name in found else None for found in ranked.values()]
                rows.append((name, *("–" if cell is None else _correlation(**cell) for cell in cells)))
            caption = "Perturbed chunks: rank correlation ± standard error, within a start"
            header = "ranked by", *(f"with the error of: {truth}" for truth in ranked)
            section.tables.append(Table(caption, header, rows))
    titles = {
        "rollouts.gif": "Held-out chunks: above true, below imagined",
        "episodes.gif": "Whole held-out episodes: left recorded, right imagined from the first frame",
    }
    section.films += [film(title, {"": folder / name}) for name, title in titles.items() if (folder / name).is_file()]
    return section


def _plain(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return ", ".join(str(one).removesuffix("/model.safetensors") for one in values)  # a run folder names its model


def sections(runs: Sequence[Path]) -> list[Section]:
    """Make all sections of the page, those of the runs in turn."""
    found: dict[Path, tuple[Kind | None, Path]] = {}  # each folder once
    for run in runs:
        for kind, folder in find_runs(run):
            found.setdefault(folder.resolve(), (kind, folder))
    evaluated, parts = any(kind and kind.script == "eval_wm.py" for kind, _ in found.values()), []
    for kind, folder in found.values():
        if kind is None:
            section = demo_section(folder)
        elif kind.script == "eval_libero.py":
            section = eval_section(folder, kind)
        elif kind.script == "eval_wm.py":
            section = eval_wm_section(folder, kind)
        else:
            section = train_section(folder, kind, evaluated)
        if kind:
            config = read_config(folder)
            section.options = {name: _plain(value) for name, value in config.items()}
            chosen = {name: _plain(config[name]) for name in kind.options if config.get(name) is not None}
            section.facts = {"script": kind.script, **chosen, **section.facts}
        section.facts = {"folder": str(folder), **{name: text for name, text in section.facts.items() if text}}
        parts.append(section)
    return parts


def write_report(runs: Sequence[str | Path], out: str | Path) -> None:
    """Write the page of runs.

    Args:
        runs: run folders.
        out: the HTML file.

    Raises:
        FileNotFoundError: a run that does not exist.
        ValueError: a folder without a run, or a damaged file, which is named.
        ImportError: matplotlib, pillow or jinja2 is missing.
    """
    write_page(", ".join(str(run) for run in runs), sections([Path(run) for run in runs]), out)


def write_page(title: str, parts: Sequence[Section], out: str | Path) -> None:
    """Write a page of sections, see `write_report`."""
    with optional("a report needs jinja2", "plots"):
        import jinja2
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    page = template.render(title=title, sections=parts)
    write_atomic(out, lambda tmp: tmp.write_text(page, encoding="utf-8"))
