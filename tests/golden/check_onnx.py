"""Checks ONNX files with the `onnx` package: `python check_onnx.py FILE...`.

Of every file: the checker with `full_check`, from the path, so that external data are looked up;
strict shape inference with data propagation, whose outputs must be what the file declares; and
that every external tensor lies inside the file it names, at a multiple of 64 bytes, in as many
bytes as its shape says. Prints one JSON object: file to problem, `null` where there is none. Exit
status 1 if any file has a problem.

The `onnx` package knows no `com.microsoft` operators; those that the flavours `ort-cpu` and `cuda` use are
registered here after ONNX Runtime's `docs/ContribOperators.md`, with their shape rules.
"""

import json
import math
import os
import sys

import onnx
from onnx.defs import OpSchema

ALIGNMENT = 64
TYPES = {
    "T": ["tensor(float)", "tensor(float16)"],
    "B": ["tensor(uint8)"],
    "I": ["tensor(int64)"],
}


def declare(
    name, inputs, attributes, infer, bytes_inputs=(), optional=(), outputs=("output",), integers=()
):
    """Registers a `com.microsoft` operator with outputs of floats, the first of which is always there. `bytes_inputs` are
    inputs of bytes, `integers` of i64."""
    kinds = {
        name: "B" if name in bytes_inputs else "I" if name in integers else "T" for name in inputs
    }
    options = OpSchema.FormalParameterOption
    parameters = [
        OpSchema.FormalParameter(
            name, kind, param_option=options.Optional if name in optional else options.Single
        )
        for name, kind in kinds.items()
    ]
    schema = OpSchema(
        name,
        "com.microsoft",
        1,
        inputs=parameters,
        outputs=[
            OpSchema.FormalParameter(
                output, "T", param_option=options.Single if place == 0 else options.Optional
            )
            for place, output in enumerate(outputs)
        ],
        type_constraints=[(kind, TYPES[kind], "") for kind in sorted({"T", *kinds.values()})],
        attributes=attributes,
    )
    schema.set_type_and_shape_inference_function(infer)
    onnx.defs.register_schema(schema)


def attribute(name, kind, required=False):
    return OpSchema.Attribute(name, getattr(OpSchema.AttrType, kind), required=required)


def same_as_input(context):
    context.set_output_type(0, context.get_input_type(0))


def infer_skip_norm(context):
    """x and residual alike, where inference has sizes for both; their sum is the fourth output."""
    x, residual = dims(context, 0), dims(context, 1)
    known = [(a.dim_value, b.dim_value) for a, b in zip(x, residual) if a.dim_value and b.dim_value]
    if len(x) != len(residual) or not known or any(a != b for a, b in known):
        raise ValueError(f"skip norm: {x} and {residual} differ")
    context.set_output_type(0, context.get_input_type(1))
    if context.get_num_outputs() > 3:
        context.set_output_type(3, context.get_input_type(1))


def dims(context, index):
    return list(context.get_input_type(index).tensor_type.shape.dim)


def set_output(context, output_dims):
    output = onnx.TypeProto()
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    given = context.get_input_type(0).tensor_type.elem_type
    output.tensor_type.elem_type = given if given in floats else onnx.TensorProto.FLOAT
    output.tensor_type.shape.dim.extend(output_dims)
    context.set_output_type(0, output)


def infer_fused_matmul(context):
    """x [.., rows, k] times W [n, k] transposed."""
    a, b = dims(context, 0), dims(context, 1)
    if len(a) < 2 or len(b) != 2:
        raise ValueError(f"FusedMatMul: expected ranks above 1 and 2, got {len(a)} and {len(b)}")
    if a[-1] != b[1]:
        raise ValueError(f"FusedMatMul: inner sizes {a[-1]} and {b[1]} differ")
    set_output(context, a[:-1] + [b[0]])


def infer_bytes_matmul(context):
    """x [.., rows, k] times W [k, n]."""
    a, b = dims(context, 0), dims(context, 1)
    if len(a) < 2 or len(b) != 2 or a[-1] != b[0]:
        raise ValueError(f"MatMulIntegerToFloat: {a} and {b} do not fit")
    set_output(context, a[:-1] + [b[1]])


