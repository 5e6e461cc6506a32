"""Makes `resampler-paper`: a resampler as in the Flamingo paper, in an OpenFlamingo checkpoint.

The paper's resampler differs from OpenFlamingo's in its squared-ReLU feed-forwards and in the
learnt frame embeddings; everything else is the LLaMA variant of `make_openflamingo.py`.

    python make_resampler.py
"""

from make_openflamingo import Variant, main

VARIANTS = {
    "resampler-paper": Variant(
        "llama",
        max_num_frames=4,
        squared_relu=True,
        n_frames={"A": 4, "D": 2},
    ),
}

if __name__ == "__main__":
    main(VARIANTS)
