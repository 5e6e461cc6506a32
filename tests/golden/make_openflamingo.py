"""Makes the OpenFlamingo and Otter checkpoints of this folder and their golden outputs.

Each variant is a small model with seeded random weights, assembled from the classes of
`open_flamingo` and `open_clip_torch`, stored as released files store it. After writing, the model
is rebuilt from the files alone and every case is run again, unbatched, against the golden.

    python make_openflamingo.py [VARIANT ...]
"""

import argparse
import copy
import json
import re
import shutil
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from einops import rearrange
from open_clip.transformer import QuickGELU, VisionTransformer
from open_flamingo.src.factory import _infer_decoder_layers_attr_name
from open_flamingo.src.flamingo import Flamingo
from open_flamingo.src.flamingo_lm import FlamingoLMMixin
from open_flamingo.src.helpers import PerceiverResampler
from open_flamingo.src.utils import extend_instance
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import (
    greedy_margin,
    pad_left,
    randomise,
    read_golden,
    require_close,
    require_equal,
    write_golden,
)

HERE = Path(__file__).parent

BASE_VOCAB = 96
END_OF_CHUNK, IMAGE, PAD, VOCAB = 96, 97, 98, 99
BOS, EOS = 1, 2
NEVER = 10_000  # an end token no model emits, so that all new tokens come

IMAGE_SIZE, PATCH_SIZE = 28, 14
VISION_WIDTH, VISION_HEADS, VISION_LAYERS = 16, 4, 2
LM_WIDTH, LM_HEADS, LM_LAYERS, LM_CONTEXT = 32, 4, 4, 128
CROSS_ATTENTION_EVERY = 2
RESAMPLER_DEPTH, N_LATENTS = 2, 8
N_NEW_TOKENS, N_BEAMS = 8, 3


def write_state(module: nn.Module, path: Path) -> None:
    torch.save(module.state_dict(), path)


