"""The loop: what is learnt does not depend on how the run was cut, stopped, killed or resumed."""
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import config
import eval as evaluate
import train
from data import Batches

MODEL = ("--dim=16", "--n_layers=1", "--n_heads=2", "--n_kv_heads=1", "--ffn_dim=32",
         "--max_seq_len=128")
TOY = ("--thought_len=2", "--n_thoughts=2", "--n_true=2", "--policy_weight=1",
       "--policy_temperature=1", "--marker_lr=1", "--batch_size=4", "--seq_len=12", "--lr=5e-3",
       "--warmup=2", "--eval_texts=8", "--steps=6", "--save_every=3", "--eval_every=3")


SHARES = "optimizer/shard-00001-model-00001-of-00003.safetensors"      # of one rank's optimizer


def toy(game, out, *changes):
    """The options of a small run, from scratch unless `changes` say otherwise."""
    model = () if any("--init_from=/" in str(change) for change in changes) else MODEL
    return (*model, *TOY, f"--data={game}/without_reasoning", f"--out={out}", *changes)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_model(checkpoint.find_checkpoint(run)).state_dict()


def assert_same_weights(a: Path, b: Path):
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def rows(run: Path) -> list[dict]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens/s"} for row in lines]


def assert_same_run_but_for_rounding(a: Path, b: Path):
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-5)
    assert len(rows(a)) == len(rows(b))
    for ours, theirs in zip(rows(a), rows(b)):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


