"""PyTorch on the CPU: OpenFlamingo's arithmetic as plain modules, eager or compiled
(`torch.compile` with frozen weights; minutes of compilation). Precisions: f32, bf16 (weights and
activations), and the same with `-compile` at the end.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measuring import emit, measure, options, stages_of
from shapes import CONFIGS, Config, language_inputs, patch_tokens, pixels, weight

PRECISIONS = ["f32", "bf16", "f32-compile", "bf16-compile"]
PARTS = ["vision", "resampler", "projected", "cached"]


def main() -> None:
    chosen = options(__doc__.splitlines()[0], PRECISIONS, PARTS)
    if chosen.verb == "make":
        return  # weights are made when a part is loaded
    precision, _, compile_mode = chosen.precision.partition("-")
    torch.set_num_threads(chosen.threads)
    with torch.no_grad() if compile_mode else torch.inference_mode():
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[precision]
        time_part(CONFIGS[chosen.config], dtype, chosen.part, chosen.seconds, bool(compile_mode))


def time_part(
    config: Config, dtype: torch.dtype, part: str, seconds: float, compiled: bool
) -> None:
    begun = time.perf_counter()
    model = {"vision": Vision, "resampler": Resampler}.get(part, Decoder)(config).eval().to(dtype)
    if compiled:
        import torch._inductor.config as inductor

        inductor.freezing = True
        model = torch.compile(model, dynamic=False)
    load_ms = round((time.perf_counter() - begun) * 1e3)
    for stage, n_images in stages_of(part):
        arguments = [tensors(value, dtype) for value in inputs(config, stage, n_images)]
        check = float(model(*arguments)[0].float().abs().mean())
        ms = measure(lambda arguments=arguments: model(*arguments), seconds)
        emit(stage, n_images, ms, check=check, load_ms=load_ms, version=torch.__version__)


def inputs(config: Config, stage: str, n_images: int) -> list:
    """Positional arguments of the module that runs `stage`."""
    if stage == "vision":
        return [pixels()]
    if stage == "resampler":
        return [patch_tokens(config)[None]]
    found = language_inputs(config, stage, n_images)
    media = [found["xk"], found["xv"]] if stage == "decode-cached" else None
    visual = None if media else found["visual"][None]
    past = [
        [found[f"{part}{layer}"] for part in ("pk", "pv")]
        for layer in range(config.language.n_built)
    ]
    return [
        found["x"][None],
        visual,
        media,
        found["media_bias"],
        found["bias"],
        None if stage == "prefill" else past,
    ]


def tensors(value: object, dtype: torch.dtype) -> object:
    """Arrays, at any depth of lists, as tensors."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value)).to(dtype)
    return [tensors(part, dtype) for part in value] if isinstance(value, list) else value


# ---- parts; shapes are [1, length, width]


def parameter(name: str, *shape: int, scale: float = 0.02) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(weight(name, *shape, scale=scale)), requires_grad=False)