def read_state(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


@dataclass(frozen=True)
class Vision:
    """A vision encoder: the module gives (pooled, tokens), its state dict is the file unless `write` says otherwise."""

    image_size: int
    width: int
    file: str
    recipe: str  # the lines of `[vision]`
    build: Callable[[], nn.Module]
    randomise: Callable[[nn.Module, int], None] = randomise
    write: Callable[[nn.Module, Path], None] = write_state
    read: Callable[[Path], dict[str, Tensor]] = read_state


CLIP = Vision(
    image_size=IMAGE_SIZE,
    width=VISION_WIDTH,
    file="clip_visual.pt",
    recipe=f"""image_size = {IMAGE_SIZE}
patch_size = {PATCH_SIZE}
heads = {VISION_HEADS}
activation = "quick_gelu"
""",
    build=lambda: build_visual(),
)


@dataclass(frozen=True)
class Variant:
    """What sets one folder apart from the others."""

    lm: str
    vision: Vision = CLIP
    form: str = "released"  # released | training | torchscript | otter
    max_num_frames: int | None = None
    squared_relu: bool = False
    n_frames: dict[str, int] = field(default_factory=dict)  # by batch name, one frame if absent
    batches: str = "ABCD"
    resampler_depth: int = RESAMPLER_DEPTH


VARIANTS = {
    "openflamingo-opt": Variant("opt"),
    "openflamingo-llama": Variant("llama"),
    "openflamingo-gpt-neox": Variant("gpt-neox"),
    "openflamingo-gpt-neox-parallel": Variant("gpt-neox-parallel"),
    "openflamingo-mpt": Variant("mpt"),
    "openflamingo-opt-training": Variant("opt", form="training"),
    "openflamingo-llama-torchscript": Variant("llama", form="torchscript"),
    "openflamingo-frames": Variant("llama", max_num_frames=4, n_frames={"A": 3, "D": 2}),
    "otter-image": Variant("llama", form="otter"),
    "otter-video": Variant("llama", form="otter", max_num_frames=4, n_frames={"A": 3, "D": 2}),
}


def main(variants: dict[str, Variant]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", nargs="*", help="default: all")
    for name in parser.parse_args().variant or variants:
        make(HERE / name, variants[name])
        verify(HERE / name, variants[name])


def make(folder: Path, variant: Variant) -> None:
    """Writes one folder anew: the checkpoint's files, then the golden."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model, base_lm = build(variant)
    WRITERS[variant.form](folder, variant, model, base_lm)
    write_golden(folder, run_cases(model, variant))


# ---- the model


class FlamingoOfFrames(Flamingo):
    """The package's model without its assertion of one frame a medium."""

    def _encode_vision_x(self, vision_x: Tensor) -> None:
        visual_tokens = encode_media(self, vision_x)
        for layer in self.lang_encoder._get_decoder_layers():
            layer.condition_vis_x(visual_tokens)


class SquaredRelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) ** 2


def encode_media(model: Flamingo, vision_x: Tensor) -> Tensor:
    """[batch, n_media, n_frames, 3, H, W] -> visual tokens [batch, n_media, n_latents, dim]."""
    batch, n_media, n_frames = vision_x.shape[:3]
    patches = model.vision_encoder(vision_x.flatten(0, 2))[1]
    patches = rearrange(patches, "(b t f) v d -> b t f v d", b=batch, t=n_media, f=n_frames)
    return model.perceiver(patches)


def build(variant: Variant) -> tuple[Flamingo, nn.Module]:
    """The assembled model, and its language model as it was before the surgery."""
    visual, lm = variant.vision.build(), build_lm(variant.lm)
    variant.vision.randomise(visual, 11)
    randomise(lm, 12)
    if variant.form == "torchscript":
        visual.half().float()
    base_lm = copy.deepcopy(lm)
    model = assemble(visual, lm, variant)
    randomise(model.perceiver, 13)
    randomise(model.lang_encoder.gated_cross_attn_layers, 14)
    fill_new_rows(model.lang_encoder, variant.form)
    return model, base_lm


def build_visual() -> VisionTransformer:
    return VisionTransformer(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        width=VISION_WIDTH,
        layers=VISION_LAYERS,
        heads=VISION_HEADS,
        mlp_ratio=4.0,
        output_dim=12,
        act_layer=QuickGELU,
        output_tokens=True,
    ).eval()


def build_lm(kind: str) -> nn.Module:
    special = dict(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=0, vocab_size=BASE_VOCAB)
    common = dict(
        hidden_size=LM_WIDTH,
        num_hidden_layers=LM_LAYERS,
        num_attention_heads=LM_HEADS,
        max_position_embeddings=LM_CONTEXT,
        **special,
    )
    neox = dict(intermediate_size=128, **common)
    t = transformers
    match kind:
        case "opt":
            config = t.OPTConfig(ffn_dim=64, word_embed_proj_dim=LM_WIDTH, dropout=0.0, **common)
            return t.OPTForCausalLM(config)
        case "llama":
            return t.LlamaForCausalLM(t.LlamaConfig(intermediate_size=56, rms_norm_eps=1e-6, **common))
        case "gpt-neox":
            config = t.GPTNeoXConfig(rotary_pct=1.0, use_parallel_residual=False, **neox)
            return t.GPTNeoXForCausalLM(config)
        case "gpt-neox-parallel":
            config = t.GPTNeoXConfig(rotary_pct=0.25, use_parallel_residual=True, **neox)
            return t.GPTNeoXForCausalLM(config)
        case "mpt":
            config = t.MptConfig(
                d_model=LM_WIDTH,
                n_heads=LM_HEADS,
                n_layers=LM_LAYERS,
                expansion_ratio=4,
                max_seq_len=LM_CONTEXT,
                use_cache=True,
                **special,
            )
            return t.MptForCausalLM(config)
    raise SystemExit(f"no language model `{kind}`")


def assemble(visual: nn.Module, lm: nn.Module, variant: Variant) -> Flamingo:
    """The package's surgery, with a resampler of this folder's size."""
    extend_instance(lm, FlamingoLMMixin)
    lm.set_decoder_layers_attr_name(_infer_decoder_layers_attr_name(lm))
    lm.resize_token_embeddings(VOCAB)
    model = FlamingoOfFrames(
        types.SimpleNamespace(visual=visual),
        lm,
        END_OF_CHUNK,
        IMAGE,
        vis_dim=variant.vision.width,
        cross_attn_every_n_layers=CROSS_ATTENTION_EVERY,
    )
    model.perceiver = PerceiverResampler(
        dim=variant.vision.width,
        depth=variant.resampler_depth,
        num_latents=N_LATENTS,
        max_num_frames=variant.max_num_frames,
    )
    if variant.squared_relu:
        for _, feed_forward in model.perceiver.layers:
            feed_forward[2] = SquaredRelu()
    return freeze(model)


def freeze(model: Flamingo) -> Flamingo:
    """Trainable parts as in the package's factory; the released file is cut along this line."""
    model.requires_grad_(False)
    model.perceiver.requires_grad_(True)
    model.lang_encoder.gated_cross_attn_layers.requires_grad_(True)
    model.lang_encoder.get_input_embeddings().requires_grad_(True)
    return model.eval()


def fill_new_rows(lm: nn.Module, form: str) -> None:
    """Fills the rows of the three added tokens.

    A head that no file stores (LLaMA's) gets zero rows, so that the logits can be had from the
    files alone.
    """
    generator = torch.Generator().manual_seed(15)
    embedding, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    with torch.no_grad():
        embedding[BASE_VOCAB:] = 0.15 * torch.randn(embedding[BASE_VOCAB:].shape, generator=generator)
        if head.data_ptr() == embedding.data_ptr():
            return
        is_stored = hasattr(lm, "embed_out")
        noise = torch.randn(head[BASE_VOCAB:].shape, generator=generator)
        head[BASE_VOCAB:] = 0.1 * noise if is_stored else 0.0


# ---- the files


def write_released(folder: Path, variant: Variant, model: Flamingo, base_lm: nn.Module) -> None:
    torch.save(released_state(model), folder / "checkpoint.pt")
    variant.vision.write(model.vision_encoder, folder / variant.vision.file)
    write_lm_and_recipe(folder, variant, base_lm)


def write_training(folder: Path, variant: Variant, model: Flamingo, base_lm: nn.Module) -> None:
    torch.save(training_checkpoint(released_state(model)), folder / "checkpoint.pt")
    torch.save(model.vision_encoder.state_dict(), folder / "clip_visual.pt")
    write_lm_and_recipe(folder, variant, base_lm)


def write_torchscript(folder: Path, variant: Variant, model: Flamingo, base_lm: nn.Module) -> None:
    torch.save(released_state(model), folder / "checkpoint.pt")
    write_clip_archive(folder / "clip_visual.pt", model.vision_encoder)
    write_lm_and_recipe(folder, variant, base_lm)


def write_lm_and_recipe(folder: Path, variant: Variant, base_lm: nn.Module) -> None:
    base_lm.save_pretrained(folder / "lang_encoder", safe_serialization=True)
    (folder / "recipe.toml").write_text(recipe(variant))


def recipe(variant: Variant) -> str:
    resampler = '\n[resampler]\nactivation = "squared_relu"\n' if variant.squared_relu else ""
    return f"""family = "openflamingo"
checkpoint = "checkpoint.pt"
language_model = "lang_encoder"
vision_encoder = "{variant.vision.file}"

[vision]
{variant.vision.recipe}{resampler}
[tokens]
end_of_chunk = {END_OF_CHUNK}
image = {IMAGE}
pad = {PAD}
"""


def released_state(model: Flamingo) -> OrderedDict:
    """What the package's training script keeps: trained tensors, and frozen ones named "embed".

    MPT's tied head has no key of its own in the released files.
    """
    state = model.state_dict()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad and "embed" not in n}
    dropped = ("lang_encoder.old_decoder_blocks", "lang_encoder.gated_cross_attn_layers", "vision_encoder")
    is_mpt = model.lang_encoder.config.model_type == "mpt"
    for name in list(state):
        is_mpt_head = is_mpt and name == "lang_encoder.lm_head.weight"
        if name in frozen or name.startswith(dropped) or is_mpt_head:
            del state[name]
    return state


