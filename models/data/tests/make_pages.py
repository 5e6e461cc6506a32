"""Makes the pictures of `pages/`, the pages that hold pictures in base64, and `tokenizer.json`.

pip install pillow==13.0.0 numpy==2.4.6 tokenizers==0.23.3; python make_pages.py
"""

import base64
import html
import io
import pathlib
import re

import numpy
from PIL import Image, ImageFilter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers import AddedToken

HERE = pathlib.Path(__file__).parent
PAGES = HERE / "pages"


def scene(seed, width, height):
    """Soft spots of random colours."""
    coarse = numpy.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=numpy.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(picture, path, quality=60):
    picture.save(PAGES / "img" / path, quality=quality)


def pictures():
    for seed, name in enumerate(
        ["dough", "oven", "bread", "harbour", "boats", "ferry", "map", "tower", "bridge", "garden", "roses", "lamp"]
    ):
        jpeg(scene(seed, 160, 120), f"{name}.jpg")
    for seed in range(20, 28):
        jpeg(scene(seed, 96, 96), f"walk {seed - 19}.jpg")
    larger = scene(11, 160, 120).resize((200, 151), Image.Resampling.LANCZOS)
    jpeg(larger, "lamp-large.jpg", quality=40)
    (PAGES / "img" / "notes.jpg").write_text("no picture at all")
    (PAGES / "img" / "bread-again.jpg").write_bytes((PAGES / "img" / "bread.jpg").read_bytes())
    scene(40, 240, 72).save(PAGES / "img" / "banner.png")
    scene(41, 40, 90).save(PAGES / "img" / "icon.png")
    Image.new("RGB", (120, 90), (200, 60, 40)).save(PAGES / "img" / "red.png")
    (PAGES / "img" / "cut.jpg").write_bytes((PAGES / "img" / "oven.jpg").read_bytes()[:200])
    scene(42, 90, 120).convert("RGB").save(PAGES / "img" / "clock.webp", quality=60)


def base64_page():
    def data(picture, kind):
        buffer = io.BytesIO()
        picture.filter(ImageFilter.GaussianBlur(1)).save(buffer, kind, quality=50)
        return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()

    first, second = data(scene(50, 80, 80), "JPEG"), data(scene(51, 72, 96), "WEBP")
    pixel = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
    text = (PAGES / "letter.html.in").read_text()
    text = text.replace("FIRST", first).replace("SECOND", second).replace("PIXEL", pixel)
    (PAGES / "letter.html").write_text(text)


def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [path.read_text(errors="replace") for path in sorted(PAGES.rglob("*.html"))]
    texts = [html.unescape(re.sub(r"<[^>]*>", " ", text)) for text in texts]
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    names = ["<pad>", "<s>", "</s>", "<image>", "<|endofchunk|>"]
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    (HERE / "tokenizer.json").write_text(bpe.to_str())


pictures()
base64_page()
tokenizer()