def linear(name: str, n_in: int, n_out: int, bias: bool = False) -> nn.Linear:
    made = nn.Linear(n_in, n_out, bias=bias, device="meta")
    made.weight = nn.Parameter(parameter(name, n_in, n_out).t().contiguous(), requires_grad=False)
    if bias:
        made.bias = parameter(name + ".bias", n_out)
    return made


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """[1, length, width] -> [1, heads, length, head width]"""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    def __init__(self, name: str, width: int, inner: int, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=bias)
        self.up, self.down = linear(name + "up", width, inner), linear(name + "down", inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class VisionLayer(nn.Module):
    def __init__(self, config: Config, name: str) -> None:
        super().__init__()
        width, mlp_width = config.vision.width, config.vision.mlp_width
        self.n_heads = config.vision.n_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (
            linear(name + part, width, width, True) for part in ("q", "k", "v", "out")
        )
        self.up = linear(name + "up", width, mlp_width, True)
        self.down = linear(name + "down", mlp_width, width, True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_norm(x)
        q, k, v = (split_heads(part(y), self.n_heads) for part in (self.q, self.k, self.v))
        x = x + self.out(join_heads(F.scaled_dot_product_attention(q, k, v)))
        y = self.up(self.mlp_norm(x))
        return x + self.down(y * torch.sigmoid(1.702 * y))


class Vision(nn.Module):
    """[1, 3, 224, 224] -> patch tokens [1, 256, width]"""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.vision.width
        self.patches = nn.Conv2d(3, width, 14, 14, bias=False)
        self.patches.weight = parameter("patch", width, 3, 14, 14)
        self.class_token = parameter("class", 1, 1, width)
        self.positions = parameter("positions", 1, 257, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(
            *(VisionLayer(config, f"vision.{layer}.") for layer in range(config.vision.n_built))
        )

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token, patches], dim=1) + self.positions
        return self.layers(self.norm(x))[:, 1:]


class ResamplerLayer(nn.Module):
    def __init__(self, config: Config, name: str) -> None:
        super().__init__()
        width, inner = config.resampler.width, config.inner_width
        self.n_heads = config.inner_heads
        self.media_norm, self.latent_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (linear(name + part, width, inner) for part in "qkv")
        self.out = linear(name + "out", inner, width)
        self.feed_forward = FeedForward(name, width, config.resampler.mlp_width)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        normed = self.latent_norm(latents)
        both = torch.cat([self.media_norm(media), normed], dim=1)
        q, k, v = (
            split_heads(part, self.n_heads) for part in (self.q(normed), self.k(both), self.v(both))
        )
        latents = latents + self.out(join_heads(F.scaled_dot_product_attention(q, k, v)))
        return latents + self.feed_forward(latents)


class Resampler(nn.Module):
    """Patch tokens [1, 256, width] -> visual tokens [1, 64, width]"""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.latents = parameter("latents", 1, 64, config.resampler.width, scale=1)
        self.layers = nn.ModuleList(
            ResamplerLayer(config, f"resampler.{layer}.")
            for layer in range(config.resampler.n_layers)
        )
        self.norm = nn.LayerNorm(config.resampler.width)

    def forward(self, media: Tensor) -> Tensor:
        latents = self.latents
        for layer in self.layers:
            latents = layer(media, latents)
        return self.norm(latents)


class GatedBlock(nn.Module):
    def __init__(self, config: Config, name: str) -> None:
        super().__init__()
        width, inner = config.language.width, config.inner_width
        self.n_heads = config.inner_heads
        self.norm = nn.LayerNorm(width)
        self.q, self.out = linear(name + "q", width, inner), linear(name + "out", inner, width)
        self.k, self.v = (linear(name + part, config.resampler.width, inner) for part in "kv")
        self.feed_forward = FeedForward(name, width, config.language.mlp_width)
        # tanh(20) is 1, as folded into the weights of the other peers.
        self.attention_gate = nn.Parameter(torch.full((1,), 20.0))
        self.feed_forward_gate = nn.Parameter(torch.full((1,), 20.0))

    def forward(
        self, x: Tensor, visual: Tensor | None, media: list[Tensor] | None, bias: Tensor
    ) -> Tensor:
        if media is None:
            media = [split_heads(part(visual), self.n_heads) for part in (self.k, self.v)]
        q = split_heads(self.q(self.norm(x)), self.n_heads)
        attended = F.scaled_dot_product_attention(q, *media, attn_mask=bias)
        x = x + self.attention_gate.tanh() * self.out(join_heads(attended))
        return x + self.feed_forward_gate.tanh() * self.feed_forward(x)


class DecoderLayer(nn.Module):
    """A gated block and the MPT layer that follows it."""

    def __init__(self, config: Config, name: str) -> None:
        super().__init__()
        width = config.language.width
        self.n_heads = config.language.n_heads
        self.gated = GatedBlock(config, name + "gated.")
        self.norm = nn.LayerNorm(width, bias=False)
        self.qkv, self.out = (
            linear(name + "qkv", width, 3 * width),
            linear(name + "out", width, width),
        )
        self.feed_forward = FeedForward(name, width, config.language.mlp_width, bias=False)

    def forward(self, x: Tensor, bias: Tensor, past: list[Tensor] | None) -> tuple[Tensor, list]:
        qkv = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (split_heads(part, self.n_heads) for part in qkv)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        x = x + self.out(join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))
        return x + self.feed_forward(x), [k, v]


class Decoder(nn.Module):
    """Embedded tokens [1, length, width] -> logits of the last position [1, 1, vocabulary], K/V."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        language = config.language
        self.layers = nn.ModuleList(
            DecoderLayer(config, f"language.{layer}.") for layer in range(language.n_built)
        )
        self.norm = nn.LayerNorm(language.width, bias=False)
        self.head = linear("head", language.width, language.vocabulary)

    def forward(
        self,
        x: Tensor,
        visual: Tensor | None,
        media: list[Tensor] | None,
        media_bias: Tensor,
        bias: Tensor,
        past: list | None,
    ) -> tuple[Tensor, list]:
        present = []
        for layer_idx, layer in enumerate(self.layers):
            x = layer.gated(x, visual, media, media_bias)
            x, kv = layer(x, bias, None if past is None else past[layer_idx])
            present.append(kv)
        return self.head(self.norm(x[:, -1:])), present


if __name__ == "__main__":
    main()
