"""GSM8K and CommonsenseQA: ask a model their questions, directly or by votes of its reasoning.

    python eval.py --checkpoint=out/quiet --task=gsm8k --file=gsm8k_test.jsonl [--votes=8]

The text up to `A:` is read, and the predictions of the answer's tokens, newline included, give
  nll    -log p of the answer (nats)
  soft   the official code's "accuracy": the probability of the answer's tokens, each among the
         digits or letters and the newline only. Its quirks are kept: `,` `.` `-` `%` cost nothing,
         and an answer that does not begin with a digit has only its newline scored. Sharpening
         raises it. If the tokenizer merges digits, it is the probability of the whole answer.
  right  CommonsenseQA: the best of the five letters is the right one
  exact  GSM8K: the greedily decoded answer is the right number; its sign counts, commas do not
Votes are zero-shot chains of thought, in the two stages of the official evaluation:
  majority           the most frequent answer is right; an answer without a number has no vote
  majority_official  the same for the first run of digits, where "no number" may win
  one_vote           the share of the votes that are right
Left out on purpose: the official code's loss of the first "Q:" and its second bos at the end of a
chain; downloads, few-shot prompts, and other tasks (tasks/lm_eval_harness.py).
"""
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoint import fingerprint
from config import Progress, UserError, check_json
from data import read_rows
from distributed import fail_together
from inference import complete
from scoring import answer_logits, thinks
from tasks.bootstrap import TEMPERATURES, UNSCALED, ResultsFile, temperature_scaled
from thoughts import base_model

ANSWER_MARKER = "\nA:"
LETTERS = "ABCDE"
STEP_BY_STEP = ANSWER_MARKER + " Let's think step by step."
CONCLUSION = {
    "gsm8k": "\nTherefore, the answer (arabic numerals) is",                 # the official code's
    "commonsense_qa": "\nTherefore, among A through E, the answer is"}       # arXiv 2205.11916
CONCLUSION_TOKENS = 12                    # the official code's
DASHES = "-\u2212\u2013\uff0d\u2010\u2011\ufe63"     # a minus; the em dash is none
NUMBER = (                                # whole, or none: not the 1 of 1,00 or 1/2 or 1e3
    rf"(?<![0-9])(?<![0-9][.,/eE])(?<![0-9][eE][{DASHES}+])(?:[-−+]\s?|[{DASHES}])?\$?"
    r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    rf"(?![.,/]?[0-9]|[eE][{DASHES}+]?[0-9])")
VOTE_PATTERN = {"gsm8k": NUMBER, "commonsense_qa": r"\b[A-E]\b"}
CHOICES = {                               # as published; as the datasets library has it
    "question": ({"stem": str, "choices": [{"label": str, "text": str}]}, str),
    "choices": (None, {"label": [str], "text": [str]})}


@dataclass
class Question:
    number: int                           # line in the file, from 1
    text: str                             # "Q: ..." with its choices, if any
    answer: str                           # what follows "A:", as the file has it
    gold: str                             # "-1450" or "B"

    @property
    def with_answer(self):
        return f"{self.text}{ANSWER_MARKER}{self.answer}\n"


@dataclass
class Answer:
    ids: list                             # of question and answer
    start: int                            # index of the answer's first token
    scored: list                          # tokens that `soft` scores, counted from `start`,
    candidates: list | None               # each among these ids (None: all)


def read_questions(task, path, limit=0):
    """Read a jsonl, jsonl.gz or parquet file. Raises UserError with the file and the line.
    Keeps `limit` questions (0: all), the first in the order of `Dataset.shuffle(seed=42)`."""
    parse_row = _gsm8k if task == "gsm8k" else _commonsense_qa
    questions = []
    for number, row in read_rows(path):
        try:
            questions.append(Question(number, *parse_row(row)))
        except (KeyError, TypeError, AttributeError, UserError) as error:
            raise UserError(f"{path}:{number}: not a row of {task}: {error}") from None
    if not questions:
        raise UserError(f"{path} holds no question")
    order = np.random.default_rng(42).permutation(len(questions))
    return [questions[i] for i in sorted(order[:limit or None])]


def _gsm8k(row):
    _, marker, answer = row["answer"].rpartition("####")
    if not marker or not answer.strip():
        raise UserError("no '####' answer")
    gold = number_in(answer)
    if not re.fullmatch(NUMBER, gold):
        raise UserError(f"the answer {gold[:60]!r} is not a number: leave the row out")
    return "Q: " + row["question"], answer, gold


def _commonsense_qa(row):
    check_json(row, CHOICES, "row")
    question, key = row["question"], row.get("answerKey")
    if isinstance(question, dict):
        labels = [choice["label"] for choice in question["choices"]]
        texts = [choice["text"] for choice in question["choices"]]
        question = question["stem"]
    else:
        labels, texts = row["choices"]["label"], row["choices"]["text"]
    if labels != [*LETTERS] or key not in labels or len(texts) != len(labels):
        raise UserError(f"{len(texts)} texts, and answerKey {key} of choices {labels} (test has no "
                        "answers, use dev)")
    lines = [f"({label}) {text}" for label, text in zip(labels, texts)]
    return "\n".join(["Q: " + question, *lines]), " " + key, key


