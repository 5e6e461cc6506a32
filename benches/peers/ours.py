"""Our own engine on the same shapes, with the command line of a peer.

Shapes come from the preset of `flamingoc synth` that has the configuration's name; weights are
random, of the same distribution for every precision. Precisions: those of `flamingoc compile
--precision`, and `f32-tract`, which runs the f32 artifact on tract (build flamingo-benches with
`--features tract`).
"""

import json
import os
import subprocess
from pathlib import Path

from measuring import HERE, MODELS, emit, options

PRECISIONS = ["f32", "bf16", "int8", "int4", "f32-tract"]
PARTS = ["vision", "projected", "cached"]
PROGRAMS = Path(os.environ.get("PEERS_OURS", HERE.parent.parent / "target" / "release"))


def main() -> None:
    chosen = options(__doc__.splitlines()[0], PRECISIONS, PARTS)
    precision, _, backend = chosen.precision.partition("-")
    if chosen.verb == "make":
        make(chosen.config, precision)
        return
    command = [
        str(PROGRAMS / "native-stages"),
        str(artifact(chosen.config, precision)),
        "--threads",
        str(chosen.threads),
        "--seconds",
        str(chosen.seconds),
    ]
    if backend:
        command += ["--backend", backend]
    for stage, n_images in stages_of(chosen.part):
        time_stage(command, stage, n_images)


def stages_of(part: str) -> list[tuple[str, int]]:
    """Our encode is `vision` and `resampler` at once, and nothing of ours projects the K/V of
    pictures for each token: our decode step stands in both places."""
    return {
        "vision": [("encode", 1)],
        "cached": [("decode-cached", 1), ("decode-cached", 32)],
        "projected": [("prefill", 1), ("decode-projected", 1), ("decode-projected", 32)],
    }[part]


def time_stage(command: list[str], stage: str, n_images: int) -> None:
    arguments = ["--stage", stage.partition("-")[0], "--images", str(n_images)]
    result = subprocess.run([*command, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(result.stdout.splitlines()[-1])
    ms = {name: round(value, 3) for name, value in found["ms"].items()}
    emit(
        stage,
        n_images,
        ms,
        load_ms=round(found["load_ms"]),
        version=version(),
        peak_mb=found.get("peak_mb"),
    )


def version() -> str:
    command = [str(PROGRAMS / "flamingoc"), "--version"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]


def artifact(config_name: str, precision: str) -> Path:
    return MODELS / "ours" / f"{config_name}-{precision}.flamingo"


def make(config_name: str, precision: str) -> None:
    """Random checkpoint once, artifact whenever the compiler is newer than it."""
    flamingoc, source = PROGRAMS / "flamingoc", MODELS / "ours" / config_name
    target = artifact(config_name, precision)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        subprocess.run([flamingoc, "synth", config_name, "-o", source], check=True)
    manifest = target / "manifest.json"
    if manifest.exists() and manifest.stat().st_mtime > flamingoc.stat().st_mtime:
        return
    # Random weights: only their bytes and times count.
    wanted = [] if precision == "f32" else ["--precision", precision, "--no-calibration", "--no-gate"]
    subprocess.run([flamingoc, "compile", source, "-o", target, "--overwrite", *wanted], check=True)


if __name__ == "__main__":
    main()
