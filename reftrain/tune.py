"""Which micro-batch size is fastest, and which is the largest that fits, measured before a run starts.

Gradients are accumulated up to the same global batch whatever the micro-batch, so losses stay as they were. Every size is measured by
the trainer itself in processes of its own; one that is predicted or extrapolated not to fit is never started.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

from planner.errors import InfeasibleError, InputError, PlannerError
from planner.files import read_json, to_json, to_yaml, write_text
from planner.plan import build_request
from planner.report._numbers import with_unit
from planner.units import format_bytes
from reftrain.config import RunConfig, make_run_config
from reftrain.measure import WARMUP_STEPS, Summary
from reftrain.parallel import default_device, end_distributed, start_ranks
from reftrain.prepare_run import prepare_data
from reftrain.runnable import check_runnable
from reftrain.train import RunOptions, Trainer, set_up
from reftrain.trials import Child, predict, rendered, vary

__all__ = ["Rung", "Tuning", "climb", "measure_steps", "render_tuning", "tune_micro_batch", "tuned_plan"]

NUM_TIMED_STEPS = 7
USABLE_FRACTION = 0.9
"""Of the memory that is free now; other programs need some too."""
MAX_SLOWER = 2
FOLDER, MARK = "tune", "out_of_memory.txt"


@dataclass(frozen=True)
class Measured:
    """What a few steps with one micro-batch size took."""

    peak_bytes: int
    """Live tensors at their most, on the fullest device."""
    process_bytes: int
    """What a process took of the machine (CPU) or its allocator of the device (CUDA), the largest of all."""
    step_s: dict[str, float]
    tokens_per_s: float


@dataclass(frozen=True)
class Rung:
    """One micro-batch size of the ladder."""

    micro_batch_size: int
    verdict: str
    """fits | too big | not tried."""
    reason: str = ""
    predicted_bytes: float | None = None
    measured: Measured | None = None


@dataclass(frozen=True)
class Tuning:
    """The ladder, and what follows from it."""

    rungs: tuple[Rung, ...]

    @property
    def fitting(self) -> list[Rung]:
        """Those that ran."""
        return [rung for rung in self.rungs if rung.measured is not None]

    @property
    def fastest(self) -> int:
        """The size with the shortest median step."""
        return min(self.fitting, key=_step_s).micro_batch_size

    @property
    def largest(self) -> int:
        """The largest size that ran."""
        return max(rung.micro_batch_size for rung in self.fitting)

    def to_dict(self) -> dict[str, Any]:
        """As `tune/report.json` holds it."""
        return {"schema_version": 1, "fastest": self.fastest, "largest": self.largest, "rungs": [asdict(rung) for rung in self.rungs]}


def _step_s(rung: Rung) -> float:
    return rung.measured.step_s["median"] if rung.measured else float("inf")


def ladder(config: RunConfig) -> list[int]:
    """Powers of two that divide a data-parallel rank's share of the global batch.

    Formula: 1, 2, 4 .. 2^k with 2^k | global_batch_size / dp.
    """
    share = config.global_batch_size // config.layout.dp
    return [2**k for k in range(share.bit_length()) if share % 2**k == 0]


def climb(
    sizes: Sequence[int],
    obstacle: Callable[[int], str],
    predicted_bytes: Callable[[int], float | None],
    measure: Callable[[int], Measured | str],
    usable_bytes: Callable[[], float],
) -> Tuning:
    """Tries sizes in order until memory ends or two in a row are slower than the fastest so far.

    Args:
        sizes: ascending micro-batch sizes.
        obstacle: why a size cannot run at all; empty where it can.
        predicted_bytes: per device; None where the planner cannot say.
        measure: the measurement, or how memory ended.
        usable_bytes: per device, now.
    """
    rungs: list[Rung] = []
    end, num_slower = "", 0
    for size in sizes:
        rung = Rung(size, "not tried", end or obstacle(size), predicted_bytes(size))
        fitting = [r for r in rungs if r.measured is not None]
        if not rung.reason and (why := _why_too_large(rung, fitting, usable_bytes())):
            rung, end = replace(rung, reason=why), f"{size} is too big already"
        if not rung.reason:
            found = measure(size)
            if isinstance(found, str):
                rung, end = replace(rung, verdict="too big", reason=found), f"{size} is too big already"
            else:
                rung = replace(rung, verdict="fits", measured=found)
                num_slower = num_slower + 1 if fitting and _step_s(rung) > min(map(_step_s, fitting)) else 0
                end = f"{MAX_SLOWER} sizes in a row were slower than a smaller one" if num_slower == MAX_SLOWER else ""
        rungs.append(rung)
    return Tuning(tuple(rungs))


def _why_too_large(rung: Rung, fitting: Sequence[Rung], usable_bytes: float) -> str:
    """Why a size must not be started; empty where it may."""
    usable = f"{format_bytes(usable_bytes)} can be used"
    if rung.predicted_bytes is not None and rung.predicted_bytes > usable_bytes:
        return f"predicted to need {format_bytes(rung.predicted_bytes)}, and {usable}"
    expected = _extrapolated_bytes(rung, fitting)
    return f"would need {format_bytes(expected)} as the smaller ones go, and {usable}" if expected > usable_bytes else ""


def _extrapolated_bytes(rung: Rung, fitting: Sequence[Rung]) -> float:
    """What a size will take, by the line through the last two that ran.

    With one behind it, the slope is the predicted one, or without a prediction the steepest there can be: all in proportion to the size.
    """
    points = [(r.micro_batch_size, r.measured.process_bytes) for r in fitting if r.measured is not None]
    if not points:
        return 0.0
    (size, taken), step = points[-1], rung.micro_batch_size - points[-1][0]
    if len(points) > 1:
        slope = (taken - points[-2][1]) / (size - points[-2][0])
    elif rung.predicted_bytes is not None and fitting[-1].predicted_bytes is not None:
        slope = (rung.predicted_bytes - fitting[-1].predicted_bytes) / step
    else:
        slope = taken / size
    return taken + max(slope, 0.0) * step


def tuned_plan(config: RunConfig, folder: Path) -> Path | None:
    """Writes the plan of a run with the size that was found fastest for its folder; None where nothing was measured yet."""
    report, plan = folder / FOLDER / "report.json", folder / FOLDER / "plan.yaml"
    if not report.is_file():
        return None
    write_text(plan, to_yaml(vary(config.plan, {"layout.micro_batch_size": read_json(report)["fastest"]})))
    return plan


def tune_micro_batch(config: RunConfig, folder: Path, say: Callable[[str], None]) -> Tuning:
    """Climbs the ladder for a run that will write to `folder`, and keeps the report there.

    Raises:
        InfeasibleError: no size fits.
        PlannerError: a measurement failed for another reason than memory, or was interrupted.
    """
    place = folder / FOLDER
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    plan = config.plan
    probed = vary(plan, {"training.data": prepare_data(config, folder), "training.profile_steps": 0})
    bare = {key: value for key, value in plan.items() if key not in ("prediction", "provenance")}
    child = Child()

    def measure(size: int) -> Measured | str:
        say(f"measuring micro-batch {size}: {WARMUP_STEPS + NUM_TIMED_STEPS} steps")
        return _measure(probed, size, place, child)

    def predicted_bytes(size: int) -> float | None:
        found = predict(vary(bare, {"layout.micro_batch_size": size}))
        return float(found["prediction"]["memory"]["peak_bytes"]["value"]) if found else None

    with child.listening():
        found = climb(ladder(config), lambda size: _obstacle(bare, size), predicted_bytes, measure, lambda: usable_bytes(config.layout.num_devices))
    if not found.fitting:
        why = "; ".join(f"{rung.micro_batch_size}: {rung.reason}" for rung in found.rungs)
        raise InfeasibleError(f"error: no micro-batch size can run ({why})\n  fix  shard more (zero_stage, tp, pp), recompute, or shorten seq_len")
    write_text(place / "report.json", to_json(found.to_dict()))
    return found


def _obstacle(plan: dict[str, Any], size: int) -> str:
    """The rules of layouts and schedules that a size breaks."""
    try:
        check_runnable(make_run_config(build_request(vary(plan, {"layout.micro_batch_size": size}))), default_device())
    except InputError as error:
        return "; ".join(problem.rule for problem in error.problems)
    return ""


def _measure(plan: dict[str, Any], size: int, place: Path, child: Child) -> Measured | str:
    """The figures of `reftrain measure-steps` with one size, or how memory ended."""
    folder = place / f"micro-batch-{size}"
    folder.mkdir()
    write_text(folder / "plan.yaml", to_yaml(vary(plan, {"layout.micro_batch_size": size})))
    log = folder / "stderr.txt"
    status = child.run(["measure-steps", str(folder / "plan.yaml"), "--out", str(folder)], log)
    if child.stop_signal:
        raise InterruptedTuningError("interrupted while micro-batch sizes were measured; nothing has been trained")
    if (folder / MARK).is_file():
        return (folder / MARK).read_text().strip()
    said = log.read_text(errors="replace")
    if status == -9 or "was ended by signal 9" in said:
        return "the system ended a process, as it does when memory runs out"
    if status != 0:
        raise PlannerError(f"{said[-4000:]}error: measuring micro-batch {size} failed with status {status}; what it said is in {log}")
    values = read_json(folder / "summary.json")
    return Measured(values["peak_bytes"], values["process_bytes"], values["step_s"], values["tokens_per_s"])


class InterruptedTuningError(PlannerError):
    """A signal came while sizes were measured."""

    exit_status = 130


class Probe(Trainer):
    """A trainer that takes a few steps, and keeps its measurements alone: no checkpoints, no evaluation."""

    def run(self) -> Summary:
        """Warm-up and timed steps; `summary.json` on the first rank."""
        self.engine.narrow()
        with self._saving():
            for _ in range(WARMUP_STEPS + NUM_TIMED_STEPS):
                self._one_step()
            taken = torch.tensor([process_bytes(self.ranks.device)], device=self.ranks.device)
            if self.ranks.world_size > 1:
                dist.all_reduce(taken, dist.ReduceOp.MAX)
            found = Summary({**self._finish().values, "process_bytes": int(taken.item())})
            if self.ranks.is_first:
                found.save(self.options.out / "summary.json")
            return found


def measure_steps(config: RunConfig, out: Path) -> None:
    """Takes a few steps on this rank and writes what they took to `out`.

    Raises:
        InfeasibleError: out of memory; `out` has a mark that says so, whichever rank it was.
    """
    ranks = start_ranks(config.layout)
    try:
        set_up(config, ranks.device)
        Probe(config, RunOptions(out), ranks, config.training.data, lambda record: None).run()
    except (MemoryError, RuntimeError) as error:
        text = str(error).partition("\n")[0]
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in text:
            raise
        write_text(out / MARK, f"out of memory: {text[-200:]}\n")
        raise InfeasibleError(f"error: out of memory: {text}") from None
    finally:
        end_distributed()


def process_bytes(device: torch.device) -> int:
    """The most that this process has taken so far: of the device by its allocator, or of the machine.

    `VmHWM`, not getrusage's ru_maxrss, which a process inherits from the one that started it (proc(5), getrusage(2)).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        return _field(Path("/proc/self/status"), "VmHWM")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def usable_bytes(num_processes: int) -> float:
    """What each process of a run may take here: nine tenths of what is free on its GPU, or of its share of the machine's memory."""
    if torch.cuda.is_available():
        return USABLE_FRACTION * min(torch.cuda.mem_get_info(i)[0] for i in range(min(num_processes, torch.cuda.device_count())))
    return USABLE_FRACTION * available_bytes() / num_processes


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that can be had without swapping, within the limits of a container; all of the machine's where the system does not tell."""
    try:
        found = _field(proc / "meminfo", "MemAvailable")
    except OSError:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            found = min(found, int((cgroup / limit).read_text()) - int((cgroup / used).read_text()))
        except (OSError, ValueError):  # no such limit, or the word `max`
            continue
    return max(found, 0)


