"""Runs a program that trains, and watches it from outside: the same measurement for every program.

The program appends one JSON line a step to a file. When a line appears, the step has ended; what the rest of the
machine computed during the step is known from samples of /proc taken all along.
"""

import json
import os
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

POLL_SECONDS = 0.01
LOAD_SAMPLE_SECONDS = 0.2
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def machine_cpu_seconds() -> float:
    """CPU time that all processes together have used since the machine started."""
    user, nice, system, idle, wait, irq, soft_irq, steal = map(int, open("/proc/stat").readline().split()[1:9])
    return (user + nice + system + irq + soft_irq + steal) / TICKS_PER_SECOND


def process_cpu_seconds(pid: int) -> float:
    """CPU time of a process and of its children that have ended; 0 once it is gone."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, after_name[11:15])) / TICKS_PER_SECOND


def wait_until_quiet(cores: float, limit_seconds: float) -> bool:
    """Waits until other processes use fewer than `cores` cores over 1.5 s; false where that never came."""
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        before, start = machine_cpu_seconds(), time.monotonic()
        time.sleep(1.5)
        if (machine_cpu_seconds() - before) / (time.monotonic() - start) < cores:
            return True
    return False


@dataclass
class Step:
    """One optimizer step as the program reported it."""

    tokens: int
    seconds: float
    loss: float
    other_cores: float  # cores that other processes used meanwhile


@dataclass
class MeasuredRun:
    """What was seen of one run."""

    start_to_first_step_seconds: float
    peak_memory_bytes: int
    steps: list[Step] = field(default_factory=list)

    def quiet_steps(self, warmup_steps: int, cores: float) -> list[Step]:
        """The steps after the warm-up during which other processes used fewer than `cores` cores."""
        return [step for step in self.steps[warmup_steps:] if step.other_cores < cores]


def tokens_per_second(steps: list[Step]) -> float:
    """Median over the steps."""
    return statistics.median(step.tokens / step.seconds for step in steps)


class LoadSampler:
    """Cores used by processes other than `pid` and this one, sampled while `pid` runs."""

    def __init__(self, pid: int):
        self.pid = pid
        self.samples: list[tuple[float, float]] = [(time.monotonic(), self._others())]

    def _others(self) -> float:
        return machine_cpu_seconds() - process_cpu_seconds(self.pid) - time.process_time()

    def sample(self) -> None:
        if time.monotonic() - self.samples[-1][0] >= LOAD_SAMPLE_SECONDS:
            self.samples.append((time.monotonic(), self._others()))

    def cores_between(self, start: float, end: float) -> float:
        first = max((sample for sample in self.samples if sample[0] <= start), default=self.samples[0])
        last = min((sample for sample in self.samples if sample[0] >= end), default=self.samples[-1])
        return max(0.0, last[1] - first[1]) / max(last[0] - first[0], 1e-9)


def run_training(command: list[str], environment: dict[str, str], metrics: Path, log: Path) -> MeasuredRun:
    """Runs `command`, which writes `metrics`; its output goes to `log`. Raises where it fails."""
    metrics.unlink(missing_ok=True)
    ended_at: list[float] = []
    with log.open("w") as log_file:
        start = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=log_file, stderr=subprocess.STDOUT)
        load = LoadSampler(process.pid)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            lines = step_lines(metrics)
            ended_at += [time.monotonic()] * (len(lines) - len(ended_at))
            if pid:
                break
            load.sample()
            time.sleep(POLL_SECONDS)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode} after {len(lines)} steps; see {log}")
    run = MeasuredRun(ended_at[0] - start, usage.ru_maxrss * 1024)
    for line, end in zip(lines, ended_at):
        other_cores = load.cores_between(end - line["seconds"], end)
        run.steps.append(Step(line["tokens"], line["seconds"], line["loss"], other_cores))
    return run


def step_lines(metrics: Path) -> list[dict]:
    """The whole lines of the metrics file that tell of a training step."""
    if not metrics.exists():
        return []
    whole = metrics.read_text().rpartition("\n")[0]
    objects = [json.loads(line) for line in whole.splitlines()]
    return [line for line in objects if "seconds" in line and "event" not in line]
