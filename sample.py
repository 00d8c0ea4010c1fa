"""Generate text, or read a given one, and show the thoughts before its tokens.

    python sample.py --checkpoint=out/quiet                            # interactive; Ctrl-D ends
    python sample.py --checkpoint=out/quiet --prompt="ball c : ab cd ce now" --show-thoughts
    python sample.py --checkpoint=out/quiet --temperature=1 --samples=3 --stop="\\n" < prompt.txt
    python sample.py --checkpoint=out/quiet --text-file=a.txt --html=a.html    # teacher forcing
    python sample.py --checkpoint=out/quiet --prompt="..." --think=gate --gate=1.5     # or never

The seed decides the text, however it is shown; a sample is the same alone or beside others.
Left out on purpose: chat templates, and a memory: each prompt begins anew.
"""
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch

import config
from checkpoint import find_checkpoint, load_for_inference
from config import UserError
from inference import Generator, row_generators
from scoring import check_context, pad_ids, states_at
from thoughts import QuietSTaR, base_model, every_position, logits_without_markers
from tokenizer import load_tokenizer
from tools.gate import read_gate
from tools.page import page
from tools.show import TextStream, describe, show, take_steps


@dataclass(frozen=True)
class SampleConfig:
    checkpoint: str = ""              # folder of the model
    prompt: str | None = None         # text to continue (default: standard input)
    text_file: str = ""               # file of a text to read instead, under teacher forcing
    max_new_tokens: int = 40          # number of tokens to add, thoughts not counted
    temperature: float = 0.0          # temperature of the added tokens; 0 takes the likeliest
    top_k: int = 0                    # draw from this many likeliest tokens; 0 draws from all
    top_p: float = 1.0                # draw from the likeliest tokens that hold this probability
    seed: int = 0                     # seed that decides the text
    samples: int = 1                  # number of texts to write for one prompt, in one batch
    stop: str = ""                    # end before this text (\n is a newline), or at end of text
    think: Literal["always", "never", "gate"] = "always"  # when to think before a token
    gate: str = ""                    # nats of entropy that open the gate, or a tools.gate file
    show_thoughts: bool = False       # show each token's thought, mixing weight and gain
    html: str = ""                    # file to write a page to that shows everything
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU

    def __post_init__(self):
        config.check_ranges(self, max_new_tokens=1, samples=(1, 10_000), temperature=(0, 100))
        mistakes = {
            "--checkpoint=FOLDER is needed": not self.checkpoint,
            "--think=gate and --gate need each other": (self.think == "gate") != bool(self.gate),
            f"--samples={self.samples} would all be alike: give --temperature above 0":
                self.samples > 1 and self.temperature == 0,
            "--think=never shows no thoughts": self.think == "never" and self.show_thoughts,
            f"--top_p={self.top_p} is not above 0 and at most 1": not 0 < self.top_p <= 1,
            f"--temperature={self.temperature}: 0 takes the likeliest token, 0.01 nearly so":
                0 < self.temperature < 0.01,
            "give one of --prompt and --text-file": self.text_file and self.prompt is not None}
        for message, mistaken in mistakes.items():
            if mistaken:
                raise UserError(message)


@torch.no_grad()
def teacher_forced(model, tokenizer, ids: list[int], think=True, gate=None) -> TextStream:
    """Read a given text, with a greedy thought before each token, or only where a `gate` opens.
    Raises UserError if text and thought exceed the context, or the text is a single token."""
    think = think and isinstance(model, QuietSTaR)
    check_context(model, len(ids), model.config.n_true if think else None)
    if len(ids) < 2:
        raise UserError(f"the text is {len(ids)} token, and one predicts no other: give more text")
    # a thought at every position; position j predicts token j + 1
    ids_1L = torch.tensor([ids], device=base_model(model).embed.weight.device)
    position_1P = every_position(ids_1L)
    base_PD, mixed_PD, weight_P, thought_PT = states_at(
        model, ids_1L, position_1P, position_1P >= 0, "own" if think else "none")
    # the reward of each thought, as in training
    reward_P = [None] * len(base_PD)
    if think:
        losses = model(ids_1L, ids_1L >= 0, thought_BNPT=thought_PT[None, None])
        reward_P = losses.reward_BNP[0, 0].tolist()
    stream = TextStream(tokenizer, ids)
    stream.prompt, stream.waiting = stream.prompt[:1], stream.prompt[1:]
    # logits are made token by token, because those of a whole text are large
    rows = zip(base_PD.split(1), mixed_PD.split(1), weight_P, thought_PT, reward_P)
    for token, (base_1D, mixed_1D, weight, thought_T, reward) in zip(stream.waiting, rows):
        base_1V = logits_without_markers(model, base_1D).log_softmax(-1)
        if not think or (gate and not gate.opens(base_1D, base_1V)):
            mixed_1D, thought_T, reward = base_1D, None, None
        mixed_1V = logits_without_markers(model, mixed_1D).log_softmax(-1)
        if not (base_1V.amax() + mixed_1V.amax()).isfinite():
            raise UserError("the model predicts nan or infinity: its weights are damaged")
        describe(token, tokenizer, model, base_1V[0], mixed_1V[0], weight, thought_T)
        token.reward = reward
    stream.end()
    return stream


