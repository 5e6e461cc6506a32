#!/usr/bin/env python3
"""Writes the pictures and the expected pixels that runtime/tests/image.rs compares with.

    python make.py            # needs: pip install "pillow<12" "numpy<2"

Later versions of Pillow run the vertical pass first for some shapes: 12 where a picture is over a
hundred times as high as wide, 13 wherever the height shrinks much more than the width. That
changes clipped pixels. The references were trained and measured with versions that run the
horizontal pass first always; the runtime follows those.

Everything here is Pillow: torchvision's Resize, CenterCrop and ToTensor on a Pillow image are
Image.resize, Image.crop and numpy, restated below. Seeded; the same versions give the same bytes.

    sources/    the pictures
    expected.bin    expected pixels, one case after the other
    cases.json      one object a case:
        source      file under sources/
        kind        decode | resize | open_flamingo | otter | idefics | paper | normalised | frame
        size        the spec's size, or [width, height] for resize
        shape       [height, width, channels] u8, or [3, size, size] f32 for normalised
        tolerance   largest difference in levels
        offset, len bytes of expected.bin
"""

import json
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps

HERE = Path(__file__).parent
SOURCES = HERE / "sources"
BICUBIC = Image.Resampling.BICUBIC
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

rng = np.random.default_rng(20240917)
cases = []
expected = bytearray()


