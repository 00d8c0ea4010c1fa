"""Shared by every script: options from dataclasses, errors for users, files written whole.

    game, train = parse(GameConfig, TrainConfig)          # --steps=300, --steps 300, --help

The options are the fields of the dataclasses: name, type, default, and as help the comment behind
the field; --show-thoughts is --show_thoughts. `UserError` is the only exception that becomes one
line; all others keep their traceback, because people fork this. Left out on purpose: files of
settings, and executing anything. A preset is a command in runs/.
"""
import argparse
import dataclasses
import difflib
import fcntl
import inspect
import json
import math
import os
import re
import shutil
import sys
import time
import typing
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path


OLDEST_TORCH = "2.11"


class UserError(ValueError):
    """A mistake of the user's, or a damaged file. The message names the value and the remedy."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message.replace("argument ", "", 1) + " (see --help)")


def parse(*dataclasses_, argv: list[str] | None = None, defaults: dict | None = None) -> tuple:
    """Return one instance of each dataclass, filled from `argv` (default: the process's own).

    `defaults`, by field name, replace the dataclasses' own. Raises UserError for an unknown option,
    a value of the wrong type, or a combination that a dataclass refuses.
    """
    description = sys.modules["__main__"].__doc__ or ""
    parser = _Parser(description=description.strip().split("\n")[0], allow_abbrev=False)
    names, kinds = [], {}
    for cls in dataclasses_:
        group = parser.add_argument_group(cls.__name__)
        source = ""
        with suppress(OSError):                              # a class typed at a prompt has none
            source = inspect.getsource(cls)                  # each field's comment is its help
        comments = dict(re.findall(r"^    (\w+): .*?#\s*(.+)$", source, flags=re.MULTILINE))
        for field in dataclasses.fields(cls):
            names.append(f"--{field.name}")
            kinds[field.name] = field.type
            group.add_argument(names[-1], **_argument(field, comments.get(field.name, "")))
    stored = {name: _as_option(value, kinds.get(name)) for name, value in (defaults or {}).items()}
    parser.set_defaults(**stored)                            # as text, so that it is checked too
    words = sys.argv[1:] if argv is None else argv
    values, unknown = parser.parse_known_args([_underscored(word) for word in words])
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else " (see --help)"
        raise UserError(f"unknown option {unknown[0]}{hint}")

    def filled(cls):
        return cls(**{field.name: getattr(values, field.name) for field in dataclasses.fields(cls)})
    return tuple(map(filled, dataclasses_))


def from_stored(cls, values: dict, path):
    """Return a dataclass filled from what a file holds, checked like options; null means the
    default. Raises UserError."""
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return parse(cls, argv=[], defaults=given)[0]
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('--')}") from None


def options_on_command_line() -> set[str]:
    """Return the names of the options, "--steps", that the command line spells out."""
    return {_underscored(word).partition("=")[0] for word in sys.argv[1:]}


def check_at_least(settings, **least) -> None:
    """Raise UserError for the first of these settings that is below its least value."""
    for name, value in least.items():
        found = getattr(settings, name)
        if found is not None and not found >= value:
            raise UserError(f"--{name}={found} is below {value}")


def check_at_most(settings, **most) -> None:
    """Raise UserError for the first of these settings that is above its greatest value."""
    for name, value in most.items():
        if not getattr(settings, name) <= value:
            raise UserError(f"--{name}={getattr(settings, name)} is above {value}")


def run(main) -> None:
    """Call `main`. A UserError becomes one line on stderr and exit status 2."""
    for stream in filter(None, (sys.stdout, sys.stderr)):    # of another encoding, or closed
        stream.reconfigure(errors="backslashreplace")
    try:
        _check_torch()
        main()
    except UserError as error:
        line = " ".join(str(error).split())
        print("error: " + printable(line), file=sys.stderr)
        sys.exit(2)


def _check_torch() -> None:
    version = getattr(sys.modules.get("torch"), "__version__", OLDEST_TORCH)
    if [int(n) for n in re.findall("[0-9]+", version)[:2]] < [2, 11]:
        raise UserError(f"torch {version} is older than {OLDEST_TORCH}: install a newer one")


def printable(text: str, keep: str = "") -> str:
    """Escape what a terminal would obey: control characters, but `keep`, and bidi overrides."""
    def escape(match):
        return match[0] if match[0] in keep else repr(match[0])[1:-1]
    return re.sub("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]", escape, text)


def _underscored(word: str) -> str:
    """Read --show-thoughts and --show_thoughts as the same option; values are left alone."""
    name, equals, value = word.partition("=")
    if name.startswith("--"):
        name = name.replace("-", "_").replace("__", "--", 1)
    return name + equals + value


def _argument(field, comment: str) -> dict:
    """Describe one field to argparse."""
    kind, default = field.type, field.default
    parts = typing.get_args(kind)                            # int | None: read as int if given
    shown = "" if default in ("", (), None) else f" (default: {default})"
    help_text = (comment + shown).replace("%", "%%").strip()
    common = dict(default=default, help=help_text)
    if kind is bool:
        return dict(common, type=true_or_false, nargs="?", const=True, metavar="BOOL")
    if typing.get_origin(kind) is typing.Literal:
        return dict(common, type=_one_of(parts), metavar="|".join(parts))
    if typing.get_origin(kind) is tuple:
        return dict(common, type=_tuple_of(_reader(parts[0])), metavar="VALUES")
    kind = parts[0] if parts else kind
    return dict(common, type=_reader(kind), metavar=kind.__name__.upper())


def _as_option(value, kind):
    """Write a stored value as it would stand on the command line."""
    if isinstance(value, (list, tuple)) and typing.get_origin(kind) is tuple:
        return ",".join(map(str, value))
    return value if value is None else str(value)


def _reader(kind):
    """A function from text to this kind. No option means anything below 0, at infinity, or nan."""
    if kind is str:
        return kind

    def value(text: str):
        number = kind(text)
        if not 0 <= number < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is below 0 or not finite")
        return number
    value.__name__ = kind.__name__                           # in what argparse says
    return value


def true_or_false(text: str) -> bool:
    return ("false", "true").index(text.lower()) == 1


def _one_of(choices: tuple[str, ...]):
    def value(text: str):
        if text not in choices:
            raise argparse.ArgumentTypeError(f"'{text}' is not one of {', '.join(choices)}")
        return text
    return value


def _tuple_of(kind):
    def comma_separated(text: str):
        return tuple(kind(part) for part in text.split(",") if part)
    return comma_separated


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file. Raises UserError if it is absent or not UTF-8."""
    try:
        return decode_text(Path(path).read_bytes(), path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def decode_text(content: bytes, source) -> str:
    """Return text that comes in, from wherever: UTF-8, without a byte order mark, lines ending in
    a newline alone. Raises UserError if it is not UTF-8."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {source}: it is not UTF-8 text at byte "
                        f"{error.start}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | Path, shape=dict):
    """Read a JSON file of this shape (see `check_json`). Raises UserError."""
    if Path(path).exists() and not Path(path).is_file():     # a pipe would never end
        raise UserError(f"{path} is not a file")
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): download it again") from None
    check_json(value, shape, path)
    return value


def check_json(value, shape, name) -> None:
    """Raise UserError unless a value has this shape: a type; [shape] for a list; a dict with the
    shapes of the keys that are used, or {str: shape} for all; a tuple of any of these, and None
    where a key may be absent."""
    kinds = shape if isinstance(shape, tuple) else (shape,)
    fitting = [kind for kind in kinds if _is_of_kind(value, kind)]
    if not fitting:
        shown = "absent" if value is None else f"{str(value)[:60]!r}, of another type"
        raise UserError(f"{name} is {shown}: repair the file, or download it again")
    kind = fitting[0]
    if isinstance(kind, list):
        for part in value:
            check_json(part, kind[0], f"{name}, an entry,")
    if isinstance(kind, dict):
        for key in (value if str in kind else kind):
            check_json(value.get(key), kind.get(str) or kind[key], f"{name}: {key}")


def _is_of_kind(value, kind) -> bool:
    if isinstance(kind, (list, dict)):
        return type(value) is type(kind)
    if kind is float:
        return type(value) in (int, float) and abs(value) < math.inf
    return value is kind or type(value) is kind


@contextmanager
def file_errors():
    """Turn an error of the operating system, like a permission or a full disk, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(str(error)) from error


@contextmanager
def atomic_write(path: str | Path):
    """Yield a temporary path to write to; it gets its name once it is whole and on the disk.

        with atomic_write("out/latest") as temporary:
            temporary.write_text("step-000100")

    A process that is killed leaves the former file. Raises UserError if it cannot be written.
    """
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes private files
        fsync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):                              # gone, if all went well
            temporary.unlink()


def lock_folder(folder: Path, owner) -> None:
    """Hold a folder for this process alone, as long as the object `owner` lives."""
    descriptor = os.open(folder, os.O_RDONLY)
    weakref.finalize(owner, os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process works in {folder}: choose another --out") from None


def say(line: str) -> None:
    """Print a line, and nothing any more once nobody reads it, as when `| tee` was stopped."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def rename_folder(draft: Path, folder: Path) -> None:
    """Rename a whole folder, once all that is in it is on the disk; it may replace another."""
    for path in (*draft.rglob("*"), draft):
        fsync(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)
    fsync(folder.parent)


def fsync(path: Path) -> None:
    """Bring a file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Progress:
    """Share done and time left on stderr, every 30 seconds."""
    def __init__(self, n_work: int, what: str, show: bool = True):
        self.n_work, self.what, self.show, self.done = max(1, n_work), what, show, 0
        self.started = self.shown = time.monotonic()

    def __call__(self, work: int) -> None:
        self.done += work
        now = time.monotonic()
        if self.show and now - self.shown > 30:
            self.shown, spent = now, now - self.started
            left = spent * (self.n_work - self.done) / self.done
            print(f"{self.what}: {self.done / self.n_work:.0%} in {spent:.0f} s, {left:.0f} s left",
                  file=sys.stderr, flush=True)
