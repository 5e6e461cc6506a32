"""llama.cpp's own `mpt` graph: the language model alone, since it has no cross-attention.

It has two language layers for each of ours, so that the bytes of weights are close to those of a
layer and its gated block; compare GB/s of weights, not times. Precisions: q8_0, q4_0.
"""

import ctypes
import time

import numpy as np

from measuring import MODELS, emit, measure, options
from shapes import CONFIGS, CONTEXT, Config, weight

PRECISIONS = ["q8_0", "q4_0"]
FILE_TYPES = {"q8_0": 7, "q4_0": 2}


def n_layers(config: Config) -> int:
    return 2 * config.language.n_built


def main() -> None:
    chosen = options(__doc__.splitlines()[0], PRECISIONS, ["cached"])
    path = MODELS / f"llama-{chosen.config}-{chosen.precision}.gguf"
    if chosen.verb == "make":
        make(CONFIGS[chosen.config], chosen.precision, str(path))
    else:
        run(CONFIGS[chosen.config], str(path), chosen.threads, chosen.seconds)


def make(config: Config, precision: str, path: str) -> None:
    import gguf
    from gguf.quants import quantize

    language, width = config.language, config.language.width
    kind = gguf.GGMLQuantizationType[precision.upper()]
    writer = gguf.GGUFWriter(path, "mpt")
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_block_count(n_layers(config))
    writer.add_feed_forward_length(language.mlp_width)
    writer.add_head_count(language.n_heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_max_alibi_bias(8.0)
    writer.add_vocab_size(language.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(FILE_TYPES[precision])

    def matrix(name: str, n_out: int, n_in: int) -> None:
        writer.add_tensor(name, quantize(weight(name, n_out, n_in), kind), raw_dtype=kind)

    ones = np.ones(width, np.float32)
    matrix("token_embd.weight", language.vocabulary, width)
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(n_layers(config)):
        block = f"blk.{layer}."
        writer.add_tensor(block + "attn_norm.weight", ones)
        writer.add_tensor(block + "ffn_norm.weight", ones)
        matrix(block + "attn_qkv.weight", 3 * width, width)
        matrix(block + "attn_output.weight", width, width)
        matrix(block + "ffn_up.weight", language.mlp_width, width)
        matrix(block + "ffn_down.weight", width, language.mlp_width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(config: Config, path: str, threads: int, seconds: float) -> None:
    import llama_cpp as llama

    silent = llama.llama_log_callback(lambda *_: None)  # the library keeps the pointer
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = threads
    settings.no_perf = True
    begun = time.perf_counter()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    context = llama.llama_init_from_model(model, settings)
    if not model or not context:
        raise SystemExit(f"llama.cpp cannot load `{path}`")
    about = {
        "load_ms": round((time.perf_counter() - begun) * 1e3),
        "version": llama.__version__,
        "language_layers": n_layers(config),
        "gated": False,
    }
    memory = llama.llama_get_memory(context)
    prompt = (llama.llama_token * CONTEXT)(
        *(i * 977 % config.language.vocabulary for i in range(CONTEXT))
    )
    token = (llama.llama_token * 1)(17)

    def advance(tokens: ctypes.Array) -> None:
        if llama.llama_decode(context, llama.llama_batch_get_one(tokens, len(tokens))) != 0:
            raise SystemExit("llama_decode failed")
        llama.llama_synchronize(context)

    def prefill() -> None:
        llama.llama_memory_clear(memory, True)
        advance(prompt)

    def decode() -> None:
        advance(token)
        llama.llama_memory_seq_rm(memory, 0, CONTEXT, -1)

    emit("prefill", 1, measure(prefill, seconds), **about)
    prefill()
    emit("decode-cached", 1, measure(decode, seconds), **about)


if __name__ == "__main__":
    main()
