//! WebDataset shards: tar files whose members `KEY.json` and `KEY.0.png`, `KEY.1.png`, … belong together.
//!
//! The writer leaves the same bytes for the same samples; the reader streams, one sample in memory at a time.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::vec;

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::phi::media_indices;
use crate::picture::decode;
use crate::vocabulary::Vocabulary;

/// Most bytes that a member of a shard may have.
const MAX_MEMBER_BYTES: u64 = 64 << 20;

/// One training example: text, its media, and which of them each token looks at.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Tokens, `[L]`, filled up at the end.
    pub text: Vec<u32>,
    /// φ: index of the medium that each token looks at, `[L]`, from 1; 0 is none, as in the filling.
    pub phi: Vec<u32>,
    /// Tokens before the filling.
    pub text_len: usize,
    /// The page's coin: φ points to the next picture, not the last one.
    pub next: bool,
    /// T: frames of each medium, 1 for pictures.
    pub n_frames: usize,
    /// Encoded PNG, `[N · T]`, all of one size; medium `n`, frame `t` is at `n · T + t`.
    pub pictures: Vec<Vec<u8>>,
    /// What each token weighs in a loss, `[L]`, from 0; without it every token of text counts alike.
    pub weights: Option<Vec<f32>>,
    /// The page or line it was made from.
    pub source: String,
}

/// `KEY.json`.
#[derive(Serialize, Deserialize)]
struct Meta {
    source: String,
    n_pictures: usize,
    n_frames: usize,
    next: bool,
    text_len: usize,
    text: Vec<u32>,
    phi: Vec<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    weights: Option<Vec<f32>>,
}

impl Sample {
    /// A sample of `text`, cut or filled up to `length`, with φ as the coin `next` has it.
    pub fn new(
        text: &[u32],
        length: usize,
        vocabulary: &Vocabulary,
        next: bool,
        n_frames: usize,
        pictures: Vec<Vec<u8>>,
        source: String,
    ) -> Self {
        let mut text = text.get(..length).unwrap_or(text).to_vec();
        let text_len = text.len();
        let mut phi = media_indices(&text, vocabulary.image, next);
        text.resize(length, vocabulary.pad);
        phi.resize(length, 0);
        Self { text, phi, text_len, next, n_frames, pictures, weights: None, source }
    }

    /// Pixels, `[n_media, T, size, size, 3]` u8 RGB, row-major; media that the sample lacks are zero.
    ///
    /// # Errors
    /// There are more media than `n_media`, or one is not a PNG of `size` × `size`: the reason.
    pub fn pixels(&self, n_media: usize, size: u32) -> Result<Vec<u8>, String> {
        let picture_len = usize::try_from(size).unwrap_or(0).pow(2) * 3;
        let capacity = n_media * self.n_frames;
        if self.pictures.len() > capacity {
            return Err(format!("{} pictures, expected at most {capacity}", self.pictures.len()));
        }
        let mut pixels = vec![0; capacity * picture_len];
        for (place, png) in pixels.chunks_exact_mut(picture_len.max(1)).zip(&self.pictures) {
            let picture = decode(png).ok_or("not a picture, or one over the limits")?;
            if picture.dimensions() != (size, size) {
                return Err(format!("a picture of {:?}, expected {size}", picture.dimensions()));
            }
            place.copy_from_slice(picture.as_raw());
        }
        Ok(pixels)
    }

    fn meta(&self) -> Vec<u8> {
        let meta = Meta {
            source: self.source.clone(),
            n_pictures: self.pictures.len(),
            n_frames: self.n_frames,
            next: self.next,
            text_len: self.text_len,
            text: self.text.clone(),
            phi: self.phi.clone(),
            weights: self.weights.clone(),
        };
        serde_json::to_vec(&meta).expect("numbers and strings are JSON")
    }
}

/// Writes samples to `000000.tar`, `000001.tar`, … of a folder. A shard has its name only once it is whole.
pub struct ShardWriter {
    folder: PathBuf,
    samples_per_shard: u64,
    n_samples: u64,
    open: Option<tar::Builder<BufWriter<File>>>,
    shards: Vec<PathBuf>,
}

impl ShardWriter {
    /// Makes the folder if it is not there.
    ///
    /// # Errors
    /// The folder cannot be made, or holds shards already.
    pub fn create(folder: &Path, samples_per_shard: u64) -> Result<Self, Error> {
        std::fs::create_dir_all(folder).map_err(Error::file(folder))?;
        if !shards_in(folder)?.is_empty() {
            return Err(Error::NotEmpty { path: folder.to_owned() });
        }
        Ok(Self {
            folder: folder.to_owned(),
            samples_per_shard: samples_per_shard.max(1),
            n_samples: 0,
            open: None,
            shards: Vec::new(),
        })
    }