def _field(file: Path, name: str) -> int:
    """Bytes of a line `name: N kB`."""
    for line in file.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{file} has no {name}")


def render_tuning(tuning: Tuning) -> str:
    """The ladder as a table, and the choice."""
    table = Table("micro-batch", "predicted", "peak", "process", "step", "80% of steps", "tokens/s", "verdict")
    for rung in tuning.rungs:
        measured, verdict = rung.measured, rung.verdict
        cells = ["", "", "", "", ""]
        if measured is not None:
            step = measured.step_s
            between = f"{with_unit(step['p10'], 's')} to {with_unit(step['p90'], 's')}"
            sizes = [with_unit(measured.peak_bytes, "bytes"), with_unit(measured.process_bytes, "bytes")]
            cells = [*sizes, with_unit(step["median"], "s"), between, f"{measured.tokens_per_s:,.0f}"]
            names = [name for name, size in (("fastest", tuning.fastest), ("largest", tuning.largest)) if size == rung.micro_batch_size]
            verdict += f" ({', '.join(names)})" if names else ""
        predicted = "unknown" if rung.predicted_bytes is None else with_unit(rung.predicted_bytes, "bytes")
        table.add_row(str(rung.micro_batch_size), predicted, *cells, verdict + (f": {rung.reason}" if rung.reason else ""))
    for column in table.columns[:-1]:
        column.justify, column.no_wrap = "right", True
    stopped = any(rung.verdict == "not tried" for rung in tuning.rungs if rung.micro_batch_size > tuning.largest)
    note = " that was tried" if stopped else ""
    return f"{rendered(table)}runs with micro-batch {tuning.fastest}, the fastest; the largest that fits{note} is {tuning.largest}\n"
