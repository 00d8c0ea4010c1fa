"""The command line."""
import importlib
from dataclasses import dataclass

import pytest

import config


@dataclass(frozen=True)
class Cooking:
    minutes: int = 5          # in the oven
    heat: float | None = None  # degrees
    salted: bool = False      # a pinch
    spices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    guests: int = 2


def parse(*argv, **kwargs):
    return config.parse(Cooking, Table, argv=list(argv), **kwargs)


def test_values_come_with_or_without_an_equals_sign_and_with_either_dash():
    cooking, table = parse("--minutes=7", "--heat", "180", "--salted", "--spices=a,b", "--guests=3")
    assert cooking == Cooking(7, 180.0, True, ("a", "b")) and table == Table(3)
    assert parse("--salted=false")[0].salted is False


def test_defaults_can_be_replaced_and_the_command_line_wins():
    assert parse(defaults={"minutes": 9, "guests": 4}) == (Cooking(9), Table(4))
    assert parse("--minutes=1", defaults={"minutes": 9})[0].minutes == 1


@pytest.mark.parametrize("argv, words", [
    (["--minuts=3"], "unknown option --minuts=3; did you mean --minutes?"),
    (["--zzz"], "unknown option --zzz"),
    (["--minutes=soon"], "--minutes: invalid int value: 'soon'"),
    (["--salted=perhaps"], "expected true or false, got 'perhaps'"),
    (["stray"], "unknown option stray")])
def test_a_mistake_is_one_line_that_names_the_value(argv, words):
    with pytest.raises(config.UserError) as error:
        parse(*argv)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_help_shows_the_comment_behind_a_field(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "in the oven (default: 5)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("script", ["train", "sample", "eval", "data", "tasks.shell_game", "tokenizer",
                                    "weights", "tools.figures", "tools.compare"])
def test_every_script_ends_a_mistake_in_one_line_and_status_2(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [script + ".py", "--no_such_option=1"])
    with pytest.raises(SystemExit) as end:
        config.run(importlib.import_module(script).main)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.startswith("error: unknown option --no_such_option=1") and err.count("\n") == 1
