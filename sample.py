"""Generate text, thinking before every token, and show the thoughts.

    python sample.py --checkpoint=out/quiet --prompt="ball c : ab cd ce now" --show-thoughts
    python sample.py --checkpoint=out/quiet --prompt="..." --no-thoughts          # the base model

To emit one token: the base state at the last position, one thought of T tokens behind it, one mixed
prediction; then the thought is dropped. A thought at the end of the text is an ordinary causal
continuation, so the text's own cache serves: thoughts are written beyond the last token and simply
overwritten by the next one. T + 1 passes a token, whatever the length of the text.

Left out on purpose: beam search, chat templates, serving.  Read next: eval.py
"""
import sys
from dataclasses import dataclass

import torch

import config
import tokenizer as tokenizers
import weights
from model import CausalContext, KVCache
from thoughts import QuietSTaR, choose_tokens, mix


HEADER = ("\na thought is what raised the likelihood of the text, not a record of why\n"
          "       token  weight    gain  thought\n")


@dataclass
class Emitted:
    """One visible token of each of the B texts, and what was thought before it (ids)."""
    token_B: torch.Tensor
    mixing_weight_B: torch.Tensor         # 0 base only, 1 thought only
    gain_B: torch.Tensor                  # nats: log p(token) with the thought, minus without
    thought_BT: torch.Tensor


class Generator:
    """B texts that grow by a token a call. `model` is a QuietSTaR, or a Mistral that cannot think.

    ids_BL is right-padded, length_B says how much of each row is text (at least one token); up to
    `max_new` tokens can follow. Thoughts are greedy; visible tokens are drawn by `generator` at
    `temperature` from the `top_k` best. Temperature 0 takes the best, top_k 0 considers all.
    """
    @torch.no_grad()
    def __init__(self, model, ids_BL, length_B, max_new: int, temperature: float = 1.0,
                 top_k: int = 0, generator: torch.Generator | None = None, think: bool = True):
        self.quiet = model if isinstance(model, QuietSTaR) and think else None
        self.mistral = model.model if isinstance(model, QuietSTaR) else model
        self.temperature, self.top_k, self.generator = temperature, top_k, generator
        self.n_thought = self.quiet.config.thought_len + 2 if self.quiet else 0
        slots = ids_BL.shape[1] + max_new + self.n_thought
        if slots > self.mistral.config.max_seq_len:
            context = f"{self.mistral.config.max_seq_len} with {self.n_thought} kept for thoughts"
            raise ValueError(f"prompt is {ids_BL.shape[1]} tokens, {max_new} more are asked for, "
                             f"context is {context}: shorten the prompt or lower --max_new")
        weight, self.position_B1 = self.mistral.embed.weight, length_B[:, None] - 1
        self.cache = KVCache(self.mistral.config, len(ids_BL), slots, weight.device, weight.dtype)
        every_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL)
        self.longest, self.last_B1 = ids_BL.shape[1], ids_BL.gather(1, self.position_B1)
        self._read(self.mistral.embed(ids_BL), every_BL)    # fill the cache; the last is read again

    def _read(self, x_BSD, position_BS):
        """One pass over new tokens at their positions; hidden states."""
        context = CausalContext(position_BS, self.cache, self.longest + self.n_thought)
        return self.mistral.transform(x_BSD, context)

    @torch.no_grad()
    def step(self) -> Emitted:
        base_BD, mixed_BD, weight_B1, thought_BT = self._think() if self.quiet else self._predict()
        logits_BV = self._logits(mixed_BD)
        token_B1 = self._choose(logits_BV)[:, None]
        gain_BV = logits_BV.log_softmax(-1) - self._logits(base_BD).log_softmax(-1)
        self.last_B1, self.position_B1 = token_B1, self.position_B1 + 1
        self.longest += 1
        return Emitted(*(t[:, 0] for t in (token_B1, weight_B1, gain_BV.gather(1, token_B1))),
                       thought_BT)

    def _logits(self, hidden_BD):
        """Of the visible tokens: a marker that has a row in the vocabulary is never emitted."""
        logits_BV = torch.nn.functional.linear(hidden_BD, self.mistral.head.weight).float()
        if self.quiet:
            logits_BV[:, list(self.quiet.config.marker_ids)] = -torch.inf
        return logits_BV

    def _predict(self):
        """Base state twice, mixing weight 0, and no thought."""
        base_BD = self._read(self.mistral.embed(self.last_B1), self.position_B1)[:, 0]
        return base_BD, base_BD, base_BD[:, :1] * 0, base_BD[:, :0].long()

    def _think(self):
        """Base state, mixed state, mixing weight and thought, at the last position of each text."""
        quiet, T = self.quiet, self.quiet.config.thought_len
        start_B1D, end_B1D = (marker.expand(len(self.last_B1), 1, -1)
                              for marker in (quiet.start_thought, quiet.end_thought))
        x_BSD = torch.cat((self.mistral.embed(self.last_B1), start_B1D), dim=1)
        position_BS = torch.cat((self.position_B1, self.position_B1 + 1), dim=1)
        hidden_BSD = self._read(x_BSD, position_BS)
        base_BD, thought = hidden_BSD[:, 0], []
        for t in range(T):
            token_B, _ = choose_tokens(hidden_BSD[:, -1], self.mistral.head.weight, None,
                                       quiet.config.marker_ids)
            thought.append(token_B)
            x_BSD = start_B1D if quiet.config.filler else self.mistral.embed(token_B[:, None])
            position_BS = position_BS[:, -1:] + 1
            if t == T - 1:
                x_BSD = torch.cat((x_BSD, end_B1D), dim=1)
                position_BS = torch.cat((position_BS, position_BS + 1), dim=1)
            hidden_BSD = self._read(x_BSD, position_BS)
        if T == 0:
            hidden_BSD = self._read(end_B1D, position_BS[:, -1:] + 1)
        weight_B1 = quiet.mixing_head(torch.cat((base_BD, hidden_BSD[:, -1]), dim=-1))
        mixed_BD = mix(base_BD, hidden_BSD[:, -1], weight_B1)
        return base_BD, mixed_BD, weight_B1, torch.stack(thought, 1) if T else base_BD[:, :0].long()

    def _choose(self, logits_BV):
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        if self.top_k:
            least_B1 = logits_BV.topk(min(self.top_k, logits_BV.shape[-1])).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
        p_BV = (logits_BV / self.temperature).softmax(-1)
        return torch.multinomial(p_BV, 1, generator=self.generator)[:, 0]


