//! `data scenes`: the demo's tasks with generated pictures, as shards. A sample depends on the seed, the split, its
//! task and its number only.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum};
use flamingo_data::phi::media_indices;
use flamingo_data::picture::png_from_pixels;
use flamingo_data::{Progress, Report, Sample, ShardWriter, WritingArgs};
use flamingo_scenes::Split;
use flamingo_scenes::draw::{SIDE, draw};
use flamingo_scenes::episode::{Episode, Style, Task};
use flamingo_scenes::random::stream;
use flamingo_scenes::words::{IMAGE, Vocabulary};

use crate::export::write_tokenizer;

/// Which pictures a sample may show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Digits and pairs of colour and kind that training sees; several answers count
    Train,
    /// Digits that training never sees; the last answer counts
    Test,
    /// Digits and pairs of colour and kind that training never sees; the last answer counts
    Unseen,
}

impl Part {
    fn split(self) -> Split {
        match self {
            Part::Train => Split::Train,
            Part::Test => Split::Test,
            Part::Unseen => Split::Unseen,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Part::Train => "train",
            Part::Test => "test",
            Part::Unseen => "unseen",
        }
    }
}

/// What is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Which pictures.
    pub part: Part,
    /// Tasks of samples, in turn; at least one.
    pub tasks: Vec<Task>,
    /// Samples.
    pub n_samples: usize,
    /// Seed of facts, prompts and pictures.
    pub seed: u64,
    /// Samples of a shard.
    pub shard_size: u64,
}

/// Writes shards, `stats.json` and the `tokenizer.json` of their text into `folder`.
///
/// # Errors
/// No tasks; a folder that holds shards already; a file that cannot be written.
pub fn build(folder: &Path, options: &Options, progress: &mut dyn Progress) -> Result<Report> {
    ensure!(!options.tasks.is_empty(), "no tasks");
    let mut shards = ShardWriter::create(folder, options.shard_size)?;
    let mut report = Report { unsafe_scorer: "off".to_owned(), ..Report::default() };
    let vocabulary = Vocabulary::default();
    for number in 0..options.n_samples {
        let sample = sample(number, options, &vocabulary);
        report.pages.add(None);
        sample.phi.iter().max().into_iter().for_each(|n_media| {
            (0..*n_media).for_each(|_| report.pictures.add(None));
        });
        report.count(&sample);
        shards.push(&sample)?;
        progress.advance(report.pages.read, report.samples);
    }
    write_tokenizer(folder)?;
    Ok(report.finish(shards)?)
}

fn sample(number: usize, options: &Options, vocabulary: &Vocabulary) -> Sample {
    let task = options.tasks[number % options.tasks.len()];
    let (split, part) = (options.part.split(), options.part.name());
    let source = format!("scenes/{part}/{}/{}/{number}", options.seed, spelled(task));
    let mut rng = stream(options.seed, &source);
    let style = Style { split, dense: split == Split::Train, described: false };
    let episode = Episode::random(task, style, vocabulary, &mut rng);
    let text: Vec<u32> = episode.tokens.iter().map(|token| token.id).collect();
    let media = episode.media.iter().map(|facts| draw(*facts, split, &mut rng).frames);
    let side = u32::try_from(SIDE).expect("the side of a picture is small");
    let png = |pixels| png_from_pixels(pixels, side).expect("a scene has SIDE × SIDE pixels");
    Sample {
        phi: media_indices(&text, IMAGE, false),
        text_len: text.len(),
        text,
        next: false,
        n_frames: episode.media.iter().map(|facts| facts.n_frames()).max().unwrap_or(1),
        pictures: media.flatten().map(png).collect(),
        weights: Some(episode.tokens.iter().map(|token| token.weight).collect()),
        source,
    }
}

/// A task as `--tasks` takes it.
fn spelled(task: Task) -> String {
    match task.size() {
        Some(size) => format!("{}:{size}", task.name()),
        None => task.name().to_owned(),
    }
}

/// Arguments of `data scenes`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flamingo-train data scenes -o shards/ --split train --n 20000
  flamingo-train data scenes -o few/ --tasks caption,which:2,3,4,few_shot:8")]
