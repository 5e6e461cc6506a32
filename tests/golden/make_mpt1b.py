"""Brings recorded MPT-1B outputs into this folder's golden form.

The MPT-1B (MosaicGPT) modelling code is in no Python package, so this checkpoint and its outputs
are recorded, not made here. `SOURCE` holds checkpoint.pt, clip_visual.pt, lang_encoder/ and
golden.npz (batches A and B with left padding and empty media).

    python make_mpt1b.py SOURCE
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import write_golden
from make_openflamingo import IMAGE, Variant, recipe

FOLDER = Path(__file__).parent / "openflamingo-mpt1b"


def main(source: Path) -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in ("checkpoint.pt", "clip_visual.pt"):
        shutil.copyfile(source / name, FOLDER / name)
    (FOLDER / "lang_encoder").mkdir(exist_ok=True)
    for file in (source / "lang_encoder").iterdir():
        shutil.copyfile(file, FOLDER / "lang_encoder" / file.name)
    (FOLDER / "recipe.toml").write_text(recipe(Variant("mpt")))
    arrays = np.load(source / "golden.npz")
    write_golden(FOLDER, rows_of(arrays, "A", ["A"]) | rows_of(arrays, "B", ["B0", "B1"]))


def rows_of(arrays: dict[str, np.ndarray], batch: str, cases: list[str]) -> dict[str, Tensor]:
    """One case a row, without padding and without the media that the row does not have."""
    golden = {}
    for idx, case in enumerate(cases):
        row = {name: torch.from_numpy(arrays[f"{batch}.{name}"][idx]) for name in NAMES}
        is_text = row["attention_mask"].bool()
        prompt_len = len(is_text)
        ids = row["lang_x"][is_text]
        n_media = int((ids == IMAGE).sum())
        golden[f"{case}.pixel_values"] = row["vision_x"][:n_media]
        golden[f"{case}.visual_tokens"] = row["resampler_out"][:n_media]
        golden[f"{case}.input_ids"] = ids
        golden[f"{case}.logits"] = row["logits"][is_text]
        golden[f"{case}.greedy"] = row["greedy"][prompt_len:]
        golden[f"{case}.beam3"] = row["beam3_lp0"][prompt_len:]
    return golden


NAMES = ("vision_x", "lang_x", "attention_mask", "resampler_out", "logits", "greedy", "beam3_lp0")

if __name__ == "__main__":
    main(Path(sys.argv[1]))
