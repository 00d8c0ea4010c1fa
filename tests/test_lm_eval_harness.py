"""The lm-evaluation-harness gets the likelihoods and the texts that eval.py finds."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import questions
from checkpoint import load_model
from config import UserError
from scoring import score_positions
from tokenizer import load_tokenizer

lm_eval = pytest.importorskip("lm_eval")
from tasks import lm_eval_harness  # noqa: E402, it needs the library


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    return questions.school(tmp_path_factory.mktemp("school"))


def requests(*args):
    return [SimpleNamespace(args=pair) for pair in args]


def our_likelihood(model, ids, start, thoughts="own"):
    """Return log p of ids[start:] by scoring.py, and whether each of them is the likeliest."""
    where_BL = torch.zeros(1, len(ids), dtype=torch.bool)
    where_BL[0, start - 1:-1] = True
    scores = score_positions(model, torch.tensor([ids]), where_BL, thoughts=thoughts)
    return -float(scores["nll_mixed"].sum()), bool(scores["right_mixed"].all())


@pytest.mark.parametrize("name, thoughts", [("quiet", "own"), ("quiet", "none"), ("plain", "own")])
def test_loglikelihoods_are_ours(school, name, thoughts):
    lm = lm_eval_harness.QuietStarLM(str(school / name), thoughts, batch_size=3)
    model, tokenizer = load_model(school / name), load_tokenizer(school)
    pairs = [("Q: where?\nA:", " " + letter) for letter in "ABCDE"]
    pairs += [("", "The baker"), ("A train has ", "1,250 miles"), ("Q: how?", "\nA: 17\n")]
    for (context, continuation), (logp, greedy) in zip(pairs, lm.loglikelihood(requests(*pairs))):
        ids = tokenizer.encode(context + continuation, bos=True)
        start = len(tokenizer.encode(context.rstrip(), bos=True))
        expected = our_likelihood(model, ids, start, thoughts)
        assert (pytest.approx(logp, rel=1e-4), greedy) == expected


def test_answers_that_differ_in_their_last_token_share_one_pass(school, monkeypatch):
    lm = lm_eval_harness.QuietStarLM(str(school / "quiet"), batch_size=8)
    asked, answer_logits = [], lm_eval_harness.answer_logits

    def recorded(model, texts, thoughts):
        asked.extend(texts)
        return answer_logits(model, texts, thoughts)
    monkeypatch.setattr(lm_eval_harness, "answer_logits", recorded)
    answers = lm.loglikelihood(requests(*[("Q: where?\nA:", " " + x) for x in "ABCDE"]))
    assert len(asked) == 1 and len({logp for logp, _ in answers}) == 5


def test_rolling_loglikelihoods_are_ours_and_windows_score_every_token_once(school):
    lm = lm_eval_harness.QuietStarLM(str(school / "quiet"))
    text = "The baker has 1,250 apples. How many?" * 4
    ids = [lm.prefix_token_id, *lm.tok_encode(text, add_special_tokens=False)]
    whole, = lm.loglikelihood_rolling(requests((text,)))
    assert whole == pytest.approx(our_likelihood(lm.quiet, ids, 1)[0], rel=1e-4)
    lm.max_length = 21
    cut, = lm.loglikelihood_rolling(requests((text,)))
    expected, done = 0.0, 1
    while done < len(ids):                        # 20 tokens, then each next 20 with what fits
        until = min(done + 20, len(ids))
        window = ids[max(0, until - 21):until]
        expected += our_likelihood(lm.quiet, window, len(window) - (until - done))[0]
        done = until
    assert cut == pytest.approx(expected, rel=1e-4) and abs(cut - whole) > 1e-3


def test_what_it_generates_is_the_greedy_continuation_up_to_the_first_stop(school):
    lm = lm_eval_harness.QuietStarLM(str(school / "quiet"), batch_size=2)
    prompts = ["Q: how many apples?\nA:", "The", "A train has 7"]

    def generate(until, *prompts):
        return lm.generate_until(requests(*[(prompt, dict(until=until, max_gen_toks=9))
                                            for prompt in prompts]))
    together = generate([], *prompts)
    for prompt, said in zip(prompts, together):
        ids = lm.tok_encode(prompt)
        for _ in range(9):
            mixed_BNPD = lm.quiet.predict(torch.tensor([ids]))[1]
            token = int(lm.quiet.model.head(mixed_BNPD[0, 0, -1]).argmax())
            if token in (lm.text_tokenizer.eos, lm.text_tokenizer.bos):
                break
            ids.append(token)
        assert lm.text_tokenizer.decode(ids) == prompt + said
    said = max(together, key=len)
    prompt = prompts[together.index(said)]
    stop = said[len(said) // 2:][:2]
    assert generate([stop], prompt) == [said[:said.index(stop)]] and stop not in prompt
    drawn = [lm.generate_until(requests((prompt, dict(do_sample=True, temperature=t))))
             for t in (0.9, 0.9, 0.0)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(UserError, match="'top_p': 0.9"):
        lm.generate_until(requests((prompt, dict(until=[], top_p=0.9))))


def test_an_empty_stop_string_stops_nothing_and_a_prompt_is_never_cut(school):
    lm = lm_eval_harness.QuietStarLM(f"{school}/quiet")

    def said(prompt, **options):
        return lm.generate_until(requests((prompt, options)))[0]
    prompt = "Q: " + "many words " * 9
    short = said(prompt, until=[], max_gen_toks=4)
    assert short and said(prompt, until=[""], max_gen_toks=4) == short
    assert said(prompt, until=[], max_gen_toks=100_000).startswith(short)
    with pytest.raises(UserError, match="leaves no room for an answer"):
        said("many words " * lm.max_length, until=[], max_gen_toks=4)


def test_an_empty_text_begins_with_bos_else_eos_else_it_is_refused(school, monkeypatch):
    lm = lm_eval_harness.QuietStarLM(f"{school}/quiet")
    asked = requests(("", dict(until=[], max_gen_toks=3)))
    begun = lm.generate_until(asked)
    encode, bos = type(lm.text_tokenizer).encode, lm.text_tokenizer.bos
    monkeypatch.setattr(type(lm.text_tokenizer), "encode",
                        lambda tokenizer, text, bos=False: encode(tokenizer, text))
    monkeypatch.setattr(lm.text_tokenizer, "bos", None)
    monkeypatch.setattr(lm.text_tokenizer, "eos", bos)
    assert lm.generate_until(asked) == begun
    monkeypatch.setattr(lm.text_tokenizer, "eos", None)
    with pytest.raises(UserError, match="no bos or eos"):
        lm.generate_until(asked)


def test_likelihoods_that_are_no_numbers_are_refused(school):
    lm = lm_eval_harness.QuietStarLM(f"{school}/plain")
    lm.quiet.head.weight.data[:] = float("nan")
    with pytest.raises(UserError, match="a log-likelihood is nan or infinite"):
        lm.loglikelihood(requests(("A", " B")))


@pytest.mark.parametrize("options", [
    *[dict(temperature=t) for t in (None, "abc", -1, float("nan"), float("inf"), 0.001, 101, True)],
    *[dict(until=until) for until in (5, [5], [None], {})],
    *[dict(do_sample=do_sample) for do_sample in (1, "yes", [])]])
def test_generation_options_of_another_kind_are_one_line(school, options):
    lm = object.__new__(lm_eval_harness.QuietStarLM)
    with pytest.raises(UserError, match=next(iter(options))):
        lm._options(options)
    assert lm._options(dict(until="a", do_sample=True)) == (("a",), 1.0, 256)


def test_an_answer_that_is_cut_to_the_room_says_so(school, capsys):
    lm = lm_eval_harness.QuietStarLM(f"{school}/plain")
    lm.max_length = 12
    lm.generate_until(requests(*[("The baker", dict(until=[], max_gen_toks=most))
                                 for most in (1, 90, 95)]))
    told = capsys.readouterr().err
    assert "cut to the room that 2 long prompts leave" in told and told.count("\n") == 1


LOCAL_TASK = """include: {library}/tasks/{spec}
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {rows}, {split}: {rows}}}}}
"""


@pytest.mark.slow
def test_its_own_command_line_runs_both_tasks_on_local_files(school, tmp_path):
    """Offline, by a yaml of four lines; the accuracy reported is the one our likelihoods give."""
    flat = questions.write(tmp_path / "flat.jsonl", questions.commonsense_qa(11, flat=True))
    library, = lm_eval.__path__
    for task, spec, split, rows in (
            ("gsm8k_cot_zeroshot", "gsm8k/gsm8k-cot-zeroshot.yaml", "test", school / "gsm8k.jsonl"),
            ("commonsense_qa", "commonsense_qa/default.yaml", "validation", flat)):
        (tmp_path / f"{task}.yaml").write_text(LOCAL_TASK.format(
            library=library, spec=spec, task=task, split=split, rows=rows))
    done = subprocess.run(
        [sys.executable, "-m", "tasks.lm_eval_harness", "run", "--include_path", str(tmp_path),
         "--model", "quiet_star", "--model_args", f"checkpoint={school}/quiet", "--tasks",
         "gsm8k_cot_zeroshot,commonsense_qa", "--gen_kwargs", "max_gen_toks=6", "--batch_size", "4",
         "--device", "cpu", "--output_path", str(tmp_path), "--log_samples"],
        capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
             "HF_HOME": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())["results"]
    assert set(results) == {"gsm8k_cot_zeroshot", "commonsense_qa"}
    lm, right = lm_eval_harness.QuietStarLM(str(school / "quiet")), []
    for row in questions.commonsense_qa(11):
        question, choices = row["question"]["stem"], row["question"]["choices"]
        options = "\n".join(f"{c['label']}. {c['text']}" for c in choices)
        context = f"Question: {question}\n{options}\nAnswer:"
        logp = lm.loglikelihood(requests(*[(context, " " + letter) for letter in "ABCDE"]))
        right.append("ABCDE"[int(np.argmax([value for value, _ in logp]))] == row["answerKey"])
    assert results["commonsense_qa"]["acc,none"] == pytest.approx(np.mean(right))
    assert "exact_match,flexible-extract" in results["gsm8k_cot_zeroshot"]
    samples = next(tmp_path.rglob("samples_gsm8k*")).read_text().splitlines()
    prompt = json.loads(samples[0])["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.startswith("Q: ") and prompt.endswith("A: Let's think step by step.")


def test_a_mistake_is_one_line(school):
    shuffled = lm_eval_harness.QuietStarLM(f"{school}/quiet", thoughts="shuffled")
    with pytest.raises(UserError, match="being generated has none to shuffle"):
        shuffled.generate_until([])
    with pytest.raises(UserError, match="thoughts=mine is not one of own, shuffled, none"):
        lm_eval_harness.QuietStarLM(f"{school}/quiet", thoughts="mine")
    for size in ("auto", 1.5, 0, -1, "", None):
        with pytest.raises(UserError, match="is not a whole number of 1 or more"):
            lm_eval_harness.QuietStarLM(f"{school}/quiet", batch_size=size)
    with pytest.raises(UserError, match="an answer of 600 tokens does not fit"):
        shuffled._loglikelihood_tokens([(None, [1], [3] * 600)])
    done = subprocess.run([sys.executable, "-m", "tasks.lm_eval_harness", "run", "--model",
                           "quiet_star", "--model_args", "checkpoint=gone", "--tasks", "gsm8k"],
                          capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: gone is missing")
