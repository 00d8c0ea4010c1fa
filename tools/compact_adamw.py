"""AdamW whose weights and moments take fewer bytes: bf16 weights, moments in fp32, bf16 or 8 bits.

At a learning rate of 1e-6 an update is far smaller than the distance between two bf16 numbers, so
rounding to the nearest one loses it. Here a new weight is computed in fp32 and rounded to one of
its two neighbours at random, so that it is right in the mean (arXiv 2010.06192). A second moment
in bf16, which shrinks by 0.1 % a step, needs the same. Moments in 8 bits are scaled in blocks
(arXiv 2110.02861), and because a block's scale is fp32, all of it can shrink.
The random numbers are keyed by (seed, step, parameter) and drawn for the whole parameter: a resumed
run rounds as an uninterrupted one does, and a shard as the whole.
"""
import functools

import torch

from data import RNG_ROUNDING, seed_of
from distributed import MOMENTS, shard_like

BLOCK = 256                           # numbers of a row that share a scale
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}


class CompactAdamW(torch.optim.Optimizer):
    """Equal to torch's AdamW in fp32, but for the rounding of what it stores. `moments` names their
    type for matrices; those of vectors are fp32."""
    def __init__(self, groups, lr, betas, seed: int, moments: str):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=1e-8, weight_decay=0.0))
        self.seed = seed
        for _, p in self.parameters():
            dtype = torch.float32
            if p.dim() > 1:
                dtype = TYPES[moments]
            self.state[p] = empty_moments(p, dtype)
            self.state[p]["step"] = torch.zeros(())

    def parameters(self):
        """Yield each parameter with its group, in the order that numbers them."""
        for group in self.param_groups:
            for p in group["params"]:
                yield group, p

    @torch.no_grad()
    def step(self):
        """Update every parameter that has a gradient."""
        for number, (group, p) in enumerate(self.parameters()):
            if p.grad is not None:
                self.update(p, group, number)

    def update(self, p, group, number: int):
        """Update one parameter by AdamW's formula, in fp32."""
        state = self.state[p]
        state["step"] += 1
        step = int(state["step"])
        key = seed_of(self.seed, RNG_ROUNDING, step, number)
        generator = torch.Generator(p.device).manual_seed(key)
        # the moments: means of the gradient and of its square
        beta1, beta2 = group["betas"]
        gradient = local(p.grad).float()
        mean = read_moment(state, "exp_avg")
        mean.lerp_(gradient, 1 - beta1)
        square = read_moment(state, "exp_avg_sq")
        square.lerp_(gradient.square(), 1 - beta2)
        # they began at zero, which is corrected for
        mean_weight = 1 - beta1 ** step
        square_weight = 1 - beta2 ** step
        rms = (square / square_weight).sqrt()
        direction = (mean / mean_weight) / (rms + group["eps"])
        # what is stored is rounded, what is computed with is not
        lr = group["lr"]
        kept = 1 - lr * group["weight_decay"]
        weight = local(p).float() * kept
        weight -= lr * direction
        round_into(p, weight, generator)
        write_moment(state, "exp_avg", mean, generator)
        write_moment(state, "exp_avg_sq", square, generator)


def local(tensor):
    """The rows that this rank holds of a sharded tensor; another tensor itself."""
    if hasattr(tensor, "to_local"):
        return tensor.to_local()
    return tensor


def empty_moments(p, dtype: torch.dtype) -> dict:
    """Both moments of a new parameter, and for 8 bits the scales of their blocks."""
    state = {}
    for name in MOMENTS:
        state[name] = torch.zeros_like(p, dtype=dtype)
        if dtype == torch.uint8:
            blocks = p[:, :blocks_of_row(p)]
            state[name + "_scale"] = torch.zeros_like(blocks, dtype=torch.float32)
    return state


def blocks_of_row(p) -> int:
    """The number of blocks in a row: of BLOCK numbers each, or one if they do not divide it."""
    n_blocks, rest = divmod(p.shape[1], BLOCK)
    return 1 if rest else n_blocks


def read_moment(state: dict, name: str):
    """A moment in fp32, a copy."""
    stored = local(state[name])
    if stored.dtype != torch.uint8:
        return stored.to(torch.float32, copy=True)
    scale = local(state[name + "_scale"])
    values = dynamic_map(name == "exp_avg").to(stored.device)
    relative = values[stored.int()]
    blocks = relative.unflatten(1, (scale.shape[1], -1))
    return (blocks * scale[..., None]).flatten(1)


def write_moment(state: dict, name: str, moment, generator):
    """Store a moment, rounded to its type."""
    stored = state[name]
    if stored.dtype != torch.uint8:
        round_into(stored, moment, generator)
        return
    scale = local(state[name + "_scale"])
    blocks = moment.unflatten(1, (scale.shape[1], -1))
    scale.copy_(blocks.abs().amax(dim=-1))
    # the nearest value of the map: the middles between neighbours part them
    values = dynamic_map(name == "exp_avg").to(moment.device)
    middles = (values[1:] + values[:-1]) / 2
    largest = scale[..., None].clamp(min=1e-30)
    relative = (blocks / largest).flatten(1)
    codes = torch.bucketize(relative, middles)
    local(stored).copy_(codes)


def round_into(stored, exact, generator):
    """Copy fp32 numbers into a tensor; if it is bf16, round each up or down at random, so that the
    mean is exact. `generator` draws 16 bits for each number of the whole, sharded or not."""
    if stored.dtype == torch.bfloat16:
        noise = torch.randint(1 << 16, stored.shape, generator=generator,
                              device=exact.device, dtype=torch.int32)
        # bf16 is the upper half of fp32: noise that is added to the lower half carries at random
        bits = exact.view(torch.int32) + shard_like(noise, stored)
        upper_half = bits & -(1 << 16)
        exact = upper_half.view(torch.float32)
    local(stored).copy_(exact)


@functools.cache
def dynamic_map(signed: bool):
    """The values of an 8-bit number, -1 to 1 or 1e-7 to 1, rising: each of seven decades has twice
    as many as the one below (arXiv 1511.04561). A second moment is never rounded to 0, because an
    update is divided by its root."""
    values = [1.0]
    if signed:
        values = [0.0, 1.0]
    for decade in range(7):
        n_values = 2 ** decade
        if not signed:
            n_values *= 2
        edges = torch.linspace(0.1, 1, n_values + 1, dtype=torch.float64)
        middles = (edges[1:] + edges[:-1]) / 2
        scaled = middles * 10.0 ** (decade - 6)
        values += scaled.tolist()
        if signed:
            values += (-scaled).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)
