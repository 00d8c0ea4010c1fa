"""Generate text, thinking before every token, and show the thoughts.

    python sample.py --checkpoint=out/quiet --prompt="ball c : ab cd ce now" --show-thoughts
    python sample.py --checkpoint=out/quiet --prompt="..." --no-thoughts          # the base model

To emit one token: the base state at the last position, one thought of T tokens behind it, one mixed
prediction; then the thought is dropped. A thought at the end of the text is an ordinary causal
continuation, so the text's own cache serves: thoughts are written beyond the last token and simply
overwritten by the next one. T + 1 passes a token, whatever the length of the text.

Left out on purpose: beam search, a chat template, serving.

Read next: eval.py
"""
import sys
from dataclasses import dataclass

import torch

import config
import tokenizer as tokenizers
import weights
from model import CausalContext, KVCache
from thoughts import QuietSTaR, choose_tokens, mix


@dataclass
class Emitted:
    """One visible token of each of the B texts, and what was thought before it."""
    token_B: torch.Tensor
    thought_BT: torch.Tensor              # ids
    mixing_weight_B: torch.Tensor         # 0 base only, 1 thought only
    gain_B: torch.Tensor                  # nats: log p(token) with the thought, minus without


class Generator:
    """B texts that grow by a token a call. `model` is a QuietSTaR, or a Mistral that cannot think.

    ids_BL is right-padded, length_B says how much of each row is text (at least one token); up to
    `max_new` tokens can follow. Thoughts are greedy; visible tokens are drawn by `generator` at
    `temperature` from the `top_k` best. Temperature 0 takes the best, top_k 0 considers all.
    """
    def __init__(self, model, ids_BL, length_B, max_new: int, temperature: float = 1.0,
                 top_k: int = 0, generator: torch.Generator | None = None, think: bool = True):
        self.quiet = model if isinstance(model, QuietSTaR) and think else None
        self.mistral = model.model if isinstance(model, QuietSTaR) else model
        self.temperature, self.top_k, self.generator = temperature, top_k, generator
        self.n_thought = self.quiet.config.thought_len + 2 if self.quiet else 0
        slots = ids_BL.shape[1] + max_new + self.n_thought
        if slots > self.mistral.config.max_seq_len:
            context = f"{self.mistral.config.max_seq_len} with {self.n_thought} kept for thoughts"
            raise ValueError(f"prompt is {ids_BL.shape[1]} tokens and {max_new} more are asked for; "
                             f"context is {context}: shorten the prompt or lower --max_new")
        weight = self.mistral.embed.weight
        self.cache = KVCache(self.mistral.config, len(ids_BL), slots, weight.device, weight.dtype)
        self.position_B1 = length_B[:, None] - 1
        every_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL)
        self.longest, self.last_B1 = ids_BL.shape[1], ids_BL.gather(1, self.position_B1)
        self._read(self.mistral.embed(ids_BL), every_BL)    # fill the cache; the last is read again

    def _read(self, x_BSD, position_BS):
        """One pass over new tokens at their positions; hidden states."""
        length = self.longest + self.n_thought
        return self.mistral.transform(x_BSD, CausalContext(position_BS, self.cache, length))

    @torch.no_grad()
    def step(self) -> Emitted:
        head_VD, B = self.mistral.head.weight, len(self.last_B1)
        base_BD, after_BD, thought_BT = self._think() if self.quiet else self._predict()
        weight_B1, mixed_BD = torch.zeros(B, 1, device=base_BD.device), base_BD
        if self.quiet:
            weight_B1 = self.quiet.mixing_head(torch.cat((base_BD, after_BD), dim=-1))
            mixed_BD = mix(base_BD, after_BD, weight_B1)
        logits_BV = torch.nn.functional.linear(mixed_BD, head_VD).float()
        token_B = self._choose(logits_BV.clone())
        base_logp_BV = torch.nn.functional.linear(base_BD, head_VD).float().log_softmax(-1)
        gain_B = (logits_BV.log_softmax(-1) - base_logp_BV).gather(1, token_B[:, None])[:, 0]
        self.last_B1, self.position_B1 = token_B[:, None], self.position_B1 + 1
        self.longest += 1
        return Emitted(token_B, thought_BT, weight_B1[:, 0], gain_B)

    def _predict(self):
        base_BD = self._read(self.mistral.embed(self.last_B1), self.position_B1)[:, 0]
        return base_BD, base_BD, base_BD[:, :0].long()

    def _think(self):
        """Base state, state after a thought, and the thought, at the last position of each text."""
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
        thought_BT = torch.stack(thought, 1) if thought else base_BD[:, :0].long()
        return base_BD, hidden_BSD[:, -1], thought_BT

    def _choose(self, logits_BV):
        """A visible token; markers have no row, or one that is never emitted."""
        if self.quiet:
            logits_BV[:, list(self.quiet.config.marker_ids)] = -torch.inf
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
    objective = weights.load_objective(cfg.checkpoint, cfg.device)
    model = objective if isinstance(objective, QuietSTaR) else objective.model
    if cfg.show_thoughts and model is not objective:
        raise ValueError(f"{cfg.checkpoint} has no thoughts to show: train it to think (train.py)")
    tokenizer = tokenizers.load(weights.find_checkpoint(cfg.checkpoint))
    prompt = cfg.prompt or sys.stdin.read().rstrip("\n")
    ids = tokenizer.encode(prompt, bos=tokenizer.bos is not None)
    if not ids:
        raise ValueError("the prompt is empty: give --prompt=TEXT or text on standard input")
    device = objective.model.embed.weight.device
    ids_BL, length_B = (torch.tensor(x, device=device) for x in ([ids], [len(ids)]))
    texts = Generator(model, ids_BL, length_B, cfg.max_new, cfg.temperature, cfg.top_k,
                      torch.Generator(device).manual_seed(cfg.seed), not cfg.no_thoughts)
    print(prompt, end="\n" if cfg.show_thoughts else "", flush=True)
    if cfg.show_thoughts:
        print("a thought is what raised the likelihood of the text, not a record of why\n"
              f"{'token':>12s}  {'weight':>6s}  {'gain':>6s}  thought")
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
                              for ids in ([token], emitted.thought_BT[0].tolist()))
            numbers = f"{emitted.mixing_weight_B[0]:6.2f}  {emitted.gain_B[0]:+6.2f}"
            print(f"{shown:>12s}  {numbers}  {thought}")
        else:
            print(stream.push(token), end="", flush=True)
    print(stream.flush())


if __name__ == "__main__":
    config.run(main)
