"""Where a process stands among its fellows, and what is applied *to* a model to run on several.

    python train.py ...                                              none: one process
    torchrun --nproc_per_node=8 train.py ...                         ddp: all hold everything
    torchrun --nproc_per_node=8 train.py --parallel=fsdp ...         fsdp: each holds an eighth

ddp (DistributedDataParallel) sums gradients. fsdp (FSDP2's `fully_shard`) also shards fp32 weights,
gradients and optimizer state; a block's weights are gathered once a step, by the first sampling
pass, and stay gathered until its gradient is done: the passes of a step share one gather. Model
files never import torch.distributed: this page does.

Left out on purpose: tensor and pipeline parallelism, which 7B needs not, hybrid sharding, and
gathering anew for every pass, which saves memory at T + 2 times the traffic.

Read next: checkpoint.py
"""
import hashlib
import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from config import UserError


@dataclass(frozen=True)
class Place:
    """One process of `world`; rank 0 prints and writes, all of them compute."""
    rank: int
    world: int
    device: torch.device
    kind: str = "none"                # none | ddp | fsdp

    @property
    def writes(self) -> bool:
        return self.rank == 0


def pick_device(name: str) -> torch.device:
    """`name` auto (CUDA if it is there), cpu or cuda; this process's own among several."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device={name} is not one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda, but this PyTorch sees no CUDA device: use --device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    here, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if here >= there:
        raise UserError(f"process {here} of this node has no GPU of its own: there are {there}; "
                         "lower --nproc_per_node")
    return torch.device("cuda", here)


def join(device: str, kind: str = "auto") -> Place:
    """Take the place that torchrun's environment gives, or be alone: one process needs no `kind`.

    auto is ddp for several processes.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if kind == "none" and world > 1:
        raise UserError(f"--parallel=none, but torchrun started {world} processes: choose "
                         "--parallel=ddp or fsdp")
    here = pick_device(device)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    if "RANK" in os.environ:
        # A restarted torchrun hands out the same store: keep away from what the dead left in it.
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:       # one node counts
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if here.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world, timeout=timedelta(hours=2))   # 87 GB to a disk
    return Place(rank, world, here, "none" if world == 1 else "ddp" if kind == "auto" else kind)


def leave():
    """Without this some backends abort at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def restarts() -> bool:
    """Does torchrun restart what dies (--max-restarts)? All nodes agree on it, not on counts."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def spread(objective, place: Place, dtype: torch.dtype = torch.float32):
    """The objective to call, on its device; its parameters, now in fp32, are the ones to optimize.
    `dtype`: of the matrix products, and so of what fsdp gathers of the blocks."""
    if place.kind == "fsdp":
        return _shard(objective, place, dtype)
    objective.to(place.device, torch.float32)
    if place.kind == "none":
        return objective
    return DistributedDataParallel(objective, gradient_as_bucket_view=True,     # else held twice
                                   device_ids=None if place.device.type == "cpu" else
                                   [place.device.index])


def _shard(objective, place: Place, dtype: torch.dtype):
    """A group to gather for each block, and one for the rest.

    Autocast does the casting: only the large matrices are gathered as bf16, the rest stays fp32,
    and so does the stream through the blocks, as without fsdp. Inputs keep their types: they hold
    counts and uniform numbers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                        register_fsdp_forward_method)
    kept = dict(mesh=init_device_mesh(place.device.type, (place.world,)),
                reshard_after_forward=False)
    half = dict(param_dtype=dtype, reduce_dtype=torch.float32) if dtype != torch.float32 else {}
    for block in objective.model.layers:
        block.float()                        # one at a time: no rank ever holds all of it in fp32
        fully_shard([block.attention, block.ffn], **kept,
                    mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False, **half))
        # Else a block that ran many passes is gathered once more when it is done:
        block.attention.set_modules_to_backward_prefetch([block.attention])
    objective.float()
    fully_shard(objective, **kept, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    objective.two_phase = True        # else gradients are exchanged after each pass of a thought
    objective.gathered_call = lambda run: run()
    register_fsdp_forward_method(objective, "gathered_call")
    return objective


def gathered(objective, place: Place, run):
    """`run()` where any method of `objective` may be called and any parameter read."""
    if place.kind != "fsdp":
        return run()
    result = objective.gathered_call(run)
    for module in objective.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return result


def meet(objective, place: Place, now: bool):
    """Whether the next backward exchanges gradients: only a step's last micro-batch has to."""
    if place.kind == "ddp":
        objective.require_backward_grad_sync = now
    if place.kind == "fsdp":
        objective.set_requires_gradient_sync(now)
        objective.set_reshard_after_backward(now)


def clip(objective, most: float):
    """Scale the gradients to a norm of at most `most`; the norm they had, over all shards."""
    norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), most)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def rows_of(place: Place, n_rows: int, n_micro_batches: int) -> list[range]:
    """This rank's rows of a step's `n_rows`, cut into micro-batches."""
    size, rest = divmod(n_rows, place.world * n_micro_batches)
    if rest:
        raise UserError(f"--batch_size={n_rows} does not divide into {place.world} ranks x "
                         f"--grad_accum={n_micro_batches}")
    first = place.rank * n_micro_batches
    return [range(size * i, size * (i + 1)) for i in range(first, first + n_micro_batches)]


def total(tensor):
    """The sum over all ranks, on all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def of_each_rank(values: list[int], place: Place):
    """[world, n] on all ranks."""
    everyone = torch.zeros(place.world, len(values), dtype=torch.long, device=place.device)
    everyone[place.rank] = torch.tensor(values)
    return total(everyone)


def agree(facts: dict[str, object], place: Place):
    """ValueError, on one rank, that names the facts which are not the same on all ranks.

    Hashes meet, as plain integers; no rank unpickles what another sent.
    """
    def first_to_differ(values) -> tuple[int, list[str]]:
        hashed = [int(hashlib.sha256(repr(v).encode()).hexdigest()[:15], 16) for v in values]
        differs = of_each_rank(hashed, place) != torch.tensor(hashed, device=place.device)
        return int(differs.any(1).byte().argmax()), differs.any(0).tolist()
    with together(place):
        rank, which = first_to_differ([list(facts)])     # of other code: the rest may not line up
        rank, which = (rank, which) if any(which) else first_to_differ(facts.values())
        if any(which) and place.writes:
            names = ", ".join(name for name, differs in zip(facts, which) if differs)
            raise UserError(f"rank {rank} is not like rank 0 in {names}: start all ranks with the "
                             "same command, code and files")


@contextmanager
def together(place: Place):
    """All ranks leave this block well, or none does: one raises its error, the others just end."""
    error = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    failed = of_each_rank([error is not None], place).flatten().nonzero().flatten().tolist()
    if failed:
        raise error if error and place.rank == failed[0] else SystemExit(2)