    /// Where the shards go.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Adds a sample; its key is its number over all shards.
    ///
    /// # Errors
    /// The shard cannot be written.
    pub fn push(&mut self, sample: &Sample) -> Result<(), Error> {
        if self.n_samples.is_multiple_of(self.samples_per_shard) {
            self.close()?;
        }
        let key = format!("{:09}", self.n_samples);
        let temporary = self.temporary();
        let tar = match &mut self.open {
            Some(tar) => tar,
            none => {
                let file = File::create(&temporary).map_err(Error::file(&temporary))?;
                none.insert(tar::Builder::new(BufWriter::new(file)))
            }
        };
        for (index, png) in sample.pictures.iter().enumerate() {
            append(tar, &format!("{key}.{index}.png"), png).map_err(Error::file(&temporary))?;
        }
        append(tar, &format!("{key}.json"), &sample.meta()).map_err(Error::file(&temporary))?;
        self.n_samples += 1;
        Ok(())
    }

    /// Closes the last shard. The paths of all, in order.
    ///
    /// # Errors
    /// The shard cannot be written.
    pub fn finish(mut self) -> Result<Vec<PathBuf>, Error> {
        self.close()?;
        Ok(self.shards)
    }

    fn close(&mut self) -> Result<(), Error> {
        let Some(tar) = self.open.take() else { return Ok(()) };
        let temporary = self.temporary();
        let path = self.folder.join(format!("{:06}.tar", self.shards.len()));
        let flushed = tar.into_inner().and_then(|mut file| file.flush());
        flushed
            .and_then(|()| std::fs::rename(&temporary, &path))
            .map_err(Error::file(&temporary))?;
        self.shards.push(path);
        Ok(())
    }

    fn temporary(&self) -> PathBuf {
        self.folder.join(format!(".{:06}.tar.part", self.shards.len()))
    }
}

fn append(tar: &mut tar::Builder<impl Write>, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_size(u64::try_from(bytes.len()).map_err(std::io::Error::other)?);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, bytes)
}

/// Names of files, without their folder.
pub fn names_of(paths: &[PathBuf]) -> Vec<String> {
    let names = paths.iter().filter_map(|path| path.file_name());
    names.map(|name| name.to_string_lossy().into_owned()).collect()
}

/// Shards of a folder by name.
pub(crate) fn shards_in(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut shards = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::file(folder))? {
        let path = entry.map_err(Error::file(folder))?.path();
        if path.extension().is_some_and(|extension| extension == "tar") {
            shards.push(path);
        }
    }
    shards.sort();
    Ok(shards)
}

/// Members of one shard that share a key: name after the key, place and size in bytes.
pub(crate) struct Group {
    /// The name up to its first dot.
    pub(crate) key: String,
    members: Vec<(String, u64, u64)>,
}

/// Samples of shards in order, one in memory at a time. A shard that cannot be read gives one error.
pub struct ShardReader {
    paths: vec::IntoIter<PathBuf>,
    shard: Option<(PathBuf, File)>,
    groups: vec::IntoIter<Group>,
}

impl ShardReader {
    /// Reads the shards of a folder, by name.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        Ok(Self::new(shards_in(folder)?))
    }

    /// Reads these shards in this order.
    pub fn new(paths: Vec<PathBuf>) -> Self {
        Self { paths: paths.into_iter(), shard: None, groups: Vec::new().into_iter() }
    }

    fn next_shard(&mut self, path: PathBuf) -> Result<(), Error> {
        let mut file = File::open(&path).map_err(Error::file(&path))?;
        self.groups = groups_of(&mut file).map_err(Error::file(&path))?.into_iter();
        self.shard = Some((path, file));
        Ok(())
    }
}

impl Iterator for ShardReader {
    type Item = Result<Sample, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let (Some((path, file)), Some(group)) = (&mut self.shard, self.groups.next()) {
                return Some(read_group(path, file, &group));
            }
            let path = self.paths.next()?;
            if let Err(error) = self.next_shard(path) {
                return Some(Err(error));
            }
        }
    }
}

