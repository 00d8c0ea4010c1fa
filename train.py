"""Train: plain next-token prediction, or Quiet-STaR on top of a checkpoint. One loop for both.

    python train.py --objective=plain --data=data/shell_game/with_reasoning --dim=128 --out=out/base
    python train.py --init_from=out/base --data=data/shell_game/without_reasoning --out=out/quiet
    torchrun --nproc_per_node=8 train.py --init_from=Mistral-7B-v0.1 ...
    python train.py --init_from=resume --out=out/quiet

Two lines of tildes in `main` enclose the only lines that learn. Random numbers are keyed by (seed,
purpose, step, row), so a resumed run, or any cut into ranks and micro-batches, sees the same text
and samples the same thoughts. --dtype=bfloat16 is that of matrix products: weights and optimizer
stay fp32 unless --weights and --moments say otherwise (tools/compact_adamw.py). Left out on
purpose: a trainer class, callbacks, fp16.
"""
import math
import signal
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import checkpoint
import config
import distributed
from config import UserError
from data import RNG_THOUGHTS, RNG_WEIGHTS, Batches, TokenFile, seed_of
from formats.lora import add_adapter
from model import Mistral, ModelConfig
from scoring import check_context, evaluate_held_out, load_task
from thoughts import PlainObjective, QuietSTaR, ThoughtConfig, base_model, denominators
from tokenizer import dash_id, load_tokenizer
from tools.compact_adamw import CompactAdamW
from tools.one_pass import MANY, use_one_pass
from tools.run_log import RunLog


@dataclass(frozen=True)
class TrainConfig:
    """The defaults are those of the official code for Mistral-7B."""
    out: str = ""                     # folder for checkpoints and log.jsonl
    data: str = ""                    # folder of token files that data.py wrote
    init_from: str = "scratch"        # scratch, resume, or a folder with a checkpoint
    objective: Literal["quiet", "plain"] = "quiet"  # Quiet-STaR, or plain next-token prediction
    steps: int = 100                  # optimizer steps in all (paper: 100)
    batch_size: int = 8               # texts per step, over all ranks and micro-batches (paper: 8)
    grad_accum: int = 1               # micro-batches per step and rank
    seq_len: int = 256                # tokens per text (paper: 256)
    crops: Literal["document", "stream"] = "document"  # one window of a document, or of all text
    lr: float = 1e-6                  # peak learning rate (paper: 1e-6)
    min_lr: float | None = None       # cosine decay to this at the last step; default: constant lr
    warmup: int = 20                  # steps of linear warm-up (official code: 20)
    marker_lr: float = 100.0          # markers' learning rate, times lr (official code's effect)
    mixing_lr: float = 1.0            # mixing head's learning rate, times lr
    weight_decay: float = 0.001       # AdamW weight decay of matrices (official code: 0.001)
    beta2: float = 0.999              # AdamW decay rate of the second moment
    grad_clip: float = 1.0            # largest norm of the whole gradient (official code: 1)
    positions: Literal["all", "random", "uncertain", "gate"] = "all"  # that think
    think_share: float = 1.0          # share of the positions, if they are not all
    gate: str = ""                    # file that tools.gate wrote, for --positions=gate
    lora: int = 0                     # rank of adapters that learn instead of the weights; 0: none
    recompute: int = 0                # activation checkpointing of every n-th block; 0 none, 1 all
    dtype: Literal["float32", "bfloat16"] = "float32"  # type of the matrix products
    weights: Literal["fp32", "bf16"] = "fp32"  # type of the blocks' matrices, rounded at random
    moments: Literal["fp32", "bf16", "8bit"] = "fp32"  # type of AdamW's moments of matrices
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU if there is one
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"  # auto: ddp for several processes
    eval_every: int = 50              # steps between evaluations on held-out text; 0: never
    eval_texts: int = 64              # held-out texts at each evaluation
    eval_task: str = "none"           # task whose answers are scored (shell_game), not all tokens
    save_every: int = 50              # steps between checkpoints; one more at the end
    seed: int = 0                     # seed of weights, batches and thoughts

    def __post_init__(self):
        config.check_ranges(self, batch_size=(1, 1 << 20), grad_accum=1, seq_len=2, lr=(1e-12, 1),
                            marker_lr=(0, 1e6), mixing_lr=(0, 1e6), weight_decay=(0, 1),
                            beta2=(0, 0.999999), grad_clip=1e-6, think_share=(1e-6, 1),
                            lora=(0, 1024), eval_texts=1, save_every=1)
        if self.positions == "all" and self.think_share < 1:
            raise UserError(f"--think_share={self.think_share} of which positions? Choose "
                            "--positions=random, uncertain or gate")
        if (self.positions == "gate") != bool(self.gate):
            raise UserError("--positions=gate needs --gate=FILE (tools/gate.py), and others none")
        if self.weights == "bf16" and self.dtype == "float32":
            raise UserError("--weights=bf16 needs products of that type: add --dtype=bfloat16")
        if not self.out or not self.data:
            raise UserError("--out=FOLDER and --data=FOLDER are needed (data.py makes the data)")

    @property
    def n_positions(self) -> int:
        """The number of positions of a text that think."""
        return math.ceil(self.think_share * (self.seq_len - 1))