def training_checkpoint(state: OrderedDict) -> dict:
    """The nesting of a checkpoint taken in training, with a short optimiser state."""
    moments = {"step": torch.tensor(5.0), "exp_avg": torch.full((3, 2), 0.25), "exp_avg_sq": torch.ones(3, 2)}
    group = {
        "lr": 1e-4,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "amsgrad": False,
        "foreach": None,
        "params": [0, 1],
    }
    return {
        "epoch": 3,
        "model_state_dict": OrderedDict((f"module.{name}", tensor) for name, tensor in state.items()),
        "optimizer_state_dict": {"state": {0: moments, 1: {}}, "param_groups": [group]},
        "lr_scheduler_state_dict": {"base_lrs": [1e-4], "last_epoch": 1, "lr_lambdas": [None]},
    }


class ClipArchive(nn.Module):
    """A CLIP of two towers with the tensor names of OpenAI's TorchScript archives."""

    def __init__(self, visual: nn.Module):
        super().__init__()
        width, n_text = 16, 8
        self.visual = copy.deepcopy(visual)
        self.token_embedding = nn.Embedding(BASE_VOCAB, width)
        self.positional_embedding = nn.Parameter(torch.empty(n_text, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, 12))
        for part in (self.token_embedding, self.ln_final):
            randomise(part, 16)
        with torch.no_grad():
            self.positional_embedding.fill_(0.125)
            self.text_projection.fill_(0.25)
        self.logit_scale = nn.Parameter(torch.tensor(4.6052))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        words = self.ln_final(self.token_embedding(text) + self.positional_embedding)
        return self.visual(image)[1], self.logit_scale.exp() * words.mean(1) @ self.text_projection


