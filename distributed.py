"""Distributed training: this process's rank and device, and how a model is wrapped in DDP or FSDP2.

    torchrun --nproc_per_node=8 train.py ...                    ddp: each rank holds everything
    torchrun --nproc_per_node=8 train.py --parallel=fsdp ...    fsdp: each rank holds an eighth
Left out on purpose: tensor and pipeline parallelism, hybrid sharding, and gathering the weights
anew for each pass, which saves memory at T + 2 times the traffic.
"""
import os
import re
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as c10d
from torch.nn.parallel import DistributedDataParallel as DDP

from config import UserError


@dataclass(frozen=True)
class Distributed:
    """One process among `world_size`. All ranks compute, rank 0 prints and writes."""
    rank: int
    world_size: int
    device: torch.device
    strategy: str = "none"            # none | ddp | fsdp: weights, gradients, AdamW in shards

    @property
    def is_main(self) -> bool:
        return self.rank == 0


MOMENTS = "exp_avg", "exp_avg_sq"     # AdamW's means of the gradient and of its square
SINGLE = Distributed(0, 1, torch.device("cpu"))


def pick_device(name: str, allow_mps: bool = False) -> torch.device:
    """Return the device for cpu, cuda (this process's own GPU), mps, or auto: CUDA if there is one,
    else a Mac's GPU if that is allowed, else the CPU. Raises UserError if there is none such."""
    index, n_devices = number_in_environment("LOCAL_RANK", 0), torch.cuda.device_count()
    has_mps = torch.backends.mps.is_available()
    if (name == "cuda" and not n_devices) or (name == "mps" and not has_mps):
        raise UserError(f"--device={name}, but this PyTorch sees no such device: use --device=cpu")
    if name == "mps" or (name == "auto" and allow_mps and has_mps and not n_devices):
        return torch.device("mps")
    if name == "cpu" or not n_devices:
        return torch.device("cpu")
    if index >= n_devices:
        raise UserError(f"no GPU is left for process {index}: --nproc_per_node={n_devices} at most")
    return torch.device("cuda", index)


def number_in_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name}={text} in the environment is no number: start with torchrun")
    return int(text)


def init_distributed(device: str, strategy: str = "auto", allow_mps: bool = False) -> Distributed:
    """Join the processes that torchrun started, if it did; `strategy` auto then means ddp."""
    own_device = pick_device(device, allow_mps)
    n_processes = os.environ.get("WORLD_SIZE", "1")
    if n_processes == "1":
        return Distributed(0, 1, own_device)
    if own_device.type == "mps":
        raise UserError(f"{n_processes} processes cannot share one mps device: use --device=cpu")
    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent:
        raise UserError(f"WORLD_SIZE={n_processes} in the environment, but no {', '.join(absent)}: "
                        "start with torchrun, or unset WORLD_SIZE")
    if number_in_environment("RANK", 0) >= number_in_environment("WORLD_SIZE", 1):
        raise UserError(f"RANK={os.environ['RANK']} of WORLD_SIZE={n_processes}: use torchrun")
    number_in_environment("MASTER_PORT", 0)
    if strategy == "none":
        raise UserError(f"--parallel=none, but torchrun started {n_processes} processes: use ddp")
    backend = {"cpu": "gloo", "cuda": "nccl"}[own_device.type]
    if backend == "nccl":
        torch.cuda.set_device(own_device)
    store, rank, world_size = next(c10d.rendezvous("env://"))
    # A restarted torchrun hands out the store of dead processes: keep apart from their keys.
    if os.environ.get("LOCAL_WORLD_SIZE") == n_processes:
        store = c10d.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    c10d.init_process_group(backend, None, timedelta(hours=2), world_size, rank, store)
    return Distributed(rank, world_size, own_device, strategy.replace("auto", "ddp"))


def cleanup() -> None:
    """Leave the process group; without this some backends abort at exit."""
    if c10d.is_initialized():
        c10d.destroy_process_group()


def restarts_enabled() -> bool:
    """Return True if torchrun restarts dead processes (--max-restarts)."""
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def parallelize(objective, dist: Distributed, dtype=torch.float32, bf16_weights=False):
    """Return the module to call. The parameters of `objective` move to the device, see `convert`;
    fsdp gathers those of blocks as `dtype`."""
    if dist.strategy != "fsdp":
        convert(objective, bf16_weights, dist.device)
    if dist.strategy == "none":
        return objective
    if dist.strategy == "ddp":        # gradients as views of its buckets: otherwise both are held
        return DDP(objective, gradient_as_bucket_view=True)
    from torch.distributed import fsdp
    # Each block is a group of shards, gathered once a step as `dtype`; the rest stays fp32.
    mesh = c10d.init_device_mesh(dist.device.type, (dist.world_size,))
    common = dict(mesh=mesh, reshard_after_forward=False)
    # Autocast casts the inputs: the residual stream stays fp32, as without fsdp.
    fp32 = fsdp.MixedPrecisionPolicy(cast_forward_inputs=False)
    policy = fsdp.MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in objective.model.layers:
        convert(block, bf16_weights, None)     # one at a time: never is the whole model fp32
        fsdp.fully_shard([block.attention, block.ffn], mp_policy=policy, **common)
        # Otherwise a block that ran many passes is gathered once more when it is done.
        block.attention.set_modules_to_backward_prefetch([block.attention])
    convert(objective, bf16_weights, None)
    fsdp.fully_shard(objective, mp_policy=fp32, **common)
    # FSDP gathers weights for `forward` only: `unsharded` needs a method that does the same.
    objective.run_unsharded = lambda run: run()
    fsdp.register_fsdp_forward_method(objective, "run_unsharded")
    return objective