/// Walks the headers of an archive and gathers neighbours with the same key, the name up to its first dot.
pub(crate) fn groups_of(file: &mut File) -> std::io::Result<Vec<Group>> {
    let mut groups: Vec<Group> = Vec::new();
    let mut archive = tar::Archive::new(file);
    for entry in archive.entries_with_seek()? {
        let entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let Some((key, rest)) = name.split_once('.') else { continue };
        if groups.last().is_none_or(|group| group.key != key) {
            groups.push(Group { key: key.to_owned(), members: Vec::new() });
        }
        let group = groups.last_mut().expect("a group was just pushed");
        group.members.push((rest.to_owned(), entry.raw_file_position(), entry.size()));
    }
    Ok(groups)
}

pub(crate) fn read_group(path: &Path, file: &mut File, group: &Group) -> Result<Sample, Error> {
    let fail = |rest: &str, reason: String| Error::Shard {
        path: path.to_owned(),
        member: format!("{}.{rest}", group.key),
        reason,
    };
    let mut read = |wanted: &str| {
        let member = group.members.iter().find(|(rest, _, _)| rest == wanted);
        let (_, place, len) = member.ok_or_else(|| fail(wanted, "missing".to_owned()))?;
        read_member(file, *place, *len).map_err(|error| fail(wanted, error.to_string()))
    };
    let meta: Meta =
        serde_json::from_slice(&read("json")?).map_err(|error| fail("json", error.to_string()))?;
    if meta.n_pictures >= group.members.len() {
        return Err(fail("json", format!("{} pictures are too many", meta.n_pictures)));
    }
    let pictures = (0..meta.n_pictures).map(|index| read(&format!("{index}.png")));
    let pictures = pictures.collect::<Result<_, _>>()?;
    if meta.phi.len() != meta.text.len() || meta.text_len > meta.text.len() {
        return Err(fail("json", "text, phi and text_len do not fit".to_owned()));
    }
    if n_media(&meta).is_none_or(|n_media| meta.phi.iter().any(|&medium| medium > n_media)) {
        return Err(fail("json", "n_pictures, n_frames and phi do not fit".to_owned()));
    }
    let Meta { source, n_frames, next, text_len, text, phi, weights, .. } = meta;
    let is_weight = |weight: &f32| weight.is_finite() && *weight >= 0.0;
    if weights.iter().any(|own| own.len() != text.len() || !own.iter().all(is_weight)) {
        return Err(fail("json", "expected a weight of at least 0 for each token".to_owned()));
    }
    Ok(Sample { text, phi, text_len, next, n_frames, pictures, weights, source })
}

/// Media of a sample; `None` if its pictures are not some media of `n_frames` each.
fn n_media(meta: &Meta) -> Option<u32> {
    let fits = meta.n_frames > 0
        && meta.n_frames <= meta.n_pictures.max(1)
        && meta.n_pictures.is_multiple_of(meta.n_frames);
    fits.then(|| u32::try_from(meta.n_pictures / meta.n_frames).ok())?
}