def texts_of(cfg: SampleConfig):
    """Yield the given text or, at a terminal, one typed prompt after another until Ctrl-D."""
    if cfg.text_file:
        yield config.read_text(cfg.text_file).removesuffix("\n")
    elif cfg.prompt is not None:
        yield config.decode_text(cfg.prompt.encode(errors="surrogateescape"), "--prompt")
    elif not sys.stdin:
        raise UserError("standard input is closed: give --prompt")
    elif not sys.stdin.isatty():
        yield config.decode_text(sys.stdin.buffer.read(), "standard input").removesuffix("\n")
    else:
        with suppress(ImportError):
            import readline               # noqa: F401, it makes input() editable
        with suppress(EOFError, KeyboardInterrupt):
            while True:
                typed = input("\n> ").encode(errors="surrogateescape")
                yield config.decode_text(typed, "the prompt")
        print()


def answer(cfg: SampleConfig, model, tokenizer, gate, text: str) -> None:
    """Continue a prompt, or read the text of --text-file, and show the tokens."""
    think = cfg.think != "never"
    ids = tokenizer.encode(text, bos=True)
    if not text or not ids:
        raise UserError("the prompt is empty: give --prompt or standard input")
    if cfg.text_file:
        streams, steps = [teacher_forced(model, tokenizer, ids, think, gate)], None
    else:
        # the samples are the rows of one batch; each draws from random numbers of its own
        ids_BL, length_B = pad_ids([ids] * cfg.samples, base_model(model).embed.weight.device)
        generators = row_generators(cfg.seed, range(cfg.samples))
        generator = Generator(model, ids_BL, length_B, cfg.max_new_tokens, cfg.temperature,
                              cfg.top_k, cfg.top_p, generators, think, gate)
        # each text ends by itself: at the stop string, or at the end-of-text token
        stop = cfg.stop.replace("\\n", "\n")
        streams = [TextStream(tokenizer, ids, stop) for _ in range(cfg.samples)]
        steps = take_steps(generator, streams, cfg.max_new_tokens)
    # every step of a generation is shown as soon as its text is decided
    show(streams, steps, cfg.show_thoughts or cfg.text_file)
    # the page needs all tokens, so it is written last
    if cfg.html:
        texts = [stream.prompt + stream.tokens for stream in streams]
        config.write_text(cfg.html, page(texts, cfg.checkpoint))


def main():
    (cfg,) = config.parse(SampleConfig)
    # the tokenizer lies beside the weights
    tokenizer = load_tokenizer(find_checkpoint(cfg.checkpoint))
    model = load_for_inference(cfg.checkpoint, cfg.device, tokenizer, cfg.dtype)
    model.requires_grad_(False)
    if not isinstance(model, QuietSTaR) and (cfg.show_thoughts or cfg.html or cfg.gate):
        raise UserError(f"{cfg.checkpoint} has no thoughts to show: train it to think (train.py)")
    # a gate decides before each token whether a thought there is likely to pay
    gate = read_gate(cfg.gate, model) if cfg.gate else None
    for text in texts_of(cfg):
        try:
            answer(cfg, model, tokenizer, gate, text)
        except KeyboardInterrupt:                                 # enough of this text
            print()
        except UserError as error:
            if cfg.text_file or cfg.prompt is not None or not sys.stdin.isatty():
                raise
            print("error: " + config.printable(str(error)), file=sys.stderr)    # ask again


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)                 # `| head` ends it quietly
    config.run(main)
