//! Opens the source that a verb was given, and shows its download.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use flamingo_models::Source;
use indicatif::ProgressBar;

use super::output::{Output, byte_bar, bytes};
use crate::hub::Download;
use crate::origin::{GivenParts, Origin};

/// Options of every verb that reads a source.
#[derive(Args, Clone, Default)]
pub(super) struct PartOptions {
    /// Language model of an OpenFlamingo from the hub, if not the one it was released with
    #[arg(long, value_name = "SOURCE")]
    language_model: Option<PathBuf>,
    /// Vision encoder of an OpenFlamingo from the hub, such as OpenAI's `ViT-L-14.pt`
    #[arg(long, value_name = "SOURCE")]
    vision_encoder: Option<PathBuf>,
}

impl PartOptions {
    /// Opens a source, downloading what is not here.
    pub(super) fn open(&self, origin: &Origin, output: &mut Output) -> Result<Source> {
        let part = |path: &Option<PathBuf>| path.as_deref().map(Origin::of).transpose();
        let given = GivenParts {
            language_model: part(&self.language_model)?,
            vision_encoder: part(&self.vision_encoder)?,
        };
        let mut downloads = Downloads { bar: byte_bar("download"), file: None, output };
        let source = origin.open(&given, &mut |download| downloads.show(download));
        downloads.bar.finish_and_clear();
        source
    }
}

/// One bar for all files, and a line for each.
struct Downloads<'o> {
    bar: ProgressBar,
    file: Option<String>,
    output: &'o mut Output,
}

impl Downloads<'_> {
    fn show(&mut self, download: Download) {
        match download {
            Download::Bytes { file, done, total } => {
                if self.file.as_deref() != Some(file) {
                    self.file = Some(file.to_owned());
                    self.bar.suspend(|| {
                        self.output.note(&format!("downloading {file}, {}", bytes(total)))
                    });
                }
                self.bar.set_message(file.to_owned());
                self.bar.set_length(total);
                self.bar.set_position(done);
            }
            Download::Checking { file } => self.bar.set_message(format!("checking {file}")),
        }
    }
}
