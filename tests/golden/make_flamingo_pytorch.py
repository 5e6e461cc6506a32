"""Makes `flamingo-pytorch`: the state dict of flamingo-pytorch's `FlamingoPaLM` behind a small CLIP, and what the package computes.

Four PaLM layers, gated blocks after the first and the last, heads of 10, embeddings of four places in a prompt. The package has
no `generate`: tokens are chosen one forward at a time. Visual tokens are those of each picture at each of the four places.

    pip install --no-deps flamingo-pytorch==0.1.2
    python make_flamingo_pytorch.py
"""

import shutil
from pathlib import Path

import torch
from flamingo_pytorch import FlamingoPaLM
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

from common import greedy_margin, randomise, read_golden, require_close, require_equal, write_golden
from make_openflamingo import IMAGE_SIZE, PATCH_SIZE

FOLDER = Path(__file__).parent / "flamingo-pytorch"
WIDTH, VOCABULARY, MEDIA, N_PLACES = 24, 64, 3, 4
N_NEW_TOKENS = 8
RECIPE = f"""family = "flamingo-pytorch"
checkpoint = "checkpoint.pt"
vision_encoder = "clip_visual.pt"

[vision]
heads = 2
activation = "quick_gelu"

[tokens]
image = {MEDIA}
"""


