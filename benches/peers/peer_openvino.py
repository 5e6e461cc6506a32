"""OpenVINO on the CPU. Precisions:

    f32
    bf16     the f32 file under the bf16 inference hint
    int8     weights in int8 and activations fake-quantised per tensor: full int8 arithmetic
    w8       nncf's weight compression to 8 bits
    w4g128   the same to 4 bits, groups of 128

w8 and w4g128 run under the bf16 hint with dynamic quantisation in groups of 128; without these
they are up to twice as slow. Part `cached` is the file of `projected` with the projections of
visual tokens cut off.
"""

import time
from pathlib import Path

import numpy as np
import openvino as ov
import openvino.opset13 as op

from measuring import MODELS, emit, measure, options, stages_of
from shapes import (
    CONFIGS,
    CONTEXT,
    N_LATENTS,
    N_PATCHES,
    Config,
    language_inputs,
    patch_tokens,
    pixels,
    weight,
)

PRECISIONS = ["f32", "bf16", "int8", "w8", "w4g128"]
COMPRESSED = ["w8", "w4g128"]
PARTS = ["vision", "resampler", "projected", "cached"]


def main() -> None:
    chosen = options(__doc__.splitlines()[0], PRECISIONS, PARTS)
    if chosen.verb == "make":
        make(chosen.config, chosen.precision)
    else:
        run(chosen.config, chosen.precision, chosen.part, chosen.threads, chosen.seconds)


def model_path(config_name: str, part: str, precision: str) -> Path:
    part = "projected" if part == "cached" else part
    precision = "f32" if precision == "bf16" else precision
    return MODELS / f"openvino-{config_name}-{part}-{precision}.xml"


def run(config_name: str, precision: str, part: str, threads: int, seconds: float) -> None:
    config = CONFIGS[config_name]
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    if precision in ("bf16", *COMPRESSED):
        settings["INFERENCE_PRECISION_HINT"] = "bf16"
    if precision in COMPRESSED:
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "128"
    begun = time.perf_counter()
    core = ov.Core()
    model = core.read_model(model_path(config_name, part, precision))
    if part == "cached":
        model = with_media_given(model, config)
    compiled = core.compile_model(model, "CPU", settings)
    load_ms = (time.perf_counter() - begun) * 1e3
    version = ov.__version__.split("-")[0]
    for stage, n_images in stages_of(part):
        request = compiled.create_infer_request()
        set_inputs(request, compiled, inputs(config, stage, n_images))
        request.infer()
        check = float(np.abs(request.get_output_tensor(0).data).mean())
        ms = measure(request.infer, seconds)
        emit(stage, n_images, ms, check=check, load_ms=round(load_ms), version=version)


def inputs(config: Config, stage: str, n_images: int) -> dict[str, np.ndarray]:
    """The inputs of `shapes.py`, with a batch axis where they lack one."""
    if stage == "vision":
        return {"pixels": pixels()}
    if stage == "resampler":
        return {"patch_tokens": patch_tokens(config)[None]}
    found = language_inputs(config, stage, n_images)
    return found | {name: found[name][None] for name in ("x", "visual")}


def set_inputs(
    request: ov.InferRequest, compiled: ov.CompiledModel, values: dict[str, np.ndarray]
) -> None:
    taken = {name for port in compiled.inputs for name in port.names}
    for name in taken & values.keys():
        request.set_tensor(name, ov.Tensor(np.ascontiguousarray(values[name])))


# ---- model files


def make(config_name: str, precision: str) -> None:
    config = CONFIGS[config_name]
    builder = Builder(precision)
    made = {"projected": lambda: builder.language(config)}
    if precision not in COMPRESSED:
        made |= {
            "vision": lambda: builder.vision(config),
            "resampler": lambda: builder.resampler(config),
        }
    for part, build in made.items():
        path = model_path(config_name, part, precision)
        ov.save_model(compressed(build(), precision), path, compress_to_fp16=False)


