"""Dataclasses to command line, and nothing else.

    game, train = parse(GameConfig, TrainConfig)          # --steps=300, --steps 300, --help

The options are the fields: name, type, default, and as help the comment behind the field. An
unknown option is an error that names the nearest. `run(main)` ends every user mistake in one line.
Left out on purpose: files of settings, and executing anything. A preset is a command in runs/.

Read next: figures.py
"""
import argparse
import dataclasses
import difflib
import inspect
import re
import sys
import types
import typing


class UsageError(ValueError):
    """The command line is wrong; the message says how and what to write instead."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message.replace("argument ", "", 1) + " (see --help)")


def parse(*dataclasses_, argv: list[str] | None = None, defaults: dict | None = None) -> tuple:
    """One instance of each dataclass, filled from `argv` (default: the process's own).

    `defaults` by field name take the place of the dataclasses' own.

    Raises UsageError for an unknown option, a value of the wrong type, or a refused combination.
    """
    caller = sys.modules["__main__"].__doc__ or ""
    parser = _Parser(description=caller.strip().split("\n")[0], allow_abbrev=False)
    for cls in dataclasses_:
        group, comments = parser.add_argument_group(cls.__name__), _comments(cls)
        for field in dataclasses.fields(cls):
            group.add_argument(f"--{field.name}", **_argument(field, comments.get(field.name, "")))
    parser.set_defaults(**(defaults or {}))
    words = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    values, unknown = parser.parse_known_args(words)
    if unknown:
        names = [f"--{f.name}" for cls in dataclasses_ for f in dataclasses.fields(cls)]
        nearest = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]}?" if nearest else " (see --help)"
        raise UsageError(f"unknown option {unknown[0]}{hint}")
    return tuple(cls(**{f.name: getattr(values, f.name) for f in dataclasses.fields(cls)})
                 for cls in dataclasses_)


def given(argv: list[str] | None = None) -> set[str]:
    """The names of the options that the command line spells out."""
    return {_underscored(word).partition("=")[0]
            for word in (sys.argv[1:] if argv is None else argv)}


def at_least(settings, **least) -> None:
    """ValueError for the first of these settings that is below its least value, or nan."""
    for name, value in least.items():
        if not getattr(settings, name) >= value:
            raise ValueError(f"--{name}={getattr(settings, name)} is below {value}")


def run(main) -> None:
    """Call `main`; a user's mistake is one line on stderr and exit status 2, never a traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def _underscored(word: str) -> str:
    """--show-thoughts and --show_thoughts are the same option; values are left alone."""
    name, equals, value = word.partition("=")
    if name.startswith("--"):
        name = name.replace("-", "_").replace("__", "--", 1)
    return name + equals + value


def _argument(field, comment: str) -> dict:
    """What argparse needs to know of one field."""
    kind, default = field.type, field.default
    if isinstance(kind, types.UnionType):                       # int | None: absent means None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    help_text = (comment + f" (default: {default})").replace("%", "%%").strip()
    if kind is bool:
        return dict(type=_boolean, nargs="?", const=True, default=default, metavar="BOOL",
                    help=help_text)
    if typing.get_origin(kind) is tuple:
        kind = _tuple_of(typing.get_args(kind)[0])
    name = getattr(kind, "__name__", "value").strip("_").upper()
    return dict(type=kind, default=default, metavar=name, help=help_text)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got '{text}'")
    return text.lower() == "true"


def _tuple_of(kind):
    def values(text: str):
        try:
            return tuple(kind(part) for part in text.split(",") if part)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected {kind.__name__}s separated by commas, got '{text}'") from None
    return values


def _comments(cls) -> dict[str, str]:
    """The comment behind each field of a dataclass, by field name."""
    try:
        source = inspect.getsource(cls)
    except OSError:                                             # defined in an interactive session
        return {}
    return dict(re.findall(r"^    (\w+): .*?#\s*(.+)$", source, flags=re.MULTILINE))