def infer_nibbles_matmul(context):
    """x [.., rows, K] times W, of which [N, blocks, bytes of a block] are stored, transposed."""
    names = ["K", "N", "block_size", "bits"]
    k, n, block, bits = (context.get_attribute(name).i for name in names)
    a, b, scales = (dims(context, index) for index in range(3))
    n_blocks = -(-k // block)
    expected = [n, n_blocks, block * bits // 8]
    if len(a) < 2 or a[-1].dim_value != k or [d.dim_value for d in b] != expected:
        raise ValueError(f"MatMulNBits: {a} and {b}, expected {expected}")
    if [d.dim_value for d in scales] != [n * n_blocks]:
        raise ValueError(f"MatMulNBits: scales {scales}, expected {n * n_blocks}")
    output = onnx.TensorShapeProto.Dimension()
    output.dim_value = n
    set_output(context, a[:-1] + [output])


def infer_attention(context):
    """query [batch, queries, width]; value [batch, keys, value width], or [batch, heads, keys, head width]."""
    query, value = dims(context, 0), dims(context, 2)
    if len(query) != 3 or len(value) not in (3, 4):
        raise ValueError(f"MultiHeadAttention: query of rank {len(query)}, value of {len(value)}")
    set_output(context, [query[0], query[1], value[2] if len(value) == 3 else query[2]])


def declare_contrib_operators():
    declare("Gelu", ["X"], [], same_as_input)
    declare("QuickGelu", ["X"], [attribute("alpha", "FLOAT")], same_as_input)
    declare(
        "FusedMatMul",
        ["A", "B"],
        [attribute("alpha", "FLOAT"), attribute("transA", "INT"), attribute("transB", "INT")],
        infer_fused_matmul,
    )
    for norm in ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"]:
        declare(
            norm,
            ["input", "skip", "gamma"],
            [attribute("epsilon", "FLOAT")],
            infer_skip_norm,
            outputs=["output", "mean", "inv_std_var", "input_skip_bias_sum"],
        )
    declare(
        "RotaryEmbedding",
        ["input", "position_ids", "cos_cache", "sin_cache"],
        [attribute(name, "INT") for name in ["interleaved", "num_heads", "rotary_embedding_dim"]],
        same_as_input,
        integers=["position_ids"],
    )
    bytes_of_a_product = ["A", "B", "a_zero_point", "b_zero_point"]
    declare(
        "MatMulIntegerToFloat",
        ["A", "B", "a_scale", "b_scale", "a_zero_point", "b_zero_point"],
        [],
        infer_bytes_matmul,
        bytes_of_a_product,
    )
    declare(
        "MatMulNBits",
        ["A", "B", "scales"],
        [attribute(name, "INT", required=True) for name in ["K", "N", "block_size"]]
        + [attribute(name, "INT") for name in ["accuracy_level", "bits"]],
        infer_nibbles_matmul,
        ["B"],
    )
    declare(
        "MultiHeadAttention",
        ["query", "key", "value", "bias", "key_padding_mask", "attention_bias"],
        [attribute("num_heads", "INT", required=True), attribute("scale", "FLOAT")],
        infer_attention,
        optional=["bias", "key_padding_mask", "attention_bias"],
    )


def external_problems(model, folder):
    """What is wrong with where the initialisers point."""
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    problems = [] if external else ["no external weights"]
    for tensor in external:
        place = {entry.key: entry.value for entry in tensor.external_data}
        offset, length = int(place["offset"]), int(place["length"])
        path = os.path.join(folder, place["location"])
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        expected = math.prod(tensor.dims) * dtype.itemsize
        if os.path.basename(path) != place["location"]:
            problems.append(f"{tensor.name}: location {place['location']} leaves the folder")
        if length != expected:
            problems.append(f"{tensor.name}: expected {expected} bytes, got {length}")
        if offset % ALIGNMENT != 0:
            problems.append(f"{tensor.name}: offset {offset} is no multiple of {ALIGNMENT}")
        if offset + length > os.path.getsize(path):
            problems.append(f"{tensor.name}: {offset} + {length} is past the end of the file")
    return problems


def form(info):
    """Element type and sizes; a symbol or an unknown size is its name or None."""
    tensor = info.type.tensor_type
    sizes = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim]
    return tensor.elem_type, sizes


def inferred_problems(model):
    """Computed values whose inferred element type, rank or known size is another than declared."""
    declared = {info.name: form(info) for info in [*model.graph.value_info, *model.graph.output]}
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    for output in bare.graph.output:
        output.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(
        bare, check_type=True, strict_mode=True, data_prop=True
    ).graph
    inferred = {info.name: form(info) for info in [*graph.value_info, *graph.output]}
    problems = [f"{name}: nothing inferred" for name in sorted(set(declared) - set(inferred))]
    for name, (dtype, sizes) in inferred.items():
        expected_dtype, expected = declared.get(name, (dtype, sizes))
        clash = len(sizes) != len(expected) or any(
            isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(sizes, expected)
        )
        if dtype != expected_dtype or clash:
            problems.append(f"{name}: declared {expected_dtype} {expected}, inferred {dtype} {sizes}")
    return problems


def check(path):
    """The problem of a file as text; None if there is none."""
    try:
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        problems = external_problems(model, os.path.dirname(path)) + inferred_problems(model)
    except Exception as error:  # The checker raises several kinds; all are findings.
        return f"{type(error).__name__}: {error}"
    return "; ".join(problems) or None


def main():
    declare_contrib_operators()
    found = {path: check(path) for path in sys.argv[1:]}
    print(json.dumps(found, indent=1))
    return 1 if not found or any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
