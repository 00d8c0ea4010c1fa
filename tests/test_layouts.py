"""Every layout, base or thinking, goes through every script."""
import json

import pytest

import eval as evaluation
import sample
import train
from checkpoint import find_checkpoint, load_model, save_model
from layouts import save_mistral, save_official
from thoughts import QuietSTaR, ThoughtConfig
from tokenizer import load_tokenizer
from toys import tiny_quiet

THINKING = ("ours", "official")


@pytest.fixture(params=["ours", "base", "official", "mistral"])
def folder(request, game, tmp_path):
    """A folder in one of the layouts, of a model with the shell game's 20 words."""
    quiet, tokenizer = tiny_quiet(model=dict(vocab_size=20, max_seq_len=128)), load_tokenizer(game)
    folder = tmp_path / request.param
    if request.param == "official":
        save_official(quiet, folder, tokenizer=tokenizer)
    elif request.param == "mistral":
        save_mistral(quiet.model, folder, tokenizer)
    else:
        model = quiet if request.param == "ours" else quiet.model
        save_model(model, folder, tokenizer=tokenizer)
    return folder


def test_sampling(call, folder):
    argv = (f"--checkpoint={folder}", "--prompt=ball c : ab cd", "--max_new_tokens=4")
    status, plain, stderr = call(sample, *argv)
    assert (status, stderr) == (0, "") and plain.startswith("ball c : ab cd")
    status, shown, stderr = call(sample, *argv, "--show-thoughts")
    if folder.name in THINKING:
        assert status == 0 and "weight" in shown
    else:
        assert status == 2 and "has no thoughts to show" in stderr
    assert call(sample, *argv, "--think=never")[0] == 0


def test_evaluating(call, folder, game, tmp_path):
    argv = (f"--checkpoint={folder}", f"--data={game}/without_reasoning", "--texts=10",
            "--task=shell_game")
    status, _, stderr = call(evaluation, *argv, f"--out={tmp_path}/result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (status, stderr) == (0, "") and result["tokens"] == 10
    assert (result["nll_mixed-nll_base"]["mean"] != 0) == (folder.name in THINKING)


@pytest.mark.parametrize("objective", ["plain", "quiet"])
def test_training(call, folder, game, tmp_path, objective):
    status, stdout, stderr = call(
        train, f"--init_from={folder}", f"--data={game}/without_reasoning", f"--out={tmp_path}/run",
        f"--objective={objective}", "--steps=2", "--batch_size=2", "--seq_len=12",
        "--thought_len=2", "--n_true=1", "--policy_weight=1", "--eval_every=1", "--eval_texts=4")
    assert (status, stderr) == (0, "") and "done:" in stdout
    trained = load_model(find_checkpoint(tmp_path / "run"))
    assert isinstance(trained, QuietSTaR) == (objective == "quiet")
    if objective == "quiet" and folder.name == "official":
        assert trained.config.marker_ids == (20, 21) and trained.config.thought_len == 2


def test_every_layout_thinks_the_same(game, tmp_path, call):
    """The two that hold thoughts, and official converted to ours."""
    quiet, tokenizer = tiny_quiet(model=dict(vocab_size=20, max_seq_len=128)), load_tokenizer(game)
    quiet.config = ThoughtConfig()                # the official layout holds no settings
    ours, official, converted = (tmp_path / name for name in ("ours", "official", "converted"))
    save_model(quiet, ours, tokenizer=tokenizer)
    save_official(quiet, official, tokenizer=tokenizer)
    save_model(load_model(official, dtype=None), converted, tokenizer=load_tokenizer(official))
    argv = ("--prompt=ball c : ab cd", "--max_new_tokens=6", "--show-thoughts")
    shown = [call(sample, f"--checkpoint={path}", *argv)[1] for path in (ours, official, converted)]
    assert shown[0] and shown[0] == shown[1] == shown[2]


def test_a_tokenizer_of_another_model_is_refused(call, folder, game, tmp_path):
    (tmp_path / "data").mkdir()
    for file in (game / "without_reasoning").iterdir():
        (tmp_path / "data" / file.name).write_bytes(file.read_bytes())
    words = json.loads((game / "without_reasoning" / "words.json").read_text())
    words["words"] = words["words"][::-1]
    (tmp_path / "data" / "words.json").write_text(json.dumps(words))
    argv = (f"--data={tmp_path}/data", "--texts=4", "--task=shell_game")
    status, _, stderr = call(evaluation, f"--checkpoint={folder}", *argv)
    assert status == 2 and "is another tokenizer than" in stderr and stderr.count("\n") == 1