@pytest.fixture(scope="module")
def whole_run(game, tmp_path_factory):
    """An uninterrupted run that every other way of running must equal."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = subprocess.run([sys.executable, "train.py", *toy(game, out)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_the_same_seed_gives_the_same_weights_and_log(call, game, whole_run, tmp_path):
    assert call(train, *toy(game, tmp_path / "again"))[0] == 0
    assert_same_weights(tmp_path / "again", whole_run)
    assert rows(tmp_path / "again") == rows(whole_run)


def test_resumed_equals_uninterrupted_bit_for_bit(call, game, whole_run, tmp_path):
    out = tmp_path / "run"
    assert call(train, *toy(game, out, "--steps=3"))[0] == 0
    assert call(train, "--init_from=resume", f"--out={out}", "--steps=6")[0] == 0
    assert_same_weights(out, whole_run)
    assert rows(out) == rows(whole_run)


def test_accumulation_equals_one_large_batch(call, game, whole_run, tmp_path):
    assert call(train, *toy(game, tmp_path / "run", "--grad_accum=4"))[0] == 0
    assert_same_run_but_for_rounding(tmp_path / "run", whole_run)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_torchrun_equals_one_process(game, whole_run, tmp_path, ranks):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node",
                           str(ranks), "--standalone", "train.py", *toy(game, tmp_path / "run")],
                          capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert_same_run_but_for_rounding(tmp_path / "run", whole_run)


def test_bfloat16_products_keep_float32_weights(call, game, tmp_path):
    assert call(train, *toy(game, tmp_path / "run", "--dtype=bfloat16"))[0] == 0
    assert {t.dtype for t in tensors(tmp_path / "run").values()} == {torch.float32}
    assert all(np.isfinite(row["loss"]) for row in rows(tmp_path / "run") if "loss" in row)


def test_plain_training_then_thoughts_then_plain_again(call, game, tmp_path):
    base, quiet = tmp_path / "base", tmp_path / "quiet"
    assert call(train, *toy(game, base, "--objective=plain"))[0] == 0
    assert set(rows(base)[1]) == {"step", "loss", "nll/base", "grad_norm", "lr"}
    assert call(train, *toy(game, quiet, f"--init_from={base}", "--steps=1"))[0] == 0
    first = rows(quiet)[1]
    assert first["nll/base"] == pytest.approx(first["nll/mixed"], abs=0.1)   # mixing head is shut
    more = toy(game, tmp_path / "more", f"--init_from={quiet}", "--objective=plain")
    assert call(train, *more)[0] == 0
    assert "start_thought" not in tensors(tmp_path / "more")


def test_the_optimizer_has_four_groups_with_their_own_rates(game):
    from toys import tiny_quiet
    cfg = train.TrainConfig(out="x", data="x", marker_lr=100, mixing_lr=5, weight_decay=0.1)
    optimizer = train.build_optimizer(tiny_quiet(), cfg)
    found = {g["name"]: (len(g["params"]), g["scale"], g["weight_decay"])
             for g in optimizer.param_groups}
    assert found == {"decay": (2 * 7 + 2, 1, 0.1), "no_decay": (2 * 2 + 1, 1, 0),
                     "markers": (2, 100, 0), "mixing_head": (5, 5, 0.1)}


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    cfg = train.TrainConfig(out="x", data="x", lr=1.0, min_lr=0.1, warmup=10, steps=110)
    assert train.lr_at(0, cfg) == pytest.approx(0.1) and train.lr_at(9, cfg) == pytest.approx(1.0)
    assert train.lr_at(60, cfg) == pytest.approx(0.55)
    assert train.lr_at(110, cfg) == pytest.approx(0.1)


def test_thoughts_depend_on_seed_step_and_row_alone():
    cfg = train.TrainConfig(out="x", data="x", seq_len=5)
    thought = train.ThoughtConfig(thought_len=2)
    def draws(step, rows):
        return train.thought_randoms(cfg, thought, step, rows)["uniform_BNPT"]
    whole = draws(7, range(4))
    assert torch.equal(torch.cat([draws(7, rows) for rows in ([0], [1, 2, 3])]), whole)
    assert not torch.equal(draws(8, range(4)), whole) and whole.shape == (4, 2, 4, 2)


def test_a_share_of_the_positions_thinks_chosen_anew_at_every_step(call, game, tmp_path):
    cfg = train.TrainConfig(out="x", data="x", seq_len=11, positions="random", think_share=0.25)
    draws = train.thought_randoms(cfg, train.ThoughtConfig(thought_len=2), 7, range(50))
    position_BP = draws["position_BP"]
    assert position_BP.shape == (50, 3) and (position_BP.diff(dim=1) > 0).all()
    assert set(position_BP.flatten().tolist()) == set(range(10))
    for positions in ("random", "uncertain"):
        options = f"--positions={positions}", "--think_share=0.5"
        assert call(train, *toy(game, tmp_path / positions, *options))[0] == 0


def test_with_every_position_chosen_all_three_ways_learn_the_same_bit_for_bit(
        call, game, whole_run, tmp_path):
    for positions in ("random", "uncertain"):
        assert call(train, *toy(game, tmp_path / positions, f"--positions={positions}"))[0] == 0
        assert_same_weights(tmp_path / positions, whole_run)
        assert rows(tmp_path / positions) == rows(whole_run)


def test_activation_checkpointing_learns_the_same(call, game, whole_run, tmp_path):
    assert call(train, *toy(game, tmp_path / "run", "--recompute=1"))[0] == 0
    assert_same_run_but_for_rounding(tmp_path / "run", whole_run)


# ------------------------------------------------------------------------------------- accidents

KILLER = """
import os, random, signal, sys, time
import config, train
out, argv, rng, kills = sys.argv[1], sys.argv[2:], random.Random(0), 0
while True:
    resume = ["--init_from=resume", "--out=" + out] if os.path.exists(out + "/latest") else argv
    child = os.fork()
    if child == 0:
        sys.argv = ["train.py", *resume]
        config.run(train.main)
        os._exit(0)
    if kills < 20:
        time.sleep(rng.uniform(0.05, 0.7))
    done, status = os.waitpid(child, os.WNOHANG if kills < 20 else 0)
    if done:
        assert status == 0, status
        break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
