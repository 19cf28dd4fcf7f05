"""Tables of docs/reliability.md from what tests/reliability.py and tests/mutate.py counted."""

from collections.abc import Iterator

from table_text import table

FATAL = "crash", "hang", "memory", "orphans"


def trials(report: dict, kind: str) -> Iterator[tuple[str, dict]]:
    """Yield the trials of one kind with their counts, by the name of what was tried."""
    for name, counts in report["trials"].items():
        if name.startswith(f"{kind}: "):
            yield name.removeprefix(f"{kind}: "), counts


def total(rows: list[list]) -> list[list]:
    """Return the rows and their sum."""
    return [*rows, ["all", *(sum(column) for column in zip(*(row[1:] for row in rows), strict=True))]]


def text(rows: list[list]) -> list[list[str]]:
    return [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]


def damaged_table(report: dict) -> str:
    """Tabulate damaged files by format, and how loading them ended."""
    ends = "same", "named", "unnamed", "other", "raw"
    rows = []
    for name, counts in trials(report, "files"):
        found = [counts.get(end, 0) for end in ends]
        fatal = sum(counts.get(end, 0) for end in FATAL)
        rows.append([name, sum(found) + fatal, *found, fatal])
    heads = ["damaged", "files", "loads the same", "refused, named", "refused, not named", "other content"]
    return table([*heads, "raw error", "crash, hang, memory"], text(total(rows)))


def interrupted_table(report: dict) -> str:
    """Tabulate writers by kills and full disks, and how their runs ended; full disks that were large enough are left
    out.
    """
    kills, disks, both = (dict(trials(report, kind)) for kind in ("kills", "full disks", "torchrun"))
    rows = []
    for name in dict.fromkeys([*kills, *disks]):
        killed, full = kills.get(name, {}), disks.get(name, {})
        hit = [full.get(end, 0) for end in ("named", "unnamed", "raw")]
        fatal = sum(counts.get(end, 0) for counts in (killed, full) for end in FATAL)
        ended = [sum(counts.get(end, 0) for counts in (killed, full)) for end in ("runs", "same")]
        rows.append([name, killed.get("kills", 0), sum(hit) + full.get("crash", 0), hit[0], *ended, fatal])
    for name, counts in both.items():
        ended = [counts.get(end, 0) for end in ("runs", "same", "orphans")]
        rows.append([f"{name}, torchrun with two processes", counts["kills"], 0, 0, *ended])
    heads = ["writer", "SIGKILLs", "full disks", "of these named", "runs that went on", "end as without interruption"]
    return table([*heads, "crash, hang, orphan"], text(total(rows)))


def refused_table(report: dict) -> str:
    """Tabulate wrong command lines by script, and how they ended."""
    ends = "one line", "more lines", "traceback", "accepted", "another status"
    rows = []
    for name, counts in trials(report, "commands"):
        found = [counts.get(end, 0) for end in ends]
        fatal = sum(counts.get(end, 0) for end in FATAL)
        rows.append([name, sum(found) + fatal, *found, fatal])
    heads = ["script", "wrong command lines", "one line, status 2", "more lines, status 2", "traceback", "accepted"]
    return table([*heads, "another status", "crash, hang, orphan"], text(total(rows)))


def noticed_table(report: dict) -> str:
    """Tabulate breakages of the code by folder, and how many of them its tests noticed."""
    counts: dict[str, list[float]] = {}
    for path, found in report["modules"].items():
        folder = path.rpartition("/")[0] or "stage scripts"
        broken = sum(found.get(verdict, 0) for verdict in ("caught", "survived", "no tests"))
        so_far = counts.get(folder, [0, 0, 0, 0.0])
        new = 1, broken, found.get("caught", 0), found["seconds"] / 60
        counts[folder] = [a + b for a, b in zip(so_far, new, strict=True)]
    rows = total([[folder, *found] for folder, found in sorted(counts.items())])
    return table(
        ["files of", "files", "breakages", "noticed", "minutes"], text([[*r[:4], f"{r[4]:.0f}"] for r in rows])
    )


def commands_of(report: dict) -> str:
    """List the commands that repeat what was counted."""
    lines = sorted({counts["command"] for counts in report["trials"].values()})
    return "\n".join(["```", *(f"python {line} --out results/reliability.json" for line in lines), "```"])
