"""The house rules that a machine can hold: what is loved stays small."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path for path in ROOT.glob("*.py"))
BUDGET = {"model.py": 300, "thoughts.py": 350, "train.py": 380, "sample.py": 180, "eval.py": 320,
          "weights.py": 300, "bench.py": 230, "generate.py": 225, "parallel.py": 210,
          "figures.py": 220}                                   # lines; 200 for every other file


def nesting(node, level: int = 0) -> int:
    """How deep statements stand in one another; elif stands beside its if."""
    deepest = level
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(child, ast.If) and isinstance(node, ast.If) and child in node.orelse
        deeper = isinstance(child, (ast.If, ast.For, ast.While, ast.With, ast.Try)) and not is_elif
        deepest = max(deepest, nesting(child, level + deeper))
    return deepest


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.name)
def test_a_room_is_small_and_says_what_it_is(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= BUDGET.get(path.name, 200)
    assert max(map(len, lines)) <= 100
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert "Read next:" in docstring
    assert f"| [{path.name}]({path.name}) | {len(lines)} |" in (ROOT / "README.md").read_text()


def test_each_page_names_the_next_one_of_the_reading_guide():
    order = re.findall(r"^\| \[(\w+\.py)\]\(\1\)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(order) == [path.name for path in ROOMS]
    for page, following in zip(order, order[1:]):
        assert f"Read next: {following}" in (ROOT / page).read_text(), page


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.name)
def test_functions_are_short_and_shallow(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name != "main":
            body = node.end_lineno - node.lineno + 1 - (ast.get_docstring(node) or "").count("\n")
            is_objective = node.name == "forward" and path.name == "thoughts.py"
            assert body <= (30 if is_objective else 60), node.name
            assert nesting(node) <= 3, node.name


def test_model_files_never_import_torch_distributed():
    for name in ("model.py", "attention.py", "thoughts.py"):
        assert "distributed" not in (ROOT / name).read_text().replace("never imports", "").replace(
            "imports torch.distributed", "")


def test_nothing_is_unpickled_but_tensors_and_plain_values():
    for path in ROOMS:
        text = path.read_text()
        assert text.count("torch.load(") == text.count("weights_only=True"), path.name
        assert "pickle.load" not in text and "eval(" not in text.replace(".eval(", ""), path.name
