"""Tables of docs/performance.md and docs/policy.md from the JSON files of benchmarks/."""

from table_text import interval, table


def step_table(report: dict) -> str:
    """Tabulate the phases of one fine-tuning step in percent of our step (rft_step.py)."""
    versions = report["versions"]
    whole = versions["ours"]["phases"]["total"]
    rows = [
        [phase, *(f"{100 * of['phases'][phase] / whole:.1f} %" for of in versions.values())]
        for phase in versions["ours"]["phases"]
    ]
    rows.append(["GFLOP", *(f"{of['flops'] / 1e9:.0f}" for of in versions.values())])
    rows.append(["share of the float32 peak", *(f"{100 * of['share_of_peak']:.0f} %" for of in versions.values())])
    return table(["phase", *versions], rows)


def faster_table(reports: dict[str, dict]) -> str:
    """Tabulate how many times faster our step is, in float32 and bfloat16, than the other versions (rft_step.py)."""
    rivals = "straightforward", "as released", "as released, bfloat16"
    rows = []
    for name, report in reports.items():
        for ours in ("ours", "ours, bfloat16"):
            found = [report["times_faster"][ours][rival] for rival in rivals]
            rows.append([f"{name}: {ours}", *(_times(of["times"], [of["least"], of["most"]]) for of in found)])
    return table(["times faster", *rivals], rows)


def _times(median: float, ends: list[float]) -> str:
    digits = 1 if median >= 10 else 2
    return f"{median:.{digits}f} {interval(ends, digits)}"


def rollout_table(report: dict) -> str:
    """Tabulate rollouts of the world model against transformers' generate (rollout.py)."""
    rows = []
    for name, of in report["versions"].items():
        if name != "ours":
            cells = _times(of["times_as_long"], of["spread"])
            low = _times(of["times_as_long_as_bfloat16"], of["spread_as_bfloat16"])
            rows.append([name, cells, low, f"{100 * of['equal_tokens']:.1f} %"])
    return table(["version", "times as long as ours", "times as long as ours in bfloat16", "equal tokens"], rows)


def undone_table(report: dict) -> str:
    """Tabulate our rollout with one optimisation undone, in times as long as ours (undone.py)."""
    kinds = "float32", "bfloat16"
    rows = [
        [name, *(_times(report[kind][name]["times_as_long"], report[kind][name]["spread"]) for kind in kinds)]
        for name in report["float32"]
        if name != "ours"
    ]
    return table(["undone", *kinds], rows)


def precision_table(reports: dict[str, dict]) -> str:
    """Tabulate training steps on one core in float32, in times as long as in bfloat16, and on both cores
    (precision.py).

    Args:
        reports: what each row's name begins with -> the report.
    """
    rows = []
    for where, report in reports.items():
        stages = {name: of for name, of in report.items() if isinstance(of, dict) and "times_faster" in of}
        for name, of in stages.items():
            found = [of["times_faster"].get(version) for version in ("bf16", "bf16_side_by_side")]
            cells = [_times(gain["median"], gain["spread"]) if gain else "" for gain in found]
            rows.append([f"{where}: {name}", *cells])
    columns = ["times as fast, bfloat16 over float32", "two in bfloat16 side by side, over one of two threads"]
    return table(["training step", *columns], rows)


def episodes_table(report: dict) -> str:
    """Tabulate the imagination of whole episodes, frame after frame (episodes.py): time, and memory per rollout."""
    rows = [
        [
            name,
            f"{of['frames_per_second']:.0f}",
            _times(of["times_as_long"], of["spread"]),
            *(f"{of['bytes'][part] / 2**10:.0f} KiB" for part in ("context", "chunk")),
        ]
        for name, of in report["versions"].items()
    ]
    heads = ["version", "frames a second", "times as long", "kept for the context", "kept for a chunk"]
    return table(heads, rows)


def pixels_table(found: dict[str, dict], what: str) -> str:
    """Tabulate pixel decode or image reward, in times as long as ours (pixels.py)."""
    rows = []
    for name, of in found.items():
        digits = 1 if of["flops"] < 1e10 else 0
        cells = _times(of["times_as_long"], of["spread"]), f"{of['flops'] / 1e9:.{digits}f}"
        rows.append([name, *cells, f"{100 * of['share_of_peak']:.0f} %"])
    return table([what, "times as long as ours", "GFLOP", "share of the float32 peak"], rows)


def distinct_table(report: dict) -> str:
    """Tabulate the frames of a start that differ, and what decoding each once gives (distinct.py)."""
    names = {"greedy": "greedy", "common": "common random numbers", "sample": "sampled"}
    groups = list(dict.fromkeys(name.split(", ")[1] for name in report["decode"]))
    rows = []
    for name, label in names.items():
        found = [report["decode"][f"{name}, {group}"] for group in groups]
        cells = [(f"{100 * of['distinct']:.0f} %", _times(of["times_faster"], of["spread"])) for of in found]
        rows.append([label, *(text for pair in cells for text in pair)])
    heads = [text for group in groups for text in (f"{group}: frames that differ", "times faster")]
    return table(["imagination", *heads], rows)


def training_table(report: dict) -> str:
    """Tabulate training steps of tokenizer and world model against straightforward ones (training.py)."""
    names = [name for name, of in report.items() if isinstance(of, dict) and "times_faster" in of]
    rows = [
        [
            name,
            _times(report[name]["times_faster"], report[name]["spread"]),
            f"{100 * report[name]['share_of_peak']:.0f} %",
        ]
        for name in names
    ]
    return table(["step", "times faster", "share of the peak"], rows)


def head_table(report: dict) -> str:
    """Tabulate the action head against a straightforward version (policy.py)."""
    names = {"chunk": "one chunk, one observation"}
    names["batch of chunks"] = f"a chunk for each of {report['config']['batch_size']} observations"
    names["head step"] = (
        f"training step of the head, {report['config']['batch_size']} observations x {report['config']['draws']} "
        "samples of tau and noise"
    )
    rows = []
    for name, label in names.items():
        of = report[name]
        compiled = "times_faster_compiled" in of
        cells = _times(of["times_faster"], of["spread"])
        second = _times(of["times_faster_compiled"], of["spread_compiled"]) if compiled else ""
        rows.append([label, cells, second, f"{of['flops'] / 1e9:.0f}", f"{100 * of['share_of_peak']:.0f} %"])
    return table(["", "times faster", "with the trunk compiled", "GFLOP", "share of the peak"], rows)


def libero_evaluation_table(report: dict) -> str:
    """Tabulate LIBERO's evaluation against a plain serial loop, on the same starts (libero_evaluation.py)."""
    rows = []
    for name, label in (("plain serial loop", "plain serial loop"), ("eval_libero.py", "`eval_libero.py`")):
        rows.append([label, f"{report['seconds'][name]:.0f}", f"{report['minutes_of_500'][name]:.0f}"])
    equal = f"{report['same_outcome']} of {report['episodes']}"
    steps = f"{report['same_outcome_and_steps']} of {report['episodes']}"
    heads = [f"{report['episodes']} episodes", "seconds", "500 episodes, minutes"]
    text = (
        f"\nTimes as fast: {report['times_as_long']:.1f}. Equal outcomes: {equal}; equal numbers of steps too: {steps}."
    )
    return table(heads, rows) + "\n" + text
