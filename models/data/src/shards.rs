//! Samples of shards by number, for a trainer that begins anywhere and goes round: one shard is open at a time.

#![deny(clippy::as_conversions)]

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use crate::shard::{Group, groups_of, read_group, shards_in};
use crate::{Error, Sample};

/// Where a sample lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The shard.
    pub path: PathBuf,
    /// The sample's key in it.
    pub key: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "shard `{}`, sample `{}`", self.path.display(), self.key)
    }
}

/// Shards in order, with how many samples each has.
pub struct Shards {
    shards: Vec<(PathBuf, usize)>,
    n_samples: usize,
    open: Option<Open>,
}

/// The shard that was read last.
struct Open {
    shard: usize,
    file: File,
    groups: Vec<Group>,
}

impl Shards {
    /// Counts the samples of these shards, and of those in these folders, by name.
    ///
    /// # Errors
    /// One of them cannot be read, or there is no sample in any.
    pub fn open(paths: &[PathBuf]) -> Result<Self, Error> {
        let mut files = Vec::new();
        for path in paths {
            match path.is_dir() {
                true => files.extend(shards_in(path)?),
                false => files.push(path.clone()),
            }
        }
        let mut shards = Vec::new();
        for path in files {
            let n_samples = open(&path)?.1.len();
            shards.push((path, n_samples));
        }
        let n_samples = shards.iter().map(|(_, n_samples)| n_samples).sum();
        if n_samples == 0 {
            return Err(Error::NoSamples { paths: paths.to_vec() });
        }
        Ok(Self { shards, n_samples, open: None })
    }

    /// Samples of all shards, at least one.
    pub fn n_samples(&self) -> usize {
        self.n_samples
    }

    /// The sample of a number, counted from 0 over all shards and round again after the last one.
    ///
    /// # Errors
    /// A shard that cannot be read or has changed, a sample that is not whole: with the shard and the member.
    pub fn read(&mut self, number: usize) -> Result<(Place, Sample), Error> {
        let (mut shard, mut rest) = (0, number % self.n_samples);
        while rest >= self.shards[shard].1 {
            rest -= self.shards[shard].1;
            shard += 1;
        }
        let path = &self.shards[shard].0;
        let open = match self.open.take().filter(|open| open.shard == shard) {
            Some(open) => self.open.insert(open),
            None => {
                let (file, groups) = open(path)?;
                self.open.insert(Open { shard, file, groups })
            }
        };
        let group = open.groups.get(rest).ok_or_else(|| Error::Shard {
            path: path.clone(),
            member: format!("number {rest}"),
            reason: "missing: the shard has changed".to_owned(),
        })?;
        let sample = read_group(path, &mut open.file, group)?;
        Ok((Place { path: path.clone(), key: group.key.clone() }, sample))
    }
}

fn open(path: &Path) -> Result<(File, Vec<Group>), Error> {
    let mut file = File::open(path).map_err(Error::file(path))?;
    let groups = groups_of(&mut file).map_err(Error::file(path))?;
    Ok((file, groups))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::Shards;
    use crate::{Error, Sample, ShardReader, ShardWriter};

    fn write(folder: &Path, n_samples: u32, samples_per_shard: u64) {
        let mut writer = ShardWriter::create(folder, samples_per_shard).unwrap();
        for number in 0..n_samples {
            let sample = Sample {
                text: vec![number],
                phi: vec![0],
                text_len: 1,
                next: false,
                n_frames: 1,
                pictures: Vec::new(),
                weights: None,
                source: format!("{number}"),
            };
            writer.push(&sample).unwrap();
        }
        writer.finish().unwrap();
    }

    #[test]
    fn any_number_gives_what_streaming_gives_there_round_and_round() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 7, 3);
        let expected: Vec<Sample> =
            ShardReader::open(folder.path()).unwrap().map(Result::unwrap).collect();
        let mut shards = Shards::open(&[folder.path().to_owned()]).unwrap();
        assert_eq!(shards.n_samples(), 7);
        for number in [0, 1, 2, 3, 6, 7, 13, 14, 5, 4, 700] {
            assert_eq!(shards.read(number).unwrap().1, expected[number % 7], "{number}");
        }
        // Files in the order in which they are named.
        let files = ["000002.tar", "000000.tar"].map(|name| folder.path().join(name));
        let mut shards = Shards::open(&files).unwrap();
        let (place, sample) = shards.read(1).unwrap();
        assert_eq!((place.key.as_str(), sample), ("000000000", expected[0].clone()));
        assert_eq!(place.path, files[1]);
    }

    #[test]
    fn no_samples_are_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let empty = Shards::open(&[folder.path().to_owned()]);
        assert!(matches!(empty, Err(Error::NoSamples { .. })));
        let missing = Shards::open(&[folder.path().join("none.tar")]);
        assert!(matches!(missing, Err(Error::File { .. })));
    }
}
