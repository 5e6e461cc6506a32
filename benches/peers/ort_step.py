"""A bare loop over an artifact's decoder in ONNX Runtime, with I/O binding: what our `ort` backend is held against.

    python ort_step.py ARTIFACT FLAVOUR CONTEXT STEPS THREADS

Prints the median of STEPS greedy steps after CONTEXT tokens, in milliseconds, as JSON. Beside it, the same steps of ours:

    flamingoc run ARTIFACT --backend ort --threads THREADS --prompt ... --max-new-tokens STEPS --json

Needs `onnxruntime` and `numpy`. In turn, several times: machines that others share move.
"""

import json
import statistics
import sys
import time

import numpy as np
import onnxruntime as ort

KINDS = {"f32": np.float32, "f16": np.float16}
# What the first steps pay once.
WARM_UP = 2


def value(array):
    return ort.OrtValue.ortvalue_from_numpy(array)


class Loop:
    def __init__(self, artifact, flavour, threads):
        with open(f"{artifact}/manifest.json") as file:
            graphs = json.load(file)["graphs"]
        is_ours = lambda graph: graph["stage"] == "decoder" and graph["flavour"] == flavour
        graph = next(filter(is_ours, graphs))
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = False
        path = f"{artifact}/{graph['path']}"
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.outputs = [output["name"] for output in graph["outputs"]]
        self.past, self.media = {}, {}
        for tensor in graph["inputs"]:
            name, shape, kind = tensor["name"], tensor["shape"], KINDS.get(tensor["dtype"])
            if name.startswith("past_"):
                self.past[name] = value(np.zeros((int(shape[0]), 0, int(shape[2])), kind))
            if name.startswith(("media_k.", "media_v.")):
                n_latents = int(shape[1]) if shape[1].isdigit() else 64
                self.media[name] = value(np.zeros((1, n_latents, int(shape[2])), kind))

    def run(self, n, past_len):
        integers = {
            "input_ids": np.full(n, 5),
            "positions": np.arange(past_len, past_len + n),
            "key_positions": np.arange(past_len + n),
            "media_time": np.ones(n),
            "media_index": np.ones(1),
            "logit_rows": np.array([n - 1]),
        }
        binding = self.session.io_binding()
        for name, array in integers.items():
            binding.bind_ortvalue_input(name, value(array.astype(np.int64)))
        for name, tensor in [*self.past.items(), *self.media.items()]:
            binding.bind_ortvalue_input(name, tensor)
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        found = dict(zip(self.outputs, binding.get_outputs()))
        self.past = {name: found[name.replace("past_", "present_")] for name in self.past}
        return int(found["logits"].numpy().argmax())


def main():
    artifact, flavour, context, steps, threads = sys.argv[1:]
    loop = Loop(artifact, flavour, int(threads))
    loop.run(int(context), 0)
    times = []
    for step in range(int(steps)):
        start = time.perf_counter()
        loop.run(1, int(context) + step)
        times.append(1e3 * (time.perf_counter() - start))
    print(json.dumps({"median_ms": statistics.median(times[WARM_UP:])}))


if __name__ == "__main__":
    main()
