"""Tokens and their thoughts: as a text grows, and as they are shown in a terminal or a pipe.

    stream = TextStream(tokenizer, prompt_ids, stop="\\n")
    show([stream], take_steps(generator, [stream], max_new_tokens=40), thoughts=True)
Left out on purpose: a full-screen interface, and the predictions of the tokens further ahead.
"""
import os
import sys
from dataclasses import dataclass

import torch

from config import printable
from tokenizer import Stream

START_THOUGHT = "<|startthought|>"        # how a start marker is shown
N_LIKELIEST = 5                           # predictions kept of each token
MATTERS = 0.1                             # nats of gain or loss; a thought of less is dimmed
NOTE = "a thought is what raised the likelihood of the text, not a record of why"


@dataclass
class Token:
    """One visible token. In a prompt, and at the start of a text, only `id` and `text` are set."""
    id: int
    text: str = ""                        # text that it adds; "" until a character is whole
    thinks: bool = False
    thought: str = ""
    mixing_weight: float = 0.0            # 0 base only, 1 thought only
    gain: float = 0.0                     # nats: log p with the thought, minus without
    logp: float | None = None             # of this token, with the thought (nats, temperature 1)
    entropy: float | None = None          # of the base prediction (nats)
    reward: float | None = None           # given texts: nats over the n_true tokens ahead
    base: tuple = ()                      # likeliest without the thought: id, text, probability
    mixed: tuple = ()                     # likeliest with the thought


class TextStream:
    """One text as it grows: `prompt`, and `tokens`, the later ones whose text is decided. Half a
    character and a possible beginning of the stop string wait until more is known. Neither the stop
    string nor the end-of-text token is part of the text."""
    def __init__(self, tokenizer, prompt_ids, stop: str = ""):
        self.tokenizer, self.decoder = tokenizer, Stream(tokenizer)
        self.stop, self.ended = stop, False
        self.prompt = [Token(int(i), self.decoder.push(i)) for i in prompt_ids]
        self.tokens, self.waiting = [], []

    def push(self, token: Token) -> None:
        if token.id in self.tokenizer.ends:
            return self.end()
        token.text = self.decoder.push(token.id)
        self.waiting.append(token)
        text = "".join(token.text for token in self.waiting)
        beginnings = tuple(self.stop[:n] for n in range(1, len(self.stop)))
        half_a_character = self.decoder.utf8.getstate()[0]
        if self.stop and self.stop in text:
            self.ended = True
            self._release(text.index(self.stop))
        elif not half_a_character and not text.endswith(beginnings):
            self._release()

    def end(self) -> None:
        """Release the tokens that wait: no more will come. Half a character becomes U+FFFD."""
        if self.waiting:
            self.waiting[-1].text += self.decoder.flush()
        self.ended = True
        self._release()

    def _release(self, n_characters: int = sys.maxsize) -> None:
        """Decide the waiting tokens; those beyond so many characters are dropped."""
        for token in self.waiting:
            if n_characters > 0:
                token.text = token.text[:n_characters]
                self.tokens.append(token)
            n_characters -= len(token.text)
        self.waiting = []


def take_steps(generator, streams: list[TextStream], max_new_tokens: int):
    """Give every text that has not ended a token at each `next`, then end all of them."""
    for _ in range(max_new_tokens):
        output = generator.step()
        for row, stream in enumerate(streams):
            if stream.ended:
                continue
            token = Token(int(output.token_B[row]))
            thought_T = output.thought_BT[row] if output.thinks_B[row] else None
            describe(token, stream.tokenizer, generator.model, output.base_logp_BV[row],
                     output.mixed_logp_BV[row], output.mixing_weight_B[row], thought_T)
            stream.push(token)
        yield
    for stream in streams:
        stream.end()


def describe(token: Token, tokenizer, model, base_logp_V, mixed_logp_V, mixing_weight, thought_T):
    """Fill in how thinking changed the prediction; `thought_T` is None if there was no thought."""
    token.logp = float(mixed_logp_V[token.id])
    token.gain = token.logp - float(base_logp_V[token.id])
    token.entropy = float(torch.special.entr(base_logp_V.exp()).sum())
    token.base, token.mixed = (_likeliest(x, tokenizer) for x in (base_logp_V, mixed_logp_V))
    if thought_T is not None:
        token.thinks = True
        token.mixing_weight = float(mixing_weight)
        token.thought = tokenizer.decode(thought_T.tolist())
        if model.config.filler:                # it reads the start marker at each step instead
            token.thought = START_THOUGHT * len(thought_T)


def _likeliest(logp_V, tokenizer) -> tuple:
    p_K, id_K = logp_V.exp().topk(min(N_LIKELIEST, len(logp_V)))
    return tuple((i, tokenizer.decode([i]), p) for i, p in zip(id_K.tolist(), p_K.tolist()))


def on_a_screen() -> bool:
    """Return True if a person reads the output; it can be a pipe, or closed."""
    return bool(sys.stdout) and sys.stdout.isatty()


def show(streams: list[TextStream], steps, thoughts: bool = False) -> None:
    """Write texts to standard output: the first as it grows, each other once the last has ended.
    With thoughts, a pipe gets a line per token. In a terminal the text flows, and a thought stands
    before its token: green if it helped, yellow if it hurt, dim if it hardly mattered."""
    if thoughts:
        print(_styled(NOTE, "2"))
    for number, stream in enumerate(streams, 1):
        if len(streams) > 1:
            print(_styled(f"--- {number} of {len(streams)}", "2"))
        print(_safe("".join(token.text for token in stream.prompt)), end="", flush=True)
        if thoughts and not on_a_screen():
            print("\n       token  weight    gain  thought", end="")
        n_shown = 0
        while n_shown < len(stream.tokens) or not stream.ended:
            if n_shown < len(stream.tokens):
                print(_shown(stream.tokens[n_shown], thoughts), end="", flush=True)
                n_shown += 1
            else:
                next(steps, None)                     # one more token, or the end of every text
        print()


def _shown(token: Token, thoughts: bool) -> str:
    text, thought = _safe(token.text), printable(token.thought)
    if thoughts and not on_a_screen():
        missing = "␣" if token.text else "◦"      # a space, or part of a character
        text = f"\n{printable(token.text.strip(' ')) or missing:>12s}"
        if token.thinks:
            text += f"  {token.mixing_weight:6.2f}  {token.gain:+6.2f}  {thought}".rstrip(" ")
    elif thoughts and token.thinks:
        colour = "32" if token.gain > 0 else "33"
        code = colour if abs(token.gain) >= MATTERS else "2"
        aside = f"[{thought} w {token.mixing_weight:.2f} {token.gain:+.2f}]"
        text = " " + _styled(aside, code) + text
    return text


def _safe(text: str) -> str:
    """Escape what a terminal would obey; a file gets the text itself."""
    return printable(text.replace("\r\n", "\n"), keep="\n\t") if on_a_screen() else text


def _styled(text: str, code: str) -> str:
    colours = on_a_screen() and not os.environ.get("NO_COLOR")
    return f"\x1b[{code}m{text}\x1b[0m" if colours else text
