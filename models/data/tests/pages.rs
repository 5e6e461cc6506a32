//! Committed web pages through the builder: as files and as an archive, against committed sequences.
//!
//! `UPDATE=1 cargo test -p flamingo-data --test pages` renews `golden/pages.txt`; read the difference.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Parser;
use flamingo_data::pages::{Options, build};
use flamingo_data::picture::decode;
use flamingo_data::report::{PageReject, PictureReject};
use flamingo_data::vocabulary::Vocabulary;
use flamingo_data::{DataCommand, Report, Sample, ShardReader};
use flate2::Compression;
use flate2::write::GzEncoder;
use proptest::prelude::*;
use tempfile::TempDir;
use tokenizers::Tokenizer;

fn tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

fn options() -> Options {
    Options { image_size: 32, min_words: 30, shard_size: 4, seed: 1, ..Options::default() }
}

fn vocabulary() -> Vocabulary {
    Vocabulary::open(&tests().join("tokenizer.json")).unwrap()
}

/// The report, and the shards in a folder that goes when it is dropped.
fn built(inputs: &[PathBuf], options: &Options) -> (Report, TempDir) {
    let out = tempfile::tempdir().unwrap();
    let report = build(inputs, out.path(), &vocabulary(), options, None, &mut ()).unwrap();
    (report, out)
}

fn samples(folder: &Path) -> Vec<Sample> {
    ShardReader::open(folder).unwrap().map(Result::unwrap).collect()
}

/// `0×12 1×3`: runs of equal numbers.
fn runs(numbers: &[u32]) -> String {
    let runs = numbers.chunk_by(|a, b| a == b).map(|run| format!("{}×{}", run[0], run.len()));
    runs.collect::<Vec<_>>().join(" ")
}

/// Mean red, green and blue of a picture in hexadecimal: which one it is.
fn colour(png: &[u8]) -> String {
    let picture = decode(png).unwrap();
    let n_pixels = u64::from(picture.width() * picture.height());
    let mean =
        |channel: usize| picture.pixels().map(|p| u64::from(p.0[channel])).sum::<u64>() / n_pixels;
    format!("{:02x}{:02x}{:02x}", mean(0), mean(1), mean(2))
}

fn text_form(samples: &[Sample], report: &Report) -> String {
    let tokenizer = Tokenizer::from_file(tests().join("tokenizer.json")).unwrap();
    let mut text = String::new();
    for sample in samples {
        let words = tokenizer.decode(&sample.text[..sample.text_len], false).unwrap();
        let coin = if sample.next { "next" } else { "last" };
        let colours: Vec<String> = sample.pictures.iter().map(|png| colour(png)).collect();
        let (length, pictures, phi) = (sample.text_len, colours.join(" "), runs(&sample.phi));
        writeln!(text, "=== {} · {length} tokens · {coin} picture", sample.source).unwrap();
        writeln!(text, "{}", words.replace("<image>", "\n<image>")).unwrap();
        writeln!(text, "--- φ {phi}\n--- pictures {pictures}\n").unwrap();
    }
    text + "=== stats.json\n" + &report.json() + "\n"
}

#[test]
fn pages_give_the_committed_sequences() {
    let (report, out) = built(&[tests().join("pages")], &options());
    let found = text_form(&samples(out.path()), &report);
    let path = tests().join("golden/pages.txt");
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&path, &found).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap();
    for (line, (found, expected)) in found.lines().zip(expected.lines()).enumerate() {
        assert_eq!(found, expected, "golden/pages.txt:{}", line + 1);
    }
    assert_eq!(found, expected);
    let stats = fs::read_to_string(out.path().join("stats.json")).unwrap();
    assert_eq!(stats, report.json() + "\n");
}

/// What the pages were written for, without looking at the golden file.
#[test]
fn every_filter_has_its_page() {
    let (report, _out) = built(&[tests().join("pages")], &options());
    let pages = |reason: PageReject| report.pages.refused[reason.name()];
    assert_eq!(pages(PageReject::Empty), 1, "empty.html");
    assert_eq!(pages(PageReject::NotEnglish), 1, "german.html");
    assert_eq!(pages(PageReject::LowQuality), 1, "prices.html");
    assert_eq!(pages(PageReject::Duplicate), 1, "news/harbour_copy.html");
    assert_eq!(pages(PageReject::NoPictures), 2, "no-pictures.html, seen.html");
    assert_eq!(report.pages.read, 14);
    let pictures = |reason: PictureReject| report.pictures.refused[reason.name()];
    assert_eq!(pictures(PictureReject::Missing), 3, "gallery.html: nowhere, far, outside");
    assert_eq!(pictures(PictureReject::Broken), 3, "gallery.html: cut, notes; letter.html: AAAA");
    assert_eq!(pictures(PictureReject::Aspect), 2, "gallery.html, news/harbour.html: banner");
    assert_eq!(pictures(PictureReject::Tiny), 2, "gallery.html: icon; letter.html: one pixel");
    assert_eq!(pictures(PictureReject::SingleColour), 2, "gallery.html, tables.html: red");
    assert_eq!(pictures(PictureReject::Duplicate), 3, "gallery.html: clock; seen.html: both");
    assert_eq!(pictures(PictureReject::NearDuplicate), 1, "gallery.html: lamp-large");
    assert_eq!(pictures(PictureReject::Unsafe), 0);
    assert_eq!(report.unsafe_scorer, "off");
    for counts in [&report.pages, &report.pictures] {
        assert_eq!(counts.read, counts.kept + counts.refused.values().sum::<u64>());
    }
    assert_eq!(report.samples, report.pages.kept);
}

#[test]
fn samples_have_the_paper_s_form() {
    let vocabulary = vocabulary();
    let options = Options { window: 64, max_images: 2, ..options() };
    let (_, out) = built(&[tests().join("pages")], &options);
    for sample in samples(out.path()) {
        assert_eq!((sample.text.len(), sample.phi.len()), (64, 64));
        let text = &sample.text[..sample.text_len];
        let n_images = text.iter().filter(|&&id| id == vocabulary.image).count();
        assert_eq!(n_images, sample.pictures.len(), "{}", sample.source);
        assert!((1..=2).contains(&n_images));
        for pair in text.windows(2).filter(|pair| pair[1] == vocabulary.image) {
            assert_eq!(pair[0], vocabulary.eoc, "{}", sample.source);
        }
        let pixels = sample.pixels(2, 32).unwrap();
        assert_eq!(pixels.len(), 2 * 32 * 32 * 3);
        assert_eq!(pixels[n_images * 32 * 32 * 3..].iter().filter(|&&value| value != 0).count(), 0);
    }
}

/// All files below a folder with their paths in it, by path.
fn files(folder: &Path, prefix: &str, found: &mut Vec<(String, Vec<u8>)>) {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        let name = format!("{prefix}{}", path.file_name().unwrap().to_str().unwrap());
        match path.is_dir() {
            true => files(&path, &format!("{name}/"), found),
            false => found.push((name, fs::read(path).unwrap())),
        }
    }
}

/// A `.warc.gz` with one compressed record an answer, as crawlers write it.
fn archive(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, body) in files {
        let kind = match name.rsplit('.').next().unwrap() {
            "html" => "text/html",
            "jpg" => "image/jpeg",
            _ => "application/octet-stream",
        };
        let address = format!("http://pages.test/{}", name.replace(' ', "%20"));
        let fields = format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n\r\n");
        let len = fields.len() + body.len();
        let header = format!(
            "WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {address}\r\n\
             WARC-Date: 2020-01-01T00:00:00Z\r\nWARC-Record-ID: <urn:uuid:{len}>\r\n\
             Content-Type: application/http; msgtype=response\r\nContent-Length: {len}\r\n\r\n"
        );
        let mut member = GzEncoder::new(&mut archive, Compression::best());
        for part in [header.as_bytes(), fields.as_bytes(), body, b"\r\n\r\n"] {
            member.write_all(part).unwrap();
        }
        member.finish().unwrap();
    }
    archive
}

#[test]
fn an_archive_gives_what_its_files_give() {
    let folder = tempfile::tempdir().unwrap();
    let mut all = Vec::new();
    files(&tests().join("pages"), "", &mut all);
    // `bread.jpg` has a query in its page: the archive knows it by its whole address.
    all.iter_mut()
        .filter(|(name, _)| name == "img/bread.jpg")
        .for_each(|(name, _)| name.push_str("?w=160"));
    let path = folder.path().join("pages.warc.gz");
    fs::write(&path, archive(&all)).unwrap();
    let (from_files, out_files) = built(&[tests().join("pages")], &options());
    let (from_archive, out_archive) = built(&[path], &options());
    assert_eq!(from_archive.json(), from_files.json());
    let mut expected = samples(out_files.path());
    expected.iter_mut().for_each(|sample| sample.source.insert_str(0, "http://pages.test/"));
    assert_eq!(samples(out_archive.path()), expected);
}

