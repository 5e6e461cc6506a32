#!/usr/bin/env python3
"""Times the peers and ours on identical shapes, in turn, and prints the ratios.

    benches/peers/setup.sh
    cargo build --release -p flamingoc -p flamingo-benches
    target/peers/venv/bin/python benches/peers/run.py

Every measurement is a process of its own that loads one model; within an item (stages of one
model, one class of precision) the contestants take turns, A B C, B C A, C A B. Results are lines
of JSON in target/peers/results.jsonl; what stands there is not measured again, so an interrupted
run goes on where it was (`--fresh` begins anew). README.md has the rules.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import report
from measuring import HERE, MODELS, WORK, wait_for_quiet
from shapes import CONFIGS

ITEMS = {"encode": ["vision", "resampler"], "cached": ["cached"], "projected": ["projected"]}
LANGUAGE = ("cached", "projected")
ALL = ("vision", "resampler", *LANGUAGE)
# BLAS libraries read these; a peer decides by itself.
UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OMP_NUM_THREADS")
SECONDS_A_PROCESS = 300


@dataclass(frozen=True)
class Contestant:
    peer: str
    script: str
    precision: str  # as the script calls it
    group: str  # the class of precision that it is compared in
    parts: tuple[str, ...] = ALL
    asked: bool = False  # runs only if named by --peers

    @property
    def name(self) -> str:
        return f"{self.peer} {self.precision}"


CONTESTANTS = [
    *(
        Contestant("ours", "ours.py", precision, precision, ("vision", *LANGUAGE))
        for precision in ("f32", "bf16", "int8", "int4")
    ),
    Contestant("onnxruntime", "peer_onnxruntime.py", "f32", "f32"),
    Contestant("onnxruntime", "peer_onnxruntime.py", "int8", "int8"),
    Contestant("onnxruntime", "peer_onnxruntime.py", "w8b128", "int8", LANGUAGE),
    Contestant("onnxruntime", "peer_onnxruntime.py", "w4b128", "int4", LANGUAGE),
    Contestant("openvino", "peer_openvino.py", "f32", "f32"),
    Contestant("openvino", "peer_openvino.py", "bf16", "bf16"),
    Contestant("openvino", "peer_openvino.py", "int8", "int8"),
    Contestant("openvino", "peer_openvino.py", "w8", "int8", LANGUAGE),
    Contestant("openvino", "peer_openvino.py", "w4g128", "int4", LANGUAGE),
    Contestant("torch", "peer_torch.py", "f32", "f32"),
    Contestant("torch", "peer_torch.py", "bf16", "bf16"),
    Contestant("torch-compile", "peer_torch.py", "f32-compile", "f32", asked=True),
    Contestant("torch-compile", "peer_torch.py", "bf16-compile", "bf16", asked=True),
    Contestant("llama.cpp", "peer_llama.py", "q8_0", "int8", ("cached",)),
    Contestant("llama.cpp", "peer_llama.py", "q4_0", "int4", ("cached",)),
    Contestant("tract", "ours.py", "f32-tract", "f32", ("vision", *LANGUAGE), asked=True),
]
PEERS = list(dict.fromkeys(contestant.peer for contestant in CONTESTANTS))


def main() -> None:
    chosen = parse_options()
    results = Results(chosen.results, chosen.fresh, chosen.again)
    present = prepare(chosen.config, chosen_contestants(chosen))
    results.append({"run": description(chosen)})
    limits(chosen.threads, results)
    for group in chosen.precisions:
        for item in chosen.items:
            run_item(item, [c for c in present if c.group == group], chosen, results)
    limits(chosen.threads, results)
    table = report.markdown(results.lines)
    chosen.markdown.write_text(table, encoding="utf-8")
    print(table)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=CONFIGS, default="of-3b-quarter")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="measured time a stage and round"
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=15.0,
        help="longest wait for a quiet machine before each process, in seconds",
    )
    parser.add_argument("--items", nargs="+", choices=ITEMS, default=list(ITEMS))
    groups = ["f32", "bf16", "int8", "int4"]
    parser.add_argument("--precisions", nargs="+", choices=groups, default=groups)
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="default: all but slow starters")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--ours-only", action="store_true")
    only.add_argument("--peers-only", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--again", action="store_true", help="repeat rounds that were disturbed")
    parser.add_argument("--results", type=Path, default=WORK / "results.jsonl")
    parser.add_argument("--markdown", type=Path, default=WORK / "RESULTS.md")
    return parser.parse_args()


class Results:
    """The lines of a results file."""

    def __init__(self, path: Path, fresh: bool, again: bool) -> None:
        self.path, self.again = path, again
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        self.lines = report.read(path) if path.exists() else []

    def append(self, line: dict[str, object]) -> None:
        line = {"at": datetime.datetime.now().isoformat(timespec="seconds"), **line}
        self.lines.append(line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def has(self, key: dict[str, object]) -> bool:
        """Whether lines with all of `key` are there (undisturbed, with `--again`)."""
        found = [line for line in self.lines if key.items() <= line.items()]
        if self.again:
            found = [line for line in found if not report.disturbed(line)]
        return bool(found)


def chosen_contestants(chosen: argparse.Namespace) -> list[Contestant]:
    found = [c for c in CONTESTANTS if c.group in chosen.precisions]
    found = [c for c in found if (c.peer in chosen.peers if chosen.peers else not c.asked)]
    if chosen.ours_only:
        return [c for c in found if c.peer == "ours"]
    return [c for c in found if c.peer != "ours"] if chosen.peers_only else found


# ---- preparing


def prepare(config_name: str, contestants: list[Contestant]) -> list[Contestant]:
    """Makes the model files that are missing. Those that cannot be made are told and left out."""
    present = []
    for contestant in contestants:
        made = MODELS / f".made-{config_name}-{contestant.name.replace(' ', '-')}"
        if contestant.script != "ours.py" and made.exists():
            present.append(contestant)
            continue
        tell(f"making {config_name}, {contestant.name}")
        failure = call(contestant, ["make", config_name, contestant.precision])[1]
        if failure:
            tell(f"left out: {contestant.name}: {failure}")
            continue
        made.parent.mkdir(parents=True, exist_ok=True)
        made.touch()
        present.append(contestant)
    return present


def call(contestant: Contestant, arguments: list[str]) -> tuple[list[dict], str | None]:
    """The lines of JSON that a script printed, and why it failed if it did."""
    environment = {name: value for name, value in os.environ.items() if name not in UNSET}
    environment |= {"PEERS_WORK": str(WORK), "OMP_NUM_THREADS": thread_count(arguments)}
    command = [sys.executable, str(HERE / contestant.script), *arguments]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=SECONDS_A_PROCESS
        )
    except subprocess.TimeoutExpired:
        return [], f"took more than {SECONDS_A_PROCESS} s"
    if done.returncode != 0:
        complaints = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        ours = [line for line in complaints if line.startswith("error:")]
        return [], (ours or complaints[-1:])[0]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], None


def thread_count(arguments: list[str]) -> str:
    return arguments[arguments.index("--threads") + 1] if "--threads" in arguments else "2"


# ---- measuring


def run_item(
    item: str, contestants: list[Contestant], chosen: argparse.Namespace, results: Results
) -> None:
    """All rounds of one item: in each, every contestant once, in an order that rotates."""
    taking_part = [c for c in contestants if set(c.parts) & set(ITEMS[item])]
    for turn in range(chosen.rounds):
        first = turn % max(1, len(taking_part))
        for contestant in taking_part[first:] + taking_part[:first]:
            for part in ITEMS[item]:
                if part in contestant.parts:
                    run_part(part, contestant, turn, chosen, results)


def run_part(
    part: str, contestant: Contestant, turn: int, chosen: argparse.Namespace, results: Results
) -> None:
    key = {
        "config": chosen.config,
        "threads": chosen.threads,
        "peer": contestant.peer,
        "precision": contestant.precision,
        "part": part,
        "round": turn,
    }
    if results.has(key):
        return
    wait_for_quiet(chosen.wait, report.spare_cores(chosen.threads) + 0.2)
    found, failure = call(
        contestant,
        [
            "time",
            chosen.config,
            contestant.precision,
            part,
            "--threads",
            str(chosen.threads),
            "--seconds",
            str(chosen.seconds),
        ],
    )
    if failure:
        tell(f"failed: {contestant.name}, {part}: {failure}")
    for line in found:
        results.append({**key, "group": contestant.group, "cores": os.cpu_count(), **line})
        ms = line["ms"]
        tell(
            f"{contestant.group:5} round {turn} {contestant.name:20} {line['stage']:17}"
            f"{line['images']:3} {ms['median']:10.2f} ms  others {ms['others']:.2f}"
        )


def limits(threads: int, results: Results) -> None:
    """What the machine can do, at this moment."""
    program = WORK / "limits"
    if not program.exists():
        tell(f"no limits: `{program}` is missing\n\nhint: run benches/peers/setup.sh")
        return
    done = subprocess.run([program, str(threads)], capture_output=True, text=True)
    if done.returncode != 0:
        tell(f"no limits: exit status {done.returncode}; they need AVX-512 with BF16 and VNNI")
    for line in done.stdout.splitlines():
        results.append(json.loads(line))


def description(chosen: argparse.Namespace) -> dict[str, object]:
    with open("/proc/cpuinfo", encoding="ascii") as file:
        facts = dict(line.partition(":")[::2] for line in file if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    vectors = [
        flag
        for flag in facts["flags"].split()
        if flag in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile")
    ]
    processor = f"{facts['model name']} (family {facts['cpu family']} model {facts['model']})"
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "vectors": vectors,
        "memory_gb": round(memory_gb),
        "system": platform.platform(terse=True),
        "command": shlex.join(["run.py", *sys.argv[1:]]),
        "config": chosen.config,
    }


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