def write_clip_archive(path: Path, visual: nn.Module) -> None:
    archive = ClipArchive(visual).eval().requires_grad_(False)
    image = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    traced = torch.jit.trace(archive, (image, torch.zeros(1, 8, dtype=torch.long)))
    traced.half().save(str(path))
    drop_source_positions(path)


def drop_source_positions(path: Path) -> None:
    """Rewrites a TorchScript archive without its `.debug_pkl` members, which name local files."""
    with zipfile.ZipFile(path) as archive:
        members = [(m.filename, m.compress_type, archive.read(m)) for m in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, compress_type, content in members:
            if not name.endswith(".debug_pkl"):
                info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                archive.writestr(info, content, compress_type)


def write_otter(folder: Path, variant: Variant, model: Flamingo, base_lm: nn.Module) -> None:
    """The whole model in one Hugging Face folder, in two shards."""
    tensors = otter_tensors(model)
    (folder / "config.json").write_text(json.dumps(otter_config(base_lm), indent=2, sort_keys=True) + "\n")
    added = {"<|endofchunk|>": END_OF_CHUNK, "<image>": IMAGE, "<PAD>": PAD}
    (folder / "added_tokens.json").write_text(json.dumps(added, indent=2) + "\n")
    names = sorted(tensors)
    half, weight_map = len(names) // 2, {}
    for idx, shard in enumerate((names[:half], names[half:]), start=1):
        file = f"model-{idx:05}-of-00002.safetensors"
        save_file({n: tensors[n] for n in shard}, str(folder / file), metadata={"format": "pt"})
        weight_map |= {name: file for name in shard}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def otter_config(base_lm: nn.Module) -> dict:
    text = base_lm.config.to_dict() | {"vocab_size": VOCAB}
    return {
        "architectures": ["OtterForConditionalGeneration"],
        "model_type": "otter",
        "cross_attn_every_n_layers": CROSS_ATTENTION_EVERY,
        "only_attend_previous": True,
        "use_media_placement_augmentation": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "text_config": {k: v for k, v in text.items() if k != "_name_or_path"},
        "vision_config": clip_config(),
    }


def clip_config() -> dict:
    return {
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "hidden_size": VISION_WIDTH,
        "image_size": IMAGE_SIZE,
        "intermediate_size": 4 * VISION_WIDTH,
        "layer_norm_eps": 1e-05,
        "num_attention_heads": VISION_HEADS,
        "num_channels": 3,
        "num_hidden_layers": VISION_LAYERS,
        "patch_size": PATCH_SIZE,
        "projection_dim": 12,
    }


OTTER_NAMES = (
    (re.compile(r"^(perceiver\.layers\.\d+)\.0\."), r"\1."),
    (re.compile(r"^(perceiver\.layers\.\d+)\.1\."), r"\1.feed_forward."),
    (re.compile(r"(\.gated_cross_attn_layer)\.ff\."), r"\1.feed_forward."),
)
OPENFLAMINGO_NAMES = (
    (re.compile(r"^(perceiver\.layers\.\d+)\.feed_forward\."), r"\1.1."),
    (re.compile(r"^(perceiver\.layers\.\d+)\.(norm_|to_)"), r"\1.0.\2"),
    (re.compile(r"(\.gated_cross_attn_layer)\.feed_forward\."), r"\1.ff."),
)


def renamed(name: str, rules: tuple) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


def otter_tensors(model: Flamingo) -> dict[str, Tensor]:
    skipped = ("lang_encoder.old_decoder_blocks", "lang_encoder.gated_cross_attn_layers", "vision_encoder")
    state = {n: t for n, t in model.state_dict().items() if not n.startswith(skipped)}
    tensors = {renamed(name, OTTER_NAMES): tensor.clone() for name, tensor in state.items()}
    for name, tensor in hugging_face_clip(model.vision_encoder.state_dict()).items():
        tensors[f"vision_encoder.{name}"] = tensor.clone()
    return tensors


def hugging_face_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's visual tensors under the names of `CLIPVisionModel`; `proj` has no place there."""
    tensors = {
        "embeddings.class_embedding": state["class_embedding"],
        "embeddings.patch_embedding.weight": state["conv1.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
    }
    layer_names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    layer_names["attn.out_proj"] = "self_attn.out_proj"
    for kind in ("weight", "bias"):
        tensors[f"pre_layrnorm.{kind}"] = state[f"ln_pre.{kind}"]
        tensors[f"post_layernorm.{kind}"] = state[f"ln_post.{kind}"]
        for idx in range(VISION_LAYERS):
            source, target = f"transformer.resblocks.{idx}", f"encoder.layers.{idx}"
            for old, new in layer_names.items():
                tensors[f"{target}.{new}.{kind}"] = state[f"{source}.{old}.{kind}"]
            for part, rows in zip("qkv", state[f"{source}.attn.in_proj_{kind}"].chunk(3)):
                tensors[f"{target}.self_attn.{part}_proj.{kind}"] = rows
    return {f"vision_model.{name}": tensor for name, tensor in tensors.items()}


WRITERS = {
    "released": write_released,
    "training": write_training,
    "torchscript": write_torchscript,
    "otter": write_otter,
}


# ---- the cases


@dataclass
class Batch:
    """Prompts run together; `rows` are their ids, `pixels` [batch, most media, n_frames, 3, H, W]."""

    names: list[str]
    rows: list[list[int]]
    pixels: Tensor

    def n_media(self, idx: int) -> int:
        return self.rows[idx].count(IMAGE)


def batches(variant: Variant) -> list[Batch]:
    """A: text before the first image. B: two rows, left padding. C: text only. D: five images."""
    generator = torch.Generator().manual_seed(2)

    def words(count: int) -> list[int]:
        return torch.randint(3, BASE_VOCAB, (count,), generator=generator).tolist()

    def pixels(batch: str, n_rows: int, n_media: int) -> Tensor:
        n_frames, side = variant.n_frames.get(batch, 1), variant.vision.image_size
        shape = (n_rows, n_media, n_frames, 3, side, side)
        return torch.randn(shape, generator=generator)

    chunk = [END_OF_CHUNK]
    a = words(3) + [IMAGE] + words(4) + chunk + [IMAGE] + words(3)
    b0 = [IMAGE] + words(3) + chunk + [IMAGE] + words(2)
    b1 = [IMAGE] + words(4)
    c = words(7)
    d = words(2)
    for count in (9, 13, 7, 11):
        d += [IMAGE] + words(count) + chunk
    d += [IMAGE] + words(10)
    b_pixels = pixels("B", 2, 2)
    b_pixels[1, 1] = 0  # the slot of the medium that row 1 does not have
    found = [
        Batch(["A"], [a], pixels("A", 1, 2)),
        Batch(["B0", "B1"], [b0, b1], b_pixels),
        Batch(["C"], [c], torch.zeros(pixels("C", 1, 1).shape)),
        Batch(["D"], [d], pixels("D", 1, 5)),
    ]
    return [batch for batch in found if batch.names[0][0] in variant.batches]


@torch.no_grad()
def run_cases(model: Flamingo, variant: Variant) -> dict[str, Tensor]:
    """Runs each batch and takes its rows apart: no batch dimension, no padding, no empty media."""
    golden: dict[str, Tensor] = {}
    for batch in batches(variant):
        ids, mask = pad_left(batch.rows, PAD)
        visual_tokens = encode_media(model, batch.pixels)
        logits = model(batch.pixels, ids, mask).logits
        greedy = generate(model, batch.pixels, ids, mask)
        beam = generate(model, batch.pixels, ids, mask, num_beams=N_BEAMS, length_penalty=0.0)
        for idx, (case, row) in enumerate(zip(batch.names, batch.rows)):
            n_media = batch.n_media(idx)
            if n_media > 0:
                golden[f"{case}.pixel_values"] = batch.pixels[idx, :n_media]
                golden[f"{case}.visual_tokens"] = visual_tokens[idx, :n_media]
            golden[f"{case}.input_ids"] = torch.tensor(row)
            golden[f"{case}.logits"] = logits[idx, -len(row) :]
            golden[f"{case}.greedy"] = greedy[idx]
            golden[f"{case}.beam3"] = beam[idx]
    return golden


def generate(model: Flamingo, pixels: Tensor, ids: Tensor, mask: Tensor, **options) -> Tensor:
    """New tokens only, [batch, N_NEW_TOKENS].

    `<image>` is suppressed: the package loses its cached media state when a model emits it.
    """
    tokens = model.generate(
        pixels,
        ids,
        mask,
        max_new_tokens=N_NEW_TOKENS,
        do_sample=False,
        eos_token_id=NEVER,
        pad_token_id=PAD,
        suppress_tokens=[IMAGE],
        **options,
    )
    return tokens[:, ids.shape[1] :]


# ---- the check


@torch.no_grad()
def verify(folder: Path, variant: Variant) -> None:
    """Rebuilds the model from the files and runs every case again, one row at a time."""
    model, margin = load(folder, variant), torch.inf
    side = variant.vision.image_size
    for case, golden in sorted(read_golden(folder).items()):
        ids = golden["input_ids"][None]
        pixels = golden.get("pixel_values", torch.zeros(1, 1, 3, side, side))[None]
        mask = torch.ones_like(ids)
        place = f"{folder.name}/{case}"
        if "visual_tokens" in golden:
            require_close(f"{place}.visual_tokens", golden["visual_tokens"], encode_media(model, pixels)[0])
        require_close(f"{place}.logits", golden["logits"], model(pixels, ids, mask).logits[0])
        require_equal(f"{place}.greedy", golden["greedy"], generate(model, pixels, ids, mask)[0])
        beam = generate(model, pixels, ids, mask, num_beams=N_BEAMS, length_penalty=0.0)
        require_equal(f"{place}.beam3", golden["beam3"], beam[0])
        whole = torch.cat([ids, golden["greedy"][None]], dim=1)
        steps = model(pixels, whole, torch.ones_like(whole)).logits[0, ids.shape[1] - 1 : -1]
        margin = min(margin, greedy_margin(steps, [IMAGE]))
    print(f"{folder.name}: files reproduce the golden; smallest greedy margin {margin:.1e}")


def load(folder: Path, variant: Variant) -> Flamingo:
    if variant.form == "otter":
        return load_otter(folder, variant)
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder / "lang_encoder")
    visual = variant.vision.build()
    visual.load_state_dict(read_visual(folder / variant.vision.file, variant))
    model = assemble(visual, lm, variant)
    fill_new_rows(model.lang_encoder, variant.form)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    if variant.form == "training":
        state = {name.removeprefix("module."): t for name, t in state["model_state_dict"].items()}
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise SystemExit(f"{folder.name}: the checkpoint has keys that the model lacks: {unexpected}")
    return model


def read_visual(path: Path, variant: Variant) -> dict[str, Tensor]:
    if variant.form != "torchscript":
        return variant.vision.read(path)
    state = torch.jit.load(str(path)).state_dict()
    prefix = "visual."
    return {name.removeprefix(prefix): t.float() for name, t in state.items() if name.startswith(prefix)}


class HuggingFaceVision(nn.Module):
    """`CLIPVisionModel` behind the call of open_clip's encoder: (pooled, patch tokens)."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        config = {k: v for k, v in clip_config().items() if k != "model_type"}
        self.model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config)).eval()
        self.model.load_state_dict(state)

    def forward(self, pixels: Tensor) -> tuple[None, Tensor]:
        return None, self.model(pixels).last_hidden_state[:, 1:]


def load_otter(folder: Path, variant: Variant) -> Flamingo:
    """Puts an Otter folder back together with transformers' own CLIP as the vision encoder."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        tensors |= load_file(str(shard))
    prefix = "vision_encoder."
    vision = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    rest = {renamed(n, OPENFLAMINGO_NAMES): t for n, t in tensors.items() if not n.startswith(prefix)}
    model = assemble(HuggingFaceVision(vision), build_lm(variant.lm), variant)
    result = model.load_state_dict(rest, strict=False)
    aliases = ("lang_encoder.old_decoder_blocks", "lang_encoder.gated_cross_attn_layers", prefix)
    missing = [name for name in result.missing_keys if not name.startswith(aliases)]
    if missing or result.unexpected_keys:
        raise SystemExit(f"{folder.name}: missing {missing}, unexpected {result.unexpected_keys}")
    return model


if __name__ == "__main__":
    main(VARIANTS)
