#!/usr/bin/env python3
"""Tables of a results file of run.py: ratios to the best peer first, then every contestant.

python report.py results.jsonl > RESULTS.md
"""

import json
import os
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from shapes import CONFIGS, counts, stored_bytes

Line = dict
Key = tuple[str, int, str, int, str]  # config, threads, stage, images, group

STAGES = ["encode", "prefill", "decode-cached", "decode-projected"]
GROUPS = ["f32", "bf16", "int8", "int4"]
PEAK_OF_GROUP = {"f32": "f32", "bf16": "bf16", "int8": "int8", "int4": "int8"}
# Relative difference of the mean absolute output from that of the f32 peers.
TOLERANCE = {"f32": 1e-4, "bf16": 0.02, "int8": 0.05, "int4": 0.05}


def main() -> None:
    sys.stdout.write(markdown(read(Path(sys.argv[1]))))


def read(path: Path) -> list[Line]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def spare_cores(threads: int, cores: int | None = None) -> int:
    """Cores that other programs may use without taking ours."""
    return max(0, (cores or os.cpu_count() or 1) - threads)


def disturbed(line: Line) -> bool:
    """Whether other programs took cores from this measurement."""
    return mark(line["ms"]["others"] or 0, line["threads"], line["cores"]) == "!"


def mark(others: float, threads: int, cores: int) -> str:
    if others > spare_cores(threads, cores) + 0.3:
        return "!"
    return "~" if others > 0.3 else ""


# ---- rows: one contestant at one stage


class Row:
    """Rounds of one contestant."""

    def __init__(self, key: Key, peer: str, precision: str) -> None:
        self.config, self.threads, self.stage, self.images, self.group = key
        self.peer, self.precision = peer, precision
        self.rounds: dict[int, list[Line]] = defaultdict(list)

    @property
    def name(self) -> str:
        return self.peer if self.peer == "ours" else f"{self.peer} {self.precision}"

    def ms_of(self, turn: int) -> float:
        """Of encode: the sum of its parts."""
        return sum(line["ms"]["median"] for line in self.rounds[turn])

    def used(self) -> list[int]:
        """Rounds that were not disturbed, or all if there is none."""
        quiet = [turn for turn, lines in self.rounds.items() if not any(map(disturbed, lines))]
        return sorted(quiet or self.rounds)

    def ms(self) -> float:
        return statistics.median(self.ms_of(turn) for turn in self.used())

    def range(self) -> tuple[float, float]:
        times = [self.ms_of(turn) for turn in self.used()]
        return min(times), max(times)

    def others(self) -> float:
        return max(line["ms"]["others"] or 0 for turn in self.used() for line in self.rounds[turn])

    def mark(self) -> str:
        return mark(self.others(), self.threads, self.lines()[0]["cores"])

    def lines(self) -> list[Line]:
        return [line for lines in self.rounds.values() for line in lines]

    def is_complete(self) -> bool:
        """A peer's encode needs both parts in a round."""
        needed = (
            2
            if self.stage == "encode" and "encode" not in {line["stage"] for line in self.lines()}
            else 1
        )
        self.rounds = {t: lines for t, lines in self.rounds.items() if len(lines) == needed}
        return bool(self.rounds)

    def comparable(self) -> bool:
        """Whether it computes the same function as the others."""
        return self.peer != "llama.cpp"

    def work(self, full: bool = False) -> tuple[float, float]:
        """(operations, bytes of weights) of one call."""
        config, some = CONFIGS[self.config], self.lines()[0]
        stage = self.stage
        if self.peer in ("ours", "tract") and stage == "decode-projected":
            stage = "decode-cached"
        parts = ["vision", "resampler"] if stage == "encode" else [stage]
        layers = None if full else some.get("language_layers")
        found = [
            counts(config, part, self.images, layers, some.get("gated", True), full)
            for part in parts
        ]
        precision = self.precision.partition("-")[0]
        stored = (
            stored_bytes(config, precision, part, n_weights)
            for part, (_, n_weights) in zip(parts, found, strict=True)
        )
        return sum(operations for operations, _ in found), sum(stored)

    def gb_per_s(self) -> float:
        return self.work()[1] / self.ms() / 1e6

    def gop_per_s(self) -> float:
        return self.work()[0] / self.ms() / 1e6

    def full_ms(self) -> float:
        """Time of the real model, by bytes where one token is decoded, else by operations."""
        which = 1 if self.is_bound_by_memory() else 0
        return self.ms() * self.work(full=True)[which] / self.work()[which]

    def is_bound_by_memory(self) -> bool:
        projects = self.stage == "decode-projected" and self.peer not in ("ours", "tract")
        return self.stage.startswith("decode") and not (projects and self.images > 1)


