"""Pictures of many runs show what eval.py wrote: every run, their means, no other numbers."""
import json

import numpy as np
import pytest

from tasks.bootstrap import bootstrap_ci
from tools import figures

pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn: drawn[0].axes are the axes of the first."""
    figures_ = []
    for name in ("mask", "learning", "seconds"):
        def draw(cfg, figure, draw=getattr(figures, name)):
            draw(cfg, figure)
            figures_.append(figure)
        monkeypatch.setattr(figures, name, draw)
    return figures_


def write(folder, name, seed, **means):
    path, means = folder / f"{seed}-{name}.json", {"nll_base": 1.0, **means}
    values = {key: dict(mean=value) for key, value in means.items() if isinstance(value, float)}
    path.write_text(json.dumps({**means, **values, "clusters": {"count": [1.0] * 4}}))
    return path


def write_log(path, mixed, base):
    rows = [{"step": 0, "loss": 2.0}]
    for i, (a, b) in enumerate(zip(mixed, base)):
        rows.append({"step": 25 * i, "eval/accuracy/mixed": a, "eval/accuracy/base": b})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_seconds_shows_the_mean_of_each_name_at_its_pace(drawn, tmp_path, call):
    rng = np.random.default_rng(0)
    fast, slow = rng.random((2, 2, 5))
    paths = []
    for name, values in ("fast", fast), ("slow", slow):
        for seed in range(2):
            folder = tmp_path / f"{name}-{seed}"
            folder.mkdir()
            paths.append(write_log(folder / "log.jsonl", values[seed], values[seed]))
    argv = "--kind=seconds", f"--input={','.join(map(str, paths))}", f"--out={tmp_path}/s.png"
    assert call(figures, *argv, "--pace=0.5,2", "--start=10,0")[0] == 0
    (ax,) = drawn[0].axes
    for line, values, x in zip(ax.get_lines(), (fast, slow), (10 + 0.5 * 25, 2 * 25)):
        np.testing.assert_allclose(line.get_ydata(), values.mean(0))
        assert line.get_xdata()[1] == x
    status, _, stderr = call(figures, *argv, "--pace=0.5")
    assert status == 2 and "fast, slow" in stderr


def test_learning_shows_each_seed_the_mean_chance_and_the_values_at_the_end(drawn, tmp_path,
                                                                            call):
    rng = np.random.default_rng(0)
    mixed, base, plain = rng.random((3, 3, 5))
    thinking = [write_log(tmp_path / f"t{i}", mixed[i], base[i]) for i in range(3)]
    others = [write_log(tmp_path / f"p{i}", base[i], plain[i]) for i in range(3)]
    status, _, stderr = call(figures, "--kind=learning", f"--input={','.join(map(str, thinking))}",
                             f"--plain={','.join(map(str, others))}", f"--out={tmp_path}/l.png")
    assert (status, stderr) == (0, "") and (tmp_path / "l.png").stat().st_size > 10_000
    (ax,) = drawn[0].axes
    lines = [tuple(line.get_ydata()) for line in ax.get_lines()]
    expected = [(0.2, 0.2)]
    for values in (mixed, base, plain):
        expected += [*map(tuple, values), tuple(values.mean(0))]
    assert len(lines) == len(expected)
    for ours, theirs in zip(sorted(lines), sorted(expected)):
        np.testing.assert_allclose(ours, theirs)
    labels = {text.get_text().strip() for text in ax.texts}
    assert labels == {"0.200 chance", f"{mixed.mean(0)[-1]:.3f} thinking",
                      f"{base.mean(0)[-1]:.3f} same model, not thinking",
                      f"{plain.mean(0)[-1]:.3f} plain training"}
    heights = sorted(text.get_position()[1] for text in ax.texts)
    assert min(np.diff(heights)) > 0.059                   # no label over another


def test_logs_of_other_steps_have_no_mean(tmp_path, call):
    logs = [write_log(tmp_path / f"{n}", [0.5] * n, [0.5] * n) for n in (2, 3)]
    status, _, stderr = call(figures, "--kind=learning", f"--input={logs[0]},{logs[1]}",
                             f"--out={tmp_path}/l.png")
    assert status == 2 and "same steps" in stderr and stderr.count("\n") == 1


def test_the_mask_names_every_token_and_every_group_on_both_axes(drawn, tmp_path, call):
    assert call(figures, "--kind=mask", f"--out={tmp_path}/mask.png")[0] == 0
    (ax,) = drawn[0].axes
    (image,) = ax.get_images()
    names = [tick.get_text() for tick in ax.get_xticklabels()]
    assert names == [tick.get_text() for tick in ax.get_yticklabels()]
    cells = np.asarray(image.get_array())
    assert cells.shape == (20, 20) and names[:6] == ["x0", "x1", "x2", "x3", "x4", "start"]
    assert (cells[:5] == np.tri(5, 20)).all()
    for j in range(3):                                     # the thought after x0, x1, x2
        rows = slice(5 + 5 * j, 10 + 5 * j)
        assert (cells[rows, :5] == (np.arange(5) <= j)).all()
        assert (cells[rows, rows] == 2 * np.tri(5)).all()
        assert cells[rows, 5:].sum() == 2 * np.tri(5).sum()
    groups = ["text", *(f"thought\nafter x{j}" for j in range(3))]
    stands = {(text.get_text(), *text.get_position()) for text in ax.texts}
    assert stands == {(group, 5 * n + 2, -3) for n, group in enumerate(groups)} | {
        (group, -3, 5 * n + 2) for n, group in enumerate(groups)}


def test_a_table_has_means_extremes_and_the_interval_over_the_texts_of_all_runs(tmp_path, call):
    rng, paths = np.random.default_rng(0), []
    right = rng.random((3, 60)) < 0.7
    for seed in range(3):
        clusters = {"count": [1.0] * 60, "right_mixed": right[seed].astype(float).tolist()}
        means = {"nll_base": {"mean": 1.0}, "right_mixed": {"mean": float(right[seed].mean())}}
        paths.append(tmp_path / f"{seed}-thinking.json")
        paths[-1].write_text(json.dumps({**means, "clusters": clusters}))
    _, out, _ = call(figures, "--kind=table", f"--input={','.join(map(str, paths))}")
    means, interval = right.mean(1), bootstrap_ci(right.sum(0), np.full(60, 3))
    shown = (f"{right.mean():.3f} ({means.min():.3f} to {means.max():.3f}) "
             f"[{interval['low']:.3f}, {interval['high']:.3f}]")
    assert shown in out.splitlines()[-1] and "| thinking | 3 |" in out


def test_there_is_no_interval_over_other_texts_or_over_none():
    def result(count, dataset_id=None):
        return dict(dataset_id=dataset_id, clusters=dict(count=count, right=count))
    assert figures.interval_over_texts([result([1.0] * 50)] * 2, "right") == " [1.000, 1.000]"
    for results in ([result([])], [result([0.0] * 50)], [result([1.0] * 49)],
                    [result([1.0] * 50, {"task": "a"}), result([1.0] * 50, {"task": "b"})]):
        assert figures.interval_over_texts(results, "right") == ""


def test_a_mistake_is_one_line(call):
    status, _, stderr = call(figures, "--kind=pie")
    assert status == 2 and "'pie' is not one of mask" in stderr and stderr.count("\n") == 1


def test_a_file_of_another_kind_is_one_line_that_names_it(tmp_path, call):
    found, log, text = (tmp_path / name for name in ("0-base.json", "log.jsonl", "README.md"))
    write(tmp_path, "base", 0)
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    text.write_text("words")
    number = tmp_path / "5.json"
    number.write_text("5")
    out = f"--out={tmp_path}/wrong.png"
    for kind, given, wrong, of in (
            ("table", log, log, "JSON"), ("table", text, text, "JSON"),
            ("table", number, number, "another type"), ("learning", found, found, "log.jsonl"),
            ("learning", text, text, "log.jsonl"), ("learning", number, number, "log.jsonl"),
            ("learning", log, log, "log.jsonl")):
        status, _, stderr = call(figures, f"--kind={kind}", f"--input={given}", out)
        assert status == 2 and f"{wrong} is" in stderr and of in stderr, stderr
        assert stderr.count("\n") == 1 and not (tmp_path / "wrong.png").exists()
