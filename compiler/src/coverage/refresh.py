#!/usr/bin/env python3
"""Makes the kernel tables in `tables/`. Plain Python 3.9; the same inputs give the same bytes.

    refresh.py signatures                          # from an installed onnxruntime wheel
    refresh.py cpu                                 # the same; or --kernels DUMP.json --version 1.32.0
    refresh.py cuda --version 1.31.1 --document OperatorKernels.md --classes CLASSES.txt
    refresh.py tensorrt --version 10.15 --document operators.md
    refresh.py tensorrt --version 11 --document operators.md --row '| Swish | Y | FP32 | |'

`DUMP.json` is a list of `{"op", "domain", "ver": [first, last], "types": {name: [ONNX types]}}`, what
`onnxruntime_pybind11_state.get_all_opkernel_def()` tells. `OperatorKernels.md` is `docs/OperatorKernels.md` of
microsoft/onnxruntime, or its CUDA section. `CLASSES.txt` has the C++ classes of the CUDA provider library, one a
line, demangled (`onnxruntime::cuda::Cos<onnxruntime::BFloat16>`). `operators.md` is `docs/operators.md` of
onnx/onnx-tensorrt. `--row` puts a row of that table in place of the document's; `--source TEXT` says where the inputs
came from, once for each. Signatures come first: the others read them.

A table: `ops` maps `Op` or `domain:Op` to kernels; none means that the provider is said not to have the op. A kernel
has `versions` (`[first, last]`, no last: open), `types` by constraint, parameter or position (`input 0`), and may have
`limits`, `notes` (limits in words, which nothing checks) and `inferred` (from a class name alone).
"""

import argparse
import json
import os
import re

TABLES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tables")
OPEN = 2147483647
# Element types that the compiler knows, in its order: its name, ONNX's, C++'s, TensorRT's.
TYPES = [
    ("f64", "double", "double", "DOUBLE"),
    ("f32", "float", "float", "FP32"),
    ("f16", "float16", "onnxruntime::MLFloat16", "FP16"),
    ("bf16", "bfloat16", "onnxruntime::BFloat16", "BF16"),
    ("i64", "int64", "long", "INT64"),
    ("i32", "int32", "int", "INT32"),
    ("i16", "int16", "short", "INT16"),
    ("i8", "int8", "signed char", "INT8"),
    ("u8", "uint8", "unsigned char", "UINT8"),
    ("bool", "bool", "bool", "BOOL"),
]
ORDER = [names[0] for names in TYPES]
FROM_ONNX = {f"tensor({onnx})": ours for ours, onnx, _, _ in TYPES}
FROM_CPP = {cpp: ours for ours, _, cpp, _ in TYPES}
FROM_TENSORRT = {tensorrt: ours for ours, _, _, tensorrt in TYPES}
# What TensorRT's `Supported Types` speaks of, where it is not the first input.
ROLES = {
    "Cast": ["input 0", "output 0"],
    "CastLike": ["input 0", "output 0"],
    "Constant": ["output 0"],
    "ConstantOfShape": ["output 0"],
    "OneHot": ["output 0"],
    "RandomNormal": ["output 0"],
    "RandomUniform": ["output 0"],
    "Where": ["input 1"],
}
# `UINT8 is only supported as network input or output`, and of quantised types the compiler knows INT8 only.
MORE_TYPES = {"QuantizeLinear": {"output 0": "i8"}}


def key_of(domain, op):
    return f"{domain}:{op}" if domain not in ("", "ai.onnx") else op


def text_of(types):
    return " ".join(name for name in ORDER if name in types)


