"""Ask a model the questions of a task, directly or by a vote among chains of thought.

Directly, the answer behind `A:` is read off the predictions of its tokens (tasks.py), and for
numbers also decoded greedily. Or the model works aloud first, zero-shot, and its votes count:

    Q: How many ...?
    A: Let's think step by step. <up to 384 tokens at temperature 0.9>
    Therefore, the answer (arabic numerals) is <12 more>

Prompts, temperature, lengths and the two stages are the official evaluation's. A thought is thought
at every emitted token, or at none.

  majority           the most frequent answer, sign and decimals kept; no number has no vote
  majority_official  the first run of digits; "no number" may win, as official
  one_vote           the share of the votes that are right

Ended as official: end of text, or the second "Q:" or blank line of the whole text, cut off with
what follows. There the official code loses the first "Q:" and doubles bos; here it does not.

Left out on purpose: other prompts than these; harness.py runs other people's.

Read next: harness.py
"""
import hashlib
import re
from collections import Counter
from pathlib import Path

import numpy as np

from config import UserError
from tasks import qa as tasks
import weights
from tasks.bootstrap import PLAIN, TEMPERATURES, ResultsFile, Progress, temperature_scaled
from predict import complete, predictions, thinks
from tasks.qa import MARKER, Question

STEPS = MARKER + " Let's think step by step."
THEREFORE = {"gsm8k": "\nTherefore, the answer (arabic numerals) is",         # the official code's
             "commonsense_qa": "\nTherefore, among A through E, the answer is"}  # arXiv 2205.11916
ENDS = ("Q:", "\n\n\n")
ANSWER_TOKENS = 12                        # of the second stage
DIRECT_TOKENS = 16                        # of a greedy answer at most
NUMBER = re.compile(r"-?\s?\$?\d[\d,]*(?:\.\d+)?")