def rows(lines: list[Line]) -> dict[Key, list[Row]]:
    """Of a round that was measured twice the run with the least foreign load stays."""
    best: dict[tuple, Line] = {}
    for line in lines:
        if "stage" not in line:
            continue
        key = tuple(
            line[name]
            for name in ("config", "threads", "peer", "precision", "stage", "images", "round")
        )
        if key not in best or (line["ms"]["others"] or 0) <= (best[key]["ms"]["others"] or 0):
            best[key] = line
    found: dict[tuple, Row] = {}
    for line in best.values():
        stage = "encode" if line["stage"] in ("vision", "resampler") else line["stage"]
        key = (line["config"], line["threads"], stage, line["images"], line["group"])
        who = (line["peer"], line["precision"])
        found.setdefault((key, who), Row(key, *who)).rounds[line["round"]].append(line)
    table: dict[Key, list[Row]] = defaultdict(list)
    for (key, _), row in found.items():
        if row.is_complete():
            table[key].append(row)
    return dict(sorted(table.items(), key=order))


def order(item: tuple[Key, list[Row]]) -> tuple:
    config, threads, stage, images, group = item[0]
    return config, -threads, GROUPS.index(group), STAGES.index(stage), images


def ratios(peer: Row, ours: Row) -> list[float]:
    """Peer's time over ours, round by round."""
    both = [turn for turn in ours.used() if turn in peer.used()]
    both = both or [turn for turn in ours.rounds if turn in peer.rounds]
    return [peer.ms_of(turn) / ours.ms_of(turn) for turn in both]


# ---- text


def markdown(lines: list[Line]) -> str:
    table = rows(lines)
    limits = best_limits(lines)
    text = ["# Results\n", *header(lines), *limits_table(limits), *summary(table)]
    for key, contestants in table.items():
        text += details(key, contestants, limits)
    text += differences(lines)
    return "\n".join(text) + "\n"


def header(lines: list[Line]) -> list[str]:
    runs = [line for line in lines if "run" in line]
    machine = runs[-1]["run"]
    versions = sorted({(line["peer"], line["version"]) for line in lines if "version" in line})
    commands = list(dict.fromkeys(line["run"]["command"] for line in runs))
    return [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"{' '.join(machine['vectors'])}; {machine['system']}. "
        f"Measured {runs[0]['at'][:16]} to {lines[-1]['at'][:16]}.\n",
        "Versions: " + ", ".join(f"{peer} {version}" for peer, version in versions) + ".\n",
        *(f"    {command}\n" for command in commands),
        "`!`: other programs took cores, the time is an upper bound. `~`: other programs ran on "
        "cores that were spare, and shared memory bandwidth and cache. Times are medians of "
        "rounds, in brackets the least and the most.\n",
    ]


def best_limits(lines: list[Line]) -> dict[tuple[str, int], float]:
    found: dict[tuple[str, int], float] = defaultdict(float)
    for line in lines:
        if "limit" in line:
            name = "read" if line["limit"].startswith("read") else line["limit"]
            found[name, line["threads"]] = max(found[name, line["threads"]], line["best"])
    return found


def limits_table(limits: dict[tuple[str, int], float]) -> list[str]:
    if not limits:
        return []
    text = [
        "| threads | read GB/s | f32 GOP/s | bf16 GOP/s | int8 GOP/s |",
        "|---:|---:|---:|---:|---:|",
    ]
    for threads in sorted({threads for _, threads in limits}):
        values = " | ".join(
            f"{limits[name, threads]:.0f}" for name in ("read", "f32", "bf16", "int8")
        )
        text.append(f"| {threads} | {values} |")
    return [*text, ""]