pub struct ScenesArgs {
    /// Folder for the shards, `stats.json` and `tokenizer.json`
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Which pictures may appear
    #[arg(long, value_enum, default_value_t = Part::Train)]
    split: Part,
    /// Tasks in turn: caption, attribute, count, pair, yes_no, video, which:PICTURES,
    /// few_shot, bind, uneven, alike, captions, questions with :EXAMPLES; `demo` is all of them
    #[arg(long, value_name = "TASK[:SIZE,…],…", default_value = "demo")]
    tasks: String,
    /// Samples
    #[arg(long, value_name = "N", default_value_t = 1000)]
    n: usize,
    #[command(flatten)]
    writing: WritingArgs,
}

impl ScenesArgs {
    /// Does it. The result, a table or JSON, goes to `output`.
    ///
    /// # Errors
    /// A task that does not exist; those of [`build`]; `output` closed.
    pub fn run(self, output: &mut dyn Write, progress: &mut dyn Progress) -> Result<()> {
        let options = Options {
            part: self.split,
            tasks: tasks(&self.tasks)?,
            n_samples: self.n,
            seed: self.writing.seed,
            shard_size: self.writing.shard_size,
        };
        let report = build(&self.out, &options, progress)?;
        Ok(self.writing.print(&report, output)?)
    }
}

/// All tasks that have pictures.
const DEMO: &str = "caption,attribute,count,pair,yes_no,video,which:2,3,4,few_shot:1,2,4,8,bind:2,4,uneven:4,alike:4,\
     captions:2,questions:2";

/// Tasks of a list such as `caption,which:2,3,4`: a number alone is a size of the task before it.
///
/// # Errors
/// A task that does not exist, or a size that it cannot have.
pub fn tasks(list: &str) -> Result<Vec<Task>> {
    let list = if list.trim() == "demo" { DEMO } else { list };
    let (mut tasks, mut last) = (Vec::new(), "");
    for item in list.split(',').map(str::trim) {
        let (name, size) = match item.split_once(':') {
            Some((name, size)) => (name, Some(size)),
            None if item.starts_with(|c: char| c.is_ascii_digit()) => (last, Some(item)),
            None => (item, None),
        };
        last = name;
        tasks.push(task(name, size).with_context(|| format!("task `{item}`"))?);
    }
    Ok(tasks)
}

fn task(name: &str, size: Option<&str>) -> Result<Task> {
    let sized = |least: usize, most: usize| match size.map(str::parse) {
        Some(Ok(size)) if (least..=most).contains(&size) => Ok(size),
        _ => bail!("expected `{name}:SIZE` with a size from {least} to {most}"),
    };
    let task = match name {
        "which" => Task::Which(sized(2, 4)?),
        "few_shot" => Task::FewShot(sized(0, 64)?),
        "bind" => Task::Bind(sized(2, 64)?),
        "uneven" => Task::Uneven(sized(2, 64)?),
        "alike" => Task::Alike(sized(1, 64)?),
        "captions" => Task::Captions(sized(0, 64)?),
        "questions" => Task::Questions(sized(0, 64)?),
        _ => {
            ensure!(size.is_none(), "`{name}` has no size");
            plain_task(name)?
        }
    };
    Ok(task)
}

fn plain_task(name: &str) -> Result<Task> {
    let plain = [Task::Caption, Task::Attribute, Task::Count, Task::Pair, Task::YesNo, Task::Video];
    let found = plain.into_iter().find(|task| task.name() == name);
    found.with_context(|| {
        let names = plain.map(Task::name).join(", ");
        format!(
            "no such task\n\nhint: expected {names}, which, few_shot, bind, uneven, alike, captions, questions, or demo \
             alone"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_alone_is_a_size_of_the_task_before_it() {
        let expected =
            [Task::Caption, Task::Which(2), Task::Which(3), Task::FewShot(0), Task::YesNo];
        assert_eq!(tasks("caption,which:2, 3,few_shot:0,yes_no").unwrap(), expected);
        assert_eq!(tasks("demo").unwrap().len(), 19);
        for (list, part) in [
            ("sing", "no such task"),
            ("repeat", "no such task"),
            ("", "no such task"),
            ("which", "`which:SIZE` with a size from 2 to 4"),
            ("which:2,5", "task `5`"),
            ("caption:2", "`caption` has no size"),
            ("3", "has no size"),
        ] {
            let error = format!("{:#}", tasks(list).unwrap_err());
            assert!(error.contains(part), "{list}: {error}");
        }
    }
}
