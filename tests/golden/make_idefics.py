"""Makes the IDEFICS-1 checkpoints of this folder and their golden outputs.

Each variant is a small model with seeded random weights in Hugging Face files. After writing, the
model is loaded from the files and every case is run again, unbatched, against the golden.

    python make_idefics.py [VARIANT ...]
"""

import argparse
import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import IdeficsConfig, IdeficsForVisionText2Text
from transformers.models.idefics.processing_idefics import (
    image_attention_mask_for_packed_input_ids,
    incremental_to_binary_attention_mask,
)

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

BASE_VOCAB, N_ADDED = 96, 2
FAKE, IMAGE = 96, 97  # <fake_token_around_image>, <image>: after the base vocabulary, as in idefics-9b
PAD, BOS, EOS = 0, 1, 2
NEVER = 10_000  # an end token no model emits, so that all new tokens come
IMAGE_SIZE = 28
N_NEW_TOKENS, N_BEAMS = 8, 3


@dataclass(frozen=True)
class Variant:
    """Settings of the configuration that change the graph."""

    alpha_type: str = "float"
    qk_layer_norms: bool = True
    use_resampler: bool = True


VARIANTS = {
    "idefics-float": Variant(),
    "idefics-vector": Variant(alpha_type="vector"),
    "idefics-plain": Variant(qk_layer_norms=False),
    "idefics-no-resampler": Variant(use_resampler=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", nargs="*", help="default: all")
    for name in parser.parse_args().variant or VARIANTS:
        make(HERE / name, VARIANTS[name])
        verify(HERE / name)


def make(folder: Path, variant: Variant) -> None:
    """Writes one folder anew: the model's files, then the golden."""
    shutil.rmtree(folder, ignore_errors=True)
    model = IdeficsForVisionText2Text(config(variant)).eval()
    randomise(model, 21)
    model.save_pretrained(folder, safe_serialization=True)
    write_golden(folder, run_cases(model))


def config(variant: Variant) -> IdeficsConfig:
    made = IdeficsConfig(
        vocab_size=BASE_VOCAB,
        additional_vocab_size=N_ADDED,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        max_position_embeddings=128,
        cross_layer_interval=2,
        qk_layer_norms=variant.qk_layer_norms,
        alpha_initializer="zeros",
        alpha_type=variant.alpha_type,
        alphas_initializer_range=0.0,
        use_resampler=variant.use_resampler,
        perceiver_config=dict(
            use_resampler=variant.use_resampler,
            resampler_n_latents=6,
            resampler_depth=2,
            resampler_n_heads=3,
            resampler_head_dim=12,
            qk_layer_norms_perceiver=variant.qk_layer_norms,
        ),
        vision_config=dict(
            embed_dim=24,
            image_size=IMAGE_SIZE,
            patch_size=14,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_act="gelu",
            layer_norm_eps=1e-5,
        ),
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
        freeze_lm_head=True,
    )
    made._attn_implementation = "eager"
    return made


# ---- the cases


@dataclass
class Batch:
    """Prompts run together; `rows` are their ids, `pixels` [batch, most media, 3, H, W]."""

    names: list[str]
    rows: list[list[int]]
    pixels: Tensor

    def inputs(self) -> dict[str, Tensor]:
        ids, mask = pad_left(self.rows, PAD)
        return model_inputs(ids, mask, self.pixels)


def batches() -> list[Batch]:
    """A: text before the first image. B: two rows, left padding, `</s>` in row 1. C: text only.
    D: five images, `</s>` before the fourth."""
    generator = torch.Generator().manual_seed(23)

    def words(count: int) -> list[int]:
        return torch.randint(3, BASE_VOCAB, (count,), generator=generator).tolist()

    def pixels(n_rows: int, n_media: int) -> Tensor:
        return torch.randn(n_rows, n_media, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)

    image = [FAKE, IMAGE, FAKE]
    a = [BOS] + words(3) + image + words(4) + image + words(3)
    b0 = [BOS] + image + words(3) + image + words(2)
    b1 = [BOS] + words(1) + image + words(1) + [EOS] + words(1)
    c = [BOS] + words(6)
    d = [BOS] + words(2) + image + words(8) + [FAKE, IMAGE, FAKE, IMAGE, FAKE] + words(9)
    d += [EOS] + words(3) + image + words(11) + image + words(7)
    b_pixels = pixels(2, 2)
    b_pixels[1, 1] = 0  # the slot of the medium that row 1 does not have
    return [
        Batch(["A"], [a], pixels(1, 2)),
        Batch(["B0", "B1"], [b0, b1], b_pixels),
        Batch(["C"], [c], torch.zeros(1, 1, 3, IMAGE_SIZE, IMAGE_SIZE)),
        Batch(["D"], [d], pixels(1, 5)),
    ]


class Words:
    """The part of a tokenizer that the processor's mask builder asks."""

    eos_token_id = EOS

    def convert_tokens_to_ids(self, _token: str) -> int:
        return IMAGE


def model_inputs(ids: Tensor, mask: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """The processor's inputs; without any image it gives one empty picture and an empty mask."""
    n_media = pixels.shape[1]
    if (ids == IMAGE).any():
        latest, _ = image_attention_mask_for_packed_input_ids(ids, Words(), "pt")
        image_mask = incremental_to_binary_attention_mask(latest, "pt", num_classes=n_media)
    else:
        image_mask = torch.zeros(*ids.shape, n_media, dtype=torch.bool)
    return dict(input_ids=ids, attention_mask=mask, pixel_values=pixels, image_attention_mask=image_mask)


@torch.no_grad()
def run_cases(model: IdeficsForVisionText2Text) -> dict[str, Tensor]:
    """Runs each batch and takes its rows apart: no batch dimension, no padding, no empty media."""
    golden: dict[str, Tensor] = {}
    for batch in batches():
        inputs = batch.inputs()
        visual_tokens = encode_media(model, batch.pixels)
        logits = model(**inputs, use_cache=False).logits
        greedy, beam = generate(model, inputs), generate_beams(model, inputs)
        for idx, (case, row) in enumerate(zip(batch.names, batch.rows)):
            n_media = row.count(IMAGE)
            if n_media > 0:
                golden[f"{case}.pixel_values"] = batch.pixels[idx, :n_media, None]
                golden[f"{case}.visual_tokens"] = visual_tokens[idx, :n_media]
            golden[f"{case}.input_ids"] = torch.tensor(row)
            golden[f"{case}.logits"] = logits[idx, -len(row) :]
            golden[f"{case}.greedy"] = greedy[idx]
            golden[f"{case}.beam3"] = beam[idx]
    return golden


def encode_media(model: IdeficsForVisionText2Text, pixels: Tensor) -> Tensor:
    """[batch, n_media, 3, H, W] -> what the cross-attention reads, [batch, n_media, n, dim]."""
    tokens = model.model.vision_model(pixel_values=pixels.flatten(0, 1)).last_hidden_state
    if model.config.use_resampler:
        tokens = model.model.perceiver_resampler(tokens)
    return tokens.unflatten(0, pixels.shape[:2])


def generate(model: IdeficsForVisionText2Text, inputs: dict[str, Tensor], **options) -> Tensor:
    """New tokens only, [batch, N_NEW_TOKENS]."""
    settings = dict(max_new_tokens=N_NEW_TOKENS, do_sample=False, eos_token_id=NEVER, pad_token_id=PAD)
    tokens = model.generate(**inputs, **settings, **options)
    return tokens[:, inputs["input_ids"].shape[1] :]


def generate_beams(model: IdeficsForVisionText2Text, inputs: dict[str, Tensor]) -> Tensor:
    with whole_vocabulary(model):
        return generate(model, inputs, num_beams=N_BEAMS, length_penalty=0.0)


@contextlib.contextmanager
def whole_vocabulary(model: IdeficsForVisionText2Text):
    """Lets beam search count the added tokens; it reads the base vocabulary from the config."""
    model.config.vocab_size = BASE_VOCAB + N_ADDED
    try:
        yield
    finally:
        model.config.vocab_size = BASE_VOCAB


# ---- the check


@torch.no_grad()
def verify(folder: Path) -> None:
    """Loads the model from the files and runs every case again, one row at a time."""
    model = IdeficsForVisionText2Text.from_pretrained(folder, attn_implementation="eager").eval()
    margin = torch.inf
    for case, golden in sorted(read_golden(folder).items()):
        ids, place = golden["input_ids"][None], f"{folder.name}/{case}"
        pixels = golden.get("pixel_values", torch.zeros(1, 1, 3, IMAGE_SIZE, IMAGE_SIZE))[None, :, 0]
        inputs = model_inputs(ids, torch.ones_like(ids), pixels)
        if "visual_tokens" in golden:
            require_close(f"{place}.visual_tokens", golden["visual_tokens"], encode_media(model, pixels)[0])
        require_close(f"{place}.logits", golden["logits"], model(**inputs, use_cache=False).logits[0])
        require_equal(f"{place}.greedy", golden["greedy"], generate(model, inputs)[0])
        require_equal(f"{place}.beam3", golden["beam3"], generate_beams(model, inputs)[0])
        require_equal(f"{place}.beam3 by hand", golden["beam3"], beams_by_hand(model, inputs))
        margin = min(margin, greedy_margin(stepped(model, inputs, golden["greedy"][None])[0], []))
    print(f"{folder.name}: files reproduce the golden; smallest greedy margin {margin:.1e}")


def stepped(model: IdeficsForVisionText2Text, inputs: dict[str, Tensor], new: Tensor) -> Tensor:
    """Logits that chose each of `new` [batch, steps]; new tokens keep the prompt's last image."""
    n_rows, n_steps = new.shape
    repeat = {k: v.expand(n_rows, *v.shape[1:]) for k, v in inputs.items()}
    image_mask = repeat["image_attention_mask"]
    ids = torch.cat([repeat["input_ids"], new], dim=1)
    prompt_len = repeat["input_ids"].shape[1]
    return model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=repeat["pixel_values"],
        image_attention_mask=torch.cat([image_mask, image_mask[:, -1:].expand(-1, n_steps, -1)], dim=1),
        use_cache=False,
    ).logits[:, prompt_len - 1 : ids.shape[1] - 1]


def beams_by_hand(model: IdeficsForVisionText2Text, inputs: dict[str, Tensor]) -> Tensor:
    """Beam search without end token and length penalty, recomputed from the prompt at each step."""
    beams, scores = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1)
    for _ in range(N_NEW_TOKENS):
        filler = torch.full((len(beams), 1), PAD)
        logits = stepped(model, inputs, torch.cat([beams, filler], dim=1))[:, -1]
        totals = scores[:, None] + logits.log_softmax(-1)
        scores, flat = totals.flatten().topk(N_BEAMS)
        parent, token = flat // totals.shape[1], flat % totals.shape[1]
        beams = torch.cat([beams[parent], token[:, None]], dim=1)
    return beams[0]


if __name__ == "__main__":
    main()
