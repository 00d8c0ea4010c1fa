"""How tokens look as they come: in a terminal, in a pipe, as JSON.

In a terminal the text flows, and a thought stands where it was thought, before its token: green if
it helped, yellow if it hurt, dimmed if it did not matter. In a pipe there is a line per token, in
plain columns. Colours are for terminals only, and not if NO_COLOR is set.

Left out on purpose: a full-screen interface; page.py writes a page instead.

Read next: page.py
"""
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from tools.trace import Line, Token

MATTERS = 0.1                             # nats of gain or loss; less is dimmed
NOTE = "a thought is what raised the likelihood of the text, not a record of why"


def literal(text: str, but: str = "") -> str:
    """Harmless to a terminal, and on one line: control characters, `but` some, as Python writes
    them."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]",
                  lambda match: match[0] if match[0] in but else repr(match[0])[1:-1], text)


class View:
    """Writes the tokens of one text after another to `out`.

    `threshold`: thoughts that gained or lost fewer nats are not shown.
    """
    def __init__(self, out, thoughts: bool = False, as_json: bool = False, threshold: float = 0.0):
        self.out, self.threshold, self.n_texts = out, threshold, 0
        self.colours = out.isatty() and not os.environ.get("NO_COLOR") and (
            os.environ.get("TERM") != "dumb")
        kind = "json" if as_json else "plain" if not thoughts else (
            "inline" if out.isatty() else "columns")
        self.kind, self.token = kind, getattr(self, f"_{kind}")

    def text(self, prompt: str, n_texts: int = 1):
        """Another of `n_texts` begins with what is known of it."""
        self.n_texts += 1
        if self.kind == "json":
            return
        if self.kind != "plain" and self.n_texts == 1:
            self._write(self._style(NOTE, "2") + "\n")
        if n_texts > 1:
            self._write(self._style(f"--- {self.n_texts} of {n_texts}", "2") + "\n")
        self._write(self._text(prompt))
        if self.kind == "columns":
            self._write("\n       token  weight    gain  thought\n")

    def end(self):
        """Of one text."""
        if self.kind in ("plain", "inline"):
            self._write("\n")

    def _write(self, text: str):
        self.out.write(text)
        self.out.flush()

    def _text(self, text: str) -> str:
        """As it is, but in a terminal, which would obey it."""
        return literal(text.replace("\r\n", "\n"), "\n\t") if self.out.isatty() else text

    def _style(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colours else text

    def _shown(self, token: Token) -> bool:
        return token.thinks and abs(token.gain) >= self.threshold

    def _plain(self, token: Token):
        self._write(self._text(token.text))

    def _json(self, token: Token):
        self._write(json.dumps(asdict(token)) + "\n")

    def _columns(self, token: Token):
        numbers = f"{token.mixing_weight:6.2f}  {token.gain:+6.2f}  {literal(token.thought)}"
        text = literal(token.text.strip(" ")) or ("␣" if token.text else "◦")     # ◦ part of one
        self._write(f"{text:>12s}  "
                    f"{numbers if self._shown(token) else ''}".rstrip(" ") + "\n")

    def _inline(self, token: Token):
        if self._shown(token):
            aside = f"[{literal(token.thought)} w {token.mixing_weight:.2f} {token.gain:+.2f}]"
            code = "2" if abs(token.gain) < MATTERS else "32" if token.gain > 0 else "33"
            self._write(" " + self._style(aside, code))
        self._write(self._text(token.text))


def show(tokens: Iterable[Token], lines: list[Line], view: View) -> list[list[Token]]:
    """Write all texts in turn, each after its prompt, and return their tokens, prompts included."""
    seen, current = [list(line.prompt) for line in lines], 0
    starts = ["".join(token.text for token in line.prompt) for line in lines]
    view.text(starts[0], len(lines))
    for token in in_order(tokens, lines):
        while current < token.sample:
            current = current + 1
            view.end()
            view.text(starts[current], len(lines))
        seen[current].append(token)
        view.token(token)
    for start in starts[current + 1:]:
        view.end()
        view.text(start, len(lines))
    view.end()
    return seen


def in_order(tokens: Iterable[Token], lines: list[Line]) -> Iterator[Token]:
    """The first text's tokens as they come, those of the next once it has ended."""
    current, waiting = 0, [[] for _ in lines]
    for token in tokens:
        while token.sample != current and lines[current].ended:
            current += 1
            yield from waiting[current]
        if token.sample == current:
            yield token
        else:
            waiting[token.sample].append(token)
    for later in waiting[current + 1:]:
        yield from later
