"""Several processes as torchrun would start them, for the price of one import of torch.

    python tests/ranks.py < jobs.json

Each job is {"ranks": one list of words for each rank}; the words are a function below, then its
arguments. "kill": [rank, path, seconds] kills a rank that long after the path is made (anew). Jobs
run one after another; on standard output: each job's exit statuses and output.
"""
import hashlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
import torch.distributed
import torch.distributed.checkpoint  # noqa: F401  once for all ranks
import torch.distributed.fsdp  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import checkpoint  # noqa: E402
import config  # noqa: E402
import distributed  # noqa: E402
import toys  # noqa: E402
import train as training  # noqa: E402
from thoughts import PlainObjective, denominators  # noqa: E402
from tools.compact_adamw import CompactAdamW  # noqa: E402


def train(*argv):
    sys.argv = ["train.py", *argv]
    config.run(training.main)


def elastic(*argv):
    os.environ["TORCHELASTIC_MAX_RESTARTS"] = "1"
    train(*argv)


def train_with_files_below(n_bytes, *argv):
    """As on a full disk: nothing can be written beyond that."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(n_bytes), int(n_bytes)))
    train(*argv)


def train_with_moments_below(n_bytes, *argv):
    """As on a disk that is full once the weights are on it."""
    transfer = checkpoint.transfer_moments

    def transfer_to_a_full_disk(*args, save):
        whole = resource.getrlimit(resource.RLIMIT_FSIZE)
        if save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(n_bytes), whole[1]))
        try:
            transfer(*args, save=save)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, whole)
    checkpoint.transfer_moments = transfer_to_a_full_disk
    train(*argv)


class Exchanges(TorchDispatchMode):
    """How often ranks exchanged what."""
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def step(strategy, grad_accum, objective, tied, recompute):
    """One training step on this rank's share of 4 texts; what was sampled, learnt and exchanged."""
    quiet = toys.tiny_quiet(model=dict(tied=tied == "tied"))
    quiet.model.recompute = int(recompute == "recompute")
    own = quiet if objective == "quiet" else PlainObjective(quiet.model)
    dist = distributed.init_distributed("cpu", strategy)
    wrapped, comm, thoughts = distributed.parallelize(own, dist), Exchanges(), []
    ids_BL, uniform_BNPT = toys.texts(4, 8), toys.uniforms(4, 2, 7, 3)
    micro_batches = distributed.micro_batches_of_rank(dist, 4, int(grad_accum))
    with comm:
        for i, rows in enumerate(micro_batches):
            distributed.set_gradient_sync(wrapped, dist, i == len(micro_batches) - 1)
            valid_BL = torch.ones(len(rows), 8, dtype=torch.bool)
            more = dict(uniform_BNPT=uniform_BNPT[rows]) if objective == "quiet" else {}
            counts = denominators(valid_BL, quiet.config) * 4 / len(rows)
            losses = wrapped(ids_BL[rows], valid_BL, counts=counts, **more)
            (losses.loss * dist.world_size).backward()
            thoughts += losses.thought_BNPT.tolist() if objective == "quiet" else []
    norm = distributed.clip_gradients(own, 1e9).item()
    predicted = distributed.unsharded(own, dist, lambda: quiet.predict(ids_BL)[1].sum().item())
    whole = distributed.full_tensors(dict(own.named_parameters()), dist)
    del wrapped
    distributed.cleanup()
    print(json.dumps(dict(thoughts=thoughts, counts=dict(comm.counts), norm=norm,
                          predicted=predicted, n_whole=len(whole))))


def update(strategy, moments):
    """Three steps of CompactAdamW on given gradients: a hash of all weights after them."""
    quiet, dist = toys.tiny_quiet(), distributed.init_distributed("cpu", strategy)
    wrapped = distributed.parallelize(quiet, dist, torch.bfloat16, bf16_weights=True)
    adamw = CompactAdamW([dict(params=[*quiet.parameters()])], 1e-3, (0.9, 0.999), 0, moments)
    generator, digest = torch.Generator().manual_seed(0), hashlib.sha256()
    for _ in range(3):
        for p in quiet.parameters():
            p.grad = torch.zeros_like(p)
            whole = torch.randn(p.shape, generator=generator)
            (p.grad.to_local() if strategy == "fsdp" else p.grad).copy_(
                distributed.shard_like(whole, p))
        adamw.step()
    for tensor in distributed.full_tensors(dict(quiet.named_parameters()), dist).values():
        digest.update(tensor.float().numpy().tobytes())
    del wrapped
    distributed.cleanup()
    print(json.dumps(dict(sha256=digest.hexdigest())))


def start(words: list[str], rank: int, world: int, port: int, file) -> int:
    """The process id of one rank, whose output goes to `file`."""
    pid = os.fork()
    if pid:
        return pid
    for number in (1, 2):
        os.dup2(file.fileno(), number)
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_PORT=port)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True",
                   **{name: str(value) for name, value in place.items()}}
    status = 0
    try:
        globals()[words[0]](*words[1:])
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


def wait(pids: list[int], patience: float = 20) -> list[int]:
    """Exit statuses; `patience` seconds after the first has failed the others are killed."""
    status, until = {}, float("inf")
    while len(status) < len(pids):
        for pid in set(pids) - set(status):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                status[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                until = min(until, time.monotonic() + patience) if status[pid] else until
            elif time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [status[pid] for pid in pids]


def made(path: str) -> int:
    """Which of the things that have been at this path is there now; 0 for none."""
    try:
        return os.stat(path).st_ctime_ns
    except FileNotFoundError:
        return 0


def run(ranks: list[list[str]], kill=None) -> dict:
    before = made(kill[1]) if kill else 0
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    files = [tempfile.TemporaryFile() for _ in ranks]
    pids = [start(words, rank, len(ranks), store.port, file)
            for rank, (words, file) in enumerate(zip(ranks, files))]
    if kill:
        rank, path, seconds = kill
        while made(path) in (0, before) and not os.waitid(
                os.P_PID, pids[rank], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.0005)
        time.sleep(seconds)
        os.kill(pids[rank], signal.SIGKILL)
    status = wait(pids)
    for file in files:
        file.seek(0)
    return dict(status=status, output=[file.read().decode() for file in files])


if __name__ == "__main__":
    print(json.dumps([run(**job) for job in json.load(sys.stdin)]))
