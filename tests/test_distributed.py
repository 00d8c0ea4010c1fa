"""Several processes learn what one learns, and nothing is lost when some of them die."""
import itertools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from checkpoint import find_checkpoint, load_model, save_model
from data import Batches, TokenFile
from test_train import assert_same_weights, rows, tensors
from tokenizer import load_tokenizer
from tools.one_pass import MANY
from toys import tiny_quiet

MODEL = ("--dim=16", "--n_layers=2", "--n_heads=2", "--n_kv_heads=1", "--ffn_dim=32",
         "--max_seq_len=128")
TOY = ("--thought_len=2", "--n_thoughts=2", "--n_true=2", "--policy_weight=1",
       "--policy_temperature=1", "--marker_lr=1", "--batch_size=4", "--seq_len=12", "--lr=2e-4",
       "--warmup=2", "--eval_texts=8", "--steps=5", "--save_every=3", "--eval_every=3")
FSDP = "--parallel=fsdp"
KILLS = int(os.environ.get("KILLS", 2))   # more of them: KILLS=20 pytest tests/test_distributed.py


def launch(*jobs: dict) -> list[dict]:
    """Each job's exit statuses and output by rank; see ranks.py."""
    done = subprocess.run([sys.executable, "tests/ranks.py"], input=json.dumps(jobs),
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ranks(world: int, *words, function: str = "train") -> dict:
    return {"ranks": [[function, *map(str, words)]] * world}


def only_line(job: dict) -> str:
    """The one line that all ranks together say when they end with status 2."""
    assert job["status"] == [2] * len(job["status"]), job
    (line,) = [line for output in job["output"] for line in output.splitlines()
               if not line.startswith("step ")]
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def layouts(game, tmp_path_factory):
    """One run in every layout: a folder for each."""
    out = tmp_path_factory.mktemp("layouts")
    start = (*MODEL, *TOY, f"--data={game}/without_reasoning")
    runs = dict(one=(1,), accumulated=(1, "--grad_accum=2"), ddp=(2,), fsdp=(2, FSDP),
                everything=(2, FSDP, "--grad_accum=2", "--recompute=1"),
                ddp_bf16=(2, "--dtype=bfloat16", "--recompute=1"),     # in two phases, as fsdp does
                fsdp_bf16=(2, FSDP, "--dtype=bfloat16"),
                one_unlearnt=(1, "--steps=0"), fsdp_unlearnt=(2, FSDP, "--steps=0"))
    done = launch(*(ranks(world, *start, *more, f"--out={out}/{name}")
                    for name, (world, *more) in runs.items()))
    assert all(set(job["status"]) == {0} for job in done), done
    return out


@pytest.mark.parametrize("layout", ["accumulated", "ddp", "fsdp", "everything"])
def test_every_layout_learns_what_one_process_learns(layouts, layout):
    ours, theirs = tensors(layouts / layout), tensors(layouts / "one")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() < 1e-5, name
    for mine, other in zip(rows(layouts / layout), rows(layouts / "one"), strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-5)


def test_two_ranks_that_sample_in_one_pass_learn_what_one_process_learns(game, tmp_path):
    options = (*MODEL, *TOY, f"--data={game}/without_reasoning", "--n_thoughts=20", "--eval_every=0")
    assert 2 * 11 * 20 >= MANY        # thoughts of each rank
    launch(*(ranks(world, *options, f"--out={tmp_path / str(world)}") for world in (1, 2)))
    one, two = tensors(tmp_path / "1"), tensors(tmp_path / "2")
    for name in one:
        assert (one[name] - two[name]).abs().max() < 1e-5, name


def test_rows_of_the_two_ranks_are_padded_unequally(game):
    """So that the layouts above would differ if a rank or a micro-batch took a mean of its own."""
    crops = Batches(TokenFile(game / "without_reasoning", "train"), 12, "document")
    counts = [[int(crops.batch(step, rows)[1].sum()) for rows in ([0, 1], [2, 3])]
              for step in range(5)]
    assert sum(first != second for first, second in counts) >= 3


def test_bfloat16_is_the_same_in_ddp_and_fsdp(layouts):
    ours, theirs = tensors(layouts / "fsdp_bf16"), tensors(layouts / "ddp_bf16")
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-6


def test_what_shards_save_is_what_one_process_saves_byte_for_byte(layouts, tmp_path):
    folders = [find_checkpoint(layouts / name) for name in ("one_unlearnt", "fsdp_unlearnt")]
    converted = [tmp_path / "one", tmp_path / "fsdp"]
    for folder, out in zip(folders, converted):
        save_model(load_model(folder, dtype=None), out, torch.bfloat16)
    for one, sharded in (folders, converted):
        (file,) = one.glob("*.safetensors")
        assert file.read_bytes() == (sharded / file.name).read_bytes()


@pytest.fixture(scope="module")
def steps():
    """One step in several layouts, under a counter of exchanges; each rank's report."""
    jobs = dict(none=(1, "none", 1, "quiet"), ddp=(2, "ddp", 2, "quiet"),
                fsdp=(2, "fsdp", 1, "quiet"), accumulated=(2, "fsdp", 2, "quiet", "", "recompute"),
                plain=(2, "fsdp", 2, "plain"), tied=(1, "none", 1, "quiet", "tied"),
                tied_fsdp=(2, "fsdp", 1, "quiet", "tied"))
    done = launch(*(ranks(world, *words, *[""] * (5 - len(words)), function="step")
                    for world, *words in jobs.values()))
    assert all(set(job["status"]) == {0} for job in done), done
    return {name: [json.loads(output) for output in job["output"]]
            for name, job in zip(jobs, done)}


@pytest.mark.parametrize("layout, alone", [("ddp", "none"), ("fsdp", "none"),
                                           ("accumulated", "none"), ("tied_fsdp", "tied")])
def test_a_text_is_given_the_same_thoughts_in_every_layout(steps, layout, alone):
    (one,), both = steps[alone], steps[layout]
    assert sum((report["thoughts"] for report in both), []) == one["thoughts"]
    for report in both:
        assert report["norm"] == pytest.approx(one["norm"], rel=1e-5)
        assert report["predicted"] == pytest.approx(one["predicted"], rel=1e-5)


@pytest.mark.parametrize("layout", ["fsdp", "accumulated", "plain", "tied_fsdp"])
def test_weights_are_gathered_once_a_step_whatever_is_sampled_or_accumulated(steps, layout):
    """Two blocks and the rest make three groups; there are four sampling passes a micro-batch."""
    for report in steps[layout]:
        assert report["counts"] == {"_allgather_base_": 3, "_reduce_scatter_base_": 3}


def test_ddp_exchanges_gradients_once_a_step(steps):
    assert [report["counts"] for report in steps["ddp"]] == [{"allreduce_": 1}] * 2


def test_only_rank_0_holds_the_whole_model_to_save_it(steps):
    assert [report["n_whole"] for report in steps["fsdp"]] == [28, 0]


def copy_at(run: Path, step: int, to: Path) -> Path:
    """The run as it was when it had just saved that step."""
    shutil.copytree(run, to)
    for folder in to.glob("step-*"):
        if folder.name != f"step-{step:06d}":
            shutil.rmtree(folder)
    (to / "latest").write_text(f"step-{step:06d}")
    return to


@pytest.mark.slow
def test_any_layout_goes_on_from_what_any_other_saved(layouts, tmp_path):
    ways = dict(one=(1,), ddp=(2, "--parallel=ddp"), fsdp=(2, FSDP))
    jobs = {f"{a}-{b}": ranks(world, "--init_from=resume", *more,
                              f"--out={copy_at(layouts / a, 3, tmp_path / f'{a}-{b}')}")
            for a in ("fsdp", "ddp") for b, (world, *more) in ways.items()}
    done = launch(*jobs.values())
    assert all(set(job["status"]) == {0} for job in done), done
    for name in jobs:
        whole = name.split("-")[0]
        if name == f"{whole}-{whole}":
            assert_same_weights(tmp_path / name, layouts / whole)
        for mine, other in zip(rows(tmp_path / name), rows(layouts / whole), strict=True):
            assert mine == pytest.approx(other, rel=1e-6, abs=1e-6)


def test_a_missing_share_is_refused_and_the_checkpoint_before_named(call, layouts, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(layouts / "fsdp", run)
    first, *_ = sorted((run / "step-000005" / "optimizer").iterdir())
    first.unlink()
    status, _, stderr = call(train, "--init_from=resume", f"--out={run}", "--parallel=auto")
    assert status == 2 and stderr.count("\n") == 1
    assert str(first) in stderr and str(run / "step-000003") in stderr


# -------------------------------------------------------------------------------- disagreements

def test_ranks_that_disagree_stop_at_once_and_say_on_what(game, tmp_path):
    shutil.copytree(game / "without_reasoning", tmp_path / "vocabulary")
    words = json.loads((game / "without_reasoning" / "words.json").read_text())
    words["words"] = words["words"][::-1]
    (tmp_path / "vocabulary" / "words.json").write_text(json.dumps(words))
    meta = json.loads((tmp_path / "vocabulary" / "meta.json").read_text())
    meta["tokenizer_sha256"] = hashlib.sha256(json.dumps(words).encode()).hexdigest()
    (tmp_path / "vocabulary" / "meta.json").write_text(json.dumps(meta))

    def pair(*words):
        both = [*MODEL, *TOY, f"--data={game}/without_reasoning", f"--out={tmp_path}/run"]
        return {"ranks": [["train", *both], ["train", *both, *map(str, words)]]}
    jobs = {"--lr": pair("--lr=1e-3"), "--dim": pair("--dim=32"),
            "tokenizer, --data": pair(f"--data={tmp_path}/vocabulary"),
            "--seed": pair("--seed=1")}
    for names, job in zip(jobs, launch(*jobs.values()), strict=True):
        line = only_line(job)
        assert "rank 1 is not like rank 0 in" in line
        assert all(name in line for name in names.split(", ")), line
    assert not (tmp_path / "run").exists()


def test_several_processes_without_a_layout_for_them_are_refused(game, tmp_path):
    argv = (*MODEL, *TOY, f"--data={game}/without_reasoning", f"--out={tmp_path}/run",
            "--parallel=none")
    (job,) = launch(ranks(2, *argv))
    assert job["status"] == [2, 2] and "torchrun started 2 processes" in job["output"][0]


# ------------------------------------------------------------------------------------- accidents

@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_a_full_disk_stops_the_save_in_one_line_and_leaves_the_former_checkpoint(
        game, layouts, tmp_path, layout):
    out = copy_at(layouts / layout, 3, tmp_path / "run")
    argv = "--init_from=resume", f"--parallel={layout}", f"--out={out}"
    weights, moments = "train_with_files_below", "train_with_moments_below"
    full = [{"ranks": [[weights, "5000", *argv], ["train", *argv]]},
            {"ranks": [[moments, "500", *argv], ["train", *argv]]},
            {"ranks": [["train", *argv], [moments, "500", *argv]]}]
    for n, job in enumerate(launch(*full)):
        line = only_line(job | {"output": [text.replace(f"going on from {out}/step-000003\n", "")
                                           for text in job["output"]]})
        assert f"cannot save to {out}" in line and f"{out}/step-000003" in line
        assert {path.name for path in out.iterdir()} == {"latest", "log.jsonl", "step-000003"}
    (job,) = launch(ranks(2, *argv))
    assert job["status"] == [0, 0]
    assert_same_weights(out, layouts / layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_killed_while_it_writes_checkpoints_a_run_goes_on_from_a_whole_one(game, tmp_path, layout):
    """One of two ranks, at random moments of the writing; the command stays the same."""
    rng, out = random.Random(0), tmp_path / "run"
    start = (*MODEL, *TOY, f"--data={game}/without_reasoning", f"--parallel={layout}",
             "--save_every=1", f"--steps={2 * KILLS}", "--eval_every=0")
    killed = [ranks(2, *start, f"--out={out}", function="elastic")
              | {"kill": [i % 2, f"{out}/draft", rng.uniform(0, 0.05)]} for i in range(KILLS)]
    done = launch(*killed, ranks(2, *start, f"--out={out}", function="elastic"),
                  ranks(2, *start, f"--out={tmp_path}/undisturbed"))
    assert sum(-signal.SIGKILL in job["status"] for job in done) == KILLS
    assert not any("error: " in output for job in done for output in job["output"])
    assert done[-1]["status"] == done[-2]["status"] == [0, 0], done
    assert_same_weights(out, tmp_path / "undisturbed")
    assert rows(out) == rows(tmp_path / "undisturbed")


def torchrun(*argv, restarts: int = 0) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            f"--max-restarts={restarts}", "train.py", *map(str, argv)]


def workers(agent: int) -> list[int]:
    """The process ids of what a torchrun has started."""
    found = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return [int(pid) for pid in found
            if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_torchrun_restarts_what_was_killed_and_the_run_ends_with_the_same_weights(game, tmp_path):
    rng, out = random.Random(0), tmp_path / "run"
    start = (*MODEL, *TOY, f"--data={game}/without_reasoning", FSDP, f"--steps={150 * KILLS}",
             "--save_every=10", "--eval_every=0")
    (whole,) = launch(ranks(2, *start, f"--out={tmp_path}/undisturbed"))
    assert whole["status"] == [0, 0], whole
    with open(tmp_path / "log", "w") as log:
        agent = subprocess.Popen(torchrun(*start, f"--out={out}", restarts=2 * KILLS), stdout=log,
                                 stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        kills = 0
        while agent.poll() is None and kills < KILLS:
            time.sleep(rng.uniform(0, 8) if (out / "latest").exists() else 0.1)
            both = workers(agent.pid) if (out / "latest").exists() else []
            if len(both) == 2:
                os.kill(rng.choice(both), signal.SIGKILL)
                kills += 1
        assert agent.wait(timeout=200) == 0, (tmp_path / "log").read_text()[-3000:]
    assert kills == KILLS and "going on from" in (tmp_path / "log").read_text()
    assert_same_weights(out, tmp_path / "undisturbed")
    assert rows(out) == rows(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_small_disk_that_is_full_leaves_the_former_checkpoint(call, game, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk]).returncode:
        pytest.skip("may not mount")
    try:
        start = *MODEL, *TOY, f"--data={game}/without_reasoning", f"--out={disk}/run"
        assert call(train, *start, "--steps=3")[0] == 0
        free = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(bytes(free - 40_000))
        argv = "--init_from=resume", f"--out={disk}/run", "--steps=5"
        status, _, stderr = call(train, *argv)
        assert status == 2 and stderr.count("\n") == 1
        assert "No space left on device" in stderr and "step-000003" in stderr
        assert {path.name for path in (disk / "run").iterdir()} == {"latest", "log.jsonl",
                                                                     "step-000003"}
        (disk / "ballast").unlink()
        assert call(train, *argv)[0] == 0
    finally:
        subprocess.run(["umount", disk])


HF = """#!/bin/sh
while [ "$1" != --local-dir ]; do shift; done
mkdir -p "$2" && cp -r "$FILES/$(basename "$2")/." "$2"
"""
TORCHRUN = f"""#!{sys.executable}
import os, sys
words = [word.replace("per_node=8", "per_node=2") for word in sys.argv[1:]]
words = [sys.executable, "-m", "torch.distributed.run", *words, "--steps=" + os.environ["STEPS"]]
os.execv(sys.executable, words)
"""


@pytest.mark.slow
def test_the_scripts_for_7b_run_as_typed_on_a_small_model_of_the_same_layout(game, tmp_path):
    """Downloads are played by a folder, and eight GPUs by two processes for a few steps."""
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet
    for path in Path().glob("*.py"):
        shutil.copy(path, tmp_path)
    for folder in ("runs", "tasks", "formats", "tools"):
        shutil.copytree(folder, tmp_path / folder)
    files, binaries, tokenizer = tmp_path / "files", tmp_path / "bin", load_tokenizer(game)
    save_model(tiny_quiet(model=dict(vocab_size=20, max_seq_len=512)).model,
               files / "Mistral-7B-v0.1", torch.bfloat16, tokenizer=tokenizer)
    texts = [f"ball c : {' '.join(swaps)} now a ."
             for swaps in itertools.product(("ab", "cd", "ce", "ad"), repeat=6)]
    (files / "owm" / "data").mkdir(parents=True)
    parquet.write_table(pyarrow.table({"text": texts, "url": texts}),
                        files / "owm" / "data" / "train-00000-of-00114.parquet")
    binaries.mkdir()
    for name, text in (("hf", HF), ("torchrun", TORCHRUN), ("nvidia-smi", "#!/bin/sh\necho $MIB\n"),
                       ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "FILES": str(files),
           "PATH": f"{binaries}:{os.environ['PATH']}"}

    def run(script, steps, mib=0):
        done = subprocess.run(["sh", f"runs/mistral7b_{script}.sh"], cwd=tmp_path, text=True,
                              capture_output=True, env=env | {"STEPS": steps, "MIB": str(mib)})
        assert done.returncode == 0 or not mib, done.stderr
        return done
    assert run("8gpu", "2").returncode == 0
    assert "going on from" in run("1gpu", "3", 143771).stdout     # with what two had begun
    out = tmp_path / "out" / "mistral7b"
    trained = tensors(out)
    assert "start_thought" in trained and {t.dtype for t in trained.values()} == {torch.float32}
    shutil.rmtree(out)
    assert "MiB: --weights=bf16 --moments=bf16" in run("1gpu", "2", 81559).stdout
    matrix = load_model(find_checkpoint(out), dtype=None).model.layers[0].ffn.up.weight
    assert matrix.dtype == torch.bfloat16
    shutil.rmtree(out)
    assert "--lora=16" in run("1gpu", "1", 24564).stdout
    assert (find_checkpoint(out) / "adapter_model.safetensors").is_file()
    refused = run("1gpu", "1")
    assert refused.returncode == 1 and "7B needs a GPU of 24 GB" in refused.stderr