def compressed(model: ov.Model, precision: str) -> ov.Model:
    if precision not in COMPRESSED:
        return model
    import nncf

    modes = nncf.CompressWeightsMode
    if precision == "w8":
        return nncf.compress_weights(model, mode=modes.INT8_SYM)
    return nncf.compress_weights(
        model, mode=modes.INT4_SYM, group_size=128, ratio=1.0, all_layers=True
    )


def with_media_given(model: ov.Model, config: Config) -> ov.Model:
    """The model with `xk` and `xv`, [1, 8, media, 64], in place of `visual`."""
    given = [parameter(name, 1, config.inner_heads, -1, 64) for name in ("xk", "xv")]
    for node in model.get_ops():
        for media, suffix in zip(given, (".gated.k.heads", ".gated.v.heads"), strict=True):
            if node.get_friendly_name().endswith(suffix):
                for target in node.output(0).get_target_inputs():
                    target.replace_source_output(media.output(0))
    kept = [p for p in model.get_parameters() if p.get_friendly_name() != "visual"]
    return ov.Model(model.get_results(), [*kept, *given], "cached")


def parameter(name: str, *shape: int) -> ov.Node:
    made = op.parameter(ov.PartialShape(list(shape)), ov.Type.f32, name)
    made.output(0).set_names({name})
    return made


def ints(*values: int) -> ov.Node:
    return op.constant(np.array(values, np.int64))


