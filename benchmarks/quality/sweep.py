"""Many runs side by side on one GPU, until the time is up.

    python benchmarks/quality/sweep.py --out out --seconds 540 --jobs 4
    python benchmarks/quality/sweep.py --out out --done runs.jsonl --only 'dense*' 'mvue*' --seeds 3
    python benchmarks/quality/sweep.py --size small --list

All results are lines of OUT/runs.jsonl, written as runs end: those of the files named by --done first, which are not
done again. Small models leave a GPU idle between steps, and compiling leaves it idle altogether: hence several
processes. They share the compile cache, so that a graph is compiled once. Runs that still go on at the end are lost.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import data
from config import Config, from_json, key, to_flags
from runs import SIZES, configs

HERE = Path(__file__).parent
START_SECONDS = 20.0
"""What a run takes besides its steps: imports, and graphs from the cache."""


@dataclass
class Job:
    config: Config
    process: subprocess.Popen
    result: Path
    log: Path
    begin: float

    def stop(self) -> None:
        """The process and those that compile for it."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Sweep:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.begin = args, time.monotonic()
        self.work = Path()  # of `run`
        self.file = args.out / "runs.jsonl"
        self.done: set[str] = set()
        self.jobs: list[Job] = []
        self.failed: list[str] = []
        self.seconds_per_step: dict[tuple[int, ...], float] = {}

    def left(self) -> float:
        return self.args.seconds - (time.monotonic() - self.begin)

    def take_over(self, write: bool) -> None:
        """Lines of earlier files become the first lines of this one."""
        earlier = [*self.args.done, self.file] if self.file.exists() else self.args.done
        lines = [line for file in earlier for line in file.read_text().splitlines() if line]
        kept = {key(from_json(json.loads(line)["config"])): line for line in lines}
        self.done = set(kept)
        if write:
            self.args.out.mkdir(parents=True, exist_ok=True)
            self.file.write_text("".join(f"{line}\n" for line in kept.values()))

    def fits(self, config: Config) -> bool:
        """Whether a run is likely to end in time; one of a size that no run has ended of is tried."""
        per_step = self.seconds_per_step.get(_shape(config), 0.0)
        return self.left() > 0.9 * per_step * config.steps + (START_SECONDS if per_step else 0.0)

    def start(self, config: Config, number: int) -> None:
        result, log = self.work / f"{number}.json", self.work / f"{number}.log"
        args = self.args
        command = [sys.executable, str(HERE / "train.py"), "--out", str(result), "--cache", str(args.cache)]
        command += ["--megabytes", str(args.megabytes), *args.train, *to_flags(config)]
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        environment = {
            "TORCHINDUCTOR_CACHE_DIR": str(args.cache / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
            "OMP_NUM_THREADS": "1",
        } | os.environ
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.jobs.append(Job(config, process, result, log, time.monotonic()))

    def collect(self) -> None:
        """Note the runs that have ended."""
        for job in [job for job in self.jobs if job.process.poll() is not None]:
            self.jobs.remove(job)
            if job.result.exists():
                self.note(job)
            else:
                self.failed.append(_label(job.config))
                print(f"FAILED {_label(job.config)}\n{job.log.read_text()[-3000:]}", flush=True)

    def note(self, job: Job) -> None:
        record = json.loads(job.result.read_text())
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        seconds = time.monotonic() - job.begin
        self.seconds_per_step[_shape(job.config)] = max(0.0, seconds - START_SECONDS) / job.config.steps
        print(
            f"{time.monotonic() - self.begin:6.0f} s  {_label(job.config):40} held out {record['held_out']:.4f}"
            f"  dense {record['held_out_dense']:.4f}  {record['step_ms']} ms a step, {seconds:.0f} s",
            flush=True,
        )

    def run(self, todo: list[Config]) -> None:
        data.load(self.args.cache, self.args.megabytes)  # once, before the others look for it
        waiting, number = list(todo), 0
        self.work = Path(tempfile.mkdtemp(prefix="quality-"))
        try:
            while (waiting or self.jobs) and self.left() > 0:
                self.collect()
                waiting = [config for config in waiting if self.fits(config)]
                while waiting and len(self.jobs) < self.args.jobs:
                    self.start(waiting.pop(0), number)
                    number += 1
                time.sleep(0.3)
            self.collect()
        finally:
            for job in self.jobs:
                job.stop()
                seconds = time.monotonic() - job.begin
                last = (job.log.read_text().splitlines() or ["nothing"])[-1]
                print(f"stopped after {seconds:.0f} s: {_label(job.config)}; its log ends: {last}", flush=True)
            self.jobs.clear()
            shutil.rmtree(self.work)


def _shape(config: Config) -> tuple[int, ...]:
    return config.dim, config.layers, config.context, config.batch


def _label(config: Config) -> str:
    return f"{config.name}, {config.steps} steps, seed {config.seed}"


def wanted(args: argparse.Namespace) -> list[Config]:
    found = [
        config
        for config in configs(args.size, args.seeds)
        if config.seed >= args.first_seed and any(fnmatch.fnmatchcase(config.name, pattern) for pattern in args.only)
    ]
    if not found:
        raise SystemExit(f"--only {' '.join(args.only)} names no run")
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "quality", help="folder of runs.jsonl")
    parser.add_argument("--done", type=Path, nargs="*", default=[], help="earlier runs.jsonl: taken over")
    parser.add_argument("--size", choices=SIZES, default="default", help="of the model and of the run")
    parser.add_argument("--seeds", type=int, default=1, help="of each recipe")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names in runs.py")
    parser.add_argument("--jobs", type=int, default=4, help="processes side by side")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="then everything is stopped")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "quality", help="text and graphs")
    parser.add_argument("--megabytes", type=float, default=200.0, help="at most so much text")
    parser.add_argument("--list", action="store_true", help="name the runs that would be done, and do nothing")
    parser.add_argument("train", nargs="*", help="after --: flags for train.py, such as --no-compile")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # stops the runs, as the end of the time does
    sweep = Sweep(args)
    todo = wanted(args)
    sweep.take_over(write=not args.list)
    todo = [config for config in todo if key(config) not in sweep.done]
    print(f"{len(sweep.done)} runs are done, {len(todo)} to do", flush=True)
    if args.list:
        print("\n".join(map(_label, todo)))
        return
    sweep.run(todo)
    print(f"{len(sweep.failed)} failed: {'; '.join(sweep.failed) or 'none'}; results in {sweep.file}")


if __name__ == "__main__":
    main()
