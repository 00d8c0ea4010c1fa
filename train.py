"""Train: plain next-token prediction, or Quiet-STaR on top of a checkpoint. One loop for both.

    python train.py --objective=plain --data=data/shell_game/aloud --dim=128 ... --out=out/base
    python train.py --init_from=out/base --data=data/shell_game/silent --out=out/quiet
    torchrun --nproc_per_node=8 train.py --init_from=Mistral-7B-v0.1 ...
    python train.py --init_from=resume --out=out/quiet

`main` is the whole story in the order of time; the two lines of tildes fence the only lines that
learn. Complete commands are in runs/. Every random number comes from a generator keyed by
(seed, purpose, step, row), so a resumed run, another number of ranks, or another cut into
micro-batches sees the same text and draws the same thoughts; there is no random state to save.

Left out on purpose: a trainer class, callbacks, fp16 and loss scaling. With --dtype=bfloat16 the
matrix products are bf16; weights and optimizer state stay fp32, as at lr 1e-6 they must.

Read next: sample.py, eval.py
"""
import json
import math
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import checkpoint
import config
import data
import eval as evaluation
import distributed as parallel
import tokenizer as tokenizers
import weights
from config import UserError
from formats.tensors import fingerprint
from model import Mistral, ModelConfig, NextToken
from thoughts import QuietSTaR, ThoughtConfig, denominators

RNG_THOUGHTS, RNG_WEIGHTS = 2, 3     # purposes of random numbers; data.Batches.PURPOSE is 1


@dataclass(frozen=True)
class TrainConfig:
    out: str = ""                     # folder for checkpoints and log.jsonl
    data: str = ""                    # folder that data.py wrote
    init_from: str = "scratch"        # scratch | resume | a folder with a checkpoint
    objective: str = "quiet"          # quiet | plain
    steps: int = 100                  # optimizer steps in all; the paper's
    batch_size: int = 8                    # texts per step, all ranks and micro-batches; the paper's
    grad_accum: int = 1               # micro-batches per step and rank
    seq_len: int = 256                 # tokens per text; the paper's
    crops: str = "document"           # document (one window of one document, as official) | stream
    lr: float = 1e-6                  # peak; the paper's
    min_lr: float | None = None       # cosine down to this at the last step; default: stay at lr
    warmup: int = 20                  # steps; the official code's
    marker_lr: float = 100.0          # times lr; the official code stores markers / 100
    mixing_lr: float = 1.0            # times lr
    weight_decay: float = 0.001       # of matrices; the official code's
    beta2: float = 0.999              # of AdamW
    grad_clip: float = 1.0                 # of the gradient's norm
    think_share: float = 1.0          # of the positions, drawn at random, that think at each step
    recompute: int = 0                # activation checkpointing of every n-th block; 0 none, 1 all
    compile: bool = False             # torch.compile the blocks; the first step takes minutes
    dtype: str = "float32"            # of the matrix products: float32 | bfloat16
    device: str = "auto"              # auto | cpu | cuda
    parallel: str = "auto"            # auto (ddp for several processes) | none | ddp | fsdp
    eval_every: int = 50              # steps; 0: never
    eval_texts: int = 64              # held-out texts at each evaluation
    save_every: int = 50              # steps; also at the end and when stopped
    seed: int = 0

    def __post_init__(self):
        for name, known in (("objective", ("quiet", "plain")), ("dtype", ("float32", "bfloat16")),
                            ("crops", ("document", "stream")),
                            ("parallel", ("auto", "none", "ddp", "fsdp"))):
            if getattr(self, name) not in known:
                raise UserError(f"--{name}={getattr(self, name)} is not one of {', '.join(known)}")
        config.check_at_least(self, batch_size=1, grad_accum=1, seq_len=2, steps=0, eval_every=0, eval_texts=1,
                        save_every=1, recompute=0, lr=0, seed=0)
        if not 0 < self.think_share <= 1:
            raise UserError(f"--think_share={self.think_share} is not above 0 and at most 1")
        if not self.out or not self.data:
            raise UserError("--out=FOLDER and --data=FOLDER are needed (data.py makes the data)")


