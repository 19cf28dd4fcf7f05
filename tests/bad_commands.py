"""Command lines that are wrong in one place, of every script: out of range, not a number, misspelt, another file."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import runpy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
PATHS = "demos", "policy", "policies", "world_model", "tokenizer", "success_model", "init"  # that smoke runs read


def leaves(hint: Any) -> list[Any]:
    """The annotations of one value: those of a union, of a tuple's items."""
    if get_origin(hint) in (Union, type(int | None)):
        return [leaf for part in get_args(hint) if part is not type(None) for leaf in leaves(part)]
    if get_origin(hint) is tuple:
        return leaves(get_args(hint)[0])
    return [hint]


def bad_values(hint: Any) -> Iterator[str]:
    """Values that no option of this annotation may have."""
    if get_origin(hint) is Literal:
        yield from ("nonsense", "")
    if get_origin(hint) is not Annotated and hint not in (int, float):
        return
    yield from ("nan", "inf", "-inf", "word", "")
    kind, *ranges = get_args(hint) or (hint,)
    if kind is int:
        yield "1.5"
    for limits in ranges:
        below, above = (limits.low, limits.high) if kind is float else (int(limits.low), int(limits.high))
        yield from (str(below - 1), str(above + 1), str(above * 1000))
        yield from ([str(below)] if limits.open_low else []) + ([str(above)] if limits.open_high else [])


def bad_lines(config: type, good: list[str], others: Mapping[str, Path]) -> Iterator[list[str]]:
    """Arguments that a script with this configuration must refuse.

    Args:
        config: its dataclass.
        good: arguments with which it runs.
        others: files that are none of those that it reads; "text", "folder" and "missing" among them.
    """
    for field in dataclasses.fields(config):
        flag, hint = f"--{field.name.replace('_', '-')}", get_type_hints(config, include_extras=True)[field.name]
        yield [*good, flag] if hint is not bool else [*good, f"{flag}=1"]  # no value, or one too many
        for leaf in leaves(hint):
            yield from ([*good, f"{flag}={value}"] for value in bad_values(leaf))
        if field.name in PATHS and flag in good:
            yield from ([*good, flag, str(path)] for path in others.values())
        if field.name in ("camera", "suites", "tasks", "perturb", "animate_starts"):
            yield from ([*good, flag, value] for value in ("nonsense", "", "-1"))
        if field.name == "out_dir":
            yield [*good, flag, str(others["text"])]
            yield [*good, flag, str(others["text"] / "below")]
            yield [*good, flag, str(others["link to nothing"])]
    yield from ([*good, "--preset", "nonsense"], [*good, "--nonsense", "1"], [*good, "stray"], ["--preset"])


def told(script: str, arguments: list[str]) -> str:
    """Run a script as a command and say how it ends: "one line" of error and status 2, "more lines", "traceback",
    "accepted", or "another status".
    """
    errors, status = io.StringIO(), 0
    sys.argv = [script, *arguments]
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code
        except BaseException:
            return "traceback"
    lines = [line for line in errors.getvalue().splitlines() if line.strip()]
    if status != 2 or not lines or not lines[-1].startswith("ERROR: "):
        return "accepted" if status in (0, None) else "another status"
    return "one line" if len(lines) == 1 else "more lines"
