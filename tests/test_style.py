"""The house rules that a machine can hold: small files, plain lines, arrows that run one way."""
import ast
import io
import re
import tokenize
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (".", "tasks", "formats", "tools")
FILES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]
BOOK = ("model.py", "lm_head.py", "attention.py", "thoughts.py", "inference.py", "train.py",
        "sample.py", "eval.py")
DENSE = ("model.py", "lm_head.py", "attention.py", "thoughts.py")      # formulas on tensors
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
every_file = pytest.mark.parametrize("name", NAMES)


def lines_of(name: str) -> list[str]:
    return (ROOT / name).read_text().splitlines()


def tree_of(name: str):
    return ast.parse((ROOT / name).read_text())


def docstring_lines(tree) -> set[int]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node):
            found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def count_lines(name: str) -> tuple[int, int]:
    """Lines of code and lines that are comments."""
    docs = docstring_lines(tree_of(name))
    bare = [line.strip() for i, line in enumerate(lines_of(name), 1) if i not in docs]
    comments = sum(line.startswith("#") for line in bare)
    return sum(map(bool, bare)) - comments, comments


def imports_of(name: str) -> set[str]:
    """Files of the project that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    files = {module.replace(".", "/") + ".py" for module in modules}
    return files & set(NAMES)


def reached_from(name: str) -> set[str]:
    found, waiting = set(), {name}
    while waiting:
        found |= waiting
        waiting = set().union(*map(imports_of, waiting)) - found
    return found - {name}


def nesting(node, level: int = 0) -> int:
    """How deep statements stand in one another; elif stands beside its if."""
    deepest = level
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(child, ast.If) and isinstance(node, ast.If) and child in node.orelse
        deeper = isinstance(child, (ast.If, ast.For, ast.While, ast.With, ast.Try)) and not is_elif
        deepest = max(deepest, nesting(child, level + deeper))
    return deepest


def test_the_house_is_small():
    sizes = {name: len(lines_of(name)) for name in NAMES}
    assert len([name for name in NAMES if "/" not in name]) <= 16
    assert sum(sizes[name] for name in BOOK) <= 1921
    assert sum(sizes.values()) <= 6539
    assert max(sizes.values()) <= 400


@every_file
def test_a_line_holds_one_idea(name):
    kinds = (tokenize.NAME, tokenize.NUMBER, tokenize.OP)
    text = (ROOT / name).read_text()
    tokens, in_string = [], 0             # Python 3.12 finds tokens inside f-strings
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        in_string += (kind == "FSTRING_START") - (kind == "FSTRING_END")
        if token.type in kinds and not in_string:
            tokens.append(token)
    n_code, _ = count_lines(name)
    assert len(tokens) <= (13 if name in DENSE else 10) * n_code
    assert max(map(len, text.splitlines()), default=0) <= 100


def test_the_book_is_commented():
    n_comments = sum(count_lines(name)[1] for name in BOOK)
    assert n_comments >= 0.05 * sum(len(lines_of(name)) for name in BOOK)


def test_imports_run_one_way_between_folders_too():
    waiting = defaultdict(set)
    for name in NAMES:
        room = name.partition("/")[0]
        waiting[room] |= {other.partition("/")[0] for other in imports_of(name)} - {room}
    while waiting:                    # take away the rooms that import nothing which is still there
        ground = [room for room, others in waiting.items() if not others & waiting.keys()]
        assert ground, dict(waiting)
        for room in ground:
            del waiting[room]


@every_file
def test_a_docstring_names_the_thing_or_says_what_the_call_does(name):
    assert ast.get_docstring(tree_of(name))
    for node in ast.walk(tree_of(name)):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
            text = ast.get_docstring(node) or ""
            assert not re.match(r"(What|Of|As|That|Those|Where|Whether|Whose)\b", text), text[:60]


@every_file
def test_functions_are_short_and_shallow(name):
    for node in ast.walk(tree_of(name)):
        if isinstance(node, FUNCTIONS):
            tells_a_story = node.name == "main" or (name, node.name) == ("thoughts.py", "forward")
            assert tells_a_story or node.end_lineno - node.lineno < 60, node.name
            assert nesting(node) <= 3, node.name


def test_no_two_files_define_the_same_public_name():
    owners = defaultdict(list)
    for name in NAMES:
        for node in tree_of(name).body:
            if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
                owners[node.name].append(name)
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    parts = target.elts if isinstance(target, ast.Tuple) else [target]
                    for part in parts:
                        owners[getattr(part, "id", "_")].append(name)
    tasks = {"tasks/shell_game.py", "tasks/dates.py"}        # these offer the same interface
    twice = {word: files for word, files in owners.items()
             if len(files) > 1 and not word.startswith("_") and word != "main"
             and not set(files) <= tasks}
    assert not twice


def test_imports_run_one_way():
    for name in NAMES:
        assert name not in set().union(*map(reached_from, imports_of(name)), imports_of(name))
    assert len(reached_from("train.py")) <= 16
    assert not {"thoughts.py", "attention.py"} & reached_from("model.py")


@every_file
def test_only_one_file_imports_torch_distributed(name):
    uses = "torch.distributed" in re.sub(r'""".*?"""', "", (ROOT / name).read_text(), flags=re.S)
    assert not uses or name == "distributed.py"


@every_file
def test_nothing_is_unpickled_and_nothing_is_executed(name):
    text = (ROOT / name).read_text()
    assert not re.search(r"pickle\.load|torch\.load\(|(?<![.\w])(eval|exec)\(|shell=True", text)


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    words = [word for word in text.split() if re.search(r"\w", word)]     # not a table's bars
    assert len(text.encode()) <= 10_240 and len(words) <= 1600
    assert len(re.findall(r"!\[|<img ", text)) <= 3
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", text):
        path = "".join(target)
        assert path.startswith("http") or (ROOT / path).exists(), path
