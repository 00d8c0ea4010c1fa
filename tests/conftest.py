import os
import sys

import pytest
import torch

from tasks import shell_game

torch.set_num_threads(1)              # two threads on a busy machine can be slower than one,
os.environ["OMP_NUM_THREADS"] = "1"   # and sums in another order: no longer the same bit for bit

# Not part of `make test`: they need another library, a browser, several processes, or minutes.
SLOW_FILES = ("test_distributed.py", "test_figures.py", "test_gguf.py", "test_layouts.py",
              "test_lm_eval_harness.py", "test_page.py", "test_qa.py")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def game(tmp_path_factory):
    """A small shell game on disk: its folder holds with_reasoning/ and without_reasoning/."""
    folder = tmp_path_factory.mktemp("game")
    shell_game.write_corpora(str(folder), 2000, seed=0)
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """call(script, "--option=value", ...) runs a script's main as the command line would, in this
    process; returns exit status, standard output and standard error."""
    def run(script, *argv):
        import config
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
        status = 0
        try:
            config.run(script.main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()
    return run
