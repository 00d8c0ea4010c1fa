"""Questions with known answers: GSM8K and CommonsenseQA, and what a prediction of them is worth.

    Q: How many ...?                Q: Where would you find magazines ...?
    A: 72                           (A) doctor ... (E) mortuary
                                    A: B

The model reads the text up to `A:` and predicts the answer directly, without working. A prediction
of its tokens, newline included, is worth
  nll    -log p of the answer (nats)
  soft   the official code's "accuracy": the probability of the answer's tokens, each among the
         digits or letters and the newline only. Quirks kept: `,` `.` `-` `%` cost nothing, and an
         answer that does not begin with a digit, a negative one too, counts as a letter, so that
         only its newline is scored. It is a probability under teacher forcing, which rises by mere
         sharpening, so it is never shown without the temperature_scaled base (evidence.py)
  right  CommonsenseQA: is the best of the five letters the right one
  exact  GSM8K: is the answer, decoded greedily, the right number; its sign counts, commas do not

Which ids are digits, letters and the newline is found by asking the tokenizer. One that merges
digits has no such alphabet; then `soft` is the probability of the whole answer, exp(-nll).

Left out on purpose: downloads, few-shot prompts, and other tasks, for which there is harness.py.

Read next: ask.py
"""
import re
from dataclasses import dataclass

import numpy as np
import torch

import data
from config import UserError

TASKS = ("gsm8k", "commonsense_qa")
MARKER, LETTERS = "\nA:", "ABCDE"
OFFICIAL_SEED = 42                        # of the official code's choice of questions


@dataclass(frozen=True)
class Question:
    number: int                           # of its line in the file, from 1
    text: str                             # "Q: ..." with its choices, if any
    answer: str                           # what follows "A:", as the file has it
    gold: str                             # "-1450" or "B"


def read(task: str, path: str) -> list[Question]:
    """All questions of a file (jsonl, jsonl.gz, parquet); ValueError with file and line."""
    parse = _gsm8k if task == "gsm8k" else _commonsense_qa
    questions = []
    for number, row in data.read_rows(path):
        try:
            questions.append(Question(number, *parse(row)))
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path}:{number}: not a row of {task}") from None
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
    if not questions:
        raise UserError(f"{path} holds no question")
    return questions


def _gsm8k(row: dict) -> tuple[str, str, str]:
    _, marker, answer = row["answer"].rpartition("####")
    if not marker or not answer.strip():
        raise UserError("no '####' answer")
    return "Q: " + row["question"], answer, number_in(answer)


def _commonsense_qa(row: dict) -> tuple[str, str, str]:
    """Rows as published ({"question": {"stem", "choices": [{"label", "text"}]}}), or flat."""
    question, choices = row["question"], row.get("choices")
    if choices is None:
        question, choices = question["stem"], question["choices"]
        choices = {key: [choice[key] for choice in choices] for key in ("label", "text")}
    if not row.get("answerKey"):
        raise UserError("no answerKey: the test split has no answers, use the dev split")
    labels, key = "".join(choices["label"]), row["answerKey"]
    if labels != LETTERS or key not in LETTERS:
        raise UserError(f"answerKey {key} of choices {labels}: one of A to E is expected")
    options = [f"({label}) {text}" for label, text in zip(choices["label"], choices["text"])]
    return "\n".join(["Q: " + question, *options]), " " + key, key


def number_in(text: str) -> str:
    """'$1,450.' is '1450' and '- 3.0' is '-3'; text that is no number stays what it is."""
    bare = re.sub(r"[\s,$]", "", text).rstrip(".")
    if not re.fullmatch(r"-?\d*\.?\d+", bare):
        return text.strip()
    whole, _, part = bare.partition(".")
    return whole + ("." + part.rstrip("0") if part.rstrip("0") else "")


