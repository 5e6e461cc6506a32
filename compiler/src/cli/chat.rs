//! `flamingoc chat`.

use std::io::{BufRead as _, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use flamingo_runtime::{GenerateOptions, Limits, Mark, Model, SamplingOptions, Session};

use super::output::Output;
use super::template::{TEMPLATES, Template};
use super::{Caching, Opening, Outcome};

/// Talk with a model about pictures
#[derive(Args)]
#[command(after_help = "Examples:
  flamingoc chat of-9b.flamingo
  printf '/image a.png\\nwhat color ?\\n' | flamingoc chat demo.flamingo --template plain

A line is a turn. Lines with a slash are commands:
  /image FILE   put a picture before the next turn; several are fine
  /undo         forget the last turn and its answer
  /reset        forget everything
  /help, /quit

Only new text is read in each turn, and a picture is encoded once. Templates: `flamingo`, the
dialogue prompt of the paper (appendix D); `idefics`, the turns of IDEFICS-instruct; `otter`;
`plain`, the text alone. Default: the model's family.")]
pub(super) struct Chat {
    /// The artifact
    artifact: PathBuf,
    /// How turns are written
    #[arg(long, value_name = "NAME", value_parser = TEMPLATES.map(|template| template.name))]
    template: Option<String>,
    /// Most new tokens of an answer
    #[arg(long, value_name = "N", default_value = "64")]
    max_new_tokens: usize,
    /// Sampling temperature; 0 takes the most likely token
    #[arg(long, value_name = "T", default_value = "0")]
    temperature: f32,
    /// Go on when the context is full, without its oldest 64 tokens; models with linear position
    /// biases only (MPT)
    #[arg(long)]
    slide: bool,
    /// Seed of sampling
    #[arg(long, value_name = "N", default_value = "0")]
    seed: u64,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    caching: Caching,
    /// Print each answer as a line of JSON
    #[arg(long)]
    json: bool,
}

/// The state of a conversation.
struct Conversation {
    session: Session,
    /// Where each turn began, and what was to be written before it.
    turns: Vec<(Mark, String)>,
    /// What is written before the next turn: the last answer, which is read with it.
    before: String,
    /// Pictures for the next turn.
    pictures: Vec<PathBuf>,
}

impl Conversation {
    fn new(model: &Model, template: &Template, slides: bool) -> Result<Conversation> {
        let mut session = model.session()?;
        if slides {
            session.slide()?;
        }
        Ok(Conversation {
            session,
            turns: Vec::new(),
            before: template.opening.to_owned(),
            pictures: Vec::new(),
        })
    }

    fn undo(&mut self) -> Result<bool> {
        let Some((mark, before)) = self.turns.pop() else { return Ok(false) };
        self.session.rewind(mark)?;
        self.before = before;
        Ok(true)
    }
}

impl Chat {
    pub(super) fn run(self, output: &mut Output) -> Result<Outcome> {
        if !(self.temperature.is_finite() && (0.0..=100.0).contains(&self.temperature)) {
            bail!("`--temperature`: expected 0 to 100, got {}", self.temperature);
        }
        let model = self.caching.open(&self.artifact, &self.opening)?;
        let family = model.manifest().config.family;
        let template = Template::named(self.template.as_deref(), family);
        let mut conversation = Conversation::new(&model, template, self.slide)?;
        let is_asking = std::io::stdin().is_terminal();
        if is_asking {
            output.note("/image FILE puts a picture before the next turn; /help says more");
        }
        let mut lines = std::io::stdin().lock().lines();
        loop {
            if is_asking {
                output.prompt("> ");
            }
            let Some(line) = lines.next().transpose()? else { return Ok(Outcome::Ok) };
            match line.trim().split_once(' ').unwrap_or((line.trim(), "")) {
                ("", _) if conversation.pictures.is_empty() => {}
                ("/quit" | "/exit", _) => return Ok(Outcome::Ok),
                ("/help", _) => output
                    .note("/image FILE, /undo, /reset, /quit; anything else is said to the model"),
                ("/reset", _) => conversation = Conversation::new(&model, template, self.slide)?,
                ("/undo", _) => match conversation.undo() {
                    Ok(true) => {}
                    Ok(false) => output.note("there is no turn to undo"),
                    Err(error) => output.note(&format!("error: {error:#}")),
                },
                ("/image", file) => match Path::new(file.trim()).is_file() {
                    true => conversation.pictures.push(PathBuf::from(file.trim())),
                    false => output.note(&format!("{}: no such file", file.trim())),
                },
                (command, _) if command.starts_with('/') => {
                    output.note(&format!("{command}: no such command; /help lists them"));
                }
                _ => match self.answer(&mut conversation, template, line.trim(), output) {
                    // What is wrong with a turn or a picture does not end the conversation.
                    Err(error) if is_asking => output.note(&format!("error: {error:#}")),
                    result => result?,
                },
            }
        }
    }

    fn answer(
        &self,
        conversation: &mut Conversation,
        template: &Template,
        text: &str,
        output: &mut Output,
    ) -> Result<()> {
        let options = GenerateOptions {
            max_new_tokens: self.max_new_tokens,
            sampling: SamplingOptions {
                temperature: self.temperature,
                seed: self.seed,
                ..SamplingOptions::default()
            },
            stop_strings: template.stops.iter().map(|stop| (*stop).to_owned()).collect(),
            ..GenerateOptions::default()
        };
        let turn = template.turn(&conversation.before, &conversation.pictures, text);
        let (start, started) = (conversation.session.mark(), Instant::now());
        conversation.session.append(&turn, &Limits::default())?;
        conversation.pictures.clear();
        let end_of_turn = conversation.session.mark();
        let (mut shown, mut first) = (Ok(()), None);
        let answer = conversation.session.generate(&options, &mut |piece| {
            first.get_or_insert_with(|| started.elapsed());
            if !self.json && shown.is_ok() {
                shown = output.text(piece);
            }
        })?;
        shown?;
        // A stop text is no part of what was said: the answer is read again with the next turn, without it.
        conversation.session.rewind(end_of_turn)?;
        conversation.turns.push((start, std::mem::take(&mut conversation.before)));
        conversation.before = format!("{}{}", answer.text, template.after_answer);
        output.warnings(conversation.session.model());
        if self.json {
            return output.line(&answer.to_json().to_string());
        }
        output.line("")?;
        let rate = answer.timings.decode_tokens_per_s.map(|rate| format!(", {rate:.1} tokens/s"));
        output.note(&format!(
            "[first token {:.0} ms{}; pictures: {} encoded, {} found; {} tokens read before]",
            first.unwrap_or_else(|| started.elapsed()).as_secs_f64() * 1e3,
            rate.unwrap_or_default(),
            answer.cache.visual_misses,
            answer.cache.visual_hits,
            start.n_tokens(),
        ));
        Ok(())
    }
}
