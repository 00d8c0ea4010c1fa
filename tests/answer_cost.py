"""What thinking costs when answers are scored: seconds and FLOP beside the base's, same rows.

    python tests/answer_cost.py gsm8k_test.jsonl tokenizer.model

A random model of width 256 and 4 layers; the time is the best of three rounds, taken in turns.
"""
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import predict  # noqa: E402
from tasks import qa as tasks  # noqa: E402
import tokenizer as tokenizers  # noqa: E402
from toys import tiny_quiet  # noqa: E402

file, tokenizer = sys.argv[1], tokenizers.load(sys.argv[2])
shape = dict(vocab_size=tokenizer.vocab_size, dim=256, n_layers=4, n_heads=8, ffn_dim=704)
quiet = tiny_quiet(model=shape).requires_grad_(False)
torch.set_num_threads(1)
known = tasks.alphabets(tokenizer)
answers = [tasks.locate(tokenizer.encode(f"{q.text}{tasks.MARKER}{q.answer}\n", bos=True),
                        tokenizer, known) for q in tasks.read("gsm8k", file)]
texts = sorted(((a.ids, a.start) for a in answers), key=lambda text: -len(text[0]))
batches = [texts[i:i + 16] for i in range(0, len(texts), 16)]


def work(thoughts: str, thought_len: int) -> float:
    quiet.config, started = replace(quiet.config, thought_len=thought_len), time.perf_counter()
    for batch in batches:
        for _ in predict.predictions(quiet, batch, thoughts):
            pass
    return time.perf_counter() - started


ways = [("none", 1), *(("own", length) for length in (1, 6, 12))]
seconds = [min(times) for times in zip(*([work(*way) for way in ways] for _ in range(3)))]
for (thoughts, length), spent in zip(ways, seconds):
    with FlopCounterMode(display=False) as counter:
        work(thoughts, length)
    flop = counter.get_total_flops()
    base = flop if thoughts == "none" else base  # noqa: F821  (the first is the base)
    print(f"{thoughts:5s} T {length:2d}  {spent:6.2f} s  {flop / 1e9:7.1f} GFLOP  "
          f"{spent / seconds[0]:5.2f} and {flop / base:5.2f} times the base; T + 3 = {length + 3}")