CHOSEN = "uncertain", "gate"          # positions that the model chooses
MAY_CHANGE = {                        # of a run that is resumed: how long, how often, and where
    "data", "steps", "min_lr", "eval_every", "eval_texts", "eval_task", "save_every", "out",
    "device", "parallel", "grad_accum", "recompute"}


def build_model(cfg: TrainConfig, model_cfg, thought_cfg, tokenizer, resumed):
    """The model to train: from scratch, from a checkpoint, or the one to resume."""
    generator = torch.Generator().manual_seed(seed_of(cfg.seed, RNG_WEIGHTS))
    if cfg.init_from == "scratch" and not resumed:
        if "--vocab_size" not in config.options_on_command_line():
            model_cfg = replace(model_cfg, vocab_size=tokenizer.vocab_size)
        model = Mistral(model_cfg).init_weights(generator)
        if cfg.lora:
            raise UserError(f"--lora={cfg.lora} freezes the weights: name them with --init_from")
    else:
        folder = resumed or checkpoint.find_checkpoint(cfg.init_from)
        model = checkpoint.load_model(folder, dtype=None, thought_config=thought_cfg)
    base = base_model(model)
    checkpoint.check_tokenizer(resumed or cfg.init_from, base.config, tokenizer)
    if cfg.objective == "plain":
        model = base
    elif not isinstance(model, QuietSTaR):
        model = checkpoint.add_thoughts(base, thought_cfg, dash_id(tokenizer), generator)
    found = base.adapter.rank if base.adapter else 0
    if found and found != cfg.lora:
        raise UserError(f"{cfg.init_from} is an adapter of rank {found}: add --lora={found}, or "
                        "merge it first (checkpoint.py --convert)")
    if cfg.lora and not found:
        add_adapter(base, checkpoint.as_base(folder, cfg.lora), generator)
    return model


def load_probe(file, dim: int):
    """The probe of a gate that tools/gate.py wrote; its threshold does not matter here."""
    probe_D = torch.tensor(config.read_json(file, {"probe": [float]})["probe"])
    if len(probe_D) != dim:
        raise UserError(f"{file} is a gate of width {len(probe_D)}, the model's is {dim}: fit one "
                        "to this model (tools/gate.py)")
    return probe_D


def build_optimizer(model, cfg: TrainConfig):
    """AdamW in four groups; `scale` is how many times `lr` a group takes."""
    groups = {
        "decay": dict(params=[], scale=1.0, weight_decay=cfg.weight_decay),
        "no_decay": dict(params=[], scale=1.0, weight_decay=0.0),
        "markers": dict(params=[], scale=cfg.marker_lr, weight_decay=0.0),
        "mixing_head": dict(params=[], scale=cfg.mixing_lr, weight_decay=cfg.weight_decay)}
    # vectors are not decayed; markers and mixing head are new and learn at rates of their own
    for name, p in model.named_parameters():
        if not p.requires_grad:                          # frozen beside adapters
            continue
        kind = "decay" if p.dim() > 1 else "no_decay"
        if name.endswith("_thought"):
            kind = "markers"
        if "mixing_head" in name:
            kind = "mixing_head"
        groups[kind]["params"].append(p)
    used = [dict(group, name=name) for name, group in groups.items() if group["params"]]
    common = dict(lr=cfg.lr, betas=(0.9, cfg.beta2))
    if cfg.weights == cfg.moments == "fp32":
        return torch.optim.AdamW(used, fused=True, **common)
    return CompactAdamW(used, seed=cfg.seed, moments=cfg.moments, **common)


