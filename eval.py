"""Does thinking help? The same text predicted with and without, and what else could explain it.

    python eval.py --checkpoint=out/quiet --data=data/gsm8k --texts=100
    python eval.py --checkpoint=out/quiet --data=data/shell_game/without_reasoning --task=shell_game
    python eval.py --checkpoint=out/quiet --task=gsm8k --file=gsm8k_test.jsonl [--votes=8]
    torchrun --nproc_per_node=8 eval.py ... --against=out/plain/gsm8k-votes0-own.json

Every scored token is predicted twice by the same model: without a thought, and after one greedy
thought at that position. Controls: every table has the base after temperature scaling, and
--thoughts=shuffled gives each position the thought of another text. Plain training and filler
tokens are other checkpoints; --against compares two results in pairs.
Left out on purpose: other people's tasks (tasks/lm_eval_harness.py), means over seeds (figures).
"""
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

import config
from checkpoint import find_checkpoint, load_for_inference
from config import UserError
from data import TokenFile
from distributed import Distributed, cleanup, init_distributed
from scoring import THOUGHTS, ReasonsAloud, load_task, score_texts, thinks
from tasks.bootstrap import (BINNED, TEMPERATURES, bin_scores, paired_differences, print_result,
                             summary, temperature_scaled)
from tasks.qa import CONCLUSION, evaluate_questions
from thoughts import base_model
from tokenizer import dash_id, load_tokenizer

MEASURES = ("nll_base", "nll_mixed", "right_base", "right_mixed", "mixing_weight")


@dataclass(frozen=True)
class EvalConfig:
    checkpoint: str = ""                  # folder with a checkpoint, or of a run
    data: str = ""                        # folder of token files (data.py): score its text
    split: Literal["val", "train"] = "val"  # part of the data to score
    texts: int = 200                      # documents to score
    seq_len: int = 256                    # tokens to read of each document, at most
    task: str = "none"                    # score answers: shell_game, gsm8k or commonsense_qa
    file: str = ""                        # questions: .jsonl, .jsonl.gz or .parquet, as published
    limit: int = 0                        # questions, chosen as in the official code; 0 asks all
    votes: int = 0                        # chains of thought per question; 0 asks directly
    temperature: float = 0.9              # temperature of the votes' tokens (official code: 0.9)
    max_new_tokens: int = 384             # tokens of a chain of thought (official code: 384)
    seed: int = 0                         # seed of the votes
    thoughts: Literal[THOUGHTS] = "own"   # see scoring.py
    n_thoughts: int = 1                   # sampled thoughts whose predictions are averaged
    aloud: bool = False                   # thoughts are text of the base, between em dashes
    thought_len: int | None = None        # tokens of a thought; default: as trained
    batch_size: int = 16                  # texts in a batch
    against: str = ""                     # json of another run on the same text, to compare with
    out: str = ""                         # json to write; for questions by default in CHECKPOINT
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU

    def __post_init__(self):
        if not self.asks_questions:
            load_task(self.task)                  # it must exist
        source = self.file if self.asks_questions else self.data
        if not self.checkpoint or not source:
            raise UserError("--checkpoint=FOLDER is needed, and --data=FOLDER or, for gsm8k and "
                            "commonsense_qa, --file=FILE")
        if self.votes > 1 and self.temperature == 0:
            raise UserError(f"--votes={self.votes} would all be alike: give --temperature above 0")
        if self.votes and self.thoughts == "shuffled":
            raise UserError("--votes with --thoughts=shuffled: new text has no others to take")
        if self.asks_questions and (self.aloud or self.thoughts == "sampled"):
            raise UserError("--aloud and --thoughts=sampled are for text (--data)")
        if self.n_thoughts > 1 and self.thoughts != "sampled":
            raise UserError(f"--n_thoughts={self.n_thoughts} would all be alike: give "
                            "--thoughts=sampled")
        if self.aloud and not self.thought_len:
            raise UserError("--aloud needs --thought_len=TOKENS")
        if 0 < self.temperature < 0.01:
            raise UserError(f"--temperature={self.temperature}: 0 takes the likeliest token")
        if self.against:                          # read now too, because scoring takes long
            config.read_json(self.against)
        if self.out and (Path(self.out).suffix == ".jsonl" or Path(self.out).is_dir()):
            raise UserError(f"--out={self.out}: name a json file (the answers' own is .jsonl)")
        config.check_ranges(self, texts=1, seq_len=2, max_new_tokens=1, batch_size=1,
                            n_thoughts=(1, 1024), votes=(0, 10_000), temperature=(0, 100))

    @property
    def asks_questions(self) -> bool:
        """True if the task is a file of questions, False if it is a token file."""
        return self.task in CONCLUSION