class Patches(nn.Module):
    """Patch tokens of open_clip's encoder, as the package's `img_encoder`."""

    def __init__(self):
        super().__init__()
        self.visual = VisionTransformer(
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            width=WIDTH,
            layers=2,
            heads=2,
            mlp_ratio=4.0,
            output_dim=12,
            act_layer=QuickGELU,
            output_tokens=True,
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.visual(pixels)[1]


def build() -> FlamingoPaLM:
    return FlamingoPaLM(
        dim=WIDTH,
        num_tokens=VOCABULARY,
        depth=4,
        dim_head=10,
        heads=3,
        ff_mult=4,
        media_token_id=MEDIA,
        cross_attn_every=3,
        img_encoder=Patches(),
        perceiver_num_latents=6,
        perceiver_depth=2,
    ).eval()


def fill(model: FlamingoPaLM) -> None:
    """As `randomise`; scales of PaLM's norms around 1, and their buffers, which the package leaves 0, around 0."""
    randomise(model, 21)
    generator = torch.Generator().manual_seed(22)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(".gamma"):
                tensor.copy_(1.0 + 0.1 * noise)
            elif name.endswith(".beta"):
                tensor.copy_(0.05 * noise)


def prompts() -> dict[str, tuple[list[int], Tensor]]:
    """A: text before the first of two pictures. B: one picture. D: as many as there are places."""
    generator = torch.Generator().manual_seed(23)

    def words(count: int) -> list[int]:
        return torch.randint(MEDIA + 1, VOCABULARY, (count,), generator=generator).tolist()

    def pixels(count: int) -> Tensor:
        return torch.randn((count, 1, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator)

    d = words(2)
    for count in (5, 3, 8, 4):
        d += [MEDIA] + words(count)
    return {
        "A": (words(4) + [MEDIA] + words(3) + [MEDIA] + words(5), pixels(2)),
        "B": ([MEDIA] + words(6), pixels(1)),
        "D": (d, pixels(N_PLACES)),
    }


def logits(model: FlamingoPaLM, ids: list[int], pixels: Tensor) -> Tensor:
    return model(torch.tensor([ids]), images=pixels[None, :, 0])[0]


def at_all_places(model: FlamingoPaLM, pixels: Tensor) -> Tensor:
    """[n_media, n_places * n_latents, dim]."""
    patches = model.img_encoder(pixels[:, 0])
    copies = patches[:, None].expand(-1, N_PLACES, -1, -1)
    return model.perceiver_resampler(copies).flatten(1, 2)


def greedy(model: FlamingoPaLM, ids: list[int], pixels: Tensor) -> tuple[Tensor, float]:
    """New tokens, `<image>` suppressed, and the smallest margin."""
    ids, margin, start = list(ids), torch.inf, len(ids)
    for _ in range(N_NEW_TOKENS):
        row = logits(model, ids, pixels)[-1:].clone()
        margin = min(margin, greedy_margin(row, [MEDIA]))
        row[0, MEDIA] = -torch.inf
        ids.append(int(row.argmax()))
    return torch.tensor(ids[start:]), margin


def run_cases(model: FlamingoPaLM) -> dict[str, Tensor]:
    golden = {}
    for case, (ids, pixels) in prompts().items():
        golden[f"{case}.input_ids"] = torch.tensor(ids)
        golden[f"{case}.pixel_values"] = pixels
        golden[f"{case}.visual_tokens"] = at_all_places(model, pixels)
        golden[f"{case}.logits"] = logits(model, ids, pixels)
        golden[f"{case}.greedy"] = greedy(model, ids, pixels)[0]
    return golden


def check_claims(model: FlamingoPaLM) -> None:
    """What README.md says of the package."""
    (ids, pixels), none = prompts()["A"], torch.tensor([[5, 6, 7]])
    first = ids.index(MEDIA)
    before, other = logits(model, ids, pixels), logits(model, ids, -pixels)
    require_close("text before the first picture", before[:first], other[:first])
    second = first + 1 + ids[first + 1 :].index(MEDIA)
    swapped = logits(model, ids, torch.stack([pixels[0], -pixels[1]]))
    require_close("text before the second picture", before[:second], swapped[:second])
    gates = [block.ff_gate for _, block in model.layers if block is not None]
    values = [gate.clone() for gate in gates]
    gated = before[:first]
    for gate in gates:
        gate.zero_()
    plain, text_only = logits(model, ids, pixels)[:first], model(none)
    for gate, value in zip(gates, values):
        gate.copy_(value)
    if torch.allclose(gated, plain, atol=1e-2):
        raise SystemExit("gated feed-forwards do not run on text before the first picture")
    require_close("a prompt without pictures", text_only, model(none))
    try:
        logits(model, [MEDIA] * 5, pixels[:1].expand(5, -1, -1, -1, -1))
    except RuntimeError:
        return
    raise SystemExit("five pictures: expected an error")


@torch.no_grad()
def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    model = build()
    fill(model)
    check_claims(model)
    torch.save(model.state_dict(), FOLDER / "checkpoint.pt")
    torch.save(model.img_encoder.visual.state_dict(), FOLDER / "clip_visual.pt")
    (FOLDER / "recipe.toml").write_text(RECIPE)
    write_golden(FOLDER, run_cases(model))
    verify()


def verify() -> None:
    """Rebuilds the model from the files and runs every case again, through other shapes where there are any."""
    model, margin = build(), torch.inf
    model.load_state_dict(torch.load(FOLDER / "checkpoint.pt", weights_only=True))
    model.img_encoder.visual.load_state_dict(torch.load(FOLDER / "clip_visual.pt", weights_only=True))
    for case, golden in read_golden(FOLDER).items():
        ids, pixels = golden["input_ids"].tolist(), golden["pixel_values"]
        tokens = golden["visual_tokens"].unflatten(1, (N_PLACES, -1))
        own = model.perceiver_resampler(model.img_encoder(pixels[:, 0])[None])[0]
        at_their_places = torch.stack([tokens[place, place] for place in range(len(pixels))])
        require_close(f"{case}.visual_tokens", at_their_places, own)
        require_close(f"{case}.logits", golden["logits"], logits(model, ids, pixels))
        found, smallest = greedy(model, ids, pixels)
        require_equal(f"{case}.greedy", golden["greedy"], found)
        margin = min(margin, smallest)
    print(f"{FOLDER.name}: files reproduce the golden; smallest greedy margin {margin:.1e}")


if __name__ == "__main__":
    main()
