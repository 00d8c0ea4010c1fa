"""Generate text in the terminal, or read one that is given, and see the thoughts.

    python sample.py --checkpoint=out/quiet                            # interactive; Ctrl-D ends
    python sample.py --checkpoint=out/quiet --prompt="ball c : ab cd ce now" --show-thoughts
    python sample.py --checkpoint=out/quiet --prompt="..." --samples=3 --temperature=1 --stop="\\n"
    python sample.py --checkpoint=out/quiet --text-file=a.txt --html=a.html    # teacher forcing
    python sample.py --checkpoint=out/quiet --prompt="..." --think=gate --gate=1.5     # or never

Tokens stream as they come. The seed decides the text, however it is shown, and each of several
samples is the same alone or beside the others.

Left out on purpose: chat templates, and a memory: each prompt begins anew.

Read next: generate.py
"""
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import config
from config import UserError
from tools import page
import tokenizer as tokenizers
import weights
from inference import Gate, Generator, read_gate, row_streams
from tools.show import View, show
from thoughts import QuietSTaR
from tools.trace import Line, Token, generated, given


@dataclass(frozen=True)
class SampleConfig:
    checkpoint: str = ""              # folder
    prompt: str = ""                  # text to continue; default: standard input
    prompt_file: str = ""             # the same from a file
    text_file: str = ""               # a text to read instead, under teacher forcing
    max_new_tokens: int = 40                 # visible tokens
    temperature: float = 0.0          # of the visible tokens; 0 takes the most likely
    top_k: int = 0                    # only so many of the likeliest tokens; 0 considers all
    top_p: float = 1.0                # only the likeliest tokens that hold this probability
    seed: int = 0
    samples: int = 1                  # texts of one prompt, in one batch
    stop: str = ""                    # end before this text (\n is a newline), or at end of text
    think: str = "always"             # always | never | gate
    gate: str = ""                    # nats of entropy that open the gate, or gate.py's file
    show_thoughts: bool = False       # each token's thought, mixing weight and gain
    threshold: float = 0.0            # show only thoughts that gained or lost so many nats
    json: bool = False                # a line of JSON per token, with everything
    html: str = ""                    # file: a page that shows everything
    compile: bool = False             # for long texts on a GPU: the first token takes minutes
    device: str = "auto"              # auto | cpu | cuda

    def __post_init__(self):
        if not self.checkpoint:
            raise UserError("--checkpoint=FOLDER is needed")
        if self.think not in ("always", "never", "gate"):
            raise UserError(f"--think={self.think} is not one of always, never, gate")
        if (self.think == "gate") != bool(self.gate):
            raise UserError("--think=gate and --gate=NATS (or FILE) need each other")
        config.check_at_least(self, max_new_tokens=1, samples=1, temperature=0, top_k=0, seed=0)
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p={self.top_p} is not above 0 and at most 1")
        if self.samples > 1 and self.temperature == 0:
            raise UserError(f"--samples={self.samples} are all the same at --temperature=0: "
                             "raise it")
        if self.compile and self.gate and self.samples > 1:
            raise UserError(f"--compile with --gate and --samples={self.samples}: how many texts "
                             "think would change from pass to pass; leave one of them out")
        if self.show_thoughts and (self.json or self.think == "never"):
            other = "--json" if self.json else "--think=never"
            raise UserError(f"--show-thoughts and {other} contradict each other")
        if sum(map(bool, (self.prompt, self.prompt_file, self.text_file))) > 1:
            raise UserError("give one of --prompt, --prompt-file and --text-file")
        if self.text_file and not (self.show_thoughts or self.json or self.html):
            raise UserError("--text-file is to be looked at: add --show-thoughts, --json or "
                             "--html=FILE")


