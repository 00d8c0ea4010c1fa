"""Any task of the lm-evaluation-harness, on a model that thinks or one that does not.

    pip install lm-eval==0.4.13
    python harness.py run --model quiet_star --model_args checkpoint=out/quiet --tasks gsm8k_cot
    python harness.py --files=gsm8k_cot_zeroshot=test.jsonl,commonsense_qa=dev.jsonl run --model \\
        quiet_star --model_args checkpoint=out/quiet --tasks gsm8k_cot_zeroshot,commonsense_qa

The first word behind --files, and all else, is the harness's own command line: this page registers
a model, `quiet_star`, and hands over. Its --model_args are checkpoint, thoughts (own, swapped,
none), thought_len and device. --files reads a task's questions from a local file (jsonl, as
published) in the place of a download; prompts, splits and metrics stay the task's.

A likelihood is that of eval.py: thoughts at the scored positions only, one base pass for all
answers to the same question that differ in one token.

Left out on purpose: chat templates, top_p and top_k, several processes.

Read next: weights.py
"""
import json
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import config
import data
import distributed as parallel
import tokenizer as tokenizers
import weights
from config import UserError
from tasks.bootstrap import Progress
from predict import complete, predictions, thinks

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError:                       # an extra: `main` says what to install
    TemplateLM, register_model = object, lambda name: lambda cls: cls

HERE = parallel.Place(0, 1, None)