/// Bytes of all files of a folder.
fn bytes(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    files(folder, "", &mut found);
    found
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let inputs = [tests().join("pages")];
    let short = Options { window: 40, shard_size: 3, ..options() };
    let (_, first) = built(&inputs, &short);
    let (_, again) = built(&inputs, &short);
    assert!(bytes(first.path()) == bytes(again.path()));
    let names: Vec<String> = bytes(first.path()).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["000000.tar", "000001.tar", "000002.tar", "stats.json"]);
    let (_, other) = built(&inputs, &Options { seed: 2, ..short });
    assert!(bytes(first.path()) != bytes(other.path()));
}

/// A page's window and coin do not depend on what else is read.
#[test]
fn a_page_alone_gives_its_sample() {
    let short = Options { window: 40, ..options() };
    let (_, all) = built(&[tests().join("pages")], &short);
    let (_, one) = built(&[tests().join("pages/walk.html")], &short);
    let walk = samples(all.path()).into_iter().find(|sample| sample.source == "walk.html");
    assert_eq!(samples(one.path()), Vec::from_iter(walk));
}

/// What a tool that knows tar only sees: members of a sample are neighbours, named by its key.
#[test]
fn members_group_by_key() {
    let (report, out) = built(&[tests().join("pages")], &options());
    let mut keys: Vec<(String, Vec<String>)> = Vec::new();
    for shard in &report.shards {
        let mut archive = tar::Archive::new(fs::File::open(out.path().join(shard)).unwrap());
        for entry in archive.entries().unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.header().mtime().unwrap(), 0);
            let name = entry.path().unwrap().to_str().unwrap().to_owned();
            let (key, rest) = name.split_once('.').unwrap();
            match keys.last_mut() {
                Some((last, members)) if last == key => members.push(rest.to_owned()),
                _ => keys.push((key.to_owned(), vec![rest.to_owned()])),
            }
        }
    }
    for ((key, members), (index, sample)) in keys.iter().zip(samples(out.path()).iter().enumerate())
    {
        assert_eq!(*key, format!("{index:09}"));
        let pictures = (0..sample.pictures.len()).map(|index| format!("{index}.png"));
        assert_eq!(*members, pictures.chain(["json".to_owned()]).collect::<Vec<_>>());
    }
    assert_eq!(keys.len(), samples(out.path()).len());
}

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: DataCommand,
}

#[test]
fn the_command_prints_the_counts() {
    let out = tempfile::tempdir().unwrap();
    let run = |extra: &[&str]| {
        let (tests, out) = (tests(), out.path().join(extra.len().to_string()));
        let pages = tests.join("pages");
        let tokenizer = tests.join("tokenizer.json");
        let mut args: Vec<&str> = vec!["x", "pages", pages.to_str().unwrap(), "--min-words", "30"];
        args.extend([
            "-o",
            out.to_str().unwrap(),
            "--image-size",
            "32",
            "--seed",
            "1",
            "--shard-size",
            "4",
        ]);
        args.extend(["--tokenizer", tokenizer.to_str().unwrap()]);
        args.extend(extra);
        let mut printed = Vec::new();
        Cli::try_parse_from(args).unwrap().command.run(&mut printed, &mut ()).unwrap();
        String::from_utf8(printed).unwrap()
    };
    let (report, _out) = built(&[tests().join("pages")], &options());
    assert_eq!(run(&["--json"]), report.json() + "\n");
    let table = run(&[]);
    assert!(table.contains("not_english"), "{table}");
    assert!(table.ends_with("scorer for unsafe pictures: off\n"), "{table}");
}

/// A folder with one page.
fn one_page(html: &[u8]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("page.html"), html).unwrap();
    folder
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn byte_soup_never_stops_the_work(soup: Vec<u8>) {
        let page = one_page(&soup);
        fs::write(page.path().join("soup.warc"), &soup).unwrap();
        let (report, _out) = built(&[page.path().to_owned()], &options());
        prop_assert_eq!(report.samples, 0);
    }

    #[test]
    fn tag_soup_never_stops_the_work(soup in prop::collection::vec(prop::sample::select(vec![
        "<p>", "</p>", "<table>", "<td>", "<img src=x ", "srcset='a 1w,,b 2x, data:,", "<noscript>", "</noscript>",
        "<svg>", "<b>", "</i>", "<a href=", "<!--", "-->", "<![CDATA[", "<template>", "text of the page and ", "&lt;image&gt;",
        "<base href=::>", "<picture>", "<source srcset=y>", "\"", ">", "<frameset>", "\u{0}", "<math><mtext>", "<select>",
    ]), 0..60)) {
        let page = one_page(soup.concat().as_bytes());
        let (report, _out) = built(&[page.path().to_owned()], &Options { min_words: 1, ..options() });
        prop_assert_eq!(report.pages.read, 1);
    }
}