class Builder:
    """Graphs over values [1, length, width]."""

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def linear(self, x: ov.Node, name: str, n_in: int, n_out: int, bias: bool = False) -> ov.Node:
        matrix = np.ascontiguousarray(weight(name, n_in, n_out).T)
        if self.precision == "int8":
            scales = np.abs(matrix).max(1, keepdims=True) / np.float32(127)
            rounded = op.constant(np.round(matrix / scales).astype(np.int8))
            y = op.multiply(op.convert(rounded, "f32"), op.constant(scales))
            y = op.matmul(quantised(x), y, False, True)
        else:
            y = op.matmul(x, op.constant(matrix), False, True)
        return op.add(y, op.constant(weight(name + ".bias", n_out)[None, None])) if bias else y

    def vision(self, config: Config) -> ov.Model:
        vision, width = config.vision, config.vision.width
        image = parameter("pixels", 1, 3, 224, 224)
        kernel = op.constant(weight("patch", width, 3, 14, 14))
        x = op.convolution(image, kernel, [14, 14], [0, 0], [0, 0], [1, 1])
        x = op.transpose(op.reshape(x, ints(1, width, N_PATCHES), False), ints(0, 2, 1))
        x = op.concat([op.constant(weight("class", 1, 1, width)), x], 1)
        x = norm(op.add(x, op.constant(weight("positions", 1, N_PATCHES + 1, width))), width)
        for layer in range(vision.n_built):
            name, y = f"vision.{layer}.", norm(x, width)
            q, k, v = (
                heads(
                    self.linear(y, name + part, width, width, True),
                    vision.n_heads,
                    width // vision.n_heads,
                )
                for part in "qkv"
            )
            attended = join(op.scaled_dot_product_attention(q, k, v), width)
            x = op.add(x, self.linear(attended, name + "out", width, width, True))
            y = self.linear(norm(x, width), name + "up", width, vision.mlp_width, True)
            y = op.swish(y, op.constant(np.float32(1.702)))
            x = op.add(x, self.linear(y, name + "down", vision.mlp_width, width, True))
        return ov.Model([op.slice(x, ints(1), ints(N_PATCHES + 1), ints(1), ints(1))], [image])

    def resampler(self, config: Config) -> ov.Model:
        resampler, inner = config.resampler, config.inner_width
        width = resampler.width
        tokens = parameter("patch_tokens", 1, N_PATCHES, width)
        x = op.constant(weight("latents", 1, N_LATENTS, width, scale=1))
        for layer in range(resampler.n_layers):
            name, y = f"resampler.{layer}.", norm(x, width)
            media = op.concat([norm(tokens, width), y], 1)
            q, k, v = (
                heads(self.linear(of, name + part, width, inner), config.inner_heads, 64)
                for part, of in (("q", y), ("k", media), ("v", media))
            )
            attended = join(op.scaled_dot_product_attention(q, k, v), inner)
            x = op.add(x, self.linear(attended, name + "out", inner, width))
            x = op.add(x, self.feed_forward(norm(x, width), name, width, resampler.mlp_width))
        return ov.Model([norm(x, width)], [tokens])

    def feed_forward(self, x: ov.Node, name: str, width: int, inner: int) -> ov.Node:
        y = op.gelu(self.linear(x, name + "up", width, inner), "erf")
        return self.linear(y, name + "down", inner, width)

    def language(self, config: Config) -> ov.Model:
        language, width = config.language, config.language.width
        n_heads, head_dim = language.n_heads, language.head_dim
        x = parameter("x", 1, -1, width)
        bias = parameter("bias", 1, n_heads, -1, -1)
        media_bias, visual = (
            parameter("media_bias", 1, 1, -1, -1),
            parameter("visual", 1, -1, config.resampler.width),
        )
        parameters, results = [x, bias, media_bias, visual], []
        for layer in range(language.n_built):
            x = self.gated_block(config, x, visual, media_bias, f"language.{layer}.gated.")
            name = f"language.{layer}."
            past = [parameter(f"{part}{layer}", 1, n_heads, -1, head_dim) for part in ("pk", "pv")]
            qkv = self.linear(norm(x, width, False), name + "qkv", width, 3 * width)
            split = op.split(qkv, op.constant(np.int64(2)), 3).outputs()
            q, k, v = (heads(part, n_heads, head_dim) for part in split)
            parameters, results = parameters + past, results + [op.result(k), op.result(v)]
            k, v = (op.concat([old, new], 2) for old, new in zip(past, (k, v), strict=True))
            attended = join(op.scaled_dot_product_attention(q, k, v, bias), width)
            x = op.add(x, self.linear(attended, name + "out", width, width))
            y = self.feed_forward(norm(x, width, False), name, width, language.mlp_width)
            x = op.add(x, y)
        x = op.slice(x, ints(-1), ints(CONTEXT * 1024), ints(1), ints(1))
        logits = self.linear(norm(x, width, False), "head", width, language.vocabulary)
        return ov.Model([op.result(logits), *results], parameters)

    def gated_block(
        self, config: Config, x: ov.Node, visual: ov.Node, bias: ov.Node, name: str
    ) -> ov.Node:
        width, inner = config.language.width, config.inner_width
        q = heads(self.linear(norm(x, width), name + "q", width, inner), config.inner_heads, 64)
        k, v = (
            heads(
                self.linear(visual, name + part, config.resampler.width, inner),
                config.inner_heads,
                64,
            )
            for part in "kv"
        )
        k.set_friendly_name(name + "k.heads")
        v.set_friendly_name(name + "v.heads")
        attended = join(op.scaled_dot_product_attention(q, k, v, bias), inner)
        x = op.add(x, self.linear(attended, name + "out", inner, width))
        y = self.feed_forward(norm(x, width), name, width, config.language.mlp_width)
        return op.add(x, y)


def quantised(x: ov.Node) -> ov.Node:
    """Values in [-6, 6) as 8 bits; outliers saturate."""
    low, high = (op.constant(np.float32(bound)) for bound in (-6.0, 6.0 * 127 / 128))
    return op.fake_quantize(x, low, high, low, high, 256)


def norm(x: ov.Node, width: int, bias: bool = True) -> ov.Node:
    y = op.mvn(x, ints(-1), True, 1e-5, "INSIDE_SQRT")
    y = op.multiply(y, op.constant(np.ones((1, 1, width), np.float32)))
    return op.add(y, op.constant(np.zeros((1, 1, width), np.float32))) if bias else y


def heads(x: ov.Node, n_heads: int, head_dim: int) -> ov.Node:
    """[1, length, width] -> [1, n_heads, length, head_dim]"""
    return op.transpose(op.reshape(x, ints(0, 0, n_heads, head_dim), True), ints(0, 2, 1, 3))


def join(x: ov.Node, width: int) -> ov.Node:
    return op.reshape(op.transpose(x, ints(0, 2, 1, 3)), ints(0, 0, width), True)


if __name__ == "__main__":
    main()
