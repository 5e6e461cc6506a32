"""Shapes, operation and byte counts, weights and inputs that every peer shares.

Stages (batch 1, f32 in and out):

    vision            one image [1, 3, 224, 224] -> patch tokens [256, width]
    resampler         patch tokens -> visual tokens [64, width]
    prefill           128 tokens, one image; visual K/V are projected inside the call
    decode-cached     one token after 128, visual K/V given
    decode-projected  one token after 128, visual K/V of every image projected anew, as
                      OpenFlamingo's own code does

The output head runs on the last position only. Masks and ALiBi are inputs.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

CONTEXT = 128  # tokens of a prefill, and before a decode step
N_PATCHES = 256
N_LATENTS = 64
PATCH_VALUES = 3 * 14 * 14


@dataclass(frozen=True)
class Vision:
    n_layers: int  # of the real model
    n_built: int  # of the timed model
    width: int
    n_heads: int
    mlp_width: int


@dataclass(frozen=True)
class Resampler:
    n_layers: int
    width: int
    mlp_width: int


@dataclass(frozen=True)
class Language:
    n_layers: int
    n_built: int
    width: int
    n_heads: int
    mlp_width: int
    vocabulary: int = 50432

    @property
    def head_dim(self) -> int:
        return self.width // self.n_heads


@dataclass(frozen=True)
class Config:
    """A gated block stands before every language layer; its inner width is 8 x 64, as is the
    resampler's."""

    vision: Vision
    resampler: Resampler
    language: Language
    inner_heads: int = 8
    inner_width: int = 512


# Named like the presets of `flamingoc synth` with the same shapes.
CONFIGS = {
    "of-3b-quarter": Config(
        Vision(24, 6, 1024, 16, 4096),
        Resampler(6, 1024, 4096),
        Language(24, 6, 2048, 16, 8192),
    ),
    "of-mini": Config(
        Vision(6, 6, 512, 8, 2048),
        Resampler(2, 512, 2048),
        Language(6, 6, 1024, 8, 4096),
    ),
}

# Parts that a peer loads as one model, and the (stage, images) that each is timed with.
PARTS = {
    "vision": [("vision", 1)],
    "resampler": [("resampler", 1)],
    "cached": [("decode-cached", 1), ("decode-cached", 32)],
    "projected": [("prefill", 1), ("decode-projected", 1), ("decode-projected", 32)],
}

# Stored bytes of one weight, scales included.
WEIGHT_BYTES = {
    "f32": 4.0,
    "bf16": 2.0,
    "int8": 1.0,  # a scale per output row
    "w8": 1.0,
    "w8b128": 1 + 4 / 128,
    "w4b128": 0.5 + 4 / 128,  # f32 scale per block
    "w4g128": 0.5 + 2 / 128,  # f16 scale per group
    "q8_0": 34 / 32,
    "q4_0": 18 / 32,
    "int4": 17 / 32,  # ours: a byte that scales each block of 32
}


def stored_bytes(config: Config, precision: str, stage: str, n_weights: int) -> float:
    """Bytes of the weights that a call reads. Our int4 is for the layers of the language model:
    its head and the picture side stay in int8."""
    if precision != "int4":
        return n_weights * WEIGHT_BYTES[precision]
    if stage in ("vision", "resampler"):
        return n_weights * WEIGHT_BYTES["int8"]
    head = config.language.width * config.language.vocabulary
    return (n_weights - head) * WEIGHT_BYTES["int4"] + head * WEIGHT_BYTES["int8"]


# ---- weights: deterministic by name and equal in every peer, so that outputs can be compared

POOL = np.random.default_rng(7).standard_normal(4_194_301, dtype=np.float32)


def weight(name: str, *shape: int, scale: float = 0.02) -> np.ndarray:
    """Normally distributed values, repeated from a pool that starts elsewhere for every name."""
    offset = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % POOL.size
    return np.resize(np.roll(POOL, -offset), shape) * np.float32(scale)


# ---- inputs


def alibi(n_heads: int, text_len: int, past_len: int) -> np.ndarray:
    """MPT's ALiBi and the causal mask as one additive bias, [1, n_heads, text_len, keys]."""
    slopes = 2.0 ** (-8.0 * np.arange(1, n_heads + 1) / n_heads)
    keys = np.arange(past_len + text_len)[None]
    queries = past_len + np.arange(text_len)[:, None]
    distance = slopes[:, None, None] * (keys - (past_len + text_len - 1))[None]
    return (distance + np.where(keys > queries, -1e9, 0.0)[None])[None].astype(np.float32)


