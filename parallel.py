"""Where a process stands among its fellows, and what is applied *to* a model to run on several.

`python train.py` is one process; `torchrun --nproc_per_node=2 train.py` is two, and then gradients
are averaged by DistributedDataParallel. Model files never import torch.distributed: this page does.

Read next: config.py
"""
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Place:
    """One process of `world`; rank 0 prints and writes, all of them compute."""
    rank: int
    world: int
    device: torch.device

    @property
    def writes(self) -> bool:
        return self.rank == 0


def pick_device(name: str) -> torch.device:
    """`name` auto (CUDA if it is there), cpu or cuda; this process's own among several."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device={name} is not one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda, but this PyTorch sees no CUDA device: use --device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def join(device: str) -> Place:
    """Take the place that torchrun's environment gives, or be alone."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    here = pick_device(device)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    return Place(rank, world, here)


def leave():
    """Without this some backends abort at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def spread(objective, place: Place):
    """The objective to call: gradients meet when the last micro-batch goes backward."""
    if place.world == 1:
        return objective
    return DistributedDataParallel(objective, device_ids=None if place.device.type == "cpu" else
                                   [place.device.index])


def meet(objective, now: bool):
    """Whether the next backward exchanges gradients: only a step's last micro-batch has to."""
    if isinstance(objective, DistributedDataParallel):
        objective.require_backward_grad_sync = now


def rows_of(place: Place, n_rows: int, n_micro_batches: int) -> list[range]:
    """This rank's rows of a step's `n_rows`, cut into micro-batches."""
    size, rest = divmod(n_rows, place.world * n_micro_batches)
    if rest:
        raise ValueError(f"batch={n_rows} does not divide into {place.world} ranks x "
                         f"accumulate={n_micro_batches}")
    first = place.rank * n_micro_batches
    return [range(size * i, size * (i + 1)) for i in range(first, first + n_micro_batches)]


def total(tensor):
    """The sum over all ranks, on all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor
