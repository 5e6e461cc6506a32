"""PyTorch eager, f32, on the CPU: OpenFlamingo's arithmetic as plain modules, for comparison.

Shapes of the `mini` configuration (random weights, batch 1):

    vision     ViT, image 224, patch 14 (256 patches + class token), width 512, 6 layers,
               8 heads x 64, MLP 2048, QuickGELU, biases; class token and ln_post not used
    resampler  width 512, 2 layers, 64 latents, 8 heads x 64, feed-forward 2048 (GELU), no biases
    gated      before every layer: 8 heads x 64 over 64 latents of width 512, feed-forward 4096 (GELU)
    language   MPT: width 1024, 6 layers, 8 heads x 128, MLP 4096 (GELU), ALiBi, no biases,
               vocabulary 50432

Stages:

    encode     one image [1, 3, 224, 224] -> visual tokens [1, 64, 512]
    prefill    128 tokens, one image; visual K/V are projected inside, as OpenFlamingo does
    decode     one token after 128 cached ones, one image, visual K/V cached

The output head runs on the last position only.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_SIZE, PATCH_SIZE, N_PATCHES = 224, 14, 256
VISION_WIDTH, VISION_LAYERS, VISION_HEADS, VISION_MLP = 512, 6, 8, 2048
N_LATENTS, RESAMPLER_LAYERS, RESAMPLER_MLP = 64, 2, 2048
INNER_HEADS, INNER_WIDTH = 8, 512
LM_WIDTH, LM_LAYERS, LM_HEADS, LM_MLP, VOCAB = 1024, 6, 8, 4096, 50432
CONTEXT = 128

KeyValue = tuple[Tensor, Tensor]  # each [1, heads, length, head width]


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        for stage in options.stage or STAGES:
            times_ms = measure(STAGES[stage](), options.warm_up, options.seconds)
            report(stage, times_ms, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stage", action="append", choices=STAGES, help="default: all")
    parser.add_argument("--warm-up", type=int, default=3, metavar="CALLS")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time a stage")
    parser.add_argument("--json", action="store_true", help="one JSON line a stage")
    return parser.parse_args()


def measure(call: Callable[[], Tensor], warm_up: int, seconds: float) -> list[float]:
    """Milliseconds of single calls, ten at least."""
    for _ in range(warm_up):
        call()
    times_ms: list[float] = []
    begun = time.perf_counter()
    while len(times_ms) < 10 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        call()
        times_ms.append((time.perf_counter() - start) * 1e3)
    return times_ms


def report(stage: str, times_ms: list[float], options: argparse.Namespace) -> None:
    tenths = statistics.quantiles(times_ms, n=10, method="inclusive")
    ms = {"median": statistics.median(times_ms), "p10": tenths[0], "p90": tenths[-1]}
    if options.json:
        ms = {name: round(value, 3) for name, value in ms.items()}
        extra = {"threads": options.threads, "calls": len(times_ms), "version": torch.__version__}
        print(json.dumps({"peer": "torch-eager", "stage": stage, "ms": ms} | extra), flush=True)
    else:
        print(f"{stage:8} {ms['median']:9.2f} ms  (p10 {ms['p10']:.2f}, p90 {ms['p90']:.2f})", flush=True)


# ---- stages


def encode_stage() -> Callable[[], Tensor]:
    vision, resampler = Vision().eval(), Resampler().eval()
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    return lambda: resampler(vision(pixels))


def prefill_stage() -> Callable[[], Tensor]:
    model = Decoder().eval()
    visual_tokens = torch.randn(1, N_LATENTS, VISION_WIDTH)
    ids = torch.randint(0, VOCAB, (1, CONTEXT))
    return lambda: model(ids, model.project_media(visual_tokens), None)[0]


def decode_stage() -> Callable[[], Tensor]:
    model = Decoder().eval()
    media = model.project_media(torch.randn(1, N_LATENTS, VISION_WIDTH))
    _, past = model(torch.randint(0, VOCAB, (1, CONTEXT)), media, None)
    next_id = torch.randint(0, VOCAB, (1, 1))
    return lambda: model(next_id, media, past)[0]


STAGES = {"encode": encode_stage, "decode": decode_stage, "prefill": prefill_stage}


# ---- parts


def linear(n_in: int, n_out: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=bias)


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """[1, length, width] -> [1, heads, length, head width]"""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def gelu_feed_forward(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), linear(width, inner), nn.GELU(), linear(inner, width))


class VisionLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(VISION_WIDTH)
        self.qkv = linear(VISION_WIDTH, 3 * VISION_WIDTH, bias=True)
        self.output = linear(VISION_WIDTH, VISION_WIDTH, bias=True)
        self.mlp_norm = nn.LayerNorm(VISION_WIDTH)
        self.up = linear(VISION_WIDTH, VISION_MLP, bias=True)
        self.down = linear(VISION_MLP, VISION_WIDTH, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        q, k, v = (split_heads(part, VISION_HEADS) for part in qkv)
        x = x + self.output(join_heads(F.scaled_dot_product_attention(q, k, v)))
        y = self.up(self.mlp_norm(x))
        return x + self.down(y * torch.sigmoid(1.702 * y))


class Vision(nn.Module):
    """[1, 3, 224, 224] -> patch tokens [1, 256, 512]"""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, VISION_WIDTH, PATCH_SIZE, PATCH_SIZE, bias=False)
        self.class_token = nn.Parameter(torch.randn(1, 1, VISION_WIDTH))
        self.positions = nn.Parameter(torch.randn(1, N_PATCHES + 1, VISION_WIDTH))
        self.norm = nn.LayerNorm(VISION_WIDTH)
        self.layers = nn.Sequential(*(VisionLayer() for _ in range(VISION_LAYERS)))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token, patches], dim=1) + self.positions
        return self.layers(self.norm(x))[:, 1:]


class ResamplerLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.media_norm = nn.LayerNorm(VISION_WIDTH)
        self.latent_norm = nn.LayerNorm(VISION_WIDTH)
        self.q = linear(VISION_WIDTH, INNER_WIDTH)
        self.kv = linear(VISION_WIDTH, 2 * INNER_WIDTH)
        self.output = linear(INNER_WIDTH, VISION_WIDTH)
        self.feed_forward = gelu_feed_forward(VISION_WIDTH, RESAMPLER_MLP)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        normed = self.latent_norm(latents)
        kv = self.kv(torch.cat([self.media_norm(media), normed], dim=1)).chunk(2, dim=-1)
        q, k, v = (split_heads(part, INNER_HEADS) for part in (self.q(normed), *kv))
        latents = latents + self.output(join_heads(F.scaled_dot_product_attention(q, k, v)))
        return latents + self.feed_forward(latents)


class Resampler(nn.Module):
    """Patch tokens [1, 256, 512] -> visual tokens [1, 64, 512]"""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, N_LATENTS, VISION_WIDTH))
        self.layers = nn.ModuleList(ResamplerLayer() for _ in range(RESAMPLER_LAYERS))
        self.norm = nn.LayerNorm(VISION_WIDTH)

    def forward(self, media: Tensor) -> Tensor:
        latents = self.latents
        for layer in self.layers:
            latents = layer(media, latents)
        return self.norm(latents)


class GatedCrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(LM_WIDTH)
        self.q = linear(LM_WIDTH, INNER_WIDTH)
        self.kv = linear(VISION_WIDTH, 2 * INNER_WIDTH)
        self.output = linear(INNER_WIDTH, LM_WIDTH)
        self.feed_forward = gelu_feed_forward(LM_WIDTH, LM_MLP)
        self.attention_gate = nn.Parameter(torch.full((1,), 0.5))
        self.feed_forward_gate = nn.Parameter(torch.full((1,), 0.5))

    def project_media(self, visual_tokens: Tensor) -> KeyValue:
        k, v = self.kv(visual_tokens).chunk(2, dim=-1)
        return split_heads(k, INNER_HEADS), split_heads(v, INNER_HEADS)

    def forward(self, x: Tensor, media: KeyValue) -> Tensor:
        q = split_heads(self.q(self.norm(x)), INNER_HEADS)
        attended = self.output(join_heads(F.scaled_dot_product_attention(q, *media)))
        x = x + self.attention_gate.tanh() * attended
        return x + self.feed_forward_gate.tanh() * self.feed_forward(x)


class DecoderLayer(nn.Module):
    """A gated cross-attention block and the MPT block that follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.gated = GatedCrossAttention()
        self.attention_norm = nn.LayerNorm(LM_WIDTH, bias=False)
        self.qkv = linear(LM_WIDTH, 3 * LM_WIDTH)
        self.output = linear(LM_WIDTH, LM_WIDTH)
        self.mlp_norm = nn.LayerNorm(LM_WIDTH, bias=False)
        self.up = linear(LM_WIDTH, LM_MLP)
        self.down = linear(LM_MLP, LM_WIDTH)

    def forward(
        self, x: Tensor, media: KeyValue, past: KeyValue | None, bias: Tensor
    ) -> tuple[Tensor, KeyValue]:
        x = self.gated(x, media)
        qkv = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        q, k, v = (split_heads(part, LM_HEADS) for part in qkv)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        x = x + self.output(join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)))), (k, v)


