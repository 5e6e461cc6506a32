"""Timing of one call, the load of other programs meanwhile, and result lines."""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from shapes import CONFIGS, PARTS

HERE = Path(__file__).resolve().parent
WORK = Path(os.environ.get("PEERS_WORK", HERE.parent.parent / "target" / "peers"))
MODELS = WORK / "models"


def options(description: str, precisions: list[str], parts: list[str]) -> argparse.Namespace:
    """The command line that all peers share: `make` writes model files, `time` measures."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("verb", choices=["make", "time"])
    parser.add_argument("config", choices=CONFIGS)
    parser.add_argument("precision", choices=precisions)
    parser.add_argument("part", choices=parts, nargs="?", help="default of `make`: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="measured time a stage")
    MODELS.mkdir(parents=True, exist_ok=True)
    return parser.parse_args()


def processor_seconds() -> float:
    """Time for which other programs have used the processors so far, summed over the cores."""
    with open("/proc/stat", encoding="ascii") as stat:
        ticks = [int(word) for word in stat.readline().split()[1:9]]
    user, nice, system, _, _, interrupts, soft_interrupts, _ = ticks
    busy = (user + nice + system + interrupts + soft_interrupts) / os.sysconf("SC_CLK_TCK")
    own = resource.getrusage(resource.RUSAGE_SELF)
    return busy - own.ru_utime - own.ru_stime


class Others:
    """Cores that other programs use between construction and `cores()`."""

    def __init__(self) -> None:
        self.busy, self.begun = processor_seconds(), time.perf_counter()

    def cores(self) -> float:
        elapsed = time.perf_counter() - self.begun
        return round(max(0.0, processor_seconds() - self.busy) / elapsed, 2)


def wait_for_quiet(limit: float, most: float) -> None:
    """Sleeps until other programs use less than `most` cores, `limit` seconds at most."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < limit:
        others = Others()
        time.sleep(0.5)
        if others.cores() < most:
            return


def measure(call: Callable[[], object], seconds: float) -> dict[str, float]:
    """Milliseconds of single calls for `seconds`, three calls at least, after one to warm up."""
    call()
    times_ms: list[float] = []
    others, begun = Others(), time.perf_counter()
    while len(times_ms) < 3 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        call()
        times_ms.append((time.perf_counter() - start) * 1e3)
    cores, times = others.cores(), np.array(times_ms)
    return {
        "median": round(float(np.median(times)), 3),
        "min": round(float(times.min()), 3),
        "p10": round(float(np.percentile(times, 10)), 3),
        "p90": round(float(np.percentile(times, 90)), 3),
        "n": len(times_ms),
        "others": cores,
    }


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def emit(stage: str, n_images: int, ms: dict[str, float], **more: object) -> None:
    """Prints the result of one stage as a JSON line."""
    line = {"stage": stage, "images": n_images, "ms": ms, "peak_mb": peak_mb(), **more}
    print(json.dumps(line), flush=True)


def stages_of(part: str) -> list[tuple[str, int]]:
    return PARTS[part]
