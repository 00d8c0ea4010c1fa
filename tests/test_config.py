"""config.py: options, errors for users, and files that are written whole."""
import importlib
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

import config

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Cooking:
    minutes: int = 5          # in the oven
    heat: float | None = None  # degrees
    salted: bool = False      # a pinch
    spices: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Table:
    guests: int = 2
    size: Literal["small", "large"] = "small"  # how long it is


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
    (["--salted=perhaps"], "--salted: invalid true_or_false value: 'perhaps'"),
    (["--sizes=1,x"], "--sizes: invalid comma_separated value: '1,x'"),
    (["stray"], "unknown option stray")])
def test_a_mistake_is_one_line_that_names_the_value(argv, words):
    with pytest.raises(config.UserError) as error:
        parse(*argv)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_help_shows_the_comment_behind_a_field(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "in the oven (default: 5)" in " ".join(capsys.readouterr().out.split())


def test_a_choice_is_shown_in_help_and_any_other_value_is_refused(capsys):
    assert parse("--size=large")[1] == Table(size="large") and Table().size == "small"
    with pytest.raises(config.UserError, match="--size: 'huge' is not one of small, large"):
        parse("--size=huge")
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--size small|large how long it is (default: small)" in " ".join(
        capsys.readouterr().out.split())


def test_a_number_below_its_least_value_or_nan_is_refused():
    config.check_ranges(Cooking(minutes=1, heat=0.0), minutes=1, heat=0)
    with pytest.raises(config.UserError, match="--minutes=0 is below 1"):
        config.check_ranges(Cooking(minutes=0), minutes=1)
    with pytest.raises(config.UserError, match="--heat=nan is below 0"):
        config.check_ranges(Cooking(heat=float("nan")), minutes=1, heat=0)


# ---------------------------------------------------------------------- errors

def test_a_user_error_is_one_escaped_line_and_exit_status_2(capsys):
    def main():
        raise config.UserError("no field\n 'a\x1b[31m\u202eb\x07\u2066' in\tcafé.txt")

    with pytest.raises(SystemExit) as end:
        config.run(main)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err == "error: no field 'a\\x1b[31m\\u202eb\\x07\\u2066' in café.txt\n"


def test_printable_keeps_only_what_it_is_told_to_keep():
    assert config.printable("a\tb\nc\x9b\u2028", keep="\n") == "a\\tb\nc\\x9b\\u2028"


FORK = """
import torch
import config


def main():
    x = torch.zeros(2, 3, 4)
    B, L = x.shape


config.run(main)
"""


def python(*argv):
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True,
                          timeout=120, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_a_forkers_mistake_in_a_shape_keeps_its_traceback_with_file_and_line(tmp_path):
    (tmp_path / "fork.py").write_text(FORK)
    done = python(tmp_path / "fork.py")
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert f'File "{tmp_path}/fork.py", line 8, in main' in done.stderr
    assert "B, L = x.shape" in done.stderr and "ValueError: too many values" in done.stderr


def test_a_users_mistake_is_one_line_without_a_traceback_in_a_process_of_its_own():
    done = python("data.py", "--input=a\x1b[2J.txt", "--tokenizer=no\u202esuch", "--out=out")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: cannot read no\\u202esuch (No such file")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", [
    "train", "sample", "eval", "data", "tasks.shell_game", "tools.bench",
    "tools.memory", "tools.gate", "tools.figures"])
def test_every_script_ends_a_mistake_in_one_line_and_status_2(script, monkeypatch, capsys):
    main = importlib.import_module(script).main
    monkeypatch.setattr("sys.argv", [script + ".py", "--no_such_option=1"])
    with pytest.raises(SystemExit) as end:
        config.run(main)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.startswith("error: unknown option --no_such_option=1") and err.count("\n") == 1


def test_trouble_with_a_file_is_one_line(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        config.run(config.file_errors()(lambda: open(tmp_path / ("long" * 100))))
    out, err = capsys.readouterr()
    assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "long" in err and not out


# ---------------------------------------------------------------------- files

def test_a_file_is_written_whole_or_the_former_one_stays(tmp_path):
    path = tmp_path / "new" / "latest"
    with config.atomic_write(path) as temporary:
        temporary.write_text("one")
    with pytest.raises(KeyboardInterrupt), config.atomic_write(path) as temporary:
        temporary.write_text("tw")
        raise KeyboardInterrupt
    assert path.read_text() == "one" and [*path.parent.iterdir()] == [path]


def test_a_file_that_cannot_be_read_or_written_is_a_users_error(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff")
    (tmp_path / "cut.json").write_text("{")
    for read, name, message in ((config.read_text, "absent", "cannot read .*absent: No such file"),
                                (config.read_text, "bytes", "it is not UTF-8 text"),
                                (config.read_json, "cut.json", "cut.json is not JSON")):
        with pytest.raises(config.UserError, match=message):
            read(tmp_path / name)
    with pytest.raises(config.UserError, match="cannot write .*bytes/under"):
        with config.atomic_write(tmp_path / "bytes" / "under") as temporary:
            temporary.write_text("x")


def configs() -> list[tuple]:
    """Every dataclass of options, with what it needs to be accepted."""
    from data import DataConfig
    from eval import EvalConfig
    from model import ModelConfig
    from sample import SampleConfig
    from tasks.dates import DatesConfig
    from tasks.shell_game import ShellGameConfig
    from thoughts import ThoughtConfig
    from tools.bench import BenchConfig
    from tools.gate import GateConfig
    from tools.memory import MemoryConfig
    from train import TrainConfig
    return [(TrainConfig, ["--out=o", "--data=d"]), (ModelConfig, []), (ThoughtConfig, []),
            (EvalConfig, ["--checkpoint=c", "--data=d"]), (SampleConfig, ["--checkpoint=c"]),
            (DataConfig, []), (GateConfig, ["--checkpoint=c", "--data=d"]), (MemoryConfig, []),
            (BenchConfig, []), (ShellGameConfig, []), (DatesConfig, [])]


NUMBERS = [(cls, needed, field.name) for cls, needed in configs() for field in fields(cls)
           if {int, float} & {field.type, *get_args(field.type)} and not get_origin(field.type) == tuple]


@pytest.mark.parametrize("cls, needed, name", NUMBERS, ids=lambda value: getattr(value, "__name__", None) or str(value))
def test_every_number_has_a_range_that_leaves_out_what_makes_no_sense(cls, needed, name):
    config.parse(cls, argv=needed)
    for value in ("-1", "-0.5", "nan", "inf", "-inf", "1e999"):
        with pytest.raises(config.UserError):
            config.parse(cls, argv=[*needed, f"--{name}={value}"])