print("kills", kills)
"""


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_it_ends_in_the_same_weights(call, game, tmp_path):
    changes = ("--steps=240", "--save_every=4", "--eval_every=0")
    assert call(train, *toy(game, tmp_path / "whole", *changes))[0] == 0
    out = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLER, str(out), *toy(game, out, *changes)],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1",
                                                               "PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "20"
    assert_same_weights(out, tmp_path / "whole")
    assert rows(out) == rows(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_says_where_and_exits_cleanly(
        call, game, whole_run, tmp_path, monkeypatch, number):
    out, crop = tmp_path / "run", Batches.batch

    def interrupted(self, step, r):
        if step == 4:
            os.kill(os.getpid(), number)
        return crop(self, step, r)
    monkeypatch.setattr(Batches, "batch", interrupted)
    status, stdout, _ = call(train, *toy(game, out))
    assert status == 0 and f"at step 5: go on with --init_from=resume; saved {out}/step-000005" in stdout
    monkeypatch.setattr(Batches, "batch", crop)
    assert call(train, "--init_from=resume", f"--out={out}")[0] == 0
    assert_same_weights(out, whole_run)


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", SHARES])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_named(
        call, whole_run, tmp_path, name, damage):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    file = run / "step-000006" / name
    content = file.read_bytes()
    file.write_bytes(content[:len(content) // 2] if damage == "truncated" else b"garbage " * 1000)
    status, _, stderr = call(train, "--init_from=resume", f"--out={run}", "--steps=9")
    assert status == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert str(file) in stderr and str(run / "step-000003") in stderr
    (run / "latest").write_text("step-000003")                      # what the message says to do
    assert call(train, "--init_from=resume", f"--out={run}")[0] == 0
    assert_same_weights(run, whole_run)


def test_a_checkpoint_never_runs_code(call, whole_run, tmp_path):
    """Pickles in the place of its files are refused, and pickles beside them never looked at."""
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)
    for number, name in enumerate(("state.json", "model.safetensors", SHARES)):
        run = tmp_path / str(number)
        shutil.copytree(whole_run, run)
        torch.save({"step": 6, "settings": Evil()}, run / "step-000006" / name)
        status, _, stderr = call(train, "--init_from=resume", f"--out={run}")
        assert status == 2 and name in stderr and stderr.count("\n") == 1
    shutil.copytree(whole_run, tmp_path / "run")
    for name in ("state.pt", ".metadata", "optimizer/.metadata", "optimizer/__0_0.distcp"):
        (tmp_path / "run" / "step-000006" / name).write_bytes(pickle.dumps(Evil()))
    assert call(train, "--init_from=resume", f"--out={tmp_path}/run")[0] == 0
    assert not (tmp_path / "owned").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(
        call, game, tmp_path, monkeypatch):
    build = train.build_optimizer

    def poisoned(model, cfg):
        optimizer = build(model, cfg)

        def poison(*_):
            if optimizer.state and next(iter(optimizer.state.values()))["step"] == 4:
                with torch.no_grad():
                    model.start_thought.fill_(torch.nan)
        optimizer.register_step_post_hook(poison)
        return optimizer
    monkeypatch.setattr(train, "build_optimizer", poisoned)
    status, _, stderr = call(train, *toy(game, tmp_path / "run", "--eval_every=0"))
    assert status == 2 and stderr.count("\n") == 1
    assert "loss is nan at step 4" in stderr and f"{tmp_path}/run/step-000003" in stderr


def test_a_run_is_never_overwritten(call, game, whole_run):
    status, _, stderr = call(train, *toy(game, whole_run))
    assert status == 2 and "already holds a run" in stderr


def test_only_the_last_two_checkpoints_are_kept(call, game, tmp_path):
    assert call(train, *toy(game, tmp_path / "run", "--save_every=2"))[0] == 0
    kept = sorted(p.name for p in (tmp_path / "run").glob("step-*"))
    assert kept == ["step-000004", "step-000006"]
    assert (tmp_path / "run" / "latest").read_text() == "step-000006"
    assert len(list((tmp_path / "run" / "step-000006" / "optimizer").iterdir())) == 3  # small files


def test_checkpoints_are_a_runs_own_in_the_order_of_their_steps(tmp_path):
    for name in ("step-1000000", "step-999900", "step-000004-best", "step-000004"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest").write_text("step-000007")                    # which is gone
    assert checkpoint.find_checkpoint(tmp_path).name == "step-1000000"


@pytest.mark.parametrize("changes, words", [
    (["--steps=many"], "--steps: invalid int value: 'many'"),
    (["--stepz=3"], "unknown option --stepz=3; did you mean --steps?"),
    (["--data=nowhere"], "nowhere"),
    (["--seq_len=100000", "--crops=stream"], "100000"),
    (["--thought_len=500"], "exceed the context of 128"),
    (["--save_every=0"], "--save_every=0 is below 1"),
    (["--grad_accum=0"], "--grad_accum=0 is below 1"),
    (["--batch_size=5", "--grad_accum=2"],
     "--batch_size=5 does not divide into 1 ranks x --grad_accum=2"),
    (["--objective=loud"], "--objective: 'loud' is not one of quiet, plain"),
    (["--init_from=nowhere"], "nowhere is missing"),
    (["--init_from=resume"], "nothing to resume"),
    (["--n_kv_heads=3"], "n_heads=2: no multiple of n_kv_heads=3"),
    (["--vocab_size=7"], "has 20 tokens, model embeds 7"),
    (["--think_share=0.5"], "--think_share=0.5 of which positions? Choose --positions=random, uncertain or"),
    (["--advantage=leave_one_out", "--n_thoughts=1"], "raise --n_thoughts"),
    (["--think_share=0"], "--think_share=0.0 is below 1e-06"),
    (["--thought_len=-1"], "--thought_len: -1 is below 0"),
    (["--device=tpu"], "--device: 'tpu' is not one of auto, cpu, cuda")])
def test_a_mistake_is_one_line_and_status_2(call, game, tmp_path, changes, words):
    status, _, stderr = call(train, *toy(game, tmp_path / "run", *changes))
    assert status == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert words in stderr


def test_a_checkpoint_brings_its_thoughts_settings_and_its_architecture(
        call, game, whole_run, tmp_path):
    argv = (f"--init_from={whole_run}", f"--data={game}/without_reasoning", "--batch_size=2", "--seq_len=12",
            "--steps=1")
    assert call(train, *argv, f"--out={tmp_path}/a", "--n_true=1")[0] == 0
    thinking = checkpoint.load_model(checkpoint.find_checkpoint(tmp_path / "a")).config
    assert (thinking.thought_len, thinking.policy_temperature, thinking.n_true) == (2, 1, 1)
    status, _, stderr = call(train, *argv, f"--out={tmp_path}/b", "--n_layers=3")
    assert status == 2 and "--n_layers=3, but the checkpoint has 1: leave it out" in stderr


def test_a_run_of_another_version_is_not_resumed_with_other_settings(call, whole_run, tmp_path):
    """Options were renamed: ignored in silence, a batch of 4 would become one of 8."""
    shutil.copytree(whole_run, tmp_path / "run")
    file = tmp_path / "run" / "step-000006" / "state.json"
    file.write_text(file.read_text().replace('"batch_size"', '"batch"'))
    status, _, stderr = call(train, "--init_from=resume", f"--out={tmp_path}/run")
    assert status == 2 and "run of another version (--batch): start anew" in stderr


def test_resuming_with_another_architecture_is_refused(call, whole_run):
    status, _, stderr = call(train, "--init_from=resume", f"--out={whole_run}", "--n_layers=2")
    assert status == 2 and "--n_layers=2, but the checkpoint has 1: leave it out" in stderr


def test_an_empty_corpus_and_a_token_outside_the_vocabulary_are_one_line(call, game, tmp_path):
    copy = tmp_path / "without_reasoning"
    shutil.copytree(game / "without_reasoning", copy)
    (copy / "train.bin").write_bytes(b"")
    assert call(train, *toy(game, tmp_path / "run", f"--data={copy}"))[0] == 2
    ids = np.fromfile(game / "without_reasoning" / "train.bin", dtype=np.uint16)
    ids[:] = 999
    (copy / "train.bin").write_bytes(ids.tobytes())
    status, _, stderr = call(train, *toy(game, tmp_path / "run", f"--data={copy}"))
    assert status == 2 and "999" in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize("script", [train, evaluate])
@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_world_size_without_the_rest_is_refused_before_anything_is_computed(
        call, game, tmp_path, monkeypatch, script, missing):
    """Half-exported variables of a cluster: no script takes itself for one of several processes."""
    for name, value in dict(WORLD_SIZE="4", RANK="1", MASTER_ADDR="x", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    options = toy(game, tmp_path / "run")
    if script is evaluate:
        options = f"--data={game}/without_reasoning", "--checkpoint=x"
    status, _, error = call(script, *options)
    assert status == 2 and f"WORLD_SIZE=4 in the environment, but no {missing}: start with" in error
    assert not (tmp_path / "run").exists()


def test_a_rank_alone_means_nothing(call, game, whole_run, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert call(train, *toy(game, tmp_path / "run"))[0] == 0
    assert_same_weights(tmp_path / "run", whole_run)


def test_weights_of_nan_are_never_saved_and_the_last_good_checkpoint_stays(
        call, game, whole_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    step = torch.optim.AdamW.step

    def broken(self, *args):
        step(self, *args)
        self.param_groups[0]["params"][0].data[0, 0] = torch.nan
    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    options = "--init_from=resume", "--steps=7", "--eval_every=0"
    status, _, error = call(train, *options, f"--data={game}/without_reasoning", f"--out={run}")
    assert status == 2 and "holds nan or infinity after step 7; last good:" in error
    assert_same_weights(run, whole_run)


# ------------------------------------------------------------------------- what a run is, and owns


def resumed(call, run: Path, *changes) -> str:
    """Go on with a run; the one line that it ends with if it is refused."""
    status, _, error = call(train, "--init_from=resume", f"--out={run}", *changes)
    assert (status, error) == (0, "") or (status == 2 and error.count("\n") == 1)
    return error


@pytest.fixture
def run(whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    return tmp_path / "run"


def test_going_on_from_an_older_checkpoint_keeps_what_is_saved_next(call, run):
    (run / "latest").write_text("step-000003")
    assert not resumed(call, run, "--steps=4")
    assert checkpoint.find_checkpoint(run).name == "step-000004"
    assert not resumed(call, run, "--steps=5")
    assert checkpoint.find_checkpoint(run).name == "step-000005"


def test_nothing_that_this_run_did_not_write_is_ever_deleted(call, run, tmp_path):
    others = [run / "step-000001", run / "step-000099", run / "step-000002-best"]
    for other in others:
        shutil.copytree(run / "step-000003", other)
    (run / "step-000000").symlink_to(run / "step-000003")
    assert not resumed(call, run, "--steps=9", "--save_every=1")
    kept = {path.name for path in run.glob("step-*")}
    assert kept == {other.name for other in others} | {"step-000000", "step-000008", "step-000009"}


def test_a_checkpoint_that_cannot_be_removed_stops_nothing(call, run, monkeypatch):
    rmtree = shutil.rmtree

    def refuse(path, ignore_errors=False, **options):
        if Path(path).name == "step-000003" and not ignore_errors:
            raise OSError("busy")
        if Path(path).name != "step-000003":
            rmtree(path, ignore_errors, **options)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert not resumed(call, run, "--steps=8", "--save_every=1")
    assert checkpoint.find_checkpoint(run).name == "step-000008"


def test_a_new_run_is_refused_where_checkpoints_lie_even_without_a_pointer(call, game, run):
    (run / "latest").unlink()
    status, _, error = call(train, *toy(game, run))
    assert status == 2 and "already holds a run" in error
    assert not resumed(call, run, "--steps=7")               # from the newest
    assert checkpoint.find_checkpoint(run).name == "step-000007"


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(call, run):
    before = rows(run)
    owner = lambda: None
    config.lock_folder(run, owner)
    assert "another process works in" in resumed(call, run, "--steps=8")
    del owner
    assert rows(run) == before and not resumed(call, run, "--steps=7")


@pytest.mark.parametrize("change, stored", [
    ("--objective=plain", "quiet"), ("--seed=5", 0), ("--lr=0.1", 0.005), ("--seq_len=9", 12),
    ("--batch_size=2", 4), ("--n_thoughts=3", 2), ("--thought_len=3", 2), ("--policy_weight=9.0", 1.0),
    ("--crops=stream", "document"), ("--positions=random", "all"), ("--dtype=bfloat16", "float32")])
def test_a_run_that_goes_on_stays_the_run_that_it_was(call, run, change, stored):
    error = resumed(call, run, change, "--steps=8")
    assert f"{change}, but the checkpoint has {'' if stored is None else stored}" in error
    assert checkpoint.find_checkpoint(run).name == "step-000006"


def test_a_run_that_goes_on_may_be_longer_and_lie_and_compute_elsewhere(call, run, tmp_path):
    moved = run.rename(tmp_path / "moved")
    assert not resumed(call, moved, "--steps=8", "--save_every=1", "--eval_every=4", "--min_lr=0.001",
                       "--grad_accum=2", "--recompute=1", "--device=cpu", "--parallel=none")


def test_a_restart_goes_on_with_the_run_of_the_same_command_alone(call, game, run, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    other = f"--init_from={run}"
    status, _, error = call(train, *toy(game, run, other, "--steps=8"))
    assert status == 2 and f"{other}, but the checkpoint has scratch" in error
    assert call(train, *toy(game, run, "--steps=8"))[0] == 0
    assert checkpoint.read_state(run / "step-000008")["settings"]["init_from"] == "scratch"


def test_a_log_that_nobody_reads_or_that_cannot_be_written_costs_no_checkpoint(game, tmp_path):
    script = ("import sys, config, train, tools.run_log; real = open\n"
              "def full(path, *args):\n"
              "    if str(path).endswith('log.jsonl'): raise OSError(28, 'No space left on device')\n"
              "    return real(path, *args)\n"
              "tools.run_log.open = full; config.run(train.main)")
    process = subprocess.Popen([sys.executable, "-c", script, *toy(game, tmp_path / "run")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert b"No space left on device; the run goes on" in process.stdout.readline()
    process.stdout.close()                                   # as when `| tee log` was stopped
    assert process.stderr.read() == b"" and process.wait() == 0
    assert checkpoint.find_checkpoint(tmp_path / "run").name == "step-000006"