@dataclass(frozen=True)
class SampleConfig:
    checkpoint: str = ""              # folder
    prompt: str = ""                  # text to continue; default: standard input
    max_new: int = 40                 # visible tokens
    temperature: float = 0.0          # of the visible tokens; 0 takes the most likely
    top_k: int = 0                    # 0 considers every token
    seed: int = 0
    show_thoughts: bool = False       # a line per token: thought, mixing weight, gain
    no_thoughts: bool = False         # the base model
    device: str = "auto"              # auto | cpu | cuda

    def __post_init__(self):
        if not self.checkpoint:
            raise ValueError("--checkpoint=FOLDER is needed")
        if self.show_thoughts and self.no_thoughts:
            raise ValueError("--show-thoughts and --no-thoughts contradict each other")


def main():
    (cfg,) = config.parse(SampleConfig)
    tokenizer = tokenizers.load(weights.find_checkpoint(cfg.checkpoint))
    objective = weights.load_objective(cfg.checkpoint, cfg.device, tokenizer)
    model = objective if isinstance(objective, QuietSTaR) else objective.model
    if cfg.show_thoughts and model is not objective:
        raise ValueError(f"{cfg.checkpoint} has no thoughts to show: train it to think (train.py)")
    prompt = cfg.prompt or sys.stdin.read().rstrip("\n")
    ids = tokenizer.encode(prompt, bos=tokenizer.bos is not None)
    if not ids:
        raise ValueError("the prompt is empty: give --prompt=TEXT or text on standard input")
    device = objective.model.embed.weight.device
    ids_BL, length_B = (torch.tensor(x, device=device) for x in ([ids], [len(ids)]))
    texts = Generator(model, ids_BL, length_B, cfg.max_new, cfg.temperature, cfg.top_k,
                      torch.Generator(device).manual_seed(cfg.seed), not cfg.no_thoughts)
    print(prompt, end=HEADER if cfg.show_thoughts else "", flush=True)
    stream = tokenizer.stream()
    for token in ids:
        stream.push(token)
    for _ in range(cfg.max_new):
        emitted = texts.step()
        token = int(emitted.token_B[0])
        if token == tokenizer.eos:
            break
        if cfg.show_thoughts:
            shown, thought = (tokenizer.decode(ids).replace("\n", "\\n")
                              for ids in ([token], emitted.thought_BT[0]))
            weight, gain = emitted.mixing_weight_B[0], emitted.gain_B[0]
            print(f"{shown:>12s}  {weight:6.2f}  {gain:+6.2f}  {thought}")
        else:
            print(stream.push(token), end="", flush=True)
    print(stream.flush())


if __name__ == "__main__":
    config.run(main)