def number_in(text):
    """Write a number plainly: '$1,450.' is '1450', '- 3.0' is '-3'. Other text stays as it is."""
    text = text.strip().rstrip(".")
    if not re.fullmatch(NUMBER, text):
        return text
    # of any length, so as text: no zeros at either end, no sign of zero
    whole, _, fraction = re.sub(r"[^0-9.]", "", text).partition(".")
    number = f"{whole.lstrip('0') or 0}.{fraction.rstrip('0')}".rstrip(".")
    is_negative = text[0] in DASHES and number != "0"
    return "-" + number if is_negative else number


def answer_tokens(tokenizer):
    """Return the ids of the digits (None if they are merged) and letters, the newline's last."""
    digits = tokenizer.encode(ANSWER_MARKER + " 0123456789\n")[-11:]
    letters = [tokenizer.encode(f"{ANSWER_MARKER} {letter}\n")[-2] for letter in LETTERS]
    letters.append(digits[-1])
    if [tokenizer.pieces[i].decode() for i in digits] != [*"0123456789\n"]:
        digits = None
    return digits, letters


def find_answer(text, tokenizer):
    """Find the answer behind the last "A:" as the official code does, but for any tokenizer."""
    ids = tokenizer.encode(text, bos=True)
    start = len(ids)
    # The answer starts behind the token without which the text has a marker less.
    while tokenizer.decode(ids[:start - 1]).count(ANSWER_MARKER) == text.count(ANSWER_MARKER):
        start -= 1
    digits, candidates = answer_tokens(tokenizer)
    if text.rpartition(ANSWER_MARKER)[2][1:2].isdigit():
        candidates = digits               # the space before them is free
    scored = [i for i, token in enumerate(ids[start:]) if candidates is None or token in candidates]
    return Answer(ids, start, scored, candidates)


def score_answer(answer, logits_SV, temperatures, task, variant):
    """Return nll_VARIANT and soft_VARIANT at each temperature and, for CommonsenseQA, right_VARIANT
    (0 or 1). The logits predict the S tokens of the answer, from `start` on."""
    logits_SV = logits_SV.cpu().double()
    target_S1 = logits_SV.new_tensor(answer.ids[answer.start:]).long()[:, None]
    candidates = answer.candidates or slice(None)
    nll, soft = [], []
    for temperature in temperatures:
        scaled_SV = logits_SV / temperature
        true_S = scaled_SV.gather(1, target_S1)[:, 0]
        nll_S = scaled_SV.logsumexp(-1) - true_S
        logp_S = true_S - scaled_SV[:, candidates].logsumexp(-1)
        nll.append(float(nll_S.sum()))
        soft.append(float(logp_S[answer.scored].sum().exp()))
    scores = {f"nll_{variant}": nll, f"soft_{variant}": soft}
    if task == "commonsense_qa":
        at = answer.scored[0]
        best = logits_SV[at, candidates[:-1]].argmax()
        scores[f"right_{variant}"] = [float(candidates[best] == target_S1[at])]
    return scores


def direct_answers(model, questions, tokenizer, cfg):
    """Return one row per question of a batch, with scores after a thought (_mixed) and without."""
    answers = [find_answer(question.with_answer, tokenizer) for question in questions]
    texts = [(answer.ids, answer.start) for answer in answers]
    logits = answer_logits(model, texts, cfg.thoughts)
    rows = []
    for answer, (base_SV, mixed_SV, weight_S) in zip(answers, logits):
        scores = {"mixing_weight": [float(weight_S.mean())]}
        scores |= score_answer(answer, base_SV, TEMPERATURES, cfg.task, "base")
        scores |= score_answer(answer, mixed_SV, [1.0], cfg.task, "mixed")
        rows.append(dict(scores=scores))
    variants = ["base", "mixed"] if cfg.task == "gsm8k" else []
    if cfg.thoughts == "shuffled":        # text that is being generated has none
        variants = variants[:1]
    prompts = [ids[:start] for ids, start in texts]
    for variant in variants:
        if variant == "base" or thinks(model, cfg.thoughts):
            said = complete(
                model, prompts, tokenizer,
                max_new_tokens=16,
                stop=lambda row, text: "\n" in text,
                think=variant == "mixed")
        for question, row, text in zip(questions, rows, said):
            line = text.partition("\n")[0]
            row[f"said_{variant}"] = line
            row["scores"][f"exact_{variant}"] = [float(number_in(line) == question.gold)]
    return rows


