"""Makes models/src/build/positions.json: how bicubic interpolation mixes old places into new ones.

    pip install pillow opencv-python-headless numpy
    python make_positions.py

OpenCV's INTER_CUBIC has a = -0.75 and repeats the outermost places, as PyTorch's `interpolate(mode="bicubic")`, which
transformers uses. Pillow's BICUBIC has a = -0.5, widens when it shrinks and takes no place outside, as PyTorch's with
`antialias=True`, which open_clip uses. Both resize the rows of an identity matrix, whose pixels then are the weights.
"""

import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

PAIRS = [(2, 3), (3, 2), (7, 14), (16, 24), (16, 32), (24, 16), (14, 7), (5, 5), (1, 4), (4, 1)]


def opencv(old: int, new: int) -> np.ndarray:
    identity = np.eye(old, dtype=np.float64)
    return cv2.resize(identity, (old, new), interpolation=cv2.INTER_CUBIC)


def pillow(old: int, new: int) -> np.ndarray:
    identity = Image.fromarray(np.eye(old, dtype=np.float32), mode="F")
    return np.asarray(identity.resize((old, new), Image.Resampling.BICUBIC))


def main() -> None:
    cases = []
    for old, new in PAIRS:
        for antialias, weights in [(False, opencv(old, new)), (True, pillow(old, new))]:
            values = [float(f"{value:.8g}") for value in weights.reshape(-1)]
            cases.append({"old": old, "new": new, "antialias": antialias, "weights": values})
    path = Path(__file__).parents[2] / "models/src/build/positions.json"
    path.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


if __name__ == "__main__":
    main()