fn read_member(file: &mut File, place: u64, len: u64) -> std::io::Result<Vec<u8>> {
    if len > MAX_MEMBER_BYTES {
        return Err(std::io::Error::other(format!("{len} bytes, at most {MAX_MEMBER_BYTES}")));
    }
    file.seek(SeekFrom::Start(place))?;
    let mut bytes = Vec::new();
    file.take(len).read_to_end(&mut bytes)?;
    match u64::try_from(bytes.len()) {
        Ok(found) if found == len => Ok(bytes),
        _ => Err(std::io::ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use image::{Rgb, RgbImage};
    use proptest::prelude::*;

    use super::{Sample, ShardReader, ShardWriter, append, groups_of};
    use crate::Error;
    use crate::picture::png;

    fn sample(n_media: u32, n_frames: usize, text_len: usize) -> Sample {
        let n_pictures = n_media * u32::try_from(n_frames).unwrap();
        let picture =
            |i: u32| png(&RgbImage::from_fn(3, 3, |x, y| Rgb([x as u8, y as u8, i as u8])));
        let mut text: Vec<u32> = (0..text_len as u32).collect();
        text.resize(16, 99);
        Sample {
            phi: text.iter().map(|id| id % (n_media + 1)).collect(),
            text,
            text_len,
            next: text_len.is_multiple_of(2),
            n_frames: if n_media == 0 { 1 } else { n_frames },
            pictures: (0..n_pictures).map(picture).collect(),
            weights: n_media.is_multiple_of(2).then(|| vec![0.1 * n_frames as f32; 16]),
            source: format!("page \u{fe}{text_len}"),
        }
    }

    fn write(folder: &Path, samples: &[Sample], samples_per_shard: u64) {
        let mut writer = ShardWriter::create(folder, samples_per_shard).unwrap();
        samples.iter().for_each(|sample| writer.push(sample).unwrap());
        let shards = writer.finish().unwrap();
        assert_eq!(shards.len(), samples.len().div_ceil(samples_per_shard.try_into().unwrap()));
    }

    fn read(folder: &Path) -> Vec<Result<Sample, Error>> {
        ShardReader::open(folder).unwrap().collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn what_is_written_is_read(
            sizes in prop::collection::vec((0..4_u32, 1..12_usize, 0..16_usize), 0..7),
            samples_per_shard in 1..4_u64,
        ) {
            let folder = tempfile::tempdir().unwrap();
            let samples: Vec<Sample> = sizes.into_iter().map(|(n, t, len)| sample(n, t, len)).collect();
            write(folder.path(), &samples, samples_per_shard);
            let found: Result<Vec<Sample>, Error> = read(folder.path()).into_iter().collect();
            prop_assert_eq!(found.unwrap(), samples);
        }

        #[test]
        fn a_damaged_shard_never_panics(places in prop::collection::vec((any::<usize>(), any::<u8>()), 1..20), end: usize) {
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), &[sample(2, 1, 5), sample(1, 3, 4)], 2);
            let path = folder.path().join("000000.tar");
            let mut bytes = fs::read(&path).unwrap();
            let len = bytes.len();
            places.iter().for_each(|(place, byte)| bytes[place % len] = *byte);
            bytes.truncate(end % (len + 1));
            fs::write(&path, bytes).unwrap();
            for sample in read(folder.path()).into_iter().flatten() {
                let _ = sample.pixels(5, 3);
            }
        }
    }

    #[test]
    fn a_shard_that_breaks_off_is_an_error_and_the_next_is_read() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &[sample(2, 1, 1), sample(1, 1, 2)], 1);
        let path = folder.path().join("000000.tar");
        let bytes = fs::read(&path).unwrap();
        for len in [1, 511, 513, 600, 1700] {
            fs::write(&path, &bytes[..len]).unwrap();
            let mut found = read(folder.path());
            assert_eq!(found.pop().unwrap().unwrap(), sample(1, 1, 2), "{len}");
            assert!(!found.is_empty() && found.iter().all(Result::is_err), "{len}: {found:?}");
        }
    }

    #[test]
    fn weights_are_numbers_from_0_and_one_for_each_token() {
        for weights in [vec![1.0; 15], vec![-0.5; 16], vec![f32::NAN; 16]] {
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), &[Sample { weights: Some(weights), ..sample(1, 1, 1) }], 1);
            let error = read(folder.path()).remove(0).unwrap_err().to_string();
            assert!(error.contains("000000.tar") && error.contains("000000000.json"), "{error}");
        }
    }

    #[test]
    fn a_sample_without_weights_says_nothing_of_them() {
        let meta = String::from_utf8(sample(1, 1, 1).meta()).unwrap();
        assert!(!meta.contains("weights"), "{meta}");
    }

    #[test]
    fn members_are_grouped_by_the_name_before_the_first_dot() {
        let mut tar = tar::Builder::new(tempfile::tempfile().unwrap());
        for name in ["a.0.png", "a.json", "b.json", "README", "c.1.png", "c.json"] {
            append(&mut tar, name, b"x").unwrap();
        }
        let mut file = tar.into_inner().unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        let groups = groups_of(&mut file).unwrap();
        let found: Vec<_> = groups.iter().map(|g| (g.key.as_str(), g.members.len())).collect();
        assert_eq!(found, [("a", 2), ("b", 1), ("c", 2)]);
    }

    #[test]
    fn other_shards_are_not_written_over() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &[sample(1, 1, 1)], 1);
        assert!(matches!(ShardWriter::create(folder.path(), 1), Err(Error::NotEmpty { .. })));
    }

    #[test]
    fn pixels_stand_in_the_order_of_media_and_frames() {
        let pixels = sample(2, 2, 3).pixels(3, 3).unwrap();
        assert_eq!(pixels.len(), 3 * 2 * 27);
        let blue: Vec<u8> = pixels.chunks(27).map(|picture| picture[2]).collect();
        assert_eq!(blue, [0, 1, 2, 3, 0, 0]);
        assert_eq!(pixels[27..27 + 6], [0, 0, 1, 1, 0, 1]);
        assert!(sample(2, 2, 3).pixels(1, 3).is_err(), "too many media");
        assert!(sample(2, 2, 3).pixels(2, 4).is_err(), "another size");
    }
}