def evaluate_data(model, tokenizer, cfg: EvalConfig, dist: Distributed) -> dict:
    """Score the text of cfg.data: sums per text for tasks.bootstrap, and bins of tokens."""
    token_file, task = TokenFile(cfg.data, cfg.split), load_task(cfg.task)
    scores = score_texts(model, token_file, tokenizer, cfg.texts, cfg.seq_len, cfg.thoughts,
                         cfg.batch_size, dist, temperatures=TEMPERATURES, task=task)
    # the measures, and beside them the base after temperature scaling
    text, thought = scores["text"], scores["thought"].astype(int)
    values = {name: scores[name] for name in MEASURES} | {"count": np.ones(len(text))}
    values["nll_scaled"], temperatures = temperature_scaled(scores["nll_at"], text, least=True)
    # where the task has a right way of reasoning: how many thoughts follow it
    if hasattr(task, "reasoning_is_right") and thought.size:
        values["reasoning_is_right"] = [
            task.reasoning_is_right(token_file.document(i), ids, tokenizer)
            for i, ids in zip(text, thought)]
    # the bootstrap draws texts, so it needs the sum of each measure over each text
    has_scores = np.bincount(text) > 0
    clusters = {name: np.bincount(text, value)[has_scores] for name, value in values.items()}
    # a comparison needs the same text, cut in the same way
    end = token_file.offsets[:cfg.texts + 1][-1]
    ids = token_file.read(0, int(end))
    dataset_id = dict(sources=token_file.meta["sources"], tokenizer=tokenizer.sha256,
                      split=cfg.split, texts=cfg.texts, seq_len=cfg.seq_len, task=cfg.task,
                      sha256=hashlib.sha256(ids).hexdigest())
    bins = {name: bin_scores(scores, by) for name, by in BINNED.items()}
    return dict(dataset_id=dataset_id, thoughts=cfg.thoughts, thought_len=thought.shape[1],
                tokens=len(text), clusters=clusters, temperatures={"nll": temperatures}, **bins)


def main():
    # setup: rank and device, tokenizer and model
    (cfg,) = config.parse(EvalConfig)
    dist = init_distributed(cfg.device, allow_mps=True)
    tokenizer = load_tokenizer(cfg.data or find_checkpoint(cfg.checkpoint))
    model = load_for_inference(cfg.checkpoint, cfg.device, tokenizer, cfg.dtype)
    if cfg.aloud:
        model = ReasonsAloud(base_model(model), cfg.thought_len, dash_id(tokenizer))
    elif cfg.thought_len is not None:
        if not thinks(model):
            raise UserError(f"--thought_len={cfg.thought_len}: {cfg.checkpoint} does not think")
        model.config = replace(model.config, thought_len=cfg.thought_len)
    # as many thoughts as are asked for, not as many as in training
    if thinks(model):
        model.config = replace(model.config, n_thoughts=cfg.n_thoughts)

    # score, on this rank's share of the batches
    out = cfg.out
    if cfg.asks_questions:
        folder = find_checkpoint(cfg.checkpoint)
        folder = folder.parent if folder.is_file() else Path(cfg.checkpoint)
        out = out or folder / f"{cfg.task}-votes{cfg.votes}-{cfg.thoughts}.json"
        result = evaluate_questions(model, tokenizer, cfg, dist, out)
    else:
        result = evaluate_data(model, tokenizer, cfg, dist)
    # the same means and intervals for every kind of task
    means = summary(result["clusters"])

    # print and write, whatever the comparison says, because scoring took long
    try:
        if cfg.against:
            result["differences"] = paired_differences(result, cfg.against)
    finally:
        if dist.is_main:
            print_result(result, means, cfg)
            if out:
                config.write_text(out, json.dumps(result | means, default=np.ndarray.tolist))
            print("wrote", out or "nothing, for want of --out")
    cleanup()


if __name__ == "__main__":
    config.run(main)