def lr_at(step, cfg: TrainConfig):
    """Linear warm-up, then constant, or along a cosine that reaches min_lr at the last step."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    min_lr = cfg.lr if cfg.min_lr is None else cfg.min_lr
    done = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return min_lr + (cfg.lr - min_lr) * (1 + math.cos(math.pi * done)) / 2


def thought_randoms(cfg: TrainConfig, thought_cfg: ThoughtConfig, step: int, rows):
    """Random numbers for the thoughts of each text: `uniform_BNPT` decides the sampled tokens, and
    `position_BP`, if it is random, which positions think."""
    shape = (thought_cfg.n_thoughts, cfg.n_positions, thought_cfg.thought_len)
    randoms = {"uniform_BNPT": []}
    for row in rows:
        rng = np.random.default_rng([cfg.seed, RNG_THOUGHTS, step, row])
        randoms["uniform_BNPT"].append(rng.random(shape, dtype=np.float32))
        if cfg.positions == "random" and cfg.n_positions < cfg.seq_len - 1:
            chosen = rng.permutation(cfg.seq_len - 1)[:cfg.n_positions]
            randoms.setdefault("position_BP", []).append(np.sort(chosen))
    return {name: torch.from_numpy(np.stack(values)) for name, values in randoms.items()}


@config.file_errors()
def configure():
    """Read the configs, with a checkpoint's as defaults, and the state to resume, or None."""
    kinds = (TrainConfig, ModelConfig, ThoughtConfig)
    first, *_ = config.parse(*kinds, defaults={"out": "-", "data": "-"})
    has_run = bool(checkpoint.checkpoints_of(Path(first.out)))
    resumes = first.init_from == "resume" or (distributed.restarts_enabled() and has_run)
    if resumes and not has_run:
        raise UserError(f"nothing to resume in --out={first.out}: it holds no checkpoint")
    if has_run and not resumes:
        raise UserError(f"{first.out} already holds a run: --init_from=resume goes on with it, "
                        "another --out starts anew")
    # what the checkpoint says is the default
    state, stored = None, {}
    if resumes:
        state = checkpoint.read_state(checkpoint.find_checkpoint(first.out))
        stored = state["settings"]
        unknown = stored.keys() - {field.name for kind in kinds for field in fields(kind)}
        if unknown:
            raise UserError(f"{first.out} is a run of another version (--{min(unknown)}): start "
                            "anew from its weights, with --init_from")
    elif first.init_from != "scratch":
        shape, settings = checkpoint.read_config(checkpoint.find_checkpoint(first.init_from))
        stored = asdict(shape) | (asdict(settings) if settings else {})
    cfg, model_cfg, thought_cfg = config.parse(*kinds, defaults=stored)
    if resumes and cfg.init_from == "resume":
        cfg = replace(cfg, init_from=stored.get("init_from", "scratch"))
    if cfg.min_lr is not None and cfg.min_lr > cfg.lr:
        raise UserError(f"--min_lr={cfg.min_lr} is above --lr={cfg.lr}")
    if thought_cfg.advantage == "leave_one_out" and thought_cfg.n_thoughts < 2:
        raise UserError("--advantage=leave_one_out compares thoughts: raise --n_thoughts")
    # its architecture cannot be changed, and of a run nothing that would make it another
    fixed = asdict(model_cfg)
    if resumes:
        fixed |= asdict(cfg) | asdict(thought_cfg)
    for name in sorted(fixed.keys() - MAY_CHANGE):
        if fixed[name] != stored.get(name, fixed[name]):
            raise UserError(f"--{name}={fixed[name]}, but the checkpoint has {stored[name]}: leave "
                            "it out, or begin another run (--init_from=FOLDER, --out)")
    return cfg, model_cfg, thought_cfg, state


