"""Intervals, paired differences, the temperature control, and results on disk."""
import json

import numpy as np
import pytest
import torch

from config import UserError
from scoring import score_targets
from tasks import bootstrap
from toys import tiny_mistral


def clusters_of(text, **values):
    """Sums over each text, as eval.py and tasks/qa.py give them."""
    values["count"] = np.ones(len(text))
    return {name: np.bincount(text, value) for name, value in values.items()}


def test_intervals_resample_texts_and_hold_the_mean():
    n = 400
    text = np.repeat(np.arange(n // 4), 4)
    value = np.repeat(np.random.default_rng(0).normal(size=n // 4), 4)       # a text's tokens agree
    found = bootstrap.summary(clusters_of(text, nll_base=value))["nll_base"]
    assert found["mean"] == pytest.approx(value.mean())
    assert found["low"] < value.mean() < found["high"]
    expected = 2 * 1.96 * value.std() / np.sqrt(n // 4)                # not / sqrt(n): 4 are as 1
    assert found["high"] - found["low"] == pytest.approx(expected, rel=0.15)


def test_a_mean_is_over_all_values_also_of_clusters_of_unequal_size():
    found = bootstrap.bootstrap_ci([1.0, 8.0], [1, 3])
    assert found["mean"] == 9 / 4
    assert (found["low"], found["high"]) == pytest.approx((1, 8 / 3))


def test_a_paired_difference_is_surer_than_its_parts():
    rng = np.random.default_rng(0)
    nll = rng.normal(size=300)
    mixed = nll - 0.1 + 0.01 * rng.normal(size=300)
    found = bootstrap.summary(clusters_of(np.arange(300), nll_base=nll, nll_mixed=mixed))
    low, high = (found["nll_mixed-nll_base"][name] for name in ("low", "high"))
    assert low < -0.1 < high < -0.09
    assert high - low < (found["nll_base"]["high"] - found["nll_base"]["low"]) / 50


def test_the_scaled_base_has_the_temperature_that_suits_the_other_half_of_the_texts():
    """Logits that are twice too flat: the temperature found is one half, on either half."""
    rng = np.random.default_rng(0)
    logits_RV = torch.tensor(rng.normal(size=(4000, 5)) * 2)
    target_R = torch.multinomial(logits_RV.softmax(-1), 1,
                                 generator=torch.Generator().manual_seed(0))[:, 0]
    model = tiny_mistral(vocab_size=5, dim=8)
    model.head.weight.data = torch.eye(5, 8)
    hidden_RD = torch.nn.functional.pad(logits_RV.float() / 2, (0, 3))
    nll, _, entropy, nll_at = (tensor.numpy() for tensor in score_targets(
        model, hidden_RD, target_R, None, bootstrap.TEMPERATURES))
    assert bootstrap.TEMPERATURES[bootstrap.UNSCALED] == 1
    np.testing.assert_allclose(nll_at[:, bootstrap.UNSCALED], nll, rtol=1e-4, atol=1e-5)
    p_RV = (logits_RV / 2).softmax(-1)
    np.testing.assert_allclose(entropy, -(p_RV * p_RV.log()).sum(-1), rtol=1e-4)
    value, fitted = bootstrap.temperature_scaled(nll_at, np.arange(4000), least=True)
    assert fitted == [0.5, 0.5] and value.mean() < nll.mean() - 0.05
    spoilt = nll_at.copy()
    spoilt[::2, 0] = -100                                     # what is scored decides nothing
    value, fitted = bootstrap.temperature_scaled(spoilt, np.arange(4000), least=True)
    assert fitted[0] == 0.5
    assert np.array_equal(value[::2], nll_at[::2, bootstrap.UNSCALED - 4])


def test_one_text_alone_is_not_scaled_because_no_other_is_there_to_fit_on():
    value_RK = np.arange(42.0).reshape(2, 21)
    value_R, fitted = bootstrap.temperature_scaled(value_RK, np.zeros(2, int), least=True)
    assert fitted[0] == 1 and np.array_equal(value_R, value_RK[:, bootstrap.UNSCALED])


def test_the_table_has_a_line_per_measure_and_the_gains_in_the_last_columns():
    rng = np.random.default_rng(0)
    names = ("nll_base", "nll_scaled", "nll_mixed", "right_base", "right_mixed", "mixing_weight")
    values = {name: rng.normal(size=30) for name in names}
    result = bootstrap.summary(clusters_of(np.arange(30), **values))
    head, nll, right, weight = bootstrap.format_table(result).splitlines()
    assert head.split("  ")[-1].strip() == "thinking - scaled"
    cells = [bootstrap.format_cell(result[name]) for name in names]
    gains = [bootstrap.format_cell(result[f"nll_mixed-{name}"], signed=True)
             for name in ("nll_base", "nll_scaled")]
    assert nll.split() == " ".join(["nll", *cells[:3], *gains]).split()
    assert right.split()[:4] == ["right", *cells[3].split()] and right.split()[-1] == "-"
    assert weight.split() == ["mixing_weight", *cells[5].split()]


def test_results_of_the_same_clusters_are_compared_pair_by_pair_and_others_refused(tmp_path):
    nll = np.random.default_rng(0).normal(size=50)
    result = dict(dataset_id=dict(texts=50), clusters=clusters_of(np.arange(50), nll_base=nll))
    other = dict(dataset_id=dict(texts=50), clusters=dict(nll_base=list(nll + 1), count=[1.0] * 50))
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other))
    found = bootstrap.paired_differences(result, str(path))["nll_base"]
    assert [found[name] for name in ("mean", "low", "high")] == pytest.approx([-1, -1, -1])
    other["clusters"]["count"][3] = 2.0
    path.write_text(json.dumps(other))
    with pytest.raises(UserError, match="counts other tokens of the same texts"):
        bootstrap.paired_differences(result, str(path))
    for text in (json.dumps(other | dict(dataset_id=dict(texts=60))), "{}"):
        path.write_text(text)
        with pytest.raises(UserError, match="of other texts or questions than {'texts': 50}"):
            bootstrap.paired_differences(result, str(path))


def test_a_results_file_keeps_whole_lines_and_refuses_those_of_other_settings(tmp_path):
    path, settings = tmp_path / "new" / "results.jsonl", dict(task="gsm8k", votes=3)
    first, right = bootstrap.ResultsFile(path, settings), dict(exact_base=[1.0])
    first.add([dict(number=n, said=said, scores=right)
               for n, said in ((7, "a\nb\u2028"), (2, "c"))])
    with open(path, "a") as file:
        file.write('{"number": 9, "said": "cut')                          # killed in mid-line
    second = bootstrap.ResultsFile(path, settings)
    assert list(second.rows) == [7, 2] and second.rows[7]["said"] == "a\nb\u2028"
    second.add([dict(number=n, said=said, scores=right)
                for n, said in ((7, "again"), (9, "d"))])                 # 7 is there already
    third = bootstrap.ResultsFile(path, settings)
    assert [row["said"] for row in third.rows.values()] == ["a\nb\u2028", "c", "d"]
    with pytest.raises(UserError, match="made with {'votes': 3}: choose another"):
        bootstrap.ResultsFile(path, dict(settings, votes=4))
    with pytest.raises(UserError, match="Is a directory: .*new"):
        bootstrap.ResultsFile(tmp_path / "new", settings).add([dict(number=1)])


@pytest.mark.parametrize("by", ["nll_base", "entropy_base", "mixing_weight"])
def test_bins_run_from_the_least_to_the_greatest_and_hold_every_token(by):
    rng = np.random.default_rng(0)
    names = ("nll_base", "nll_mixed", "entropy_base", "mixing_weight")
    scores = {name: rng.exponential(size=95) for name in names}
    scores["text"] = np.arange(95) // 2
    rows = bootstrap.bin_scores(scores, by)
    assert sum(row["tokens"] for row in rows) == 95 and len(rows) == 10
    assert all(a[by] < b[by] for a, b in zip(rows, rows[1:]))
    for row in rows:
        low, high = row["interval_gain"]
        assert low <= row["gain"] <= high
        assert row["gain"] == pytest.approx(row["nll_base"] - row["nll_mixed"])
    lines = bootstrap.format_bins(rows).splitlines()
    assert len(lines) == 11 and f"{rows[9]['gain']:+.4f} [{low:+.4f}, {high:+.4f}]" in lines[10]


@pytest.mark.parametrize("line", ['{"number": 1}', '{"question": "Q"}', "3", "[1]", "null",
                                  '{"number": 1, "settings": {}, "scores": {}}',
                                  '{"number": 1, "settings": {}, "scores": {"nll_base": []}}'])
def test_a_file_of_other_rows_is_refused_and_kept(tmp_path, line):
    path = tmp_path / "q.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match="choose another --out"):
        bootstrap.ResultsFile(path, {})
    assert path.read_text() == line
