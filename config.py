"""Shared by every script: options from dataclasses, errors for users, files written whole.

    game, train = parse(GameConfig, TrainConfig)          # --steps=300, --steps 300, --help

An option is a field of a dataclass: its name, type and default, and as help the comment behind it.
Only a `UserError` becomes one line; all others keep their traceback, because people fork this. Left
out on purpose: executing anything, and files of settings: a preset is a command in runs/.
"""
import argparse
import dataclasses
import difflib
import errno
import fcntl
import hashlib
import inspect
import itertools
import json
import os
import re
import sys
import time
import typing
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path

LARGEST_NUMBER = 1 << 53              # a float holds every whole number up to it


class UserError(ValueError):
    """A mistake of the user's, or a damaged file. The message names the value and the remedy."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message.replace("argument ", "", 1) + " (see --help)")


def parse(*dataclasses_, argv: list[str] | None = None, defaults: dict | None = None) -> tuple:
    """Return one instance of each dataclass, filled from `argv` (default: the process's own), else
    from `defaults` by field name, where None stands for the dataclass's own. Raises UserError."""
    description = sys.modules["__main__"].__doc__ or ""
    parser = _Parser(description=description.strip().split("\n")[0], allow_abbrev=False)
    kinds = {}
    for cls in dataclasses_:
        group = parser.add_argument_group(cls.__name__)
        comments = {}                                        # each field's comment is its help
        with suppress(OSError):                              # a class typed at a prompt has none
            comments = dict(re.findall(r"^    (\w+): .*?#\s*(.+)$", inspect.getsource(cls), re.M))
        for field in dataclasses.fields(cls):
            kinds[field.name] = field.type
            group.add_argument(f"--{field.name}", **_argument(field, comments.get(field.name, "")))
    for name, value in (defaults or {}).items():
        if isinstance(value, (list, tuple)) and typing.get_origin(kinds.get(name)) is tuple:
            value = ",".join(map(str, value))
        if value is not None:
            parser.set_defaults(**{name: str(value)})        # as text, so that it is checked too
    words = sys.argv[1:] if argv is None else argv
    values, unknown = parser.parse_known_args([_underscored(word) for word in words])
    for name, kind in kinds.items():
        _check_value(name, getattr(values, name), kind)
    if unknown:
        names = [f"--{name}" for name in kinds]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else " (see --help)"
        raise UserError(f"unknown option {unknown[0]}{hint}")

    def filled(cls):
        return cls(**{field.name: getattr(values, field.name) for field in dataclasses.fields(cls)})
    return tuple(map(filled, dataclasses_))


def from_stored(cls, values: dict, path):
    """Return a dataclass of what a file holds, checked like options. Raises UserError."""
    try:
        return parse(cls, argv=[], defaults=values)[0]
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('--')}") from None


def options_on_command_line() -> set[str]:
    """Return the names of the options, "--steps", that the command line spells out."""
    return {_underscored(word).partition("=")[0] for word in sys.argv[1:]}


def check_ranges(settings, **ranges) -> None:
    """Raise UserError for the first setting outside its range: (least, most), or least alone."""
    for name, bounds in ranges.items():
        least, most = bounds if isinstance(bounds, tuple) else (bounds, LARGEST_NUMBER)
        found = getattr(settings, name)
        if found is not None and not least <= found <= most:
            trouble = f"above {most}" if found > most else f"below {least}"
            raise UserError(f"--{name}={found} is {trouble}")