def main():
    # setup
    cfg, model_cfg, thought_cfg, state = configure()
    out = Path(cfg.out)
    signals = []                # Ctrl-C is only recorded; the loop looks between two steps
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: signals.append(received))
    dist = distributed.init_distributed(cfg.device, cfg.parallel)
    rows = distributed.micro_batches_of_rank(dist, cfg.batch_size, cfg.grad_accum)

    # data
    tokenizer = load_tokenizer(cfg.data)
    train_file = TokenFile(cfg.data, "train")
    batches = Batches(train_file, cfg.seq_len, cfg.crops, cfg.seed)
    if state and state.get("data", train_file.sha256) != train_file.sha256:
        raise UserError(f"--data={cfg.data} holds other text than this run has learnt from: name "
                        "the folder of that text, or begin another run")
    val_file = TokenFile(cfg.data, "val") if cfg.eval_every else None
    task = load_task(cfg.eval_task)

    # model
    resumed = checkpoint.find_checkpoint(cfg.out) if state else None
    model = build_model(cfg, model_cfg, thought_cfg, tokenizer, resumed)
    base_model(model).recompute = cfg.recompute
    is_quiet = isinstance(model, QuietSTaR)
    check_context(model, cfg.seq_len, thought_cfg.n_true if is_quiet else None)
    settings = asdict(cfg) | asdict(base_model(model).config) | asdict(thought_cfg)
    step = state["step"] if state else 0
    facts = {"step": step, "tokenizer": tokenizer.sha256}
    facts |= {f"--{name}": value for name, value in settings.items()}
    distributed.check_same_on_all_ranks(facts, dist)
    # one pass: faster for many thoughts, wrong where a block runs twice; fsdp would exchange each
    n_thoughts = len(rows[0]) * cfg.n_positions * thought_cfg.n_thoughts
    if is_quiet and n_thoughts >= MANY and not cfg.recompute and dist.strategy != "fsdp":
        use_one_pass(model)
    objective = model if is_quiet else PlainObjective(model)
    dtype = getattr(torch, cfg.dtype)
    wrapped = distributed.parallelize(objective, dist, dtype, cfg.weights == "bf16")

    probe_D = None
    if cfg.gate:                      # a resumed run goes on with its copy
        file = out / "gate.json" if resumed else cfg.gate
        probe_D = load_probe(file, base_model(model).config.dim)

    # optimizer
    optimizer = build_optimizer(model, cfg)

    # resume
    if resumed:
        checkpoint.load_optimizer(resumed, state, model, optimizer, dist)
        if dist.is_main:
            config.say(f"going on from {resumed}")
    log = RunLog(out, step, dist.is_main)
    if cfg.gate and dist.is_main and not resumed:
        config.write_text(out / "gate.json", config.read_text(cfg.gate))
    saved_at = step if state else -1
    autocast = torch.autocast(dist.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    # loop
    while True:
        # evaluate (all ranks compute, rank 0 writes)
        if cfg.eval_every and (step % cfg.eval_every == 0 or step >= cfg.steps):
            with autocast:
                scores = distributed.unsharded(objective, dist, lambda: evaluate_held_out(
                    model, val_file, tokenizer, cfg.eval_texts, cfg.seq_len, task))
            values = {f"eval/{name}": value for name, value in scores.items()}
            log.row(step, cfg.steps, values, always=True)

        # save (each rank its share, rank 0 the rest); a signal to any rank stops all
        n_signals = torch.tensor(len(signals), device=dist.device)
        stopped = int(distributed.all_reduce_sum(n_signals)) > 0
        finished = stopped or step >= cfg.steps
        if step > saved_at and (finished or (step and step % cfg.save_every == 0)):
            checkpoint.save_run(out, step, model, optimizer, settings, tokenizer, dist,
                                data=train_file.sha256)
            saved_at = step
        if finished:
            break

        # step: the texts of this rank, their random numbers, and the denominators of all ranks
        started = time.perf_counter()
        texts = [batches.batch(step, r) for r in rows]
        counts = sum(denominators(valid_BL, thought_cfg, cfg.n_positions) for _, valid_BL in texts)
        counts = distributed.all_reduce_sum(counts.to(dist.device))
        lr = lr_at(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        sums = {}
        # ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
        for i, (ids_BL, valid_BL) in enumerate(texts):
            inputs = thought_randoms(cfg, thought_cfg, step, rows[i]) if is_quiet else {}
            inputs |= dict(ids_BL=ids_BL, valid_BL=valid_BL, counts=counts)
            inputs = {name: tensor.to(dist.device) for name, tensor in inputs.items()}
            if is_quiet and cfg.positions in CHOSEN and cfg.n_positions < cfg.seq_len - 1:
                inputs |= dict(n_chosen=cfg.n_positions, probe_D=probe_D)
            # gradients are exchanged once a step, after the last micro-batch
            distributed.set_gradient_sync(wrapped, dist, i == len(texts) - 1)
            with autocast:
                losses = wrapped(**inputs)
            (losses.loss * dist.world_size).backward()  # undo the mean over ranks: counts hold it
            for name, value in losses.metrics().items():
                sums[name] = sums.get(name, 0) + value.double()
        norm = distributed.clip_gradients(objective, cfg.grad_clip)
        sums["grad_norm"] = norm.double() / dist.world_size      # the same on all ranks
        totals = distributed.all_reduce_sum(torch.stack(list(sums.values())))
        values = dict(zip(sums, totals.tolist()))
        if not math.isfinite(values["loss"] + values["grad_norm"]):
            raise UserError(f"loss is {values['loss']} at step {step}, norm {values['grad_norm']}: "
                            f"not learnt from; last checkpoint: {checkpoint.pointed(out)}")
        optimizer.step()
        optimizer.zero_grad()
        # ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

        # log (rank 0)
        step += 1
        seconds = time.perf_counter() - started
        values |= {"lr": lr, "tokens/s": cfg.batch_size * cfg.seq_len / seconds}
        log.row(step, cfg.steps, values)

    # finish; ddp's wrapper is deleted before its process group, or its end can wait for ever
    del wrapped
    distributed.cleanup()
    if dist.is_main:
        resume = f"stopped by a signal at step {step}: go on with --init_from=resume; saved"
        config.say(f"{resume if stopped else 'done:'} {checkpoint.find_checkpoint(cfg.out)}")


if __name__ == "__main__":
    config.run(main)
