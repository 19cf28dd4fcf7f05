"""The JSON files of results/studies/: runs alone, no summaries, short enough to read and to compare in a diff."""

import json
from collections.abc import Sequence
from pathlib import Path

from vlarft.run.checkpoint import write_atomic

STUDIES = Path(__file__).resolve().parents[1] / "results" / "studies"
DIGITS = 5  # significant digits of a measured number; tables show two or three
WIDTH = 160  # columns; a value that fits stays on one line


def read(name: str) -> dict:
    """Read a committed file."""
    return json.loads((STUDIES / f"{name}.json").read_text())


def rounded(value: object) -> object:
    """Round the floats of a JSON value to `DIGITS` significant digits."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def write(path: str | Path, report: dict) -> None:
    """Write a file atomically, each run on lines of its own."""
    text = _text(report, 0) + "\n"
    write_atomic(path, lambda tmp: tmp.write_text(text))


def _text(value: object, indent: int) -> str:
    flat = json.dumps(value, ensure_ascii=False)
    if len(flat) + indent <= WIDTH or not isinstance(value, (dict, list)):
        return flat
    if isinstance(value, list) and not any(isinstance(item, (dict, list)) for item in value):
        return flat  # numbers of one course, however many
    if isinstance(value, dict):
        items = [f"{json.dumps(name, ensure_ascii=False)}: {_text(item, indent + 1)}" for name, item in value.items()]
    else:
        items = [_text(item, indent + 1) for item in value]
    first, last = "{}" if isinstance(value, dict) else "[]"
    between = "\n" + " " * (indent + 1)
    return first + between + f",{between}".join(items) + "\n" + " " * indent + last


def columns(rows: Sequence[dict]) -> dict[str, list]:
    """Turn rows of a log into one list for each name; None where a row has no such value."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
