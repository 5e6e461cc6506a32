"""flamingoc on CUDA beside PyTorch on CUDA, f16, equal shapes, in one run on one GPU.

    python benches/peers/gpu.py of-3b artifact.flamingo --flamingoc target/release/flamingoc

The artifact is made by `flamingoc synth of-3b -o of-3b` and `flamingoc compile of-3b -o artifact.flamingo --precision f16
--target cuda --no-gate`. PyTorch runs the modules of `peer_torch.py` with random weights: eager, and for a decode step
also as a captured CUDA graph, which takes one length of the past only. Prints a line of JSON for each figure.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace

import torch

import peer_torch
from measuring import measure
from shapes import CONFIGS, PARTS, Config

GPU = torch.device("cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", choices=["of-3b", "of-3b-quarter", "of-mini"])
    parser.add_argument("artifact", help="compiled with --target cuda")
    parser.add_argument("--flamingoc", default="target/release/flamingoc")
    parser.add_argument("--seconds", type=float, default=2.0, help="measured time a stage")
    chosen = parser.parse_args()
    config = CONFIGS.get(chosen.config) or whole(CONFIGS["of-3b-quarter"])
    say(gpu=torch.cuda.get_device_name(), copy_gb_per_s=bandwidth(), torch=torch.__version__)
    ours(chosen.artifact, chosen.flamingoc, chosen.seconds)
    peer_torch.parameter = random_parameter
    with torch.inference_mode():
        for part in PARTS:
            theirs(config, part, chosen.seconds)
    ours(chosen.artifact, chosen.flamingoc, chosen.seconds)


def whole(config: Config) -> Config:
    return replace(
        config,
        vision=replace(config.vision, n_built=config.vision.n_layers),
        language=replace(config.language, n_built=config.language.n_layers),
    )


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def bandwidth() -> float:
    """GB/s at which 4 GB are copied, read and written."""
    values = torch.ones(1 << 30, dtype=torch.float32, device=GPU)
    other = torch.empty_like(values)
    ms = timed(lambda: other.copy_(values), 0.5)["median"]
    return round(2 * values.nbytes / ms / 1e6)


def timed(call, seconds: float) -> dict:
    def to_the_end() -> None:
        call()
        torch.cuda.synchronize()

    return measure(to_the_end, seconds)


def random_parameter(_name: str, *shape: int, scale: float = 0.02) -> torch.nn.Parameter:
    values = torch.randn(*shape, dtype=torch.float16, device=GPU) * scale
    return torch.nn.Parameter(values, requires_grad=False)


def to_gpu(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.to(GPU)
    return [to_gpu(part) for part in value] if isinstance(value, list) else value


def theirs(config: Config, part: str, seconds: float) -> None:
    modules = {"vision": peer_torch.Vision, "resampler": peer_torch.Resampler}
    model = modules.get(part, peer_torch.Decoder)(config).eval().to(GPU, torch.float16)
    weight_bytes = sum(p.numel() * 2 for p in model.parameters())
    for stage, n_images in PARTS[part]:
        inputs = peer_torch.inputs(config, stage, n_images)
        arguments = [to_gpu(peer_torch.tensors(value, torch.float16)) for value in inputs]
        fields = {"stage": stage, "images": n_images, "weight_bytes": weight_bytes}
        ms = timed(lambda arguments=arguments: model(*arguments), seconds)
        say(who="torch", **fields, ms=ms)
        if stage.startswith("decode"):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model(*arguments)
            say(who="torch-cuda-graph", **fields, ms=timed(graph.replay, seconds))
    del model
    torch.cuda.empty_cache()


def ours(artifact: str, flamingoc: str, seconds: float) -> None:
    command = [flamingoc, "bench", artifact, "--backend", "ort", "--ep", "cuda", "--strict-ep"]
    command += ["--images", "1,32", "--budget-s", str(8 * seconds), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    for result in json.loads(done.stdout)["results"]:
        place = {key: result[key] for key in ("stage", "images", "context")}
        say(who="flamingoc", **place, ms=result["ms"])


if __name__ == "__main__":
    main()