def convert(module, bf16_weights: bool, device) -> None:
    """Move all parameters to a device, if one is given, as fp32; with `bf16_weights` those of the
    blocks' linears, biases too, as bf16. Never are two copies of the whole model held."""
    for name, p in module.named_parameters():
        is_bf16 = bf16_weights and re.search(r"\b(attention|ffn)\.(?!.*lora_)", name)
        dtype = torch.bfloat16 if is_bf16 else torch.float32
        if device or p.dtype != dtype:
            p.data = p.data.to(device or p.device, dtype)


def shard_like(full, parameter):
    """Return the part of `full`, the same on all ranks, that this rank holds of `parameter`."""
    if not hasattr(parameter, "placements"):
        return full
    from torch.distributed.tensor import distribute_tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(full, mesh, placements, src_data_rank=None).to_local()


def unsharded(objective, dist: Distributed, run):
    """Return `run()`, which may call any method of `objective` and read any parameter."""
    if dist.strategy != "fsdp":
        return run()
    result = objective.run_unsharded(run)
    for module in objective.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return result


def set_gradient_sync(objective, dist: Distributed, now: bool) -> None:
    """Set whether the next backward exchanges gradients: a step's last micro-batch has to."""
    if dist.strategy == "ddp":
        objective.require_backward_grad_sync = now
    if dist.strategy == "fsdp":
        objective.set_requires_gradient_sync(now)
        objective.set_reshard_after_backward(now)


def clip_gradients(objective, max_norm: float):
    """Scale the gradients to at most `max_norm`; return the norm before, over all shards."""
    norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def micro_batches_of_rank(dist: Distributed, n_rows: int, n_micro_batches: int) -> list[range]:
    """Cut this rank's share of a step's `n_rows` texts into micro-batches of row numbers."""
    size, rest = divmod(n_rows, dist.world_size * n_micro_batches)
    if rest:
        raise UserError(f"--batch_size={n_rows} does not divide into {dist.world_size} ranks x "
                        f"--grad_accum={n_micro_batches}")
    first = dist.rank * n_micro_batches
    return [range(size * i, size * (i + 1)) for i in range(first, first + n_micro_batches)]


def all_reduce_sum(tensor):
    """Return the sum over all ranks, on all ranks."""
    if c10d.is_initialized():
        tensor = tensor.clone()
        c10d.all_reduce(tensor)
    return tensor


def all_gather_ints(values: list[int], dist: Distributed):
    """Return every rank's `values`, [world_size, n], on all ranks."""
    table = torch.zeros(dist.world_size, len(values), dtype=torch.long, device=dist.device)
    table[dist.rank] = torch.tensor(values)
    return all_reduce_sum(table)


def check_same_on_all_ranks(facts: dict[str, object], dist: Distributed) -> None:
    """Raise UserError, on rank 0, that names the facts which differ; other ranks exit."""
    # Checksums are plain integers: no rank unpickles what another sent.
    table = all_gather_ints([zlib.crc32(repr(fact).encode()) for fact in facts.values()], dist)
    rows, columns = (table != table[0]).nonzero(as_tuple=True)
    with fail_together(dist):
        if dist.is_main and len(rows):
            names = [name for i, name in enumerate(facts) if i in columns]
            raise UserError(f"rank {rows[0]} is not like rank 0 in {', '.join(names)}: start all "
                            "ranks with the same command and files")


@contextmanager
def fail_together(dist: Distributed):
    """Stop all ranks if a UserError is raised on any: the first raises it, the others exit."""
    error = None
    try:
        yield
    except UserError as caught:
        error = caught
    failed = all_gather_ints([error is not None], dist).flatten()
    if failed.any():
        raise error if error and dist.rank == int(failed.argmax()) else SystemExit(2)


def full_tensors(parameters: dict, dist: Distributed) -> dict[str, torch.Tensor]:
    """Return whole parameters by name on rank 0, and nothing elsewhere. All ranks call."""
    tensors = {}
    for name, parameter in parameters.items():
        full = parameter.full_tensor().cpu() if dist.strategy == "fsdp" else parameter
        if dist.is_main:
            tensors[name] = full.detach()
    return tensors


def transfer_moments(model, optimizer, step: int, folder, dist: Distributed, save: bool):
    """Save or load AdamW's moments, each rank its share. Raises UserError."""
    from torch.distributed import checkpoint as dcp
    tensors = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        state = optimizer.state[p]
        if not state:
            state |= {key: torch.zeros_like(p) for key in MOMENTS}
        state.setdefault("step", torch.zeros((), device=p.device))
        state["step"].fill_(step)
        for key in sorted(state.keys() - {"step"}):
            tensors[f"{name}.{key}"] = state[key]
    file_of = {name: 1 + i // 18 for i, name in enumerate(tensors)}   # small ones: each is copied
    common = dict(state_dict=tensors, no_dist=dist.strategy == "none")
    try:
        with warnings.catch_warnings(action="ignore"):       # about a process that is alone
            if save:
                writer = dcp.HuggingFaceStorageWriter(str(folder), file_of, save_distributed=True)
                dcp.save(storage_writer=writer, **common)
            else:
                dcp.load(storage_reader=dcp.HuggingFaceStorageReader(str(folder)), **common)
    except dcp.CheckpointException as found:          # it is a BaseException
        error, _ = next(iter(found.failures.values()))
        raise UserError(f"{folder}: {type(error).__name__}: {error}") from None