def subset(n_questions: int, limit: int) -> list[int]:
    """The first `limit` of a fixed shuffle: of GSM8K's 1,319, 128 are the official evaluation's.

    (`Dataset.shuffle(seed=42)` of the `datasets` library is this permutation.) 0 takes all.
    """
    order = np.random.default_rng(OFFICIAL_SEED).permutation(n_questions)
    return sorted(order[:limit].tolist()) if limit else list(range(n_questions))


# ----------------------------------------------------------------------------- where is the answer

@dataclass(frozen=True)
class Alphabets:
    """Ids that an answer is made of, each with the newline at the end; None if digits merge."""
    digits: tuple[int, ...] | None
    letters: tuple[int, ...]


def alphabets(tokenizer) -> Alphabets:
    """Ids of the digits and the letters as they come out behind `A: `."""
    def ids_of(symbols: str):
        coded = [tokenizer.encode(f"{MARKER} {symbol}\n") for symbol in symbols]
        ids = tuple(code[-2] for code in coded) + (coded[0][-1],)
        alone = len({(*code[:-2], code[-1]) for code in coded}) == 1
        return ids if alone and len(set(ids)) == len(symbols) + 1 else None
    digits, letters = ids_of("0123456789"), ids_of(LETTERS)
    if letters is None:
        raise UserError(f"{tokenizer.path} does not write {', '.join(LETTERS)} as a token each: "
                         "answers cannot be compared")
    if digits and tokenizer.encode(f"{MARKER} 12\n")[-3:] != [digits[1], digits[2], digits[-1]]:
        digits = None
    return Alphabets(digits, letters)


@dataclass(frozen=True)
class Answer:
    """One question as tokens: `start` is the first of its answer, `counted` those that the official
    metric counts, each among the ids `among` (None: among all)."""
    ids: list[int]
    start: int
    counted: list[int]
    among: tuple[int, ...] | None


def locate(ids: list[int], tokenizer, known: Alphabets) -> Answer:
    """Find the answer behind the last `A:` as the official code does, for any tokenizer.

    It compares text, not ids: the answer starts behind the token that completes the marker. Text
    without a marker is scored from its third token on.
    """
    text, ends, stream = "<s>" if ids[0] == tokenizer.bos else "", [], tokenizer.stream()
    for i in ids:
        text += stream.push(i)
        ends.append(len(text))
    at, start = text.rfind(MARKER), 2
    if at >= 0:
        start = 1 + next(i for i, end in enumerate(ends) if end >= at + len(MARKER))
    numeric = text[at + 1 + len(MARKER) if at >= 0 else 1:][:1].isdigit()
    among = known.digits if numeric else known.letters
    counted = [t for t in range(start + (numeric and among is not None), len(ids))
               if among is None or ids[t] in among]
    return Answer(ids, start, counted, among)


def worth(answer: Answer, logits_SV, temperatures, task: str) -> dict[str, list[float]]:
    """What these predictions are worth: `nll` and `soft` at each temperature, and `right`.

    `logits_SV`: of the S tokens from `start` on, each predicted by the position before it.
    """
    logits_SV = logits_SV.double()
    target_S1 = torch.tensor(answer.ids[answer.start:], device=logits_SV.device)[:, None]
    counted = [t - answer.start for t in answer.counted]
    found = dict(nll=[], soft=[])
    for temperature in temperatures:
        scaled_SV = logits_SV / temperature
        at_S = scaled_SV.gather(1, target_S1)[:, 0]
        among_SV = scaled_SV if answer.among is None else scaled_SV[:, list(answer.among)]
        found["nll"].append(float((scaled_SV.logsumexp(-1) - at_S).sum()))
        found["soft"].append(float((at_S - among_SV.logsumexp(-1))[counted].sum().exp()))
    if task == "commonsense_qa":
        letters = list(answer.among)[:-1]
        best = letters[int(logits_SV[counted[0], letters].argmax())]
        found["right"] = [float(best == answer.ids[answer.counted[0]])]
    return found