def summary(table: dict[Key, list[Row]]) -> list[str]:
    text = [
        "## Ours and the best peer\n",
        "The ratio is the peer's time over ours: above 1, ours is faster.\n",
        "| shapes | threads | precision | stage | images | ours ms | best peer | its ms | ratio |",
        "|---|---:|---|---|---:|---:|---|---:|---:|",
    ]
    for (config, threads, stage, images, group), contestants in table.items():
        ours = next((row for row in contestants if row.peer == "ours"), None)
        peers = [row for row in contestants if row is not ours and row.comparable()]
        best = min(peers, key=Row.ms, default=None)
        text.append(
            f"| {config} | {threads} | {group} | {stage} | {images} | {time(ours)} | "
            f"{best.name if best else 'none'} | {time(best)} | {ratio_text(best, ours)} |"
        )
    return [*text, ""]


def time(row: Row | None) -> str:
    return f"{row.ms():.1f}{row.mark()}" if row else "none"


def ratio_text(peer: Row | None, ours: Row | None) -> str:
    found = ratios(peer, ours) if peer and ours else []
    if not found:
        return ""
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def details(key: Key, contestants: list[Row], limits: dict[tuple[str, int], float]) -> list[str]:
    config, threads, stage, images, group = key
    ours = next((row for row in contestants if row.peer == "ours"), None)
    text = [
        f"## {config}, {threads} thread(s), {group}, {stage}, {images} image(s)\n",
        "| who | ms | full model ms | GOP/s | % of peak | weights GB/s | % of read | load ms "
        "| memory MB | others | time / ours |",
        "|---|" + "---:|" * 10,
    ]
    for row in sorted(contestants, key=Row.ms):
        low, high = row.range()
        speed = f"{speed_text(row.gop_per_s(), limits[PEAK_OF_GROUP[group], threads])} | | "
        if row.is_bound_by_memory():
            speed = f"| | {speed_text(row.gb_per_s(), limits['read', threads])}"
        name = row.name if row.comparable() else f"{row.name} (language model alone)"
        load = sum(line.get("load_ms") or 0 for line in row.rounds[row.used()[0]])
        peak = max(line.get("peak_mb") or 0 for line in row.lines()) or ""
        against = "" if row is ours or not row.comparable() else ratio_text(row, ours)
        text.append(
            f"| {name} | {row.ms():.1f} ({low:.1f} to {high:.1f}) | {row.full_ms():.0f} | "
            f"{speed} | {load} | {peak} | {row.others():.2f} {row.mark()} | {against} |"
        )
    return [*text, ""]


def speed_text(value: float, limit: float) -> str:
    """Two cells: the speed, and its part of the limit."""
    digits = 0 if value >= 100 else 1
    return f"{value:.{digits}f} | {100 * value / limit:.0f}" if limit else f"{value:.{digits}f} | "


def differences(lines: list[Line]) -> list[str]:
    """Peers have equal weights and inputs; those whose outputs differ are named."""
    found: dict[tuple, dict[tuple, float]] = defaultdict(dict)
    for line in lines:
        if "check" in line:
            stage = (line["config"], line["stage"], line["images"])
            found[stage][line["group"], line["peer"], line["precision"]] = line["check"]
    text = []
    for (config, stage, images), checks in found.items():
        exact = [value for (group, _, _), value in checks.items() if group == "f32"]
        for (group, peer, precision), value in checks.items():
            if exact and abs(value / statistics.median(exact) - 1) > TOLERANCE[group]:
                text.append(
                    f"* {config}, {stage}, {images} image(s): {peer} {precision} gives "
                    f"{value:.5f}, f32 peers {statistics.median(exact):.5f}"
                )
    return ["## Outputs that differ\n", "Mean absolute output.\n", *text] if text else []


if __name__ == "__main__":
    main()
