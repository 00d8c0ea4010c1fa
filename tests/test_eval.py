"""eval.py: the table it prints, the json it writes, and what it refuses."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import eval as evaluation
from checkpoint import save_model
from data import prepare
from tokenizer import load_tokenizer
from toys import tiny_mistral, tiny_quiet


def test_the_command_prints_a_table_and_writes_the_same_numbers(call, game, tmp_path):
    save_model(tiny_quiet(model=dict(vocab_size=20)), tmp_path / "quiet")
    argv = (f"--checkpoint={tmp_path}/quiet", f"--data={game}/without_reasoning", "--texts=20",
            "--task=shell_game")
    status, out, _ = call(evaluation, *argv, f"--out={tmp_path}/scores.json")
    found = json.loads((tmp_path / "scores.json").read_text())
    assert status == 0 and f"{found['nll_mixed']['mean']:.4f}" in out
    assert found["tokens"] == 20 and 0 <= found["reasoning_is_right"]["mean"] <= 1
    assert len(found["difficulty"]) == len(found["by_entropy"]) == len(found["by_weight"]) == 10
    status, out, _ = call(evaluation, *argv, f"--against={tmp_path}/scores.json", "--thoughts=none",
                          f"--out={tmp_path}/none.json")
    none = json.loads((tmp_path / "none.json").read_text())
    assert none["differences"]["nll_base"]["mean"] == pytest.approx(0, abs=1e-5)
    gain = found["nll_mixed-nll_base"]["mean"]
    assert none["differences"]["nll_mixed"]["mean"] == pytest.approx(-gain, abs=1e-5)
    found["clusters"]["count"][3] += 1
    (tmp_path / "scores.json").write_text(json.dumps(found))
    status, _, stderr = call(evaluation, *argv, f"--against={tmp_path}/scores.json",
                             f"--out={tmp_path}/again.json")
    assert status == 2 and "counts other tokens of the same texts" in stderr
    assert json.loads((tmp_path / "again.json").read_text())["nll_mixed"] == found["nll_mixed"]


def test_without_a_task_every_next_token_is_scored(call, game, tmp_path):
    """The user chooses: the vocabulary of the data decides nothing."""
    save_model(tiny_quiet(model=dict(vocab_size=20)), tmp_path / "quiet")
    argv = (f"--checkpoint={tmp_path}/quiet", f"--data={game}/without_reasoning", "--texts=20")
    assert call(evaluation, *argv, f"--out={tmp_path}/all.json")[0] == 0
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["tokens"] > 100 and "reasoning_is_right" not in found


def test_thoughts_of_another_length_than_the_trained_one_score_the_same_tokens(call, game,
                                                                               tmp_path):
    save_model(tiny_quiet(model=dict(vocab_size=20)), tmp_path / "quiet")
    found = {}
    for length in ("", "3", "0", "5"):
        argv = [f"--checkpoint={tmp_path}/quiet", f"--data={game}/without_reasoning", "--texts=10",
                f"--out={tmp_path}/scores.json", "--task=shell_game"]
        argv += [f"--thought_len={length}"] if length else []
        assert call(evaluation, *argv)[0] == 0
        found[length] = json.loads((tmp_path / "scores.json").read_text())
    assert [found[length]["thought_len"] for length in found] == [3, 3, 0, 5]
    assert found[""]["nll_mixed"] == found["3"]["nll_mixed"] != found["5"]["nll_mixed"]
    assert found["0"]["nll_mixed"] != found["5"]["nll_mixed"]
    assert len({json.dumps(f["clusters"]["count"]) for f in found.values()}) == 1


@pytest.mark.slow
def test_two_ranks_score_the_same_tokens_as_one(call, tmp_path):
    save_model(tiny_quiet(model=dict(vocab_size=20)), tmp_path / "quiet")
    words = dict(words=["a", "b", "c", "."], bos=None, eos=".")
    (tmp_path / "words.json").write_text(json.dumps(words))
    lines = (" ".join("abc"[i * j % 3] for j in range(2 + i % 9)) for i in range(90))
    prepare(lines, load_tokenizer(tmp_path / "words.json"), tmp_path / "data", 0.9, [])
    argv = (f"--checkpoint={tmp_path}/quiet", f"--data={tmp_path}/data", "--batch_size=4")
    assert call(evaluation, *argv, f"--out={tmp_path}/one.json")[0] == 0
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           "--standalone", "eval.py", *argv, f"--out={tmp_path}/two.json"],
                          capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert one == two and one["tokens"] > 0


def test_a_model_that_learnt_by_comparing_thoughts_is_scored_with_one(call, game, tmp_path):
    save_model(tiny_quiet(model=dict(vocab_size=20), advantage="leave_one_out"), tmp_path,
               tokenizer=load_tokenizer(game))
    status, _, stderr = call(evaluation, f"--checkpoint={tmp_path}", "--texts=9",
                             f"--data={game}/without_reasoning")
    assert status == 0, stderr


def test_a_mistake_is_one_line(call, game, tmp_path):
    save_model(tiny_mistral(vocab_size=20), tmp_path / "plain")
    data = f"--data={game}/without_reasoning"
    for argv, words in (
            ([f"--checkpoint={tmp_path}", data], "holds no whole checkpoint"),
            ([f"--checkpoint={tmp_path}", "--data=x", "--texts=0"], "--texts=0 is below 1"),
            ([f"--checkpoint={tmp_path}/gone", data], "gone is missing"),
            (["--data=x"], "--checkpoint=FOLDER is needed, and --data=FOLDER or"),
            ([f"--checkpoint={tmp_path}", "--task=gsm8k"], "--file=FILE"),
            ([f"--checkpoint={tmp_path}", "--data=x", "--thoughts=mine"],
             "--thoughts: 'mine' is not one of own, sampled, shuffled, none (see"),
            ([f"--checkpoint={tmp_path}", "--data=x", "--n_thoughts=2"], "--thoughts=sampled"),
            ([f"--checkpoint={tmp_path}", "--data=x", "--task=riddles"], "task 'riddles' is not one of"),
            ([f"--checkpoint={tmp_path}/plain", data, "--thought_len=2"], "plain does not think")):
        status, _, stderr = call(evaluation, *argv)
        assert status == 2 and words in stderr and stderr.count("\n") == 1, stderr


def test_results_of_other_lines_under_the_same_name_cannot_be_compared(call, game, tmp_path):
    save_model(tiny_quiet(model=dict(vocab_size=20)), tmp_path / "m",
               tokenizer=load_tokenizer(game))
    data, other = tmp_path / "data", tmp_path / "other.json"
    shutil.copytree(game / "without_reasoning", data)
    options = f"--checkpoint={tmp_path / 'm'}", f"--data={data}", "--texts=20"
    status, out, _ = call(evaluation, *options, f"--out={other}")
    assert status == 0 and "intervals over 20 texts are too narrow" in out
    assert call(evaluation, *options, f"--against={other}")[0] == 0
    ids = np.fromfile(data / "val.bin", np.uint16)
    ids[4] = 5 + (ids[4] - 4) % 5     # another cup
    ids.tofile(data / "val.bin")
    status, _, error = call(evaluation, *options, f"--against={other}")
    assert status == 2 and "only the same can be compared" in error