@register_model("quiet_star")
class QuietStarLM(TemplateLM):
    """What the harness asks of a model, answered by predict.py."""
    def __init__(self, checkpoint: str = "", thoughts: str = "own", thought_len: int | None = None,
                 device: str = "auto", batch_size: int | str = 16, max_batch_size=None):
        super().__init__()
        if not checkpoint or thoughts not in ("own", "swapped", "none"):
            raise UserError(f"--model_args checkpoint={checkpoint},thoughts={thoughts}: a folder, "
                             "and own, swapped or none")
        self.tokens = tokenizers.load(weights.find_checkpoint(checkpoint))
        here = "cpu" if device == "cpu" else "auto"         # its default names a GPU, there or not
        self.objective = weights.load_objective(checkpoint, here, self.tokens)
        self.thoughts, n_hidden = thoughts, 0
        self.batch = 16 if str(batch_size).startswith("auto") else int(batch_size)
        if thought_len is not None and thinks(self.objective):
            self.objective.config = replace(self.objective.config, thought_len=int(thought_len))
        if thinks(self.objective, thoughts):
            n_hidden = self.objective.config.thought_len + 2
        self.max_length = self.objective.model.config.max_seq_len - n_hidden    # of visible tokens

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self.tokens.eos if self.tokens.bos is None else self.tokens.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self.tokens.encode(string, bos=add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """For (_, context ids, continuation ids): log p of the continuation, and whether each of
        its tokens is the likeliest. A context that is too long loses its beginning."""
        asked: dict[tuple, list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) >= self.max_length:
                raise UserError(f"an answer of {len(continuation)} tokens does not fit into a "
                                 f"context of {self.max_length}")
            ids = [*context, *continuation][-self.max_length:]
            seen = tuple(ids[:-1]), len(ids) - len(continuation)     # the last token is only scored
            asked.setdefault(seen, []).append(number)
        answers: list = [None] * len(requests)
        keys = sorted(asked, key=lambda key: -len(key[0]))
        progress = Progress(len(keys), "loglikelihood", HERE)
        for batch in (keys[i:i + self.batch] for i in range(0, len(keys), self.batch)):
            texts = [([*ids, 0], start) for ids, start in batch]
            for key, (_, logits_SV, _) in zip(batch, predictions(self.objective, texts,
                                                                 self.thoughts)):
                logp_SV = logits_SV.log_softmax(-1)
                for number in asked[key]:
                    answers[number] = self._sum(logp_SV, requests[number][2])
            progress(len(batch))
        return answers

    def _sum(self, logp_SV, continuation: list[int]) -> tuple[float, bool]:
        target_S1 = logp_SV.new_tensor(continuation).long()[:, None]
        greedy = (logp_SV.argmax(-1, keepdim=True) == target_S1).all()
        return float(logp_SV.gather(1, target_S1).sum()), bool(greedy)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts; one that is too long is scored in windows, every token once."""
        parts, owner = [], []
        for number, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False), self.prefix_token_id,
                self.max_length - 1, 1)
            for context, continuation in map(utils.make_disjoint_window, windows):
                parts.append((None, context, continuation))
                owner.append(number)
        sums = [0.0] * len(requests)
        for number, (logp, _) in zip(owner, self._loglikelihood_tokens(parts)):
            sums[number] += logp
        return sums

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """How each (text, options) goes on, up to the first of its `until`, which is left out.

        A request draws from numbers of its own place in the list: batches change nothing.
        """
        if self.thoughts == "swapped":
            raise UserError("thoughts=swapped: text being written has nobody to swap with")
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        same: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            same.setdefault(json.dumps(self._options(request.args[1])), []).append(number)
        said, progress = [""] * len(requests), Progress(len(requests), "generate_until", HERE)
        for options, numbers in same.items():
            until, temperature, max_new = json.loads(options)
            numbers.sort(key=lambda number: -len(prompts[number]))
            for batch in (numbers[i:i + self.batch] for i in range(0, len(numbers), self.batch)):
                texts = complete(
                    self.objective, [prompts[n][-(self.max_length - max_new):] for n in batch],
                    self.tokens, max_new, lambda row, text: any(end in text for end in until),
                    self.thoughts != "none", temperature, [(0, n) for n in batch])
                for number, text in zip(batch, texts):
                    cuts = [text.find(end) for end in until if end in text]
                    said[number] = text[:min(cuts, default=len(text))]
                progress(len(batch))
        return said

    def _options(self, given: dict) -> tuple[list[str], float, int]:
        """until, temperature (0 unless it is to sample), tokens at most."""
        until = given.get("until") or []
        known = {"until", "do_sample", "temperature", "max_gen_toks"}
        other = {k: v for k, v in given.items() if k not in known and v not in (None, 0, 1.0)}
        if other:
            raise UserError(f"generation options {other} are not supported: only {sorted(known)}")
        temperature = float(given.get("temperature", 1.0)) if given.get("do_sample") else 0.0
        max_new = min(int(given.get("max_gen_toks", 256)), self.max_length - 1)
        return [until] if isinstance(until, str) else list(until), temperature, max_new


def read_locally(files: str, folder: str):
    """In `folder`, for each TASK=FILE of `files`, the task as the harness has it, but with FILE in
    the place of all its splits. ValueError if there is no such task."""
    theirs = [(path, path.read_text(errors="replace"))
              for path in sorted(Path(utils.__file__).parent.glob("tasks/**/*.yaml"))]
    for task, _, path in (pair.partition("=") for pair in files.split(",")):
        named = re.compile(rf"^task:\s*{re.escape(task)}\s*$", re.MULTILINE)
        spec = next((str(file) for file, text in theirs if named.search(text)), None)
        if spec is None:
            raise UserError(f"--files: the harness has no task '{task}' (of {task}={path})")
        rows = Path(folder, f"{task}.jsonl")
        rows.write_text("".join(json.dumps(flat(row)) + "\n" for _, row in data.read_rows(path)))
        splits = {name: str(rows) for name in ("train", "validation", "test")}
        local = dict(include=spec, task=task, dataset_path="json",
                     dataset_name=None, dataset_kwargs=dict(data_files=splits))
        Path(folder, f"{task}.yaml").write_text(json.dumps(local))        # JSON is YAML


def flat(row: dict) -> dict:
    """CommonsenseQA as published becomes the form that the harness's task reads."""
    question = row.get("question")
    if not isinstance(question, dict):
        return row
    choices = {key: [choice[key] for choice in question["choices"]] for key in ("label", "text")}
    return {**row, "question": question["stem"], "choices": choices}


def main():
    if TemplateLM is object:
        raise UserError("the lm-evaluation-harness is not here: pip install lm-eval==0.4.13")
    from lm_eval.__main__ import cli_evaluate
    files = [word.partition("=")[2] for word in sys.argv[1:] if word.startswith("--files=")]
    sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith("--files=")]
    with tempfile.TemporaryDirectory() as folder:
        if files:
            read_locally(files[0], folder)
            sys.argv += ["--include_path", folder]
        cli_evaluate()


if __name__ == "__main__":
    config.run(main)
