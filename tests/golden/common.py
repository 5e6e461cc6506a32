"""What the golden makers share: seeded weights, the golden file, and comparisons with a bound."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# Kernel and thread choice alone move f32 logits by up to 2e-5 between runs.
TOLERANCE = 5e-5


def randomise(module: nn.Module, seed: int) -> None:
    """Fills every parameter so that no norm, bias or gate is trivial and a missed term shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name.lower(), parameter, noise))


def _scaled(name: str, parameter: Tensor, noise: Tensor) -> Tensor:
    is_gate = "alpha_" in name or name.endswith("_gate")
    if is_gate:
        return 0.6 + 0.3 * noise
    if parameter.dim() == 1 and name.endswith("weight"):  # norms
        return 1.0 + 0.1 * noise
    if parameter.dim() == 1:  # biases, class embedding
        return 0.05 * noise
    if "latents" in name and "norm" not in name:
        return noise
    if "embed" in name or "wte" in name:
        return 0.15 * noise
    return noise * (1.3 / parameter[0].numel() ** 0.5)


def pad_left(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of a left-padded batch, both [batch, longest]."""
    length = max(map(len, rows))
    ids = [[pad] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def write_golden(folder: Path, golden: dict[str, Tensor]) -> None:
    """Writes `golden.safetensors`; names are `<case>.<tensor>`."""
    tensors = {name: golden[name].contiguous().clone() for name in sorted(golden)}
    save_file(tensors, str(folder / "golden.safetensors"))


def read_golden(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Case name -> tensor name -> tensor."""
    cases: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(str(folder / "golden.safetensors")).items():
        case, tensor_name = name.split(".", 1)
        cases.setdefault(case, {})[tensor_name] = tensor
    return cases


def require_close(place: str, expected: Tensor, found: Tensor) -> None:
    """Fails with the worst element when two tensors differ by more than the run-to-run noise."""
    if expected.shape != found.shape:
        raise SystemExit(f"{place}: expected shape {tuple(expected.shape)}, found {tuple(found.shape)}")
    worst = (expected - found).abs().max().item()
    if not worst <= TOLERANCE:
        raise SystemExit(f"{place}: differs by {worst:.2e}, allowed {TOLERANCE:.0e}")


def require_equal(place: str, expected: Tensor, found: Tensor) -> None:
    """Fails when two token sequences differ."""
    if expected.tolist() != found.tolist():
        raise SystemExit(f"{place}: expected {expected.tolist()}, found {found.tolist()}")


def greedy_margin(logits: Tensor, suppressed: list[int]) -> float:
    """Smallest distance between best and second logit over rows of [steps, vocab]."""
    logits = logits.clone()
    logits[:, suppressed] = -torch.inf
    best = logits.topk(2, dim=-1).values
    return (best[:, 0] - best[:, 1]).min().item()