def synthetic(width, height, channels, noise=60):
    """Gradients in different directions, an edge, and noise: something for every frequency."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    planes = []
    for channel in range(channels):
        ramp = (x * (1 + channel) / max(width, 1) + y * (3 - channel) / max(height, 1)) * 70
        edge = 120.0 * ((x + y * (channel + 1)) % 37 < 9)
        planes.append(ramp + edge + rng.uniform(-noise, noise, (height, width)))
    pixels = np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def picture(mode, width, height, **kwargs):
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    return Image.fromarray(synthetic(width, height, channels, **kwargs), mode)


def save(name, image, **kwargs):
    image.save(SOURCES / name, **kwargs)


def case(source, kind, size, pixels, tolerance=0):
    pixels = np.ascontiguousarray(pixels)
    data = pixels.tobytes()
    shape = list(pixels.shape) if pixels.ndim == 3 else list(pixels.shape) + [1]
    cases.append(dict(source=source, kind=kind, size=size, shape=shape, tolerance=tolerance,
                      offset=len(expected), len=len(data)))
    expected.extend(data)


def opened(name):
    image = Image.open(SOURCES / name)
    image.load()
    return ImageOps.exif_transpose(image)


def torchvision_resize(image, size):
    width, height = image.size
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = size, int(size * long / short)
    new = (new_short, new_long) if width <= height else (new_long, new_short)
    return image if image.size == new else image.resize(new, BICUBIC)


def open_flamingo(image, size):
    image = torchvision_resize(image, size)
    width, height = image.size
    top = int(round((height - size) / 2.0))
    left = int(round((width - size) / 2.0))
    return image.crop((left, top, left + size, top + size)).convert("RGB")


def otter(image, size):
    image = torchvision_resize(image.convert("RGB"), size)
    width, height = image.size
    top, left = (height - size) // 2, (width - size) // 2
    return image.crop((left, top, left + size, top + size))


def idefics(image, size):
    if image.mode != "RGB":
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (255, 255, 255))
        image = Image.alpha_composite(background, rgba).convert("RGB")
    return image.resize((size, size), BICUBIC)


def paper(image, size):
    image = image.convert("RGB")
    width, height = image.size
    long = max(width, height)
    new = tuple(size if side == long else max(1, int(size * side / long)) for side in image.size)
    canvas = Image.new("RGB", (size, size))
    canvas.paste(image.resize(new, BICUBIC), ((size - new[0]) // 2, (size - new[1]) // 2))
    return canvas


FAMILIES = dict(open_flamingo=open_flamingo, otter=otter, idefics=idefics, paper=paper)


def families(name, size, tolerance=0, kinds=FAMILIES):
    for kind in kinds:
        case(name, kind, size, np.asarray(FAMILIES[kind](opened(name), size)), tolerance)


def normalised(name, size):
    scaled = np.asarray(open_flamingo(opened(name), size)).astype(np.float32) / np.float32(255)
    values = ((scaled - MEAN) / STD).transpose(2, 0, 1)
    case(name, "normalised", size, values.astype("<f4"))


def still_pictures():
    save("rgb_100x37.png", picture("RGB", 100, 37))
    save("rgb_45x90.png", picture("RGB", 45, 90))
    save("rgb_1x1.png", picture("RGB", 1, 1))
    save("rgb_7x3.png", picture("RGB", 7, 3))
    save("rgb_3x50.png", picture("RGB", 3, 50))
    save("grey_61x83.png", picture("L", 61, 83))
    save("grey_alpha_50x40.png", picture("LA", 50, 40))
    save("rgba_57x43.png", picture("RGBA", 57, 43))
    save("palette_64x48.png", picture("RGB", 64, 48).quantize(40))
    transparent = picture("RGB", 37, 51).quantize(20)
    save("palette_alpha_37x51.png", transparent, transparency=bytes(range(0, 200, 10)))
    save("bilevel_70x45.png", picture("L", 70, 45).convert("1"))
    save("rgb_key_40x33.png", Image.fromarray(synthetic(40, 33, 3) // 128 * 255, "RGB"),
         transparency=(255, 0, 0))
    save("grey_key_40x33.png", Image.fromarray(synthetic(40, 33, 1) // 64 * 64, "L"), transparency=64)
    for name in sorted(p.name for p in SOURCES.glob("*.png")):
        families(name, 32)

    rgb = opened("rgb_100x37.png")
    for size in [(1, 1), (100, 11), (33, 37), (7, 90), (211, 3), (99, 36), (101, 38)]:
        case("rgb_100x37.png", "resize", size, np.asarray(rgb.resize(size, BICUBIC)))
    for name in ["grey_61x83.png", "grey_alpha_50x40.png", "rgba_57x43.png", "palette_64x48.png"]:
        image = opened(name)
        for size in [(17, 29), (90, 64), image.size]:
            resized = image.resize(size, BICUBIC)
            if resized.mode == "P":
                resized = resized.convert("RGBA")
            case(name, "resize", size, np.asarray(resized))
    normalised("rgb_100x37.png", 32)
    normalised("grey_61x83.png", 33)


def png_chunk(kind, body):
    import struct
    import zlib
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_16_bit(name, pixels, colour_type):
    import struct
    import zlib
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    data += png_chunk(b"IDAT", zlib.compress(lines)) + png_chunk(b"IEND", b"")
    (SOURCES / name).write_bytes(data)


def deep_pictures():
    pixels = rng.integers(0, 65536, (21, 30, 3))
    png_16_bit("rgb16_30x21.png", pixels, 2)
    families("rgb16_30x21.png", 24)
    png_16_bit("grey16_30x21.png", pixels[..., 0], 0)
    # Not Pillow's clipping conversion of I;16: the high byte, as Pillow does for RGB.
    case("grey16_30x21.png", "decode", 0, (pixels[..., 0] >> 8).astype(np.uint8))


def lossy_pictures():
    smooth = picture("RGB", 640, 480, noise=12)
    save("photo_640x480.jpg", smooth, quality=90)
    families("photo_640x480.jpg", 64, tolerance=4)
    case("photo_640x480.jpg", "decode", 0, np.asarray(opened("photo_640x480.jpg"))[:48, :64],
         tolerance=4)
    save("grey_90x70.jpg", picture("L", 90, 70, noise=12), quality=90)
    families("grey_90x70.jpg", 32, tolerance=4)
    save("progressive_90x70.jpg", picture("RGB", 90, 70, noise=12), quality=90, progressive=True,
         subsampling=0)
    families("progressive_90x70.jpg", 32, tolerance=4)
    save("cmyk_60x50.jpg", picture("CMYK", 60, 50, noise=2), quality=95)
    families("cmyk_60x50.jpg", 32, tolerance=4, kinds=["otter", "idefics", "paper"])
    # The reference resizes the four inks, we resize RGB: close, not equal.
    families("cmyk_60x50.jpg", 32, tolerance=24, kinds=["open_flamingo"])
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        name = f"exif{orientation}_40x24.jpg"
        save(name, picture("RGB", 40, 24, noise=4), quality=95, subsampling=0, exif=exif)
        case(name, "decode", 0, np.asarray(opened(name)), tolerance=4)
    save("lossless_75x40.webp", picture("RGB", 75, 40), lossless=True)
    families("lossless_75x40.webp", 32)
    save("lossless_alpha_40x75.webp", picture("RGBA", 40, 75), lossless=True, exact=True)
    families("lossless_alpha_40x75.webp", 32)
    save("lossy_160x120.webp", picture("RGB", 160, 120, noise=12), quality=90)
    families("lossy_160x120.webp", 32, tolerance=4)


def animations():
    frames = [picture("RGB", 31, 22).quantize(30).convert("RGB") for _ in range(3)]
    rest = dict(save_all=True, append_images=frames[1:], duration=[40, 120, 500], loop=0)
    save("frames_31x22.gif", frames[0].quantize(64), save_all=True,
         append_images=[f.quantize(64) for f in frames[1:]], duration=[40, 120, 500], loop=0)
    save("frames_31x22.webp", frames[0], lossless=True, **rest)
    save("frames_31x22.png", frames[0], **rest)
    for name in ["frames_31x22.gif", "frames_31x22.webp", "frames_31x22.png"]:
        families(name, 16, kinds=["open_flamingo", "idefics"])
        image = Image.open(SOURCES / name)
        for idx in range(image.n_frames):
            image.seek(idx)
            # The WebP decoder composes a frame onto the last one with truncation.
            case(name, "frame", idx, np.asarray(image.convert("RGB")),
                 tolerance=int(name.endswith("webp") and idx > 0))
    levels = np.random.default_rng(7).permutation(30 * 26) % 256
    save("grey_levels_30x26.gif", Image.fromarray(levels.reshape(26, 30).astype(np.uint8), "L"))
    assert opened("grey_levels_30x26.gif").mode == "L"
    families("grey_levels_30x26.gif", 16)


def main():
    assert int(PIL.__version__.split(".")[0]) < 12, "Pillow 12 has another order of passes"
    SOURCES.mkdir(exist_ok=True)
    for old in SOURCES.iterdir():
        old.unlink()
    still_pictures()
    deep_pictures()
    lossy_pictures()
    animations()
    (HERE / "expected.bin").write_bytes(expected)
    lines = ",\n".join("  " + json.dumps(c) for c in cases)
    (HERE / "cases.json").write_text("[\n" + lines + "\n]\n")
    total = sum(p.stat().st_size for p in SOURCES.iterdir()) + len(expected)
    print(f"Pillow {PIL.__version__}: {len(cases)} cases, {total} bytes")


main()