class Decoder(nn.Module):
    """Token ids [1, length] -> logits of the last position [1, 1, vocabulary], and all K/V."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, LM_WIDTH)
        self.layers = nn.ModuleList(DecoderLayer() for _ in range(LM_LAYERS))
        self.norm = nn.LayerNorm(LM_WIDTH, bias=False)

    def project_media(self, visual_tokens: Tensor) -> list[KeyValue]:
        return [layer.gated.project_media(visual_tokens) for layer in self.layers]

    def forward(
        self, ids: Tensor, media: list[KeyValue], past: list[KeyValue] | None
    ) -> tuple[Tensor, list[KeyValue]]:
        past_len = 0 if past is None else past[0][0].shape[2]
        bias, present = alibi(ids.shape[1], past_len), []
        x = self.embedding(ids)
        for idx, layer in enumerate(self.layers):
            x, kv = layer(x, media[idx], None if past is None else past[idx], bias)
            present.append(kv)
        return F.linear(self.norm(x[:, -1:]), self.embedding.weight), present


def alibi(text_len: int, past_len: int) -> Tensor:
    """ALiBi and the causal mask in one additive bias, [1, heads, text_len, past_len + text_len]."""
    slopes = 2.0 ** (-8.0 * torch.arange(1, LM_HEADS + 1) / LM_HEADS)
    key = torch.arange(past_len + text_len)
    query = torch.arange(past_len, past_len + text_len)[:, None]
    bias = slopes[:, None, None] * (key - (past_len + text_len - 1))
    return bias.masked_fill(key > query, -torch.inf)[None]


if __name__ == "__main__":
    main()
