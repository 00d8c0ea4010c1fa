"""The house rules that a machine can hold: what is loved stays small."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path for folder in (".", "tasks", "formats", "tools") for path in ROOT.glob(f"{folder}/*.py"))
BUDGET = {"model.py": 300, "thoughts.py": 350, "train.py": 380, "sample.py": 180, "eval.py": 320,
          "weights.py": 300, "bench.py": 230, "inference.py": 225, "parallel.py": 210,
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
