//! Pairs through the builder: what a picture, a video and a folder become.

use std::fs;
use std::path::Path;

use flamingo_data::pairs::{Options, build};
use flamingo_data::picture::png;
use flamingo_data::vocabulary::Vocabulary;
use flamingo_data::{Report, Sample, ShardReader};
use image::codecs::gif::GifEncoder;
use image::{Delay, Frame, Rgb, RgbImage, Rgba, RgbaImage};
use tempfile::TempDir;
use tokenizers::Tokenizer;

fn tokenizer() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tokenizer.json")
}

fn built(list: &Path, options: &Options) -> (Report, Vec<Sample>) {
    let out = tempfile::tempdir().unwrap();
    let vocabulary = Vocabulary::open(&tokenizer()).unwrap();
    let report = build(&[list.to_owned()], out.path(), &vocabulary, options, &mut ()).unwrap();
    (report, ShardReader::open(out.path()).unwrap().map(Result::unwrap).collect())
}

fn words(sample: &Sample) -> String {
    let tokenizer = Tokenizer::from_file(tokenizer()).unwrap();
    tokenizer.decode(&sample.text[..sample.text_len], false).unwrap()
}

/// `boat.png`, the two-second `boat.gif`, and a list.
fn folder(list: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("list.jsonl"), list).unwrap();
    fs::write(folder.path().join("boat.png"), png(&RgbImage::from_pixel(90, 60, Rgb([1, 2, 3]))))
        .unwrap();
    let mut film = Vec::new();
    let mut encoder = GifEncoder::new(&mut film);
    for grey in [0, 80] {
        let picture = RgbaImage::from_pixel(8, 8, Rgba([grey, grey, grey, 255]));
        encoder
            .encode_frame(Frame::from_parts(picture, 0, 0, Delay::from_numer_denom_ms(1000, 1)))
            .unwrap();
    }
    drop(encoder);
    fs::write(folder.path().join("boat.gif"), film).unwrap();
    folder
}

#[test]
fn pictures_and_videos_have_one_form() {
    let folder = folder(
        "{\"text\": \"A boat\", \"image\": \"boat.png\"}\n\
         {\"text\": \"It <image> sails\", \"video\": \"boat.gif\"}\n\
         {\"text\": \"gone\", \"image\": \"gone.png\"}\n\
         {\"text\": \"out\", \"image\": \"../boat.png\"}\n\
         {\"text\": \" \", \"image\": \"boat.png\"}\n\
         {\"text\": \"not moving\", \"video\": \"boat.png\"}\nrubbish\n",
    );
    let options = Options { image_size: 16, space: 0.0, ..Options::default() };
    let (report, samples) = built(&folder.path().join("list.jsonl"), &options);
    let [picture, video] = &samples[..] else { panic!("{} samples", samples.len()) };
    assert_eq!(words(picture), "<s><image>A boat<|endofchunk|></s>");
    assert_eq!(words(video), "<s><image>It   sails<|endofchunk|></s>");
    assert_eq!((picture.n_frames, picture.pictures.len()), (1, 1));
    assert_eq!((video.n_frames, video.pictures.len()), (8, 8));
    assert_eq!(
        video.pixels(1, 16).unwrap().chunks(16 * 16 * 3).map(|f| f[0]).collect::<Vec<_>>(),
        [0, 80, 80, 80, 80, 80, 80, 80]
    );
    for sample in &samples {
        assert_eq!(sample.text.len(), 32);
        let expected = (0..32).map(|place| u32::from((1..sample.text_len).contains(&place)));
        assert_eq!(sample.phi, expected.collect::<Vec<_>>());
        assert!(!sample.next);
    }
    assert_eq!((report.pages.read, report.pages.kept), (7, 2));
    assert_eq!((report.pages.refused["unreadable"], report.pages.refused["empty"]), (1, 1));
    assert_eq!(report.pages.refused["no_pictures"], 3);
    assert_eq!((report.pictures.refused["missing"], report.pictures.refused["broken"]), (2, 1));
}

#[test]
fn a_space_comes_before_half_of_the_texts() {
    let list: String =
        (0..200).map(|_| "{\"text\": \"A boat\", \"image\": \"boat.png\"}\n").collect();
    let folder = folder(&list);
    let options = Options { image_size: 4, ..Options::default() };
    let (_, samples) = built(&folder.path().join("list.jsonl"), &options);
    let texts: Vec<String> = samples.iter().map(words).collect();
    let n_spaces =
        texts.iter().filter(|text| *text == "<s><image> A boat<|endofchunk|></s>").count();
    let n_others =
        texts.iter().filter(|text| *text == "<s><image>A boat<|endofchunk|></s>").count();
    assert_eq!(n_spaces + n_others, 200);
    // Five standard deviations of 200 fair coins.
    assert!((65..=135).contains(&n_spaces), "{n_spaces}");
}

#[test]
fn a_long_text_is_cut_without_an_end() {
    let folder =
        folder(&format!("{{\"text\": \"{}\", \"image\": \"boat.png\"}}", "A boat. ".repeat(40)));
    let options = Options { image_size: 4, space: 0.0, length: 12, ..Options::default() };
    let (_, samples) = built(&folder.path().join("list.jsonl"), &options);
    assert_eq!((samples[0].text.len(), samples[0].text_len), (12, 12));
    assert!(words(&samples[0]).starts_with("<s><image>A boat. A"));
    assert!(!words(&samples[0]).contains("<|endofchunk|>"));
}

#[test]
fn a_folder_of_media_with_texts() {
    let folder = folder("");
    fs::write(folder.path().join("boat.txt"), "A boat\n").unwrap();
    let options = Options { image_size: 4, frames: 2, ..Options::default() };
    let (_, samples) = built(folder.path(), &options);
    let found: Vec<(&str, usize)> =
        samples.iter().map(|s| (s.source.as_str(), s.n_frames)).collect();
    assert_eq!(found, [("boat.gif", 2), ("boat.png", 1)]);
}
