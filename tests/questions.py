"""Rows like those of GSM8K and CommonsenseQA, and the real ones where they are at hand."""
import json
import os
import random
from pathlib import Path

from checkpoint import save_model
from data import train_tokenizer
from tokenizer import load_tokenizer
from toys import tiny_mistral, tiny_quiet

DATA = Path(os.environ.get("DATA_DIR", Path(__file__).parents[1] / "../shared/data"))
WHO = ["Zoë", "The baker", "Mr O'Neil", "Natalia", "A train"]
WHAT = ["apples", "miles", "$5 coins", "naïve cats", "litres of 2% milk"]
REAL = {"gsm8k": "gsm8k_test_300.jsonl", "commonsense_qa": "csqa_dev_600.jsonl"}


def gsm8k(n: int) -> list[dict]:
    """Answers of one digit to seven, with commas, signs, decimals, a dollar or a percent sign."""
    rng, rows = random.Random(0), []
    forms = [str, "{:,}".format, "-{}".format, "{}.5".format, "${:,}".format, "{}%".format, str]
    for i in range(n):
        number = rng.randrange(10 ** rng.randrange(1, 7))
        question = f"{rng.choice(WHO)} has {rng.randrange(1, 9999):,} {rng.choice(WHAT)}. How many?"
        answer = f"{number}*1 = <<{number}*1={number}>>{number}\n#### {forms[i % 7](number)}"
        rows.append(dict(question=question, answer=answer))
    return rows


def commonsense_qa(n: int, flat: bool = False) -> list[dict]:
    rng, rows = random.Random(0), []
    for i in range(n):
        stem, key = f"Where would {rng.choice(WHO)} put {rng.choice(WHAT)} ({i})?", "ABCDE"[i % 5]
        texts = rng.choices(["bank", "new york", "a naïve café", "(A) box", "C"], k=5)
        choices = [dict(label=label, text=text) for label, text in zip("ABCDE", texts)]
        if flat:
            rows.append(dict(question=stem, answerKey=key,
                             choices=dict(label=list("ABCDE"), text=texts)))
        else:
            rows.append(dict(answerKey=key, question=dict(stem=stem, choices=choices)))
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files(task: str, folder: Path, n: int) -> list[Path]:
    """200 made rows; and a file of real ones, if there."""
    make = gsm8k if task == "gsm8k" else commonsense_qa
    real = DATA / REAL[task]
    return [write(folder / f"{task}.jsonl", make(n)), *([real] if real.exists() else [])]


def school(folder: Path, n_rows: int = 11) -> Path:
    """A folder with questions, a tokenizer trained on such, and models: quiet/ thinks, plain/ not.
    """
    write(folder / "gsm8k.jsonl", gsm8k(n_rows))
    write(folder / "commonsense_qa.jsonl", commonsense_qa(n_rows))
    texts = [row["question"] + " A B C D E Therefore, the answer is\n\n" for row in gsm8k(300)]
    (folder / "tokenizer.model").write_bytes(train_tokenizer(texts, 420))
    tokenizer = load_tokenizer(folder)
    shape = dict(vocab_size=tokenizer.vocab_size, max_seq_len=512)
    save_model(tiny_quiet(model=shape), folder / "quiet", tokenizer=tokenizer)
    save_model(tiny_mistral(1, **shape), folder / "plain", tokenizer=tokenizer)
    return folder
