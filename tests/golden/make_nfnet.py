"""Makes `nfnet-paper`: a Flamingo with the paper's kinds of parts, in OpenFlamingo's file formats.

The vision encoder is timm's `NormFreeNet` as configured for `dm_nfnet_f0` to `dm_nfnet_f6`, with
fewer and narrower layers: the quad stem, blocks with a second grouped convolution, squeeze-excite
and skipinit, average pooling before the shortcut of a stage, and the last convolution. A side of 36
pixels becomes 18, 9, 5, 3 and 2, so every kind of layer meets an odd size. The resampler is that of
`make_resampler.py`, the language model the LLaMA variant of `make_openflamingo.py`.

    python make_nfnet.py
"""

from dataclasses import replace

import torch
from timm.models.nfnet import NormFreeNet, _dm_nfnet_cfg
from torch import Tensor, nn

from make_openflamingo import Variant, Vision, main

IMAGE_SIZE = 36
CONFIG = replace(
    _dm_nfnet_cfg(depths=(2, 1, 2, 1), channels=(48, 32, 48, 48)),
    stem_chs=32,
    group_size=8,
    num_features=24,
)


class Encoder(NormFreeNet):
    """(pooled, tokens) as open_clip's encoders give them; the pixels of the features are the tokens."""

    def forward(self, pixels: Tensor) -> tuple[None, Tensor]:
        return None, self.forward_features(pixels).flatten(2).transpose(1, 2)


def randomise(module: nn.Module, seed: int) -> None:
    """Filters with a mean, so that standardisation shows; gains around 1, skipinit gains around 0.5."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(".gain"):
                parameter.copy_(1.0 + 0.2 * noise)
            elif name.endswith(".skipinit_gain"):
                parameter.copy_(0.5 + 0.2 * noise)
            elif name.endswith(".bias"):
                parameter.copy_(0.1 * noise)
            elif ".attn_last." in name:
                parameter.copy_(noise * (2.0 / parameter[0].numel() ** 0.5))
            else:
                parameter.copy_(0.3 + 0.7 * noise)


NFNET = Vision(
    image_size=IMAGE_SIZE,
    width=CONFIG.num_features,
    file="nfnet.pt",
    recipe=f'kind = "nfnet"\nimage_size = {IMAGE_SIZE}\n',
    build=lambda: Encoder(CONFIG, num_classes=10).eval(),
    randomise=randomise,
)
VARIANTS = {
    "nfnet-paper": Variant(
        "llama",
        vision=NFNET,
        max_num_frames=4,
        squared_relu=True,
        n_frames={"A": 4, "D": 2},
    ),
}

if __name__ == "__main__":
    main(VARIANTS)
