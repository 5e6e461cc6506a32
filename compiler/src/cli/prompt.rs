//! The options that name a prompt.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use flamingo_runtime::{Model, PromptFile, Segment};

use super::template::{TEMPLATES, Template};

/// A prompt: text with pictures, or a file.
#[derive(Args)]
pub(super) struct PromptArgs {
    /// Text with `<image>` where each picture stands
    #[arg(long, value_name = "TEXT", group = "text", conflicts_with = "prompt_file")]
    prompt: Option<String>,
    /// What a user says of the pictures, written as the model's family does: for Otter
    /// `<image>User: TEXT GPT:<answer>`
    #[arg(long, value_name = "TEXT", group = "text", conflicts_with = "prompt_file")]
    ask: Option<String>,
    /// How `--ask` is written [default: as the model's family does]
    #[arg(long, value_name = "NAME", requires = "ask", conflicts_with_all = ["prompt", "prompt_file"], value_parser = TEMPLATES.map(|template| template.name))]
    template: Option<String>,
    /// A picture for the next `<image>`; repeat it for more
    #[arg(long, value_name = "FILE", requires = "text")]
    image: Vec<PathBuf>,
    /// A prompt as JSON
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
}

impl PromptArgs {
    /// The prompt that they name; what is asked is not yet in a family's form.
    pub(super) fn read(&self) -> Result<PromptFile> {
        match (&self.prompt, &self.ask, &self.prompt_file) {
            (Some(text), _, _) => Ok(PromptFile::from_text(text, &self.image)?),
            (None, Some(text), _) => {
                let pictures =
                    self.image.iter().map(|image| Segment::Image { image: image.clone() });
                let text = Segment::Text { text: text.clone() };
                Ok(PromptFile {
                    segments: pictures.chain([text]).collect(),
                    ..PromptFile::default()
                })
            }
            (None, None, Some(path)) => Ok(PromptFile::read(path)?),
            (None, None, None) => {
                bail!(
                    "no prompt\n\nhint: pass `--prompt TEXT`, `--ask TEXT` or `--prompt-file FILE`"
                )
            }
        }
    }

    /// What is asked, in the form of the model's family, and the texts that end an answer to it; else the prompt as it is.
    pub(super) fn in_form(&self, prompt: PromptFile, model: &Model) -> (PromptFile, Vec<String>) {
        let Some(text) = &self.ask else { return (prompt, Vec::new()) };
        let family = model.manifest().config.family;
        let template = Template::named(self.template.as_deref(), family);
        let stops = template.stops.iter().map(|stop| (*stop).to_owned()).collect();
        (template.turn(template.opening, &self.image, text), stops)
    }
}
