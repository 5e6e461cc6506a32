//! Pictures against Pillow: every case of `image_golden/cases.json`, and files that must be refused.
//!
//! `image_golden/make.py` writes the pictures and the expected pixels with Pillow alone.

use std::fs;
use std::path::{Path, PathBuf};

use flamingo_models::image_spec::ImageSpec;
use flamingo_runtime::image::{
    ImageError, Mode, Picture, decode, decode_frames, load, open, open_frames, preprocess, resize,
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    source: String,
    kind: String,
    size: Size,
    shape: [usize; 3],
    tolerance: i32,
    offset: usize,
    len: usize,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Size {
    Side(usize),
    Sides(usize, usize),
}

impl Size {
    fn side(&self) -> usize {
        match *self {
            Self::Side(side) => side,
            Self::Sides(..) => panic!("expected one side"),
        }
    }
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/image_golden")
}

fn source(name: &str) -> PathBuf {
    golden().join("sources").join(name)
}

/// Levels as they are, so that f32 values can be compared with Pillow's bytes.
fn levels_of(spec: ImageSpec) -> ImageSpec {
    ImageSpec { rescale: 1.0, mean: [0.0; 3], std: [1.0; 3], ..spec }
}

fn spec_of(kind: &str, size: usize) -> ImageSpec {
    match kind {
        "open_flamingo" => ImageSpec::open_flamingo(size),
        "otter" => ImageSpec::otter(size),
        "idefics" => ImageSpec::idefics(size),
        "paper" => ImageSpec::paper(size, [0.0; 3], [1.0; 3]),
        other => panic!("unknown kind {other}"),
    }
}

/// `[3, size, size]` levels as `[size, size, 3]` bytes.
fn interleaved(values: &[f32], size: usize) -> Vec<u8> {
    let level = |value: f32| {
        assert_eq!(value.fract(), 0.0, "{value} is no level");
        value as u8
    };
    let pixel = |idx| (0..3).map(move |channel| level(values[channel * size * size + idx]));
    (0..size * size).flat_map(pixel).collect()
}

/// The top left corner of `shape`.
fn corner(picture: &Picture, shape: [usize; 3]) -> Vec<u8> {
    assert_eq!(picture.mode().channels(), shape[2], "{:?}", picture.mode());
    let row_len = picture.width() * shape[2];
    let rows = picture.pixels().chunks_exact(row_len).take(shape[0]);
    rows.flat_map(|row| &row[..shape[1] * shape[2]]).copied().collect()
}

fn found(case: &Case) -> Vec<u8> {
    let path = source(&case.source);
    match case.kind.as_str() {
        "decode" => corner(&open(&path).unwrap(), case.shape),
        "frame" => corner(&open_frames(&path).unwrap()[case.size.side()].picture, case.shape),
        "resize" => {
            let Size::Sides(width, height) = case.size else { panic!("expected two sides") };
            let resized = resize::resize(&open(&path).unwrap(), width, height).unwrap();
            assert_eq!((resized.width(), resized.height()), (width, height));
            resized.pixels().to_vec()
        }
        kind => {
            let spec = levels_of(spec_of(kind, case.size.side()));
            interleaved(&load(&path, &spec).unwrap(), case.size.side())
        }
    }
}

fn check(case: &Case, expected: &[u8]) -> Result<i32, String> {
    let place = format!("{} {}", case.source, case.kind);
    let found = found(case);
    if found.len() != expected.len() {
        return Err(format!("{place}: {} bytes, expected {}", found.len(), expected.len()));
    }
    let difference = |idx: usize| (i32::from(found[idx]) - i32::from(expected[idx])).abs();
    let worst = (0..found.len()).max_by_key(|&idx| difference(idx)).unwrap();
    if difference(worst) > case.tolerance {
        return Err(format!(
            "{place}: byte {worst} is {}, expected {} +- {} (shape {:?})",
            found[worst], expected[worst], case.tolerance, case.shape
        ));
    }
    Ok(difference(worst))
}

fn cases() -> (Vec<Case>, Vec<u8>) {
    let cases = fs::read_to_string(golden().join("cases.json")).unwrap();
    (serde_json::from_str(&cases).unwrap(), fs::read(golden().join("expected.bin")).unwrap())
}

#[test]
fn pixels_equal_pillow() {
    let (cases, expected) = cases();
    assert!(cases.len() > 100);
    let levels = cases.iter().filter(|case| case.kind != "normalised");
    let failures: Vec<_> =
        levels.filter_map(|case| check(case, &expected[case.offset..][..case.len]).err()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn normalised_values_equal_torch_order_to_the_bit() {
    let (cases, expected) = cases();
    let mut n_checked = 0;
    for case in cases.iter().filter(|case| case.kind == "normalised") {
        let spec = ImageSpec::open_flamingo(case.size.side());
        let values = load(&source(&case.source), &spec).unwrap();
        let bytes = expected[case.offset..][..case.len].as_chunks::<4>().0;
        assert_eq!(values.len(), bytes.len());
        for (idx, (value, &bytes)) in values.iter().zip(bytes).enumerate() {
            let expected = f32::from_le_bytes(bytes);
            assert_eq!(value.to_bits(), expected.to_bits(), "{idx}: {value} {expected}");
        }
        n_checked += 1;
    }
    assert_eq!(n_checked, 2);
}

#[test]
fn a_batch_of_specs_leaves_the_picture_alone() {
    let picture = open(&source("rgba_57x43.png")).unwrap();
    let before = picture.clone();
    let first = preprocess(&picture, &ImageSpec::open_flamingo(20)).unwrap();
    preprocess(&picture, &ImageSpec::idefics(20)).unwrap();
    assert_eq!(picture, before);
    assert_eq!(preprocess(&picture, &ImageSpec::open_flamingo(20)).unwrap(), first);
}

#[test]
fn modes_are_those_of_the_file() {
    for (name, mode) in [
        ("grey_61x83.png", Mode::Grey),
        ("grey16_30x21.png", Mode::Grey),
        ("grey_alpha_50x40.png", Mode::GreyAlpha),
        ("grey_key_40x33.png", Mode::GreyKeyed),
        ("grey_levels_30x26.gif", Mode::GreyKeyed),
        ("rgb_key_40x33.png", Mode::Rgb),
        ("rgb16_30x21.png", Mode::Rgb),
        ("rgba_57x43.png", Mode::Rgba),
        ("palette_64x48.png", Mode::Indexed),
        ("bilevel_70x45.png", Mode::Indexed),
        ("frames_31x22.gif", Mode::Indexed),
        ("grey_90x70.jpg", Mode::Grey),
        ("cmyk_60x50.jpg", Mode::Rgb),
    ] {
        assert_eq!(open(&source(name)).unwrap().mode(), mode, "{name}");
    }
}

#[test]
fn frames_carry_their_delays() {
    for name in ["frames_31x22.gif", "frames_31x22.webp", "frames_31x22.png"] {
        let frames = open_frames(&source(name)).unwrap();
        let delays: Vec<_> = frames.iter().map(|frame| frame.delay.as_millis()).collect();
        assert_eq!(delays, [40, 120, 500], "{name}");
        assert!(frames.iter().all(|frame| frame.picture.mode() == Mode::Rgb));
    }
    for name in ["rgb_100x37.png", "photo_640x480.jpg", "lossless_75x40.webp"] {
        let frames = open_frames(&source(name)).unwrap();
        assert_eq!(frames.len(), 1, "{name}");
        assert_eq!(frames[0].picture, open(&source(name)).unwrap(), "{name}");
    }
}

#[test]
fn the_content_decides_not_the_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture.gif");
    fs::copy(source("rgb_7x3.png"), &path).unwrap();
    assert_eq!(open(&path).unwrap(), open(&source("rgb_7x3.png")).unwrap());
}

/// The message of the error that reading `bytes` as `name` gives; it must name the file.
fn refusal(name: &str, bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    let message = open(&path).unwrap_err().to_string();
    assert!(message.contains(name), "{message}");
    message
}

#[test]
fn what_is_no_picture_is_refused_with_a_hint() {
    let text = refusal("notes.jpg", b"these are my notes, not a picture");
    assert!(text.contains("expected a JPEG, PNG, WebP or GIF"), "{text}");
    assert!(text.contains("these are my notes"), "{text}");
    assert!(text.contains("\n\nhint: "), "{text}");
    let empty = refusal("empty.png", b"");
    assert!(empty.contains("an empty file"), "{empty}");
    let other = refusal("old.bmp", b"BM\x46\0\0\0\0\0\0\0\x36\0\0\0");
    assert!(other.contains("a Bmp picture"), "{other}");
    let missing = open(Path::new("no/such/picture.jpg")).unwrap_err().to_string();
    assert!(missing.contains("no/such/picture.jpg"), "{missing}");
    assert!(missing.contains("cannot read"), "{missing}");
    assert!(open(&golden()).is_err(), "a folder");
}

#[test]
fn truncated_files_are_refused_at_every_length() {
    for name in [
        "exif1_40x24.jpg",
        "progressive_90x70.jpg",
        "rgb_7x3.png",
        "lossless_75x40.webp",
        "lossy_160x120.webp",
    ] {
        let bytes = fs::read(source(name)).unwrap();
        for len in (0..bytes.len() - 12).step_by(1 + bytes.len() / 97) {
            let error = decode(&bytes[..len]).unwrap_err();
            assert!(
                matches!(error, ImageError::Broken { .. } | ImageError::NotAnImage { .. }),
                "{name} at {len}: {error}"
            );
            assert!(decode_frames(&bytes[..len]).is_err(), "{name} at {len}");
        }
    }
}

#[test]
fn damaged_files_never_panic() {
    for entry in fs::read_dir(golden().join("sources")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        if bytes.len() > 12_000 {
            continue;
        }
        let mut state = 0x9e37_79b9_u32;
        for _ in 0..24 {
            let mut damaged = bytes.clone();
            for _ in 0..3 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let idx = state as usize % damaged.len();
                damaged[idx] ^= (state >> 24) as u8 | 1;
            }
            let _ = decode(&damaged);
            let _ = decode_frames(&damaged);
        }
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |mut crc, &byte| {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
        crc
    })
}

fn png_declaring(width: u32, height: u32) -> Vec<u8> {
    let mut chunk = b"IHDR".to_vec();
    chunk.extend(width.to_be_bytes());
    chunk.extend(height.to_be_bytes());
    chunk.extend([8, 2, 0, 0, 0]);
    let mut bytes = b"\x89PNG\r\n\x1a\n\0\0\0\x0d".to_vec();
    bytes.extend(&chunk);
    bytes.extend(crc32(&chunk).to_be_bytes());
    bytes.extend(b"\0\0\0\0IDAT\x35\xaf\x06\x1e");
    bytes
}

#[test]
fn declared_sizes_are_checked_before_allocation() {
    for (width, height) in [(60_000, 60_000), (16_385, 1), (16_384, 16_384)] {
        let error = decode(&png_declaring(width, height)).unwrap_err();
        let ImageError::TooLarge { width: found, .. } = error else {
            panic!("{width} x {height}: {error}");
        };
        assert_eq!(found, u64::from(width));
    }
    let small = decode(&png_declaring(4, 4)).unwrap_err();
    assert!(matches!(small, ImageError::Broken { .. }), "{small}");

    let mut gif = b"GIF89a\xff\xff\xff\xff\0\0\0".to_vec();
    gif.extend(b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;");
    for error in [decode(&gif).unwrap_err(), decode_frames(&gif).unwrap_err()] {
        assert!(matches!(error, ImageError::TooLarge { .. }), "{error}");
    }

    let mut webp = fs::read(source("lossless_75x40.webp")).unwrap();
    webp[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
    let error = decode(&webp).unwrap_err();
    assert!(matches!(error, ImageError::Broken { .. }), "{error}");
}
