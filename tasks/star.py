"""STaR (arXiv 2203.14465): text of a model's own reasoning, where it led to the right answer.

    python -m tasks.star --checkpoint=out/base --data=data/shell_game/without_reasoning --out=one
    python -m tasks.star --checkpoint=out/base --task=gsm8k --file=gsm8k_train.jsonl --out=one

This is what one round asks; runs/star.sh has the rounds, each fine-tuned from the original weights.
An em dash stands behind a question: the model reasons up to another one, then answers, greedily.
With --rationalise it is asked again what it got wrong, with the answer as a hint before the first
dash; what it says then is kept without the hint. Left out on purpose: few-shot prompts, because the
bases here have learnt from text to reason between dashes.
"""
from dataclasses import dataclass
from typing import Literal

import torch

import config
from checkpoint import find_checkpoint, load_for_inference
from config import Progress, UserError
from data import TokenFile, prepare
from inference import complete
from scoring import DATA_TASKS, load_task
from tasks.qa import ANSWER_MARKER, number_in, read_questions
from tokenizer import dash_id, load_tokenizer


@dataclass(frozen=True)
class Problem:
    question: list[int]               # ids
    hint: list[int]                   # ids of the answer
    answer: str
    rest: str                         # the answer and what follows it, as the text has it


def read_problems(cfg, tokenizer) -> list[Problem]:
    """Read questions of GSM8K's form, or the first documents of a token file with an answer."""
    problems = []
    if cfg.task == "gsm8k":
        for row in read_questions(cfg.task, cfg.file, cfg.questions):
            question = tokenizer.encode(row.text + ANSWER_MARKER, bos=True)
            whole = tokenizer.encode(f"{row.text}{ANSWER_MARKER} {row.gold}\n", bos=True)
            hint = whole[len(question):-1]
            problems.append(Problem(question, hint, row.gold, f" {row.gold}\n"))
        return problems
    task = load_task(cfg.task)
    token_file = TokenFile(cfg.data, cfg.split)
    for i in range(min(cfg.questions, token_file.n_docs)):
        ids = token_file.document(i).tolist()
        where_1L = task.answer_positions(torch.tensor([ids]), tokenizer)
        for j in where_1L[0].nonzero()[:, 0].tolist()[:1]:
            question, hint = ids[:j + 1], ids[j + 1:j + 2]
            answer = tokenizer.decode(hint).strip()
            whole = tokenizer.decode([token for token in ids if token != tokenizer.eos])
            rest = whole.removeprefix(tokenizer.decode(question))
            problems.append(Problem(question, hint, answer, rest))
    if not problems:
        raise UserError(f"{cfg.data} holds no answer of {cfg.task}: name its data, or its --task")
    return problems


def dash_of(tokenizer) -> tuple[int, str]:
    """Return the em dash around reasoning: its id, and how text shows it."""
    dash = dash_id(tokenizer)
    return dash, tokenizer.decode([dash]).strip()


def ask(model, tokenizer, problems: list[Problem], cfg, hint: bool) -> list[str | None]:
    """Return the reasoning about each problem that ended in the right answer, else None."""
    dash, mark = dash_of(tokenizer)

    def has_answered(row, text):
        return "\n" in text.partition(mark)[2]
    progress = Progress(len(problems), "asking with a hint" if hint else "asking")
    found = []
    for start in range(0, len(problems), cfg.batch_size):
        batch = problems[start:start + cfg.batch_size]
        prompts = [p.question + (p.hint if hint else []) + [dash] for p in batch]
        texts = complete(model, prompts, tokenizer, cfg.max_new_tokens, has_answered, think=False)
        for problem, text in zip(batch, texts):
            reasoning, _, answer = text.partition(mark)
            answer = number_in(answer.partition("\n")[0])
            found.append(reasoning if answer == problem.answer else None)
        progress(len(batch))
    return found


def text_of(problem: Problem, reasoning: str, tokenizer) -> str:
    """Write question, reasoning and answer as a line of text in which people reason aloud."""
    dash, mark = dash_of(tokenizer)
    question = [token for token in problem.question if token != tokenizer.bos]
    return tokenizer.decode([*question, dash]) + reasoning + mark + problem.rest


@dataclass(frozen=True)
class StarConfig:
    checkpoint: str = ""              # model that reasons: the base, then that of the round before
    out: str = ""                     # folder of token files to write
    task: Literal[(*DATA_TASKS, "gsm8k")] = "shell_game"  # gsm8k asks --file, the others --data
    data: str = ""                    # folder of token files whose text hides answers
    file: str = ""                    # GSM8K's questions, as published
    split: Literal["train", "val"] = "train"  # part of the data to ask
    questions: int = 2000             # how many to ask
    rationalise: bool = False         # ask again what was wrong, with the answer as a hint
    max_new_tokens: int = 16          # tokens of reasoning and answer
    batch_size: int = 250             # questions in a batch
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU if there is one

    def __post_init__(self):
        config.check_ranges(self, questions=1, max_new_tokens=1, batch_size=1)
        source = self.file if self.task == "gsm8k" else self.data
        if not (self.checkpoint and self.out and source):
            raise UserError("--checkpoint=FOLDER and --out=FOLDER are needed, and --data=FOLDER "
                            "or, for gsm8k, --file=FILE")


def main():
    (cfg,) = config.parse(StarConfig)
    tokenizer = load_tokenizer(cfg.data or find_checkpoint(cfg.checkpoint))
    model = load_for_inference(cfg.checkpoint, cfg.device, tokenizer)
    problems = read_problems(cfg, tokenizer)
    found = ask(model, tokenizer, problems, cfg, hint=False)
    wrong = [problem for problem, reasoning in zip(problems, found) if reasoning is None]
    line = f"asked {len(problems)}, right {1 - len(wrong) / len(problems):.3f}"
    # rationalisation
    if cfg.rationalise and wrong:
        found += ask(model, tokenizer, wrong, cfg, hint=True)
        n_more = sum(reasoning is not None for reasoning in found[len(problems):])
        line += f"; with a hint right {n_more / len(wrong):.3f} of {len(wrong)}"
        problems = problems + wrong
    texts = [text_of(problem, reasoning, tokenizer)
             for problem, reasoning in zip(problems, found) if reasoning is not None]
    if not texts:
        raise UserError(f"{line}: no reasoning to learn from")
    prepare(texts, tokenizer, cfg.out, val_share=0, sources=[f"STaR, {cfg.checkpoint}"])
    print(line)


if __name__ == "__main__":
    config.run(main)
