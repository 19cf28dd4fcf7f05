"""Frozen dataclasses as configurations: to and from JSON, and as a command line.

A script declares one flat frozen `Config`, whose fields carry their help, and a dict of presets:

    @dataclass(frozen=True)
    class Config:
        out_dir: str = opt("runs/wm", "folder that the run writes")
        lr: Positive = opt(5e-5, "AdamW learning rate (Sec. 4)")

    PRESETS = {"paper": Config(), "tiny": Config(lr=1e-3)}
    if __name__ == "__main__":
        run_script(main, Config, PRESETS, __doc__)

`--preset tiny` picks the instance and every other flag overrides one field. A field whose type is itself a frozen
dataclass becomes dotted flags, `--perturb.flips 3`. A number's type states its range (`Count`, `Positive`, ...), which
command line and JSON are held to; infinity and NaN are in none.
"""

import argparse
import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

ConfigT = TypeVar("ConfigT")


class Range(NamedTuple):
    """The values that a number may take; the ends belong to it unless it is open there."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def has(self, value: float) -> bool:
        """Return whether the value lies in it; NaN never does."""
        inside = self.low <= value <= self.high
        return inside and not (self.open_low and value == self.low) and not (self.open_high and value == self.high)

    def __str__(self) -> str:
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {left}{self.low:g}, {self.high:g}{right}"


MOST = 10**9  # of everything that is counted or measured: a larger number is a slip
Count = Annotated[int, Range(1, MOST)]
Rows = Annotated[int, Range(1, 2**16)]  # computed at once: a batch
Side = Annotated[int, Range(1, 4096)]  # of an image [px]
Whole = Annotated[int, Range(0, MOST)]
Lookback = Annotated[int, Range(-1, MOST)]
Positive = Annotated[float, Range(0, MOST, open_low=True)]
NotNegative = Annotated[float, Range(0, MOST)]
Share = Annotated[float, Range(0, 1)]
ShareBelow1 = Annotated[float, Range(0, 1, open_high=True)]
ProperShare = Annotated[float, Range(0, 1, open_low=True, open_high=True)]
ShareAbove0 = Rate = Annotated[float, Range(0, 1, open_low=True)]  # Rate: of learning
Processes = Annotated[int, Range(0, 1024)]


def opt(default: Any, help: str, group: str | None = None) -> Any:
    """Declare a dataclass field of a script's configuration.

    Args:
        default: its value.
        help: text for `--help`, with unit and source.
        group: heading under which `--help` lists this field and those after it, up to the next field with a heading.
    """
    return dataclasses.field(default=default, metadata={"help": help, "group": group})


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a (nested) dataclass to JSON-safe types: tuples become lists, nested dataclasses dicts."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value

    return plain(config)


def from_dict(cls: type[ConfigT], values: Mapping[str, Any], where: str = "") -> ConfigT:
    """Build a dataclass from the result of `to_dict`.

    Raises:
        ValueError: an unknown key, a missing field without default, or a value of the wrong type. The message names the
        field.
    """
    where = where or cls.__name__
    names = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - names):
        raise ValueError(
            f"{where} has no field {', '.join(map(repr, unknown))}; its fields are {', '.join(sorted(names))}"
        )
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks the field {', '.join(map(repr, missing))}")
    hints = _hints(cls)
    return cls(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """List the leaves in which two `to_dict` results differ, name and both values, for error messages."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(dict.fromkeys([*a, *b]))
        return [line for k in keys for line in differences(a.get(k), b.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if a == b else [f"{prefix}: {a!r} against {b!r}"]


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check one JSON value against its annotation; lists become tuples, dicts nested dataclasses."""
    origin, args = get_origin(hint), get_args(hint)
    wrong = ValueError(f"{where} must be {_type_name(hint)}, got {value!r}")
    if hint is Any:
        return value
    if origin is Annotated:
        value = _convert(args[0], value, where)
        if not args[1].has(value):
            raise ValueError(f"{where} {value}: give a number {args[1]}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        others = [a for a in args if a is not type(None)]
        for candidate in others:
            try:
                return _convert(candidate, value, where)
            except ValueError:
                if len(others) == 1 and get_origin(candidate) is Annotated:
                    raise  # it says more than the union
        raise wrong
    if origin is Literal:
        if value not in args:
            raise wrong
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise wrong
        inner = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        if len(inner) != len(value):
            raise wrong
        return tuple(_convert(a, v, where) for a, v in zip(inner, value, strict=True))
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise wrong
        return from_dict(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is not bool and isinstance(value, bool))):
        raise wrong
    return value


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        return _type_name(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("none" if a is type(None) else _type_name(a) for a in get_args(hint))
    return getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint)


def parse(config_class: type[ConfigT], presets: Mapping[str, ConfigT], argv: Sequence[str], doc: str = "") -> ConfigT:
    """Build a config from the command line: `--preset NAME` picks the defaults, every other flag overrides one field.

    bool fields become --x / --no-x, Literal fields choices, `X | None` accepts "none", tuples take several values,
    nested dataclasses dotted flags. Unknown flags, presets and choices exit with status 2 and name what is valid.

    Args:
        config_class: the script's dataclass.
        presets: named instances of it; the first is the default.
        argv: the command line without the script's name.
        doc: the script's docstring, whose first paragraph `--help` shows.
    """
    default = next(iter(presets))
    # a small parser reads --preset first: its instance gives the defaults that the full parser shows, and a missing
    # value elsewhere does not hide a misspelt preset
    if any(a == "--preset" or a.startswith("--preset=") for a in argv):
        first = Parser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset", choices=list(presets), default=default)
        base = presets[first.parse_known_args(argv)[0].preset]
    else:
        base = presets[default]
    parser = command_line(base, presets, doc)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if k not in ("preset", "debug")}
    try:
        return _override(base, given, "")
    except ValueError as error:  # a config's own __post_init__ refused a value
        parser.error(str(error))


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line, with `--debug` for `script.clear_errors`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(2, f"ERROR: {message} (--help lists what there is)\n")


def command_line(base: Any, presets: Mapping[str, Any], doc: str = "") -> Parser:
    """Make the parser of `parse`; its help shows the values of the preset `base`."""

    def layout(prog: str) -> argparse.HelpFormatter:
        return argparse.HelpFormatter(prog, max_help_position=34, width=120)

    parser = Parser(
        description=inspect.cleandoc(doc).partition("\n\n")[0],
        allow_abbrev=False,
        formatter_class=layout,
        usage="%(prog)s [--preset NAME] [options]",
    )
    default = next(iter(presets))
    parser.add_argument("--preset", choices=list(presets), default=default, help=f"named set of defaults [{default}]")
    _add_flags(parser, base, "")
    return parser


def _add_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup, base: Any, prefix: str) -> None:
    hints, root = _hints(type(base)), parser
    for f in dataclasses.fields(base):
        hint, value, name = hints[f.name], getattr(base, f.name), f"{prefix}{f.name}"
        flag = "--" + name.replace("_", "-")
        if heading := f.metadata.get("group"):
            parser = root.add_argument_group(heading)
        if dataclasses.is_dataclass(value):
            _add_flags(parser, value, f"{name}.")
            continue
        if dataclasses.is_dataclass(hint) or any(dataclasses.is_dataclass(a) for a in get_args(hint)):
            continue  # a part that this preset leaves out: chosen by the preset, not by flags
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}  # only flags that were given are parsed
        options["help"] = f"{f.metadata.get('help', '')} [{_shown(value)}]".strip().replace("%", "%%")
        optional = get_origin(hint) in (Union, types.UnionType)
        inner = next(a for a in get_args(hint) if a is not type(None)) if optional else hint
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif get_origin(inner) is Literal:
            choices = [*get_args(inner), *([None] if optional else [])]
            parser.add_argument(
                flag,
                choices=choices,
                type=reader(inner, optional),
                metavar=f"{{{','.join(map(str, choices))}}}",
                **options,
            )
        elif get_origin(inner) is tuple:
            item = get_args(inner)[0]
            parser.add_argument(
                flag, nargs="+", type=reader(item, optional), metavar=_type_name(item).upper(), **options
            )
        else:
            kind = _type_name(inner).upper()
            parser.add_argument(flag, type=reader(inner, optional), metavar=kind, **options)


def _shown(value: Any) -> str:
    """Format a value as it is typed on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)


def reader(hint: Any, optional: bool = False) -> Any:
    """Make argparse's `type` for values of an annotation; `optional` reads "none" as None."""
    hint, within = get_args(hint) if get_origin(hint) is Annotated else (hint, None)

    def read(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        if get_origin(hint) is Literal:
            return next((a for a in get_args(hint) if str(a) == text), text)
        if hint is bool:
            if text.lower() not in ("true", "false"):
                raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
            return text.lower() == "true"
        value = hint(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"expected a finite number, got {text}")
        if within and not within.has(value):
            raise argparse.ArgumentTypeError(f"{text}: give a number {within}")
        return value

    read.__name__ = _type_name(hint)  # argparse prints it: "invalid int value: 'x'"
    return read


def _override(base: ConfigT, given: Mapping[str, Any], prefix: str) -> ConfigT:
    changes: dict[str, Any] = {}
    hints = _hints(type(base))
    for f in dataclasses.fields(base):
        name = f"{prefix}{f.name}"
        if dataclasses.is_dataclass(getattr(base, f.name)):
            changes[f.name] = _override(getattr(base, f.name), given, f"{name}.")
        elif name in given:
            value = given[name]
            if isinstance(value, list):
                value = None if value == [None] else tuple(value)
            changes[f.name] = _convert(hints[f.name], value, f"--{name.replace('_', '-')}")
    return dataclasses.replace(base, **changes)