def run(main) -> None:
    """Call `main`. A UserError becomes one line on stderr and exit status 2."""
    for stream in filter(None, (sys.stdout, sys.stderr)):    # of another encoding, or closed
        stream.reconfigure(errors="backslashreplace")
    try:
        version = getattr(sys.modules.get("torch"), "__version__", "2.11")
        if [int(n) for n in re.findall("[0-9]+", version)[:2]] < [2, 11]:
            raise UserError(f"torch {version} is older than 2.11: install a newer one")
        main()
        print(end="", flush=True)
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            if error.errno != errno.ENOSPC:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)     # a full device is not tried again
        print("error: " + printable(" ".join(str(error).split())), file=sys.stderr)
        sys.exit(2)


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
    parts = typing.get_args(kind)
    shown = "" if default in ("", (), None) else f" (default: {default})"
    common = dict(default=default, help=(comment + shown).replace("%", "%%").strip())
    if kind is bool:
        return dict(common, type=true_or_false, nargs="?", const=True, metavar="BOOL")
    if typing.get_origin(kind) is typing.Literal:
        return dict(common, metavar="|".join(parts))
    if typing.get_origin(kind) is tuple:
        def comma_separated(text: str):                      # its name is in argparse's messages
            return tuple(parts[0](part) for part in text.split(",") if part)
        return dict(common, type=comma_separated, metavar="VALUES")
    kind = parts[0] if parts else kind                       # int | None: read as int if given
    return dict(common, type=kind, metavar=kind.__name__.upper())


def _check_value(name: str, value, kind) -> None:
    """Raise UserError for a choice that does not exist, or a number that no option has use for."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal and value not in choices:
        raise UserError(f"--{name}: '{value}' is not one of {', '.join(choices)} (see --help)")
    numbers, most = (value,), LARGEST_NUMBER
    if isinstance(value, tuple):
        numbers, most = value, 1 << 31
    for number in numbers:
        if isinstance(number, (int, float)) and not 0 <= number <= most:
            raise UserError(f"--{name}: {number} is below 0 or not finite, or too large")


def true_or_false(text: str) -> bool:
    return ("false", "true").index(text.lower()) == 1


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file. Raises UserError if it is absent or not UTF-8."""
    try:
        return decode_text(Path(path).read_bytes(), path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def decode_text(content: bytes, source) -> str:
    """Return incoming UTF-8 text without byte order mark, with plain newlines, or UserError."""
    try:
        text = content.decode("utf-8-sig").lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {source}: it is not UTF-8 text, byte {error.start}") from None
    if "\0" in text:
        raise UserError(f"cannot read {source}: it holds zero bytes, so it is no UTF-8 text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_regular(path: str | Path) -> None:
    """Raise UserError for a pipe or a device, which might never end, in a file's place."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is not a file: move it")


def sampled_sha256(paths) -> str:
    """Hash 16 MB of each file, from its first byte to its last, because 14 GB take long."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            for i in range(16):
                file.seek(i * max(0, size - 2**20) // 15)
                digest.update(file.read(2**20))
    return digest.hexdigest()


def read_json(path: str | Path, shape=dict):
    """Read a JSON file of this shape (see `check_json`). Raises UserError."""
    check_regular(path)
    return parse_json(read_text(path), shape, path)


def parse_json(text: str, shape, name):
    """Return the value of a JSON text of this shape, as `read_json` does."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON ({error}): download it again") from None
    check_json(value, shape, name)
    return value


def check_json(value, shape, name) -> None:
    """Raise UserError unless a value has this shape: a type, [shape], {key: shape} of the keys in
    use, {str: shape} of all, or a tuple of these, with None where it may be absent."""
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
        return type(value) in (int, float) and abs(value) < 1e38          # fits in fp32
    if kind is int:
        return type(value) is int and abs(value) <= LARGEST_NUMBER
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
    """Yield a temporary path to write to; it gets its name once it is whole and on the disk. A
    process that is killed leaves the former file. Raises UserError if it cannot be written."""
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


def write_text(path: str | Path, text: str) -> None:
    """Write a file by `atomic_write`, in UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, "utf-8")


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


def move_aside(path: Path) -> None:
    """Rename what has this name to NAME.old0 or the next free number: nothing is deleted."""
    if os.path.lexists(path):
        free = (f"{path}.old{n}" for n in itertools.count())
        os.rename(path, next(name for name in free if not os.path.lexists(name)))


def rename_folder(draft: Path, folder: Path) -> None:
    """Rename a whole folder, once all that is in it is on the disk; another moves aside."""
    for path in (*draft.rglob("*"), draft):
        fsync(path)
    move_aside(folder)
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