def media_bias(text_len: int, n_images: int) -> np.ndarray:
    """Every text token sees the latents of the last image only, [1, 1, text_len, latents]."""
    bias = np.full((1, 1, text_len, n_images * N_LATENTS), -1e9, np.float32)
    bias[..., (n_images - 1) * N_LATENTS :] = 0
    return bias


def pixels() -> np.ndarray:
    return weight("pixels", 1, 3, 224, 224, scale=1)


def patch_tokens(config: Config) -> np.ndarray:
    """[256, width]"""
    return weight("patch_tokens", N_PATCHES, config.vision.width, scale=1)


def language_inputs(config: Config, stage: str, n_images: int) -> dict[str, np.ndarray]:
    """Inputs by name; a peer takes those that its graph has. `pk{i}` and `pv{i}` are the past of
    layer i, [1, n_heads, past_len, head_dim]; `xk` and `xv` the K/V of media for all layers."""
    language = config.language
    text_len, past_len = (CONTEXT, 0) if stage == "prefill" else (1, CONTEXT)
    media = (1, config.inner_heads, n_images * N_LATENTS, 64)
    past = (1, language.n_heads, past_len, language.head_dim)
    inputs = {
        "x": weight("x", text_len, language.width, scale=1),
        "bias": alibi(language.n_heads, text_len, past_len),
        "media_bias": media_bias(text_len, n_images),
        "visual": weight("visual", n_images * N_LATENTS, config.resampler.width, scale=1),
        "xk": weight("xk", *media, scale=1),
        "xv": weight("xv", *media, scale=1),
    }
    for layer in range(language.n_built):
        inputs[f"pk{layer}"] = weight("pk", *past, scale=1)
        inputs[f"pv{layer}"] = weight("pv", *past, scale=1)
    return inputs


# ---- counts; a multiply-add is two operations


def counts(
    config: Config,
    stage: str,
    n_images: int = 1,
    n_language_layers: int | None = None,
    gated: bool = True,
    full: bool = False,
) -> tuple[int, int]:
    """(operations, weights read) of one call, of the built layers or (`full`) of the real model."""
    if stage == "vision":
        return vision_counts(config.vision, full)
    if stage == "resampler":
        return resampler_counts(config)
    return language_counts(config, stage, n_images, n_language_layers, gated, full)


def vision_counts(vision: Vision, full: bool) -> tuple[int, int]:
    n_layers = vision.n_layers if full else vision.n_built
    n_tokens, width = N_PATCHES + 1, vision.width
    weights = n_layers * (4 * width * width + 2 * width * vision.mlp_width)
    attention = n_layers * 4 * n_tokens * n_tokens * width
    patches = PATCH_VALUES * width
    return 2 * n_tokens * weights + attention + 2 * N_PATCHES * patches, weights + patches


def resampler_counts(config: Config) -> tuple[int, int]:
    resampler, inner = config.resampler, config.inner_width
    width, n_keys = resampler.width, N_PATCHES + N_LATENTS
    projections = 2 * N_LATENTS * 2 * width * inner + 2 * n_keys * 2 * width * inner
    attention = 4 * N_LATENTS * n_keys * inner
    feed_forward = 2 * N_LATENTS * 2 * width * resampler.mlp_width
    weights = 4 * width * inner + 2 * width * resampler.mlp_width
    n_layers = resampler.n_layers
    return n_layers * (projections + attention + feed_forward), n_layers * weights


def language_counts(
    config: Config, stage: str, n_images: int, n_layers: int | None, gated: bool, full: bool
) -> tuple[int, int]:
    language, inner = config.language, config.inner_width
    width, mlp_width = language.width, language.mlp_width
    n_layers = language.n_layers if full else n_layers or language.n_built
    text_len, past_len = (CONTEXT, 0) if stage == "prefill" else (1, CONTEXT)
    layer = 4 * width * width + 2 * width * mlp_width
    head = width * language.vocabulary
    attention = 4 * text_len * (past_len + text_len) * width
    operations = n_layers * (2 * text_len * layer + attention) + 2 * head
    weights = n_layers * layer + head
    if gated:
        block = 2 * width * inner + 2 * width * mlp_width
        attention = 4 * text_len * n_images * N_LATENTS * inner
        operations += n_layers * (2 * text_len * block + attention)
        weights += n_layers * block
        if stage != "decode-cached":
            projection = 2 * config.resampler.width * inner
            operations += n_layers * 2 * n_images * N_LATENTS * projection
            weights += n_layers * projection
    return operations, weights