def generate(cfg: SampleConfig, objective, tokenizer, gate: Gate | None,
             prompt: str) -> list[list[Token]]:
    """Continue a prompt on standard output; the tokens of every sample, the prompt's included."""
    ids = tokenizer.encode(prompt, bos=True)
    if not prompt or not ids:
        raise UserError("the prompt is empty: give --prompt=TEXT, --prompt-file=FILE or text on "
                         "standard input")
    model = objective if isinstance(objective, QuietSTaR) else objective.model
    ids_BL = torch.tensor([ids] * cfg.samples, device=objective.model.embed.weight.device)
    length_B = torch.full_like(ids_BL[:, 0], len(ids))
    texts = Generator(model, ids_BL, length_B, cfg.max_new_tokens, cfg.temperature, cfg.top_k,
                      think=cfg.think != "never", top_p=cfg.top_p, gate=gate,
                      streams=row_streams(cfg.seed, range(cfg.samples)), compiled=cfg.compile)
    stop = cfg.stop.replace("\\n", "\n")
    lines = [Line(tokenizer, ids, sample, stop) for sample in range(cfg.samples)]
    view = View(sys.stdout, cfg.show_thoughts, cfg.json, cfg.threshold)
    return show(generated(texts, tokenizer, lines, cfg.max_new_tokens), lines, view)


def read(cfg: SampleConfig, objective, tokenizer, gate: Gate | None,
         text: str) -> list[list[Token]]:
    """Show what thinking does to a text that is given; its tokens."""
    ids = tokenizer.encode(text, bos=True)
    if len(ids) < 2:
        raise UserError(f"{cfg.text_file} has {len(ids)} tokens: two are needed, since the first "
                         "is predicted by none")
    first, *rest = given(objective, tokenizer, ids, cfg.think != "never", gate)
    if not (cfg.show_thoughts or cfg.json):
        return [[first, *rest]]
    view = View(sys.stdout, cfg.show_thoughts, cfg.json, cfg.threshold)
    return show(rest, [Line(tokenizer, ids[:1])], view)


def written(cfg: SampleConfig) -> str:
    """The text of the command line, of a file, or of standard input."""
    path = cfg.text_file or cfg.prompt_file
    if cfg.prompt or (not path and "--prompt" in config.options_on_command_line()):
        return cfg.prompt
    try:
        text = Path(path).read_text(encoding="utf-8") if path else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path or 'standard input'} is not UTF-8 text: {error}") from None
    return text.removesuffix("\n")


def typed() -> Iterator[str]:
    """What a person types, a prompt a line, until Ctrl-D, or Ctrl-C at the prompt."""
    import readline                       # noqa: F401, it makes input() editable
    while True:
        try:
            prompt = input("\n> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        if prompt:
            yield prompt


def main():
    (cfg,) = config.parse(SampleConfig)
    tokenizer = tokenizers.load(weights.find_checkpoint(cfg.checkpoint))
    objective = weights.load_objective(cfg.checkpoint, cfg.device, tokenizer).requires_grad_(False)
    if not isinstance(objective, QuietSTaR) and (cfg.show_thoughts or cfg.html or cfg.gate):
        raise UserError(f"{cfg.checkpoint} has no thoughts to show: train it to think (train.py)")
    gate = read_gate(cfg.gate, objective) if cfg.gate else None
    person = sys.stdin.isatty() and not (cfg.prompt_file or cfg.text_file
                                         or "--prompt" in config.options_on_command_line())
    for prompt in typed() if person else [written(cfg)]:
        try:
            texts = (read if cfg.text_file else generate)(cfg, objective, tokenizer, gate, prompt)
            if cfg.html:
                content = page.page(texts, Path(cfg.checkpoint).name)
                weights.atomic_write(cfg.html, lambda path: path.write_text(content, "utf-8"))
        except KeyboardInterrupt:                                 # enough of this text
            print()
        except UserError as error:
            if not person:
                raise
            print(f"error: {error}", file=sys.stderr)             # another prompt may be right


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):        # `| head` ends it quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    config.run(main)