def build_objective(cfg: TrainConfig, model_cfg: ModelConfig, thought_cfg: ThoughtConfig, tokenizer,
                    resumed: Path | None):
    """Scratch, a checkpoint, or the one to resume, as the objective to train. A checkpoint's
    weights are mapped as they are stored, from pages that all ranks of a machine share."""
    generator = torch.Generator().manual_seed(seed_of(cfg.seed, RNG_WEIGHTS))
    if resumed:
        try:
            model = weights.load(resumed, dtype=None, thought_config=thought_cfg)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(f"{error}{checkpoint.other(resumed)}") from None
    elif cfg.init_from == "scratch":
        model = Mistral(model_cfg).init_weights(generator)
    else:
        model = weights.load(weights.find_checkpoint(cfg.init_from), dtype=None,
                             thought_config=thought_cfg)
    base = model.model if isinstance(model, QuietSTaR) else model
    weights.check_tokenizer(resumed or cfg.init_from, base.config, tokenizer)
    if cfg.objective == "plain":
        return NextToken(base)
    if isinstance(model, QuietSTaR):
        return model
    return weights.add_thoughts(base, thought_cfg, tokenizers.dash_id(tokenizer), generator)


def build_optimizer(objective, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW in four groups; each remembers how many times `lr` it takes."""
    groups = {"decay": [], "no_decay": [], "markers": [], "mixing_head": []}
    for name, p in objective.named_parameters():
        kind = ("markers" if name.endswith("_thought") else "mixing_head" if "mixing_head" in name
                else "decay" if p.dim() > 1 else "no_decay")
        groups[kind].append(p)
    scale = {"markers": cfg.marker_lr, "mixing_head": cfg.mixing_lr}
    decay = {"decay": cfg.weight_decay, "mixing_head": cfg.weight_decay}
    return torch.optim.AdamW(
        [dict(params=params, name=name, scale=scale.get(name, 1.0),
              weight_decay=decay.get(name, 0.0)) for name, params in groups.items() if params],
        lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)


def lr_at(step: int, cfg: TrainConfig) -> float:
    """Linear warm-up, then constant, or along a cosine that reaches lr_end at the last step."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    min_lr = cfg.lr if cfg.min_lr is None else cfg.min_lr
    done = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return min_lr + (cfg.lr - min_lr) * (1 + math.cos(math.pi * done)) / 2


def seed_of(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def thought_draws(cfg: TrainConfig, thought_cfg: ThoughtConfig, step: int, rows) -> dict:
    """What chance decides of each row's thoughts, the same on any layout: where one thinks (if not
    everywhere), and the uniform numbers that choose the tokens."""
    n_positions, draws = math.ceil(cfg.think_share * (cfg.seq_len - 1)), {"uniform_BNPT": []}
    for row in rows:
        rng = np.random.default_rng([cfg.seed, RNG_THOUGHTS, step, row])
        shape = thought_cfg.n_thoughts, n_positions, thought_cfg.thought_len
        draws["uniform_BNPT"].append(rng.random(shape, dtype=np.float32))
        if cfg.think_share < 1:
            chosen = np.sort(rng.permutation(cfg.seq_len - 1)[:n_positions])
            draws.setdefault("position_BP", []).append(chosen)
    return {name: torch.from_numpy(np.stack(values)) for name, values in draws.items()}


# ------------------------------------------------------------------------------------ the setting

def configure() -> tuple[TrainConfig, ModelConfig, ThoughtConfig, dict | None]:
    """The command line; what it leaves out comes from the checkpoint it begins with, if any."""
    kinds = (TrainConfig, ModelConfig, ThoughtConfig)
    first, *_ = config.parse(*kinds, defaults={"out": "-", "data": "-"})
    resumes = first.init_from == "resume" or (
        parallel.restarts() and Path(first.out, "latest").is_file())
    if first.init_from == "scratch" and not resumes:
        return *config.parse(*kinds), None
    if not resumes:
        shape, settings = weights.read_config(weights.find_checkpoint(first.init_from))
        fixed = [name for name in asdict(shape) if f"--{name}" in config.options_on_command_line()]
        if fixed:
            raise UserError(f"--{fixed[0]} is the checkpoint's to say: {first.init_from} has "
                             f"{asdict(shape)[fixed[0]]}; leave it out")
        return *config.parse(*kinds, defaults=asdict(settings) if settings else None), None
    if not Path(first.out, "latest").is_file():
        raise UserError(f"nothing to resume in --out={first.out}: it has no file 'latest'")
    folder = weights.find_checkpoint(first.out)
    state = checkpoint.read_state(folder)
    cfg, model_cfg, thought_cfg = config.parse(*kinds, defaults=state["settings"])
    for name, value in asdict(model_cfg).items():
        if value != state["settings"][name]:
            raise UserError(f"cannot resume: {name} is {state['settings'][name]} in {folder}, "
                             f"{value} on the command line")
    return cfg, model_cfg, thought_cfg, state


def facts(settings: dict, step: int, tokenizer, objective) -> dict[str, object]:
    """What must be the same on all ranks, under the name that an error gives it."""
    def here(folder, *patterns):
        return [(path.name, fingerprint(path))
                for pattern in patterns for path in sorted(Path(folder).glob(pattern))]
    return {"code": here(Path(__file__).parent, "*.py"), "torch": torch.__version__,
            "tokenizer": tokenizer.sha256, "step": step,
            "data": here(settings["data"], "*.bin", "*.npy", "meta.json"),
            "weights": [p.detach().flatten()[:64].tolist() for p in objective.parameters()],
            **{f"--{name}": value for name, value in settings.items()}}


# ---------------------------------------------------------------------------------------- the log

COLUMNS = (("loss", "loss", ".4f"), ("nll/base", "base", ".4f"), ("nll/mixed", "mixed", ".4f"),
           ("thought/reward", "reward", "+.4f"), ("thought/entropy", "entropy", ".3f"),
           ("thought/mixing_weight", "weight", "+.3f"), ("grad_norm", "norm", ".2f"),
           ("lr", "lr", ".1e"), ("tokens/s", "tok/s", ".0f"))


class Log:
    """log.jsonl, a row a step under stable names; the same on the screen about once a second."""
    def __init__(self, out: Path, step: int, writes: bool):
        self.path, self.writes, self.printed = out / "log.jsonl", writes, 0.0
        if writes:
            out.mkdir(parents=True, exist_ok=True)
        if writes and self.path.is_file():            # drop what the checkpoint does not know of
            lines = self.path.read_text().splitlines()
            rows = [json.loads(line) for line in lines if line.endswith("}")]
            kept = [row for row in rows if row["step"] < step + ("loss" in row)]
            text = "".join(json.dumps(row) + "\n" for row in kept)
            weights.atomic_write(self.path, lambda path: path.write_text(text))

    def row(self, step: int, steps: int, values: dict[str, float], always: bool = False):
        if not self.writes:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if always or time.monotonic() > self.printed + 1:
            self.printed = time.monotonic()
            shown = [f"{head} {values[name]:{form}}" for name, head, form in COLUMNS
                     if name in values]
            shown += [f"{name} {value:.4f}" for name, value in values.items()
                      if name.startswith("eval/")]
            print(f"step {step}/{steps}  " + "  ".join(shown), flush=True)


def listen_for_signals() -> list[int]:
    """SIGTERM and Ctrl-C only leave a note here; the loop reads it between two steps."""
    notes: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: notes.append(received))
    return notes


def check_finite(values: dict[str, float], step: int, out: Path):
    if not all(math.isfinite(values[name]) for name in ("loss", "grad_norm")):
        pointer = out / "latest"
        good = out / pointer.read_text().strip() if pointer.is_file() else "none yet"
        norm = values["grad_norm"]
        raise UserError(f"loss is {values['loss']} at step {step} (grad norm {norm}); nothing was "
                         f"learnt from it; last good checkpoint: {good}")


# ---------------------------------------------------------------------------------------- the story

def main():
    # setup
    cfg, model_cfg, thought_cfg, state = configure()
    place, out = parallel.join(cfg.device, cfg.parallel), Path(cfg.out)
    signals = listen_for_signals()
    rows = parallel.rows_of(place, cfg.batch_size, cfg.grad_accum)
    if state is None and (out / "latest").is_file():
        raise UserError(f"{out} already holds a run: --init_from=resume goes on with it, "
                         f"another --out starts anew")

    # data
    tokenizer = tokenizers.load(cfg.data)
    train_file, val_file = data.TokenFile(cfg.data, "train"), data.TokenFile(cfg.data, "val")
    crops = data.Batches(train_file, cfg.seq_len, cfg.crops, cfg.seed)

    # model
    if state is None and cfg.init_from == "scratch" and "--vocab_size" not in config.options_on_command_line():
        model_cfg = replace(model_cfg, vocab_size=tokenizer.vocab_size)
    resumed = None if state is None else weights.find_checkpoint(cfg.out)
    objective = build_objective(cfg, model_cfg, thought_cfg, tokenizer, resumed)
    objective.model.recompute = cfg.recompute
    if cfg.compile:
        objective.model.compile_blocks()
    settings = asdict(cfg) | asdict(objective.model.config) | asdict(thought_cfg)
    branch = (thought_cfg.thought_len + thought_cfg.n_true + 1) * (cfg.objective == "quiet")
    if cfg.seq_len + branch > objective.model.config.max_seq_len:
        raise UserError(f"--seq_len={cfg.seq_len} and {branch} for a thought and what it is graded "
                         f"on exceed the context of {objective.model.config.max_seq_len}")
    step = state["step"] if state else 0
    parallel.agree(facts(settings, step, tokenizer, objective), place)
    dtype = getattr(torch, cfg.dtype)
    parallel_objective = parallel.spread(objective, place, dtype)

    # optimizer
    optimizer = build_optimizer(objective, cfg)

    # resume
    if resumed:
        checkpoint.load_optimizer(resumed, state, objective, optimizer, place)
        if place.writes:
            print(f"going on from {resumed}", flush=True)
    log = Log(out, step, place.writes)
    amp = torch.autocast(place.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    n_positions = math.ceil(cfg.think_share * (cfg.seq_len - 1))
    saved_at, is_quiet = step if state else -1, isinstance(objective, QuietSTaR)

    # loop
    while True:
        # evaluate (all ranks compute, rank 0 writes)
        if cfg.eval_every and (step % cfg.eval_every == 0 or step >= cfg.steps):
            with amp:
                scores = parallel.gathered(objective, place, lambda: evaluation.held_out(
                    objective, val_file, tokenizer, cfg.eval_texts, cfg.seq_len))
            log.row(step, cfg.steps, {f"eval/{name}": scores[name] for name in scores}, always=True)

        # save (each rank its share, rank 0 the rest)
        asked = parallel.total(torch.tensor(len(signals), device=place.device))    # of any rank
        stopping = asked > 0 or step >= cfg.steps
        if step > saved_at and (stopping or (step and step % cfg.save_every == 0)):
            checkpoint.save(out, step, objective, optimizer, settings, tokenizer, place)
            saved_at = step
        if stopping:
            break

        # step
        started = time.perf_counter()
        texts = [crops.batch(step, r) for r in rows]
        draws = [thought_draws(cfg, thought_cfg, step, r) if is_quiet else {} for r in rows]
        terms = sum(denominators(valid_BL, thought_cfg, n_positions) for _, valid_BL in texts)
        terms = parallel.total(terms.to(place.device))
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, cfg) * group["scale"]
        sums: dict[str, torch.Tensor] = {}
        # ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
        for i, ((ids_BL, valid_BL), draw) in enumerate(zip(texts, draws)):
            last, draw = i == len(rows) - 1, {name: t.to(place.device) for name, t in draw.items()}
            parallel.meet(parallel_objective, place, last)
            with amp:
                outcome = parallel_objective(ids_BL.to(place.device), valid_BL.to(place.device),
                                             terms=terms, **draw)
            (outcome.loss * place.world).backward()     # ddp and fsdp average over ranks; we sum
            for name, value in outcome.metrics().items():
                sums[name] = sums.get(name, 0) + value
        norm = parallel.clip(objective, cfg.grad_clip)
        sums["grad_norm"] = norm / place.world                  # the same on all ranks
        values = {name: value.item() for name, value in zip(sums, parallel.total(torch.stack(
            [value.double() for value in sums.values()])))}
        check_finite(values, step, out)
        optimizer.step()
        optimizer.zero_grad()
        # ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

        # log (rank 0)
        step, seconds = step + 1, time.perf_counter() - started
        log.row(step, cfg.steps, {**values, "lr": lr_at(step - 1, cfg),
                                  "tokens/s": cfg.batch_size * cfg.seq_len / seconds})

    # finish
    del parallel_objective            # ddp's end, after the process group's, can wait for ever
    parallel.leave()
    if place.writes:
        folder = weights.find_checkpoint(cfg.out)
        print(f"stopped by a signal at step {step}: saved {folder}, go on with --init_from=resume"
              if asked > 0 else f"done: {folder}", flush=True)


if __name__ == "__main__":
    config.run(main)
