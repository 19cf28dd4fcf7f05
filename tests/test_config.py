"""config: JSON round trip and command line."""

import dataclasses
import json
import re
from typing import Literal

import pytest

from vlarft.run.config import NotNegative, Rows, Share, differences, from_dict, opt, parse, to_dict


@dataclasses.dataclass(frozen=True)
class Part:
    width: int = 3
    levels: tuple[int, ...] = (5, 5)


@dataclasses.dataclass(frozen=True)
class Config:
    lr: float = opt(0.1, "learning rate, 50 % of it")
    model: Part = dataclasses.field(default_factory=Part)
    kind: Literal["a", "b"] = opt("a", "which")
    flag: bool = opt(False, "on or off")
    limit: int | None = opt(None, "no limit when none")
    names: tuple[str, ...] | None = opt(None, "some names")
    share: Share | None = opt(0.5, "a share")
    sizes: tuple[Rows, ...] = opt((1,), "some sizes")
    weight: NotNegative = opt(0.0, "a weight")


PRESETS = {"paper": Config(), "tiny": Config(lr=1.0, limit=4, flag=True)}


def test_round_trip_through_json():
    config = Config(model=Part(7, (3, 5, 7)), names=("x",))
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lrr": 1.0}, "no field 'lrr'; its fields are"),
        ({"lr": "fast"}, "Config.lr must be float, got 'fast'"),
        ({"kind": "c"}, "one of a, b, got 'c'"),
        ({"model": {"width": True}}, "Config.model.width must be int, got True"),
        ({"model": 3}, "Config.model"),
        ({"share": 1.5}, "Config.share 1.5: give a number in [0, 1]"),
        ({"sizes": [1, 0]}, "Config.sizes 0: give a number in [1, 65536]"),
        ({"weight": float("inf")}, "Config.weight inf: give a number in [0, 1e+09]"),
        ({"weight": "heavy"}, "Config.weight must be float, got 'heavy'"),
    ],
)
def test_from_dict_names_the_field(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_dict(Config, values)


def test_missing_field_is_named():
    @dataclasses.dataclass(frozen=True)
    class Needs:
        path: str

    with pytest.raises(ValueError, match="lacks the field 'path'"):
        from_dict(Needs, {})


def test_differences_names_leaves():
    a, b = to_dict(Config()), to_dict(Config(model=Part(width=9)))
    assert differences(a, b) == ["model.width: 3 against 9"]
    assert differences(a, a) == []


def test_command_line():
    assert parse(Config, PRESETS, []) == Config()
    assert parse(Config, PRESETS, ["--preset", "tiny", "--no-flag"]) == dataclasses.replace(PRESETS["tiny"], flag=False)
    given = ["--lr", "2", "--model.levels", "3", "5", "7", "--kind", "b", "--limit", "none", "--names", "p", "q"]
    expected = Config(2.0, Part(levels=(3, 5, 7)), "b", False, None, ("p", "q"))
    assert parse(Config, PRESETS, given) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
        (["--kind", "c"], "invalid choice: 'c'"),
        (["--lr", "fast"], "invalid float value: 'fast'"),
        (["--lr", "nan"], "expected a finite number, got nan"),
        (["--weight=-inf"], "expected a finite number, got -inf"),
        (["--weight=-1"], "argument --weight: -1: give a number in [0, 1e+09]"),
        (["--share", "2"], "argument --share: 2: give a number in [0, 1]"),
        (["--sizes", "3", "70000"], "argument --sizes: 70000: give a number in [1, 65536]"),
        (["--limit", "1.5"], "invalid int value: '1.5'"),
    ],
)
def test_command_line_errors(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Config, PRESETS, argv)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert message in text and text.startswith("ERROR: ") and text.count("\n") == 1


def test_help_shows_every_field(capsys):
    with pytest.raises(SystemExit):
        parse(Config, PRESETS, ["--help"])
    shown = capsys.readouterr().out
    assert "--model.width" in shown and "50 % of it" in shown and "--no-flag" in shown
