"""Pictures of many runs show what eval.py wrote: every run, their means, no other numbers."""
import json

import numpy as np
import pytest

from tools import compare
from tools import figures

pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch):
    """The axes that are drawn into, and what they hold: points(ax) is [x, y] of every marker."""
    axes = []

    def canvas(*args, draw=figures.canvas):
        figure, made = draw(*args)
        axes.extend(made)
        return figure, made
    monkeypatch.setattr(compare, "canvas", canvas)
    return axes


def points(ax, size):
    lines = [line for line in ax.get_lines() if line.get_markersize() == size
             and line.get_marker() == "o"]
    return np.array(sorted(xy for line in lines for xy in zip(*line.get_data())), float)


def write(folder, name, seed, **means):
    path, means = folder / f"{seed}-{name}.json", {"nll_base": 1.0, **means}
    values = {key: dict(mean=value) for key, value in means.items() if isinstance(value, float)}
    path.write_text(json.dumps({**means, **values}))
    return path


def test_every_run_and_every_mean_stands_where_its_number_is(drawn, tmp_path, call):
    rng, paths, right = np.random.default_rng(0), [], {}
    for name, length in (("base", 0), ("thinking", 6), ("thinking-T2", 2)):
        for seed in range(3):
            value = float(rng.random())
            right.setdefault(name, []).append(value)
            paths.append(write(tmp_path, name, seed, right_base=value, right_mixed=value,
                               nll_base=1 - value, nll_sharp=0.5, nll_mixed=1 - value,
                               thought_len=length))
    status, told, _ = call(compare, "--kind=controls", f"--input={','.join(map(str, paths))}",
                           f"--out={tmp_path}/controls.png")
    assert status == 0 and (tmp_path / "controls.png").stat().st_size > 10_000
    accuracy, nll, length = drawn
    for ax, turn in (accuracy, lambda v: v), (nll, lambda v: 1 - v):
        shown = [turn(v) for v in right["base"] + right["thinking"] * 2]   # thinking, and not
        shown += right["base"] if ax is accuracy else [0.5] * 3            # base, temperature_scaled
        np.testing.assert_allclose(points(ax, 3)[:, 0], sorted(shown))
    two, six = sorted(right["thinking-T2"]), sorted(right["thinking"])
    np.testing.assert_allclose(points(length, 3), [(2, v) for v in two] + [(6, v) for v in six])
    np.testing.assert_allclose(points(length, 7), [(2, np.mean(two)), (6, np.mean(six))])


def test_gains_stand_over_what_their_tenth_is_like(drawn, tmp_path, call):
    rows = [dict(nll_base=1.0 * i, nll_mixed=0.5 * i, entropy_base=2.0 * i, mixing_weight=0.1 * i,
                 interval_gain=(0.4 * i, 0.7 * i)) for i in range(10)]
    path = write(tmp_path, "thinking", 0, difficulty=rows, by_entropy=rows, by_weight=rows)
    assert call(compare, "--kind=difficulty", f"--input={path}",
                f"--out={tmp_path}/difficulty.png")[0] == 0
    for ax, step in zip(drawn, (1.0, 2.0, 0.1)):
        np.testing.assert_allclose(points(ax, 4), [(step * i, 0.5 * i) for i in range(10)])


def test_a_mistake_is_one_line(call):
    status, _, stderr = call(compare, "--kind=pie")
    assert status == 2 and "--kind=pie" in stderr and stderr.count("\n") == 1


def test_a_figure_of_no_control_is_refused(tmp_path, call):
    path = write(tmp_path, "other", 0)
    status, _, stderr = call(compare, "--kind=controls", f"--input={path}",
                             f"--out={tmp_path}/empty.png")
    assert status == 2 and "no control among other" in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "empty.png").exists()


def test_a_file_of_another_kind_is_one_line_that_names_it(tmp_path, call):
    found, log, text = (tmp_path / name for name in ("0-base.json", "log.jsonl", "README.md"))
    write(tmp_path, "base", 0)
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    text.write_text("words")
    number, task = tmp_path / "5.json", tmp_path / "task.json"
    number.write_text("5")
    task.write_text('{"nll_base": {"mean": 1.0}, "soft_base": {"mean": 0.1}}')
    out = f"--out={tmp_path}/wrong.png"
    for script, kind, given, wrong, of in (
            (figures, "table", f"{log}", log, "eval.py"), (figures, "table", text, text, "eval.py"),
            (figures, "curves", found, found, "log.jsonl"), (figures, "curves", text, text, "log"),
            (figures, "top", f"{log},{log}", log, "eval.py"),
            (figures, "table", number, number, "eval.py"),
            (figures, "top", f"{task},{log}", task, "eval.py"),
            (compare, "difficulty", task, task, "eval.py"),
            (compare, "controls", log, log, "eval.py"),
            (compare, "difficulty", text, text, "eval.py")):
        status, _, stderr = call(script, f"--kind={kind}", f"--input={given}", out)
        assert status == 2 and f"{wrong} is not" in stderr and of in stderr, stderr
        assert stderr.count("\n") == 1 and not (tmp_path / "wrong.png").exists()
