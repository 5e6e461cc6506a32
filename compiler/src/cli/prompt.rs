//! The options that name a prompt.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use flamingo_runtime::PromptFile;

/// A prompt: text with pictures, or a file.
#[derive(Args)]
pub(super) struct PromptArgs {
    /// Text with `<image>` where each picture stands
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt_file")]
    prompt: Option<String>,
    /// A picture for the next `<image>`; repeat it for more
    #[arg(long, value_name = "FILE", requires = "prompt")]
    image: Vec<PathBuf>,
    /// A prompt as JSON
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
}

impl PromptArgs {
    /// The prompt that they name.
    pub(super) fn read(&self) -> Result<PromptFile> {
        match (&self.prompt, &self.prompt_file) {
            (Some(text), _) => Ok(PromptFile::from_text(text, &self.image)?),
            (None, Some(path)) => Ok(PromptFile::read(path)?),
            (None, None) => {
                bail!("no prompt\n\nhint: pass `--prompt TEXT` or `--prompt-file FILE`")
            }
        }
    }
}