def ask(objective, tokenizer, cfg, place, out: str) -> dict:
    """Every question of cfg.file (or the --limit subset), this rank's share of the batches.

    What was answered stands in a jsonl beside `out`, a line per question, and is not asked again.
    Returns what it is of and the measures by question, for evidence.summary.
    """
    questions = tasks.read(cfg.task, cfg.file)
    questions = [questions[i] for i in tasks.subset(len(questions), cfg.limit)]
    of = dict(task=cfg.task, sha256=hashlib.sha256(Path(cfg.file).read_bytes()).hexdigest(),
              questions=len(questions))
    how = dict(weights=identity(cfg.checkpoint), thoughts=cfg.thoughts, votes=cfg.votes)
    if thinks(objective, cfg.thoughts):
        how |= dict(thought_len=objective.config.thought_len)
    if cfg.votes:
        how |= dict(seed=cfg.seed, temperature=cfg.temperature, max_new=cfg.max_new_tokens)
    if cfg.thoughts == "swapped":
        how |= dict(batch=cfg.batch_size)                        # a thought comes from the same batch
    ledger = ResultsFile(str(Path(out).with_suffix(".jsonl")), of | how, place)
    known = tasks.alphabets(tokenizer)
    answers = {q.number: tasks.locate(tokenizer.encode(f"{q.text}{MARKER}{q.answer}\n", bos=True),
                                      tokenizer, known) for q in questions}
    questions.sort(key=lambda q: -len(answers[q.number].ids))   # like lengths, the longest first
    size = max(1, cfg.batch_size // max(1, cfg.votes))
    starts = range(place.rank * size, len(questions), place.world * size)
    batches = [batch for batch in (questions[start:start + size] for start in starts)
               if any(q.number not in ledger.done for q in batch)]
    progress = Progress(sum(map(len, batches)), f"{cfg.task} on this rank", place)
    for batch in batches:
        rows = (reason(objective, batch, tokenizer, cfg) if cfg.votes else
                direct(objective, batch, [answers[q.number] for q in batch], tokenizer, cfg))
        ledger.add([row for row in rows if row["number"] not in ledger.done])
        progress(len(batch))
    ledger.wait(place)
    rows = [row for row in ledger.rows().values() if row["number"] in answers]
    if len(rows) != len(questions):
        raise UserError(f"{ledger.path} has {len(rows)} of {len(questions)} questions: some rank "
                         "did not finish; the same command goes on")
    units, fitted = measures(rows)
    return dict(of=of, **how, temperatures=fitted, units=units)


def identity(folder: str) -> str:
    """Which weights: their folder, and when and how large they were written."""
    files = sorted(weights.find_checkpoint(folder).glob("*"))
    return ", ".join(f"{path.name} of {path.stat().st_size} bytes at {path.stat().st_mtime_ns}"
                     for path in files if path.suffix in (".safetensors", ".bin", ".pth"))


def measures(rows: list[dict]) -> tuple[dict, dict]:
    """By question, with the temperature_scaled base beside the rest; the temperatures that were fitted."""
    names = [name for name in rows[0] if isinstance(rows[0][name], (float, list))
             and name not in ("said", "votes")]
    units, fitted = {}, {}
    for name in names:
        value = np.array([row[name] for row in rows])
        if value.ndim == 2:                                             # at each temperature
            measure = name.removesuffix("_base")
            units[f"{measure}_sharp"], fitted[measure] = temperature_scaled(value, np.arange(len(rows)),
                                                                   least=measure == "nll")
            value = value[:, PLAIN]
        units[name] = value
    if not any(name.endswith("_mixed") for name in units):      # it does not think: as the base
        units |= {name.replace("_base", "_mixed"): value for name, value in units.items()
                  if name.endswith("_base")}
    return {**units, "count": np.ones(len(rows))}, fitted


def direct(objective, questions: list[Question], answers: list, tokenizer, cfg) -> list[dict]:
    """A row for each question of one batch: what the prediction of its answer is worth."""
    rows, variants = [], ("base", "mixed")[:1 + thinks(objective, cfg.thoughts)]
    predicted = predictions(objective, [(a.ids, a.start) for a in answers], cfg.thoughts)
    for question, answer, (*logits, weight_S) in zip(questions, answers, predicted):
        row = dict(number=question.number, gold=question.gold, mixing_weight=float(weight_S.mean()))
        for variant, logits_SV in zip(variants, logits):
            at = TEMPERATURES if variant == "base" else (1.0,)
            for name, value in tasks.worth(answer, logits_SV, at, cfg.task).items():
                row[f"{name}_{variant}"] = value if len(value) > 1 else value[0]
        rows.append(row)
    if cfg.task == "gsm8k":
        for variant in variants[:1 + (cfg.thoughts == "own")]:      # nobody generates with swapped
            said = complete(objective, [a.ids[:a.start] for a in answers], tokenizer, DIRECT_TOKENS,
                            lambda row, text: "\n" in text, think=variant == "mixed")
            for row, line in zip(rows, (text.partition("\n")[0] for text in said)):
                row[f"said_{variant}"] = line
                row[f"exact_{variant}"] = float(tasks.number_in(line) == row["gold"])
    return rows


# -------------------------------------------------------------------------------- chains of thought

def reason(objective, questions: list[Question], tokenizer, cfg) -> list[dict]:
    """A row for each question: its votes, what was said, and whether the majority is right."""
    asked = [(question, vote) for question in questions for vote in range(cfg.votes)]

    def go_on(texts: list[str], max_new: int, stage: int) -> list[str]:
        said = complete(objective, [tokenizer.encode(text, bos=True) for text in texts], tokenizer,
                        max_new, lambda row, more: end_of(texts[row] + more) is not None,
                        cfg.thoughts == "own", cfg.temperature,
                        [(cfg.seed, q.number, vote, stage) for q, vote in asked])
        whole = [text + more for text, more in zip(texts, said)]
        return [text.rpartition(end_of(text))[0] if end_of(text) else text for text in whole]
    therefore = THEREFORE[cfg.task]
    worked = go_on([question.text + STEPS for question, _ in asked], cfg.max_new_tokens, 1)
    told = go_on([text.rstrip() + therefore for text in worked], ANSWER_TOKENS, 2)
    rows = []
    for i, question in enumerate(questions):
        mine = told[i * cfg.votes:(i + 1) * cfg.votes]
        counted = count(cfg.task, question.gold, [text.rpartition(therefore)[2] for text in mine])
        rows.append(dict(number=question.number, gold=question.gold, said=mine, **counted))
    return rows


def end_of(text: str) -> str | None:
    """What ended the whole text, by appearing in it for the second time."""
    return next((end for end in ENDS if text.count(end) > 1), None)


def count(task: str, gold: str, said: list[str]) -> dict:
    """The votes in what was said last, and whether their majority is the right answer."""
    votes = [answer_in(task, text) for text in said]
    known = Counter(vote for vote in votes if vote is not None).most_common(1)  # a tie: the first
    found = dict(votes=votes, one_vote=float(np.mean([vote == gold for vote in votes])),
                 majority=float(bool(known) and known[0][0] == gold))
    if task == "gsm8k":
        winner, _ = Counter(map(first_integer, said)).most_common(1)[0]
        found["majority_official"] = float(winner == first_integer(gold))
    return found


def answer_in(task: str, text: str) -> str | None:
    if task == "commonsense_qa":
        letter = re.search(r"\b[A-E]\b", text)
        return letter and letter.group()
    number = NUMBER.search(text)
    return number and tasks.number_in(number.group())


def first_integer(text: str) -> int | None:
    """The official code's: commas dropped, then the first digits; signs and decimals are lost."""
    digits = re.search(r"\d+", text.replace(",", ""))
    return int(digits.group()) if digits else None
