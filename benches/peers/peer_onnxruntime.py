"""ONNX Runtime on the CPU. Graphs are written in the form its own optimiser would reach at best,
with the contrib operators SkipLayerNormalization, MultiHeadAttention, QuickGelu, Gelu and
MatMulNBits (accuracy level 4: activations in int8). Precisions:

    f32
    int8     what `quantize_dynamic(per_channel=True)` writes; fuses to DynamicQuantizeMatMul
    w8b128   MatMulNBits of 8 bits, blocks of 128
    w4b128   MatMulNBits of 4 bits, blocks of 128

Parts `projected` and `cached` are two graphs over one weight file.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, save

from measuring import MODELS, emit, measure, options, stages_of
from shapes import (
    CONFIGS,
    CONTEXT,
    N_LATENTS,
    N_PATCHES,
    Config,
    Resampler,
    Vision,
    language_inputs,
    patch_tokens,
    pixels,
    weight,
)

PRECISIONS = ["f32", "int8", "w8b128", "w4b128"]
PARTS = ["vision", "resampler", "projected", "cached"]
ALIGNMENT = 4096  # so that ONNX Runtime can map the weights

Value = tuple[str, list[object]]  # name and shape of a graph input or output


def main() -> None:
    chosen = options(__doc__.splitlines()[0], PRECISIONS, PARTS)
    if chosen.verb == "make":
        make(chosen.config, chosen.precision)
    else:
        run(chosen.config, chosen.precision, chosen.part, chosen.threads, chosen.seconds)


def graph_path(config_name: str, part: str, precision: str) -> Path:
    return MODELS / f"ort-{config_name}-{part}-{precision}.onnx"


def run(config_name: str, precision: str, part: str, threads: int, seconds: float) -> None:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    settings.log_severity_level = 3
    begun = time.perf_counter()
    path = str(graph_path(config_name, part, precision))
    session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    load_ms = (time.perf_counter() - begun) * 1e3
    taken, outputs = {i.name for i in session.get_inputs()}, [o.name for o in session.get_outputs()]
    for stage, n_images in stages_of(part):
        feed = inputs(CONFIGS[config_name], stage, n_images)
        feed = {name: value for name, value in feed.items() if name in taken}
        check = float(np.abs(session.run(outputs, feed)[0]).mean())
        ms = measure(lambda feed=feed: session.run(outputs, feed), seconds)
        emit(stage, n_images, ms, check=check, load_ms=round(load_ms), version=ort.__version__)


def inputs(config: Config, stage: str, n_images: int) -> dict[str, np.ndarray]:
    if stage == "vision":
        return {"pixels": pixels()}
    if stage == "resampler":
        return {"patch_tokens": patch_tokens(config)}
    return language_inputs(config, stage, n_images)


# ---- model files


def make(config_name: str, precision: str) -> None:
    """`projected` and `cached` share a weight file; those in blocks are language models only."""
    config = CONFIGS[config_name]
    shared = WeightFile(MODELS / f"ort-{config_name}-language-{precision}.bin")
    for part in PARTS if precision in ("f32", "int8") else ["projected", "cached"]:
        own = MODELS / f"ort-{config_name}-{part}-{precision}.bin"
        graph = Graph(WeightFile(own) if part in ("vision", "resampler") else shared, precision)
        graph.save(graph_path(config_name, part, precision), *build(graph, config, part))


def build(graph: "Graph", config: Config, part: str) -> tuple[list[Value], list[Value]]:
    if part == "vision":
        return vision_graph(graph, config.vision)
    if part == "resampler":
        return resampler_graph(graph, config.resampler, config)
    return language_graph(graph, config, cached=part == "cached")


class WeightFile:
    """External data of one or more graphs; a tensor that is there is not written again."""

    def __init__(self, path: Path) -> None:
        self.path, self.end = path, 0
        self.file = open(path, "wb")
        self.tensors: dict[str, tuple[int, np.ndarray]] = {}  # offset; shape and type of the rest

    def put(self, name: str, values: np.ndarray) -> None:
        self.file.seek(self.end)
        values.tofile(self.file)
        self.tensors[name] = (self.end, np.empty((0, *values.shape), values.dtype))
        self.end = -(-(self.end + values.nbytes) // ALIGNMENT) * ALIGNMENT

    def reference(self, name: str) -> TensorProto:
        offset, like = self.tensors[name]
        tensor = TensorProto(name=name, data_location=TensorProto.EXTERNAL)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(like.dtype)
        tensor.dims.extend(like.shape[1:])
        size = int(np.prod(like.shape[1:])) * like.dtype.itemsize
        for key, value in (("location", self.path.name), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class Graph:
    """Nodes so far. Methods take and give names of values."""

    def __init__(self, weights: WeightFile, precision: str) -> None:
        self.weights, self.precision = weights, precision
        self.nodes: list = []
        self.initialisers: dict[str, TensorProto] = {}
        self.quantised: dict[str, list[str]] = {}
        self.open_sums: dict[str, tuple[str, str]] = {}

    def node(
        self,
        op: str,
        inputs: Iterable[str],
        n_outputs: int = 1,
        domain: str = "",
        **attributes: object,
    ) -> str | list[str]:
        name = f"{op}_{len(self.nodes)}"
        outputs = [f"{name}.{index}" for index in range(n_outputs)]
        made = helper.make_node(op, list(inputs), outputs, name=name, domain=domain, **attributes)
        self.nodes.append(made)
        return outputs[0] if n_outputs == 1 else outputs

    def contrib(self, op: str, inputs: Iterable[str], n_outputs: int = 1, **attributes: object):
        return self.node(op, inputs, n_outputs, "com.microsoft", **attributes)

    def constant(self, values: np.ndarray, name: str | None = None) -> str:
        """A small tensor, stored in the graph file."""
        name = name or f"constant_{len(self.initialisers)}"
        dtype = helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor = helper.make_tensor(name, dtype, values.shape, values.tobytes(), raw=True)
        self.initialisers.setdefault(name, tensor)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64), "ints_" + "_".join(map(str, values)))

    def stored(self, name: str, make: Callable[[], np.ndarray]) -> str:
        """A large tensor, made and stored in the weight file once."""
        if name not in self.weights.tensors:
            self.weights.put(name, make())
        return self.use(name)

    def use(self, name: str) -> str:
        """A tensor of the weight file."""
        self.initialisers.setdefault(name, self.weights.reference(name))
        return name

    def linear(self, x: str, name: str, n_in: int, n_out: int, bias: bool = False) -> str:
        """[length, n_in] -> [length, n_out] in the graph's precision."""
        biases = [self.constant(weight(name + ".bias", n_out), name + ".bias")] if bias else []
        if self.precision == "f32":
            matrix = self.stored(name, lambda: weight(name, n_in, n_out))
            return self.node("Gemm", [x, matrix, *biases])
        if self.precision == "int8":
            y = self.int8_product(x, name, n_in, n_out)
            return self.node("Add", [y, *biases]) if bias else y
        return self.blocked_product(x, name, n_in, n_out, biases)

    def int8_product(self, x: str, name: str, n_in: int, n_out: int) -> str:
        if name + ".q" not in self.weights.tensors:
            values = weight(name, n_in, n_out)
            scales = np.abs(values).max(0) / 127
            rounded = np.clip(np.round(values / scales), -127, 127).astype(np.int8)
            self.weights.put(name + ".q", rounded)
            self.weights.put(name + ".scale", scales.astype(np.float32))
        q, scale = (self.use(name + end) for end in (".q", ".scale"))
        zeros = self.constant(np.zeros(n_out, np.int8), f"zeros_{n_out}")
        if x not in self.quantised:
            self.quantised[x] = self.node("DynamicQuantizeLinear", [x], 3)
        xq, x_scale, x_zero = self.quantised[x]
        y = self.node("MatMulInteger", [xq, q, x_zero, zeros])
        y = self.node("Cast", [y], to=TensorProto.FLOAT)
        return self.node("Mul", [y, self.node("Mul", [x_scale, scale])])

    def blocked_product(self, x: str, name: str, n_in: int, n_out: int, biases: list[str]) -> str:
        bits, block = int(self.precision[1]), int(self.precision[3:])
        if name + ".q" not in self.weights.tensors:
            middle = 2 ** (bits - 1)
            values = np.ascontiguousarray(weight(name, n_in, n_out).T)
            values = values.reshape(n_out, n_in // block, block)
            scales = np.abs(values).max(-1, keepdims=True) / (middle - 1)
            rounded = (np.round(values / scales) + middle).astype(np.uint8)
            if bits == 4:
                rounded = rounded[..., 0::2] | (rounded[..., 1::2] << 4)
            self.weights.put(name + ".q", rounded)
            self.weights.put(name + ".scale", scales.reshape(n_out, -1).astype(np.float32))
        q, scale = (self.use(name + end) for end in (".q", ".scale"))
        inputs = [x, q, scale] + (["", "", *biases] if biases else [])
        return self.contrib(
            "MatMulNBits", inputs, K=n_in, N=n_out, bits=bits, block_size=block, accuracy_level=4
        )

    def add(self, a: str, b: str) -> str:
        """A residual sum, left open so that the norm that follows can take it in."""
        name = f"sum_{len(self.nodes)}"
        self.open_sums[name] = (a, b)
        return name

    def close(self, x: str) -> str:
        return self.node("Add", self.open_sums.pop(x)) if x in self.open_sums else x

    def norm(self, x: str, width: int, bias: bool = True) -> str:
        affine = [self.constant(np.ones(width, np.float32), f"ones_{width}")]
        if bias:
            affine.append(self.constant(np.zeros(width, np.float32), f"zero_bias_{width}"))
        if x not in self.open_sums:
            return self.node("LayerNormalization", [x, *affine], epsilon=1e-5)
        a, b = self.open_sums.pop(x)
        self.nodes.append(
            helper.make_node(
                "SkipLayerNormalization",
                [a, b, *affine],
                [f"{x}.norm", "", "", x],
                name=f"{x}.skip",
                domain="com.microsoft",
                epsilon=1e-5,
            )
        )
        return f"{x}.norm"

    def attention(
        self,
        q: str,
        k: str,
        v: str,
        n_heads: int,
        bias: str = "",
        past: tuple[str, str] | None = None,
        split_kv: bool = False,
    ):
        """q, k, v are [length, width], or k and v [1, heads, length, head_dim] (`split_kv`).
        With `past`, gives the new keys and values too."""
        batched = [self.unsqueeze(q)] + (
            [k, v] if split_kv else [self.unsqueeze(k), self.unsqueeze(v)]
        )
        inputs = [*batched, "", "", bias, *(past or ())]
        while inputs[-1] == "":
            inputs.pop()
        found = self.contrib("MultiHeadAttention", inputs, 3 if past else 1, num_heads=n_heads)
        if not past:
            return self.node("Squeeze", [found, self.ints(0)])
        return self.node("Squeeze", [found[0], self.ints(0)]), found[1], found[2]

    def unsqueeze(self, x: str) -> str:
        return self.node("Unsqueeze", [x, self.ints(0)])

    def save(self, path: Path, inputs: list[Value], outputs: list[Value]) -> None:
        def values(of: list[Value]) -> list:
            return [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in of]

        graph = helper.make_graph(
            self.nodes, "peer", values(inputs), values(outputs), list(self.initialisers.values())
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        self.weights.file.flush()
        save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


# ---- graphs


def vision_graph(graph: Graph, vision: Vision) -> tuple[list[Value], list[Value]]:
    width = vision.width
    kernel = graph.stored("patch", lambda: weight("patch", width, 3, 14, 14))
    x = graph.node("Conv", ["pixels", kernel], kernel_shape=[14, 14], strides=[14, 14])
    x = graph.node("Reshape", [x, graph.ints(width, N_PATCHES)])
    x = graph.node("Transpose", [x], perm=[1, 0])
    x = graph.node("Concat", [graph.constant(weight("class", 1, width)), x], axis=0)
    x = graph.node("Add", [x, graph.constant(weight("positions", N_PATCHES + 1, width))])
    x = graph.norm(x, width)
    for layer in range(vision.n_built):
        name = f"vision.{layer}."
        y = graph.norm(x, width)
        q, k, v = (graph.linear(y, name + part, width, width, True) for part in "qkv")
        attended = graph.attention(q, k, v, vision.n_heads)
        x = graph.add(x, graph.linear(attended, name + "out", width, width, True))
        y = graph.linear(graph.norm(x, width), name + "up", width, vision.mlp_width, True)
        y = graph.contrib("QuickGelu", [y], alpha=1.702)
        x = graph.add(x, graph.linear(y, name + "down", vision.mlp_width, width, True))
    x = graph.node(
        "Slice", [graph.close(x), graph.ints(1), graph.ints(N_PATCHES + 1), graph.ints(0)]
    )
    return [("pixels", [1, 3, 224, 224])], [(x, [N_PATCHES, width])]


def resampler_graph(
    graph: Graph, resampler: Resampler, config: Config
) -> tuple[list[Value], list[Value]]:
    width, inner = resampler.width, config.inner_width
    x = graph.constant(weight("latents", N_LATENTS, width, scale=1), "latents")
    for layer in range(resampler.n_layers):
        name = f"resampler.{layer}."
        y = graph.norm(x, width)
        media = graph.node("Concat", [graph.norm("patch_tokens", width), y], axis=0)
        q = graph.linear(y, name + "q", width, inner)
        k, v = (graph.linear(media, name + part, width, inner) for part in "kv")
        attended = graph.attention(q, k, v, config.inner_heads)
        x = graph.add(x, graph.linear(attended, name + "out", inner, width))
        y = feed_forward(graph, graph.norm(x, width), name, width, resampler.mlp_width)
        x = graph.add(x, y)
    outputs = [(graph.norm(x, width), [N_LATENTS, width])]
    return [("patch_tokens", [N_PATCHES, width])], outputs


def feed_forward(graph: Graph, x: str, name: str, width: int, inner: int) -> str:
    y = graph.contrib("Gelu", [graph.linear(x, name + "up", width, inner)])
    return graph.linear(y, name + "down", inner, width)


def language_graph(graph: Graph, config: Config, cached: bool) -> tuple[list[Value], list[Value]]:
    """The tanh gates are one and folded into the matrices after them."""
    language, width = config.language, config.language.width
    n_heads, head_dim = language.n_heads, language.head_dim
    x, past, present = "x", [], []
    for layer in range(language.n_built):
        x = gated_block(graph, config, x, f"language.{layer}.gated.", cached)
        name, keys = f"language.{layer}.", (f"pk{layer}", f"pv{layer}")
        qkv = graph.linear(graph.norm(x, width, False), name + "qkv", width, 3 * width)
        q, k, v = graph.node("Split", [qkv], 3, axis=1, num_outputs=3)
        attended, *new = graph.attention(q, k, v, n_heads, "bias", keys)
        past += [(key, [1, n_heads, "past", head_dim]) for key in keys]
        present += [(key, [1, n_heads, "keys", head_dim]) for key in new]
        x = graph.add(x, graph.linear(attended, name + "out", width, width))
        y = feed_forward(graph, graph.norm(x, width, False), name, width, language.mlp_width)
        x = graph.add(x, y)
    last = [graph.ints(-1), graph.ints(CONTEXT * 1024), graph.ints(0)]
    x = graph.node("Slice", [graph.close(x), *last])
    logits = graph.linear(graph.norm(x, width, False), "head", width, language.vocabulary)
    media = (
        [("xk", [1, 8, "media", 64]), ("xv", [1, 8, "media", 64])]
        if cached
        else [("visual", ["media", config.resampler.width])]
    )
    inputs = [
        ("x", ["text", width]),
        ("bias", [1, n_heads, "text", "keys"]),
        ("media_bias", [1, 1, "text", "media"]),
        *media,
        *past,
    ]
    return inputs, [(logits, [1, language.vocabulary]), *present]


def gated_block(graph: Graph, config: Config, x: str, name: str, cached: bool) -> str:
    width, inner = config.language.width, config.inner_width
    q = graph.linear(graph.norm(x, width), name + "q", width, inner)
    k, v = (
        ("xk", "xv")
        if cached
        else (graph.linear("visual", name + part, config.resampler.width, inner) for part in "kv")
    )
    attended = graph.attention(q, k, v, config.inner_heads, "media_bias", split_kv=cached)
    x = graph.add(x, graph.linear(attended, name + "out", inner, width))
    y = feed_forward(graph, graph.norm(x, width), name, width, config.language.mlp_width)
    return graph.add(x, y)


if __name__ == "__main__":
    main()
