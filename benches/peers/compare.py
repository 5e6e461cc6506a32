#!/usr/bin/env python3
"""Our native backend against PyTorch eager, f32, same shapes, stage by stage in turn.

Each round runs every stage once in each program, one process a stage, A B then B A; the ratio of a
round is PyTorch's median over ours (above 1: ours is faster). Prints a table, or JSON lines.

    flamingoc synth of-mini -o of-mini && flamingoc compile of-mini -o of-mini.flamingo
    cargo build --release -p flamingo-benches
    python compare.py of-mini.flamingo --torch-python venv/bin/python
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys

STAGES = ["encode", "decode", "prefill"]
HERE = pathlib.Path(__file__).resolve().parent


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=pathlib.Path)
    parser.add_argument("--native", type=pathlib.Path,
                        default=HERE.parent.parent / "target/release/native-stages")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="measured time a stage")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def median_ms(command: list[str]) -> float:
    """Median of the one stage that `command` measures."""
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])["ms"]["median"]


def main() -> None:
    options = parse_options()
    shared = ["--threads", str(options.threads), "--seconds", str(options.seconds)]
    ours = [str(options.native), str(options.artifact), *shared]
    torch = [options.torch_python, str(HERE / "torch_eager.py"), "--json", *shared]
    times = {stage: ([], []) for stage in STAGES}
    for turn in range(options.rounds):
        for stage in STAGES:
            programs = [(0, ours), (1, torch)]
            for index, command in programs if turn % 2 == 0 else reversed(programs):
                times[stage][index].append(median_ms([*command, "--stage", stage]))
    if not options.json:
        print(f"{'stage':<8} {'ours ms':>9} {'torch ms':>9} {'torch/ours':>11}  (min to max of rounds)")
    for stage, (own, peer) in times.items():
        ratios = [b / a for a, b in zip(own, peer)]
        row = dict(stage=stage, ours_ms=statistics.median(own), torch_ms=statistics.median(peer),
                   ratio=statistics.median(ratios), ratio_min=min(ratios), ratio_max=max(ratios))
        if options.json:
            print(json.dumps(row))
        else:
            print(f"{stage:<8} {row['ours_ms']:>9.2f} {row['torch_ms']:>9.2f} {row['ratio']:>11.2f}"
                  f"  ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})")


if __name__ == "__main__":
    main()
