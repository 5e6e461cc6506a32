//! Counts of what was kept and why the rest was not: `stats.json` and the table.

use std::path::{Path, PathBuf};

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::{Error, Sample, ShardWriter};

macro_rules! reasons {
    ($(#[$doc:meta])* $name:ident { $($(#[$reason_doc:meta])* $reason:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $name { $($(#[$reason_doc])* $reason,)* }

        impl $name {
            /// All reasons, in the order in which they are asked.
            pub const ALL: &[Self] = &[$(Self::$reason,)*];

            /// Name in `stats.json`.
            pub fn name(self) -> &'static str {
                match self { $(Self::$reason => $text,)* }
            }
        }
    };
}

reasons! {
    /// Why a page gives no sample.
    PageReject {
        /// Not readable as HTML: a file that cannot be read, a broken record, over a limit of bytes or tags.
        Unreadable = "unreadable",
        /// Not HTML text at all, such as a record of another kind that says it is.
        Empty = "empty",
        /// The language of its text is not English.
        NotEnglish = "not_english",
        /// Its text does not read as prose; `pages::filter` states the rule.
        LowQuality = "low_quality",
        /// Its text was seen before.
        Duplicate = "duplicate",
        /// The tokenizer refuses it, or does not keep its markers in one piece.
        Untokenised = "untokenised",
        /// No picture of it is left.
        NoPictures = "no_pictures",
    }
}

reasons! {
    /// Why a picture is left out of its page.
    PictureReject {
        /// No file or record for any of its addresses.
        Missing = "missing",
        /// Not decodable, or over a limit of bytes or pixels.
        Broken = "broken",
        /// A side under 64 pixels.
        Tiny = "tiny",
        /// One side more than 3 times the other.
        Aspect = "aspect",
        /// One colour all over.
        SingleColour = "single_colour",
        /// The same bytes were seen before.
        Duplicate = "duplicate",
        /// It looks like one that was seen before.
        NearDuplicate = "near_duplicate",
        /// The scorer for unsafe pictures refused it.
        Unsafe = "unsafe",
    }
}

/// What was read, kept and refused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Pages, or lines of a list of pairs.
    pub pages: Counts,
    /// Pictures of pages that passed the filters of text, or media of pairs.
    pub pictures: Counts,
    /// Samples written.
    pub samples: u64,
    /// Tokens in them, without filling.
    pub tokens: u64,
    /// Pictures in them; a video counts as its frames.
    pub sample_pictures: u64,
    /// Samples whose coin fell on *next*.
    pub next: u64,
    /// The scorer for unsafe pictures, or `off`.
    pub unsafe_scorer: String,
    /// Files written, in order.
    pub shards: Vec<String>,
}

/// How many were read, kept, and refused for each reason.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// All that were looked at.
    pub read: u64,
    /// Those that passed.
    pub kept: u64,
    /// Those that did not, by reason.
    pub refused: std::collections::BTreeMap<&'static str, u64>,
}

impl Counts {
    /// Zero of every reason, so that each has its row.
    fn with(reasons: impl Iterator<Item = &'static str>) -> Self {
        Self { refused: reasons.map(|name| (name, 0)).collect(), ..Self::default() }
    }

    /// Counts one more that was read, as kept or refused.
    pub fn add(&mut self, refused: Option<&'static str>) {
        self.read += 1;
        match refused {
            None => self.kept += 1,
            Some(name) => *self.refused.entry(name).or_default() += 1,
        }
    }
}

impl Report {
    /// Zero of everything, with a row for each filter of pages and pictures.
    pub fn new(unsafe_scorer: &str) -> Self {
        Self {
            pages: Counts::with(PageReject::ALL.iter().map(|reason| reason.name())),
            pictures: Counts::with(PictureReject::ALL.iter().map(|reason| reason.name())),
            unsafe_scorer: unsafe_scorer.to_owned(),
            ..Self::default()
        }
    }

    /// Counts a sample that is written.
    pub fn count(&mut self, sample: &Sample) {
        let size = |len: usize| u64::try_from(len).unwrap_or(u64::MAX);
        self.samples += 1;
        self.tokens += size(sample.text_len);
        self.sample_pictures += size(sample.pictures.len());
        self.next += u64::from(sample.next);
    }

    /// Closes the shards, lists them and writes `stats.json` beside them.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn finish(mut self, shards: ShardWriter) -> Result<Self, Error> {
        let folder = shards.folder().to_owned();
        let name =
            |path: &PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
        self.shards = shards.finish()?.iter().filter_map(name).collect();
        self.write(&folder)?;
        Ok(self)
    }

    /// Writes `stats.json` into `folder`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), Error> {
        let path = folder.join("stats.json");
        std::fs::write(&path, self.json() + "\n").map_err(Error::file(&path))
    }

    /// The counts as JSON, always the same bytes for the same counts.
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("counts and names are JSON")
    }

    /// The counts as a table, one row a filter.
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_header(["", "pages", "pictures"]);
        let mut row = |name: &str, pages: Option<u64>, pictures: Option<u64>| {
            let text = |count: Option<u64>| count.map_or(String::new(), |n| n.to_string());
            table.add_row([name.to_owned(), text(pages), text(pictures)]);
        };
        row("read", Some(self.pages.read), Some(self.pictures.read));
        let names = self.pages.refused.keys().chain(self.pictures.refused.keys());
        let names: std::collections::BTreeSet<&str> = names.copied().collect();
        for name in names {
            let count = |counts: &Counts| counts.refused.get(name).copied();
            row(name, count(&self.pages), count(&self.pictures));
        }
        row("kept", Some(self.pages.kept), Some(self.pictures.kept));
        row("in samples", Some(self.samples), Some(self.sample_pictures));
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let scorer = &self.unsafe_scorer;
        format!("{table}\n\n{} tokens, scorer for unsafe pictures: {scorer}", self.tokens)
    }
}
