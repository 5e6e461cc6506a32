"""Makes `clip-b32`, `clip-b16`, `clip-h14`, `siglip` and `siglip-timm`: the LLaMA variant of `make_openflamingo.py` behind
the vision encoders that people put in the place of ViT-L/14, small, with what each has otherwise.

B/32 and B/16 and the So400m SigLIP have pictures here whose side is no multiple of the patch: their convolutions leave the
rest out, as SigLIP So400m's of 14 pixels does at 384.

    python make_vision.py [VARIANT ...]
"""

from pathlib import Path

import torch
import transformers
from open_clip.transformer import QuickGELU, VisionTransformer
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import Tensor, nn

from make_openflamingo import Variant, Vision, main


class OpenClip(VisionTransformer):
    """open_clip's encoder; `is_normed` as of version 2.23, which hands tokens on behind `ln_post`."""

    def __init__(self, is_normed: bool, **shape):
        super().__init__(mlp_ratio=shape.pop("mlp_ratio", 4.0), output_dim=12, output_tokens=True, **shape)
        self.is_normed = is_normed

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        pooled, tokens = super().forward(pixels)
        return pooled, self.ln_post(tokens) if self.is_normed else tokens


class HuggingFace(nn.Module):
    """A vision model of transformers behind the call of open_clip's encoders."""

    def __init__(self, model: transformers.PreTrainedModel, n_skipped: int):
        super().__init__()
        self.model, self.n_skipped = model.eval(), n_skipped

    def forward(self, pixels: Tensor) -> tuple[None, Tensor]:
        return None, self.model(pixels).last_hidden_state[:, self.n_skipped :]


class Trunk(nn.Module):
    """open_clip's `TimmModel` of a SigLIP, as `visual` of a whole model."""

    def __init__(self, trunk: TimmTransformer):
        super().__init__()
        self.visual = nn.ModuleDict({"trunk": trunk})

    def forward(self, pixels: Tensor) -> tuple[None, Tensor]:
        return None, self.visual["trunk"].forward_features(pixels)


def write_folder(module: HuggingFace, path: Path) -> None:
    module.model.save_pretrained(path, safe_serialization=True)


def read_folder(path: Path, kind: type) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in kind.from_pretrained(path).state_dict().items()}


def write_whole(module: Trunk, path: Path) -> None:
    """With what a whole SigLIP has beside its `visual` tower."""
    text = {"text.token_embedding.weight": torch.ones(5, 12), "logit_scale": torch.ones(()), "logit_bias": -torch.ones(())}
    torch.save(module.state_dict() | text, path)


def read_visual(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, weights_only=True)
    return {name: tensor for name, tensor in state.items() if name.startswith("visual.")}


def open_clip(recipe: str = "", is_normed: bool = False, **shape) -> Vision:
    size = shape["image_size"]
    return Vision(
        image_size=size,
        width=shape["width"],
        file="clip_visual.pt",
        recipe=f"image_size = {size}\nheads = {shape['heads']}\n{recipe}",
        build=lambda: OpenClip(is_normed, **shape).eval(),
    )


def folder(kind: type, config: transformers.PretrainedConfig, n_skipped: int) -> Vision:
    return Vision(
        image_size=config.image_size,
        width=config.hidden_size,
        file="vision_encoder",
        recipe="",
        build=lambda: HuggingFace(kind(config), n_skipped),
        write=write_folder,
        read=lambda path: read_folder(path, kind),
    )


CLIP_B16 = transformers.CLIPVisionConfig(
    hidden_size=20,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=41,
    patch_size=16,
    projection_dim=12,
    hidden_act="quick_gelu",
)
SIGLIP = transformers.SiglipVisionConfig(
    hidden_size=18,
    intermediate_size=43,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=48,
    patch_size=14,
)


def timm_siglip() -> TimmTransformer:
    return TimmTransformer(
        img_size=48,
        patch_size=14,
        embed_dim=18,
        depth=2,
        num_heads=2,
        mlp_ratio=2.4,
        class_token=False,
        global_pool="map",
        num_classes=0,
    ).eval()


TIMM = Vision(
    image_size=48,
    width=18,
    file="siglip.pt",
    recipe='image_size = 48\nheads = 2\nactivation = "gelu"\n',
    build=lambda: Trunk(timm_siglip()),
    write=write_whole,
    read=read_visual,
)


def variant(vision: Vision) -> Variant:
    return Variant("llama", vision=vision, batches="ABC", resampler_depth=1)


VARIANTS = {
    "clip-b32": variant(
        open_clip(image_size=70, patch_size=32, width=16, layers=2, heads=2, act_layer=QuickGELU),
    ),
    "clip-b16": variant(folder(transformers.CLIPVisionModel, CLIP_B16, 1)),
    "clip-h14": variant(
        open_clip(
            'activation = "gelu"\nfinal_norm = true\n',
            is_normed=True,
            image_size=42,
            patch_size=14,
            width=24,
            layers=3,
            heads=2,
            mlp_ratio=4.3637,
        ),
    ),
    "siglip": variant(folder(transformers.SiglipVisionModel, SIGLIP, 0)),
    "siglip-timm": variant(TIMM),
}

if __name__ == "__main__":
    main(VARIANTS)