def one_line(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def write(name, head, ops):
    """Writes a table, one op a line."""
    lines = [f"{json.dumps(key)}: {one_line(value)}," for key, value in head.items()]
    rows = [f"{json.dumps(key)}: {one_line(ops[key])}" for key in sorted(ops)]
    text = "{\n" + "\n".join(lines) + '\n"ops": {\n' + ",\n".join(rows) + "\n}\n}\n"
    with open(os.path.join(TABLES, name), "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def wheel():
    from onnxruntime import __version__
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return state, __version__


# Signatures: which constraint each input and output has, by the version that an op has it since.


def signatures(args):
    state, version = wheel()
    found = {}
    for schema in state.get_all_operator_schema():
        parameters = lambda items: [f"{item.name}:{item.typeStr}" for item in items]
        entry = [schema.since_version, parameters(schema.inputs), parameters(schema.outputs)]
        found.setdefault(key_of(schema.domain, schema.name), []).append(entry)
    sources = args.source or [f"schemas of the wheel onnxruntime {version}: get_all_operator_schema()"]
    head = {"version": version, "sources": sources}
    write("signatures.json", head, {key: sorted(entries) for key, entries in found.items()})


def read_signatures():
    with open(os.path.join(TABLES, "signatures.json"), encoding="utf-8") as file:
        return json.load(file)["ops"]


def newest(schemas, key, opset=None):
    """The newest schema of an op up to `opset`: since, inputs, outputs."""
    entries = [entry for entry in schemas.get(key, []) if opset is None or entry[0] <= opset]
    return entries[-1] if entries else None


# ONNX Runtime's kernels.


def known_types(onnx_types):
    """Ours of ONNX's; none if the constraint is of sequences, maps or optionals only."""
    tensors = [name for name in onnx_types if name.startswith("tensor(")]
    return frozenset(FROM_ONNX[name] for name in tensors if name in FROM_ONNX) if tensors else None


def merge(kernels):
    """Kernels that differ in the types of one constraint become one."""
    kernels = sorted(set(kernels), key=lambda kernel: [(name, sorted(types)) for name, types in kernel])
    again = True
    while again:
        again = False
        for index, one in enumerate(kernels):
            for other in kernels[index + 1 :]:
                differ = [i for i, (a, b) in enumerate(zip(one, other)) if a != b]
                same_names = [name for name, _ in one] == [name for name, _ in other]
                if same_names and len(differ) == 1:
                    at = differ[0]
                    both = (one[at][0], one[at][1] | other[at][1])
                    kernels[index] = one[:at] + (both,) + one[at + 1 :]
                    kernels.remove(other)
                    again = True
                    break
            if again:
                break
    return kernels


def table_of(definitions):
    """`(key, first, last, {constraint: ONNX types})` of every kernel to the ops of a table."""
    by_version = {}
    for key, first, last, constraints in definitions:
        types = {name: known_types(types) for name, types in constraints.items()}
        if any(types[name] == frozenset() for name in types):
            by_version.setdefault(key, {})
            continue  # of element types that the compiler does not know
        kernel = tuple(sorted((name, t) for name, t in types.items() if t is not None))
        by_version.setdefault(key, {}).setdefault((first, last), []).append(kernel)
    ops = {}
    for key, versions in by_version.items():
        by_types = {}
        for version in sorted(versions, key=lambda v: (v[0], v[1] or OPEN)):
            for kernel in merge(versions[version]):
                by_types.setdefault(kernel, []).append(list(version))
        ops[key] = [
            {"versions": versions, "types": {name: text_of(types) for name, types in kernel}}
            for kernel, versions in by_types.items()
        ]
    return {key: kernels for key, kernels in ops.items() if kernels}


def last_of(version):
    return None if version == OPEN else version


def cpu(args):
    if args.kernels:
        with open(args.kernels, encoding="utf-8") as file:
            dump = json.load(file)
        found = [(d["domain"], d["op"], d["ver"], d["types"]) for d in dump]
        version = args.version
    else:
        state, version = wheel()
        kernels = state.get_all_opkernel_def()
        kernels = [k for k in kernels if k.provider == "CPUExecutionProvider"]
        found = [(k.domain, k.op_name, k.version_range, k.type_constraints) for k in kernels]
    sources = args.source or [f"kernels of the wheel onnxruntime {version}: get_all_opkernel_def()"]
    definitions = [(key_of(d, op), v[0], last_of(v[1]), types) for d, op, v, types in found]
    head = {"provider": "CPUExecutionProvider", "version": version, "sources": sources}
    write(f"ort-cpu-{version}.json", head, table_of(definitions))


def documented(text):
    """Kernels of the CUDA section of OperatorKernels.md."""
    section = text.split("Operators implemented by CUDAExecutionProvider", 1)[1]
    section = re.split(r"\n## ", section, maxsplit=1)[0]
    domain = op = ""
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if "**Operator Domain:**" in line:
            domain = re.search(r"\*\*Operator Domain:\*\* \*(.*?)\*", line)[1]
        if len(cells) != 4 or not re.fullmatch(r"\d+\+?|\[\d+, \d+\]", cells[2]):
            continue
        op = cells[0] or op
        numbers = [int(number) for number in re.findall(r"\d+", cells[2])]
        last = None if cells[2].endswith("+") else numbers[-1]
        constraints = re.findall(r"\*\*(\w+)\*\* = (.*?)(?=<br/>|$)", cells[3])
        types = {name: [t.strip() for t in types.split(",")] for name, types in constraints}
        yield key_of(domain, op), numbers[0], last, types


def classes(text):
    """First template argument of kernel classes that are called as an op, by op."""
    found = {}
    for line in text.splitlines():
        match = re.fullmatch(r"onnxruntime::(contrib::)?cuda::(\w+)<([\w: ]+)>", line.strip())
        if match and match[3] in FROM_CPP:
            key = key_of("com.microsoft" if match[1] else "", match[2])
            found.setdefault(key, set()).add(FROM_CPP[match[3]])
    return found


def cuda(args):
    with open(args.document, encoding="utf-8") as file:
        ops = table_of(documented(file.read()))
    with open(args.classes, encoding="utf-8") as file:
        seen = classes(file.read())
    schemas = read_signatures()
    for key in sorted(seen):
        schema = newest(schemas, key)
        inputs = schema[1] if schema else []
        constraint = inputs[0].rpartition(":")[2] if inputs else ""
        told = set()
        for kernel in ops.get(key, []):
            told.update(kernel["types"].get(constraint, "").split())
        if constraint and not constraint.startswith("tensor(") and not seen[key] <= told:
            kernel = {"versions": [[schema[0], None]], "types": {constraint: text_of(seen[key])}, "inferred": True}
            ops.setdefault(key, []).append(kernel)
    head = {"provider": "CUDAExecutionProvider", "version": args.version, "sources": args.source}
    write(f"ort-cuda-{args.version}.json", head, ops)


# TensorRT's parser.


def limit_of(sentence, inputs, outputs):
    """Limits that a sentence of `Restrictions` states; none if it must be left in words."""
    names = [name.strip() for name in re.findall(r"`([^`]+)`", sentence)]
    at = [inputs.index(name) for name in names if name in inputs]
    is_about = lambda known: names and all(name in known for name in names)
    constant = r"must be (an initializer|a constant tensor|a build-time constant|resolvable to a constant)$"
    value = re.search(r"^`(\w+)` must be (-?\d+)$", sentence)
    if re.search(constant, sentence) and is_about(inputs):
        return [{"constant": index} for index in at]
    if re.search(r"^`\w*zero_point` must be (0|zero)$", sentence) and is_about(inputs):
        return [{"zero": index} for index in at]
    if re.search(r"must be 4D( input)?$", sentence):
        return [{"rank": [index, 4]} for index in (at or [0])]
    if value and value[1] not in inputs:
        return [{"attribute": [value[1], int(value[2])]}]
    if re.search(r"inputs are unsupported$", sentence) and is_about(inputs):
        return [{"absent": index} for index in at]
    if re.search(r"outputs? (tensor )?(are )?unsupported$", sentence):
        names = [name for name in names if name in outputs] or names
        return [{"outputs": min((outputs.index(n) for n in names if n in outputs), default=1)}]
    if sentence.startswith("Only the first output"):
        return [{"outputs": 1}]
    if re.search(r"attributes are unsupported$", sentence):
        return [{"without": name} for name in names]
    return []


def kernels_of(op, types, restrictions, schemas, opsets):
    schema = newest(schemas, op, opsets[1]) or [1, [], []]
    names = [[parameter.rpartition(":")[0] for parameter in side] for side in schema[1:]]
    ours = text_of({FROM_TENSORRT[t.strip()] for t in types.split(",") if t.strip() in FROM_TENSORRT})
    kernel = {"versions": [[1, None]], "types": {role: ours for role in ROLES.get(op, ["input 0"])}}
    kernel["types"].update(MORE_TYPES.get(op, {}))
    limits, notes = [], []
    for sentence in re.split(r"\.\s|\.$|<br />", restrictions.replace("\\", "")):
        sentence = sentence.strip(" .")
        typed = re.fullmatch(r"`(\w+)` must be INT64", sentence)
        found = limit_of(sentence, *names)
        if typed and typed[1] in names[0]:
            kernel["types"][typed[1]] = "i64"
        elif found:
            limits += found
        elif sentence:
            notes.append(sentence)
    kernel.update({name: value for name, value in (("limits", limits), ("notes", notes)) if value})
    return kernel


def tensorrt(args):
    with open(args.document, encoding="utf-8") as file:
        text = file.read()
    opsets = [int(n) for n in re.search(r"range of opset (\d+) to opset (\d+)", text).groups()]
    schemas = read_signatures()
    ops = {}
    for line in text.splitlines() + args.row:
        cells = [cell.strip() for cell in line.split("|")[1:]] + ["", ""]
        if len(cells) < 4 or cells[1][:1] not in ("Y", "N"):
            continue
        op, is_supported, types, restrictions = cells[0], cells[1][0] == "Y", cells[2], cells[3]
        ops[op] = [kernels_of(op, types, restrictions, schemas, opsets)] if is_supported else []
    head = {
        "provider": "TensorrtExecutionProvider",
        "version": args.version,
        "sources": args.source,
        "opsets": opsets,
    }
    write(f"tensorrt-{args.version}.json", head, ops)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="table", required=True)
    options = {
        signatures: [],
        cpu: ["--kernels", "--version"],
        cuda: ["--document", "--classes", "--version"],
        tensorrt: ["--document", "--version"],
    }
    for verb, names in options.items():
        sub = verbs.add_parser(verb.__name__)
        sub.set_defaults(run=verb)
        sub.add_argument("--source", action="append", default=[])
        for name in names:
            sub.add_argument(name, required=verb is not cpu)
    verbs.choices["tensorrt"].add_argument("--row", action="append", default=[])
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