def cot_votes(model, questions, tokenizer, cfg):
    """Return one row per question: what its votes said, and whether their majority is right."""
    asked = [(question, vote) for question in questions for vote in range(cfg.votes)]

    def cut_chain(text):
        for end in ("Q:", "\n\n\n"):       # its second one in the whole text ends a chain
            if text.count(end) > 1:
                return text.rpartition(end)[0], True
        return text, False

    def go_on(texts, max_new_tokens, stage):
        prompts = [tokenizer.encode(text, bos=True) for text in texts]
        more = complete(
            model, prompts, tokenizer, max_new_tokens,
            stop=lambda row, text: cut_chain(texts[row] + text)[1],
            think=cfg.thoughts == "own",
            temperature=cfg.temperature,
            keys=[(cfg.seed, question.number, vote, stage) for question, vote in asked])
        return [cut_chain(text + added)[0] for text, added in zip(texts, more)]
    prompts = [question.text + STEP_BY_STEP for question, _ in asked]
    chains = go_on(prompts, cfg.max_new_tokens, stage=1)
    conclusion = CONCLUSION[cfg.task]
    prompts = [chain.rstrip() + conclusion for chain in chains]
    said = go_on(prompts, CONCLUSION_TOKENS, stage=2)
    rows = []
    for question in questions:
        own = said[:cfg.votes]
        said = said[cfg.votes:]
        answers = [text.rpartition(conclusion)[2] for text in own]
        votes, scores = count_votes(cfg.task, question.gold, answers)
        rows.append(dict(said=own, votes=votes, scores=scores))
    return rows


def count_votes(task, gold, said):
    """Return the votes in these conclusions, and how right they are, one and together."""
    def official_vote(text):              # commas, signs and decimals are lost
        match = re.search(r"\d+", text.replace(",", ""))
        return match and (match[0].lstrip("0") or "0")
    votes = []
    for text in said:
        match = re.search(VOTE_PATTERN[task], text)
        votes.append(match and number_in(match[0]))
    known = list(filter(None, votes))
    majority = max(known, key=known.count, default=None)          # in a tie, the first
    scores = dict(
        one_vote=[votes.count(gold) / len(votes)],
        majority=[float(majority == gold)])
    if task == "gsm8k":
        official = [official_vote(text) for text in said]
        winner = max(official, key=official.count)
        scores["majority_official"] = [float(winner == official_vote(gold))]
    return votes, scores


def evaluate_questions(model, tokenizer, cfg, dist, out):
    """Ask this rank's share of the questions; return the settings and the measures by question.
    Each answer is a line of a jsonl beside `out`, and is not asked again."""
    questions = read_questions(cfg.task, cfg.file, cfg.limit)
    sha256 = hashlib.sha256(Path(cfg.file).read_bytes()).hexdigest()
    dataset_id = dict(task=cfg.task, sha256=sha256, questions=len(questions))
    # Everything that an answer depends on, but for the question.
    settings = dict(
        dataset_id=dataset_id,
        weights=fingerprint(cfg.checkpoint), tokenizer=tokenizer.sha256,
        dtype=str(base_model(model).embed.weight.dtype),
        thoughts=cfg.thoughts, votes=cfg.votes,
        thought_len=model.config.thought_len if thinks(model, cfg.thoughts) else 0)
    if cfg.votes:                         # these decide the text
        settings |= dict(seed=cfg.seed, temperature=cfg.temperature,
                         max_new_tokens=cfg.max_new_tokens)
    if cfg.thoughts == "shuffled":        # a thought comes from the same batch
        settings["batch_size"] = cfg.batch_size
    # Questions of like length share a batch, the longest first.
    questions.sort(key=lambda question: -len(tokenizer.encode(question.with_answer)))
    size = max(1, cfg.batch_size // max(1, cfg.votes))
    batches = [questions[i:i + size] for i in range(0, len(questions), size)]
    with fail_together(dist):
        results = ResultsFile(Path(out).with_suffix(".jsonl"), settings)
        progress = Progress(len(questions) - len(results.rows), cfg.task, show=dist.is_main)
        for batch in batches[dist.rank::dist.world_size]:
            if all(question.number in results.rows for question in batch):
                continue
            ask = cot_votes if cfg.votes else direct_answers
            rows = ask(model, batch, tokenizer, cfg)
            for question, row in zip(batch, rows):
                row |= dict(number=question.number, gold=question.gold)
            results.add(rows)
            progress(len(batch) * dist.world_size)
    found = ResultsFile(results.path, settings).rows
    numbers = sorted(question.number for question in questions)
    rows = [found[number] for number in numbers if number in found]
    if len(rows) < len(questions):
        raise UserError(f"{results.path} has {len(rows)} of {len(questions)} questions: some rank "
                        "did not finish; the same command goes on")
    # The measures by question, and the base after temperature scaling.
    clusters = {"count": np.ones(len(rows))}
    temperatures = {}
    for name in rows[0]["scores"]:
        value_QK = np.array([row["scores"][name] for row in rows])
        clusters[name] = value_QK[:, 0]
        if value_QK.shape[1] == len(TEMPERATURES):
            clusters[name] = value_QK[:, UNSCALED]
            measure = name.removesuffix("_base")
            clusters[f"{measure}_scaled"], temperatures[measure] = temperature_scaled(
                value_QK, np.arange(len(rows)), least=measure == "nll")
    return settings | dict(clusters=clusters, temperatures=temperatures)
