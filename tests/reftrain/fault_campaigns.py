"""Campaigns of faults against whole runs; each returns counts of faults that landed and of runs that survived them.

The tests run small shares of them, `python scripts/faults.py` the whole. Every fault is driven by the seed of the `random.Random` that is
passed in, and counts as landed only if the process had done a new step and was then ended by that fault.
"""

import collections
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.reftrain.fault_worker import Run, raw_records, root

NUM_MICROBATCHES, BATCH, SEQ_LEN, NUM_WINDOWS = 4, 8, 16, 37
"""Four microbatches a step; the 37 windows of the text are an epoch of four and a half steps."""


def write_plan(folder, name="plan", *, precision="fp32", dropout=0.0, num_devices=1, steps=40, every=3, width=32, **training):
    """A plan for a model so small that a step takes milliseconds, on a text so short that every fifth step crosses an epoch's end."""
    data = folder / "text"
    if not data.exists():
        write_text_data(data)
    model = {"model_type": "gpt2", "n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 256,
             "resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}  # fmt: skip
    plan = {
        "schema_version": 1, "model": model,
        "workload": {"seq_len": SEQ_LEN, "global_batch_size": BATCH, "tokens": BATCH * SEQ_LEN * steps, "precision": precision},
        "cluster": {"accelerator": "h100", "num_devices": num_devices},
        "layout": {"micro_batch_size": 2 // num_devices, **({"dp_shard": num_devices, "zero_stage": 3} if num_devices > 1 else {})},
        "training": {"data": str(data), "checkpoint_every_steps": every, "num_steps": steps, **training},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(plan))
    return path


def write_text_data(folder):
    from reftrain.data import TokenWriter

    numbers = random.Random(5)
    with TokenWriter(folder / "train", vocab_size=256, end_of_text_id=0, tokenizer_sha256="0" * 64) as writer:
        tokens = [1]
        while len(tokens) < NUM_WINDOWS * SEQ_LEN:
            tokens.append((tokens[-1] * 5 + numbers.choice((3, 3, 3, 8))) % 256)
        writer.add(tokens, len(tokens))


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run."""

    losses: dict
    """By (step, position of its first sample): a rollback gives a step a second loss, for other samples."""
    weights: str
    num_steps: int
    step_s: float


def weights_hash(out, step):
    """SHA-256 over weights and optimizer states of a checkpoint: names, shapes, bytes."""
    from safetensors.numpy import load_file

    digest = hashlib.sha256()
    for file in sorted((out / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{name}{tensor.shape}{tensor.dtype}".encode() + tensor.tobytes())
    return digest.hexdigest()


def run_reference(plan, out, **options):
    run = Run(plan, out, **options)
    assert run.end() == 0, run.text
    records = [r for r in raw_records(out) if r["kind"] == "step"]
    took = [r["step_s"] for r in records]
    last = max(r["step"] for r in records) + 1
    return Reference({(r["step"], r["position"]): r["loss"] for r in records}, weights_hash(out, last), last, sorted(took)[len(took) // 2])


def assert_equals_reference(out, reference):
    """Every line ever written for a step has the reference's loss, to the bit; and so have the final weights and states."""
    found = [((r["step"], r["position"]), r["loss"]) for r in raw_records(out) if r["kind"] == "step"]
    assert {key for key, _ in found} == set(reference.losses)
    wrong = [(key, loss, reference.losses[key]) for key, loss in found if loss != reference.losses[key]]
    assert not wrong, wrong
    assert weights_hash(out, reference.num_steps) == reference.weights


def interrupt(folder, plan, reference, number, count, random_numbers, check, **options):
    """Runs the plan again and again, and sends each run one signal at a random instant after at least one new step; resumes; compares.

    `check(run, where, status)` says whether the signal landed. Between rounds, one finished run of the plan each, the folder is new.
    """
    counts = collections.Counter()
    while counts["landed"] < count:
        out = folder / f"{plan.stem}-{signal.Signals(number).name}-{counts['rounds']}"
        finished, before = False, counts["landed"]
        while not finished:
            run = Run(plan, out, *(["--resume"] if (out / "plan.yaml").exists() else []), **options)
            wanted = random_numbers.randint(1, 8)  # the first steps of a process are slow: a delay alone would hardly ever reach a checkpoint
            if counts["landed"] < count and run.wait_for(lambda window, wanted=wanted: window["num_steps"] >= wanted):
                time.sleep(random_numbers.uniform(0, 2 * reference.step_s + options.get("slow_save_s", 0.0)))
                where = run.signal(number)
                status = run.end()
                finished = status == 0
                if not finished:
                    check(run, where, status)
                    counts["landed"] += 1
                    counts["mid-accumulation"] += where["microbatch"] > 1
                    counts["while saving"] += where["saving"]
            else:
                status = run.end()
                assert status == 0, run.text
                finished = True
        assert_equals_reference(out, reference)
        counts["rounds"] += 1
        counts["resumed past step 0"] += sum(r["kind"] == "resumed" and r["step"] > 0 for r in raw_records(out))
        counts["survived"] += counts["landed"] - before
        shutil.rmtree(out)
    return counts


def kills(folder, plan, reference, count, random_numbers, **options):
    """`kill -9`."""

    def check(run, where, status):
        assert status == -signal.SIGKILL, run.text
        assert where["num_steps"] >= 1

    return interrupt(folder, plan, reference, signal.SIGKILL, count, random_numbers, check, **options)


def terms(folder, plan, reference, count, random_numbers, **options):
    """SIGTERM: status 130, and a checkpoint of the very step that the run has reached."""
    slowest = [0.0]

    def check(run, where, status):
        from reftrain.checkpoint import CheckpointStore

        assert status == 130, run.text
        slowest[0] = max(slowest[0], run.took_s)
        last = [r for r in raw_records(run.out) if r["kind"] == "step"][-1]["step"]
        newest = CheckpointStore(run.out / "checkpoints").newest()
        assert newest.name == f"step-{last + 1:08d}", (newest, last)
        assert json.loads((run.out / "summary.json").read_text())["stop_signal"] == signal.SIGTERM

    counts = interrupt(folder, plan, reference, signal.SIGTERM, count, random_numbers, check, **options)
    assert slowest[0] < 10.0, "the checkpoint of the current step must stand within 10 s"
    counts["slowest in ms"] = math.ceil(1e3 * slowest[0])
    return counts


def command(*arguments, **options):
    """A subprocess of the command line."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root())}
    return subprocess.Popen(
        [sys.executable, "-m", "reftrain", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def ranks_of(launcher):
    """{rank: pid} of the workers of a launcher, from the process table."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                variables = dict(v.split("=", 1) for v in (entry / "environ").read_text().split("\0") if "=" in v)
            except (OSError, ValueError, IndexError):
                continue
            if parent == launcher.pid and "RANK" in variables:
                found[int(variables["RANK"])] = int(entry.name)
    return found


def log_steps(out):
    """[step, ...] since the last resume."""
    try:
        records = raw_records(out)
    except OSError:
        return 0, []
    resumes = [i for i, r in enumerate(records) if r["kind"] == "resumed"]
    return len(resumes), [r["step"] for r in records[resumes[-1] if resumes else 0 :] if r["kind"] == "step"]


def rank_kills(folder, count, random_numbers):
    """One of two processes killed at a random step, `count` times in one run that restarts itself; compared with a run that nobody kills."""
    plan = write_plan(folder, "two", num_devices=2, steps=12 + 3 * count, every=2)
    base = command("run", plan, "--out", folder / "two-reference")
    text, _ = base.communicate(timeout=120)
    assert base.returncode == 0, text
    expected = {r["step"]: r["loss"] for r in raw_records(folder / "two-reference") if r["kind"] == "step"}
    out = folder / "two-killed"
    kill_ranks(plan, out, count, random_numbers)
    records = [r for r in raw_records(out) if r["kind"] == "step"]
    assert {r["step"] for r in records} == set(expected)
    assert all(r["loss"] == expected[r["step"]] for r in records)
    assert weights_hash(out, len(expected)) == weights_hash(folder / "two-reference", len(expected))
    return collections.Counter(landed=count, survived=count, rounds=1)


def kill_ranks(plan, out, count, random_numbers, *more, stop_with=None):
    """Starts a job of two processes and kills one of them `count` times; the job restarts itself, and ends well or by a signal to its launcher."""
    launcher = command("run", plan, "--out", out, "--max-restarts", count, *more)
    first, landed = log_steps(out)[0] + ("--resume" in more), 0

    def has_stepped():
        resumes, steps = log_steps(out)
        return resumes == first + landed and len(steps) >= 1

    try:
        while landed < count + (stop_with is not None) and launcher.poll() is None:
            if not has_stepped():  # each start of the job has to do a new step before the next fault
                time.sleep(0.01)
                continue
            time.sleep(random_numbers.uniform(0, 0.1))
            workers = ranks_of(launcher)
            if landed == count:
                launcher.send_signal(stop_with)
                break
            if len(workers) == 2:
                os.kill(workers[random_numbers.randrange(2)], signal.SIGKILL)
                landed += 1
        text, _ = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
        launcher.wait()
    assert launcher.returncode == (0 if stop_with is None else 130), text
    assert text.count("was ended by signal 9: starting again") == landed == count, text


def template(folder, plan, name, at_least=12):
    """A run that was killed after some steps: (its folder, its newest good checkpoint)."""
    from reftrain.checkpoint import CheckpointStore

    out = folder / name
    run = Run(plan, out)
    assert run.wait_for(lambda window: window["num_steps"] >= at_least)
    run.signal(signal.SIGKILL)
    assert run.end() == -signal.SIGKILL, run.text
    return out, CheckpointStore(out / "checkpoints").newest()


def full_disks(folder, plan, reference, count, random_numbers):
    """Files may not grow beyond a random size while a resumed run saves: status 2, what and where, nothing lost, `--resume` goes on."""
    from reftrain.checkpoint import CheckpointStore

    origin, newest = template(folder, plan, f"{plan.stem}-before-full")
    log_bytes = (origin / "metrics.jsonl").stat().st_size
    largest = max(f.stat().st_size for f in newest.iterdir())
    counts = collections.Counter()
    for _ in range(count):
        out = folder / f"{plan.stem}-full"
        shutil.copytree(origin, out)
        limit = round(math.exp(random_numbers.uniform(math.log(log_bytes + 2000), math.log(largest - 1))))
        run = Run(plan, out, "--resume", max_file_bytes=limit)
        assert run.end() == 2, run.text
        assert run.window.get()["num_steps"] >= 1
        assert "File too large" in run.text, run.text
        assert " bytes" in run.text, run.text
        assert str(out) in run.text, run.text
        assert "Traceback" not in run.text, run.text
        counts["landed"] += 1
        assert CheckpointStore(out / "checkpoints").newest().name == newest.name
        again = Run(plan, out, "--resume")
        assert again.end() == 0, again.text
        assert_equals_reference(out, reference)
        counts["survived"] += 1
        shutil.rmtree(out)
    return counts


def bit_flips(folder, plan, reference, count, random_numbers):
    """One bit of a random file of the newest checkpoint flips between two runs: the file is named, the previous checkpoint is used."""
    origin, newest = template(folder, plan, f"{plan.stem}-before-flip")
    previous = sorted(p.name for p in newest.parent.glob("step-*") if p.name < newest.name)[-1]
    counts = collections.Counter()
    for _ in range(count):
        out = folder / f"{plan.stem}-flipped"
        shutil.copytree(origin, out)
        file = random_numbers.choice(sorted((out / "checkpoints" / newest.name).iterdir()))
        data = bytearray(file.read_bytes())
        data[random_numbers.randrange(len(data))] ^= 1 << random_numbers.randrange(8)
        file.write_bytes(data)
        counts["landed"] += 1
        run = Run(plan, out, "--resume")
        assert run.end() == 0, run.text
        assert str(file) in run.text, run.text
        assert [r["checkpoint"] for r in raw_records(out) if r["kind"] == "resumed"] == [previous]
        assert_equals_reference(out, reference)
        counts["survived"] += 1
        shutil.rmtree(out)
    return counts


def bad_losses(folder, plan, count, random_numbers):
    """NaN, Inf and 100x put into the real loss and gradients of `count` steps: each one is skipped, and nothing but the step has changed."""
    from unittest.mock import patch

    from reftrain.config import load_run_config
    from reftrain.steps import Engine
    from reftrain.train import RunOptions, train

    config = load_run_config(plan)
    steps = random_numbers.sample(range(20, config.num_steps, 2), count)  # never two in a row, which in time would roll back
    factors = {step: (float("nan"), float("inf"), 100.0)[i % 3] for i, step in enumerate(steps)}
    before, outcome, now = {}, {}, [0]
    work, skip, update = Engine.forward_backward, Engine.skip, Engine.update

    def digest(engine):
        found = hashlib.sha256()
        for part in engine.state().values():
            for name, value in sorted(part.items()):
                found.update(f"{name}{value if not hasattr(value, 'numpy') else ''}".encode())
                found.update(value.detach().numpy().tobytes() if hasattr(value, "numpy") else b"")
        return found.hexdigest()

    def spoiled(engine, *args):
        before[now[0]] = digest(engine)
        loss = work(engine, *args)
        factor = factors.get(now[0], 1.0)
        for parameter in engine.parts[0].parameters():
            parameter.grad *= factor
        return loss * factor

    def ended(real, name):
        def wrapper(engine, *args):
            result = real(engine, *args)
            outcome[now[0]] = (name, digest(engine) == before[now[0]])
            now[0] += 1
            return result

        return wrapper

    out = folder / f"{plan.stem}-spoiled"
    with patch.multiple(Engine, forward_backward=spoiled, skip=ended(skip, "skipped"), update=ended(update, "updated")):
        summary = train(config, RunOptions(out)).values
    assert {step for step, (name, same) in outcome.items() if name == "skipped" and same} == set(steps)
    assert all(not same for name, same in outcome.values() if name == "updated")
    assert {r["step"] for r in raw_records(out) if r.get("skipped")} == set(steps)
    assert summary["num_skipped"] == count
    assert all_finite(out)
    return collections.Counter(landed=count, survived=count, rounds=1)


def all_finite(out):
    """Whether no checkpoint of a run holds a NaN or an infinity; there must be one."""
    import numpy as np
    from safetensors.numpy import load_file

    files = sorted((out / "checkpoints").glob("step-*/*.safetensors"))
    assert files
    return all(np.isfinite(tensor).all() for file in files for tensor in load_file(file).values())
