//! `flamingo-run`: the lean runtime of a device. Opens an artifact and answers one prompt.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use flamingo_runtime::{
    GenerateOptions, KvFormat, Model, OpenOptions, PromptFile, SamplingOptions, VisualCache,
    VisualCacheOptions, bytes_from_text, env,
};
use lexopt::prelude::*;

const HELP: &str = "Answer a prompt with pictures from a compiled artifact

Usage: flamingo-run ARTIFACT (--prompt TEXT [--image FILE]... | --prompt-file FILE)

Options:
  --prompt TEXT          text with `<image>` where each picture stands
  --image FILE           a picture for the next `<image>`
  --prompt-file FILE     a prompt as JSON
  --max-new-tokens N     most new tokens [default: the prompt file's, else 64]
  --temperature T        0 takes the most likely token [default: 0]
  --seed N               seed of sampling [default: 0]
  --threads N            threads [default: one for each physical core]
  --kv FORMAT            keep keys and values in f32, f16 or int8 [default: f32 for an artifact
                         in f32, f16 for others]
  --cache-dir DIR        keep what is known of each picture in this folder, for the next run too
                         [default: FLAMINGO_CACHE_DIR, else none]
  --cache-limit SIZE     most bytes in that folder [default: 1GB]
  --no-cache             encode every picture, even one that comes twice
  --verify               check the hash of every file first
  --json                 print text, token ids, timings and cache counts
  --help                 print this

Example:
  flamingo-run demo.flamingo --prompt \"<image>what color ?\" --image a.png

Exit status: 0 ok, 2 an error.
";

#[derive(Default)]
struct Arguments {
    artifact: Option<PathBuf>,
    prompt: Option<String>,
    images: Vec<PathBuf>,
    prompt_file: Option<PathBuf>,
    max_new_tokens: Option<usize>,
    temperature: Option<f32>,
    seed: u64,
    opening: OpenOptions,
    cache: VisualCacheOptions,
    no_cache: bool,
    json: bool,
    help: bool,
}

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // A closed stderr must not hide the exit status.
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<(), Failure> {
    let mut arguments = parse(lexopt::Parser::from_env())?;
    let mut stdout = io::stdout();
    if arguments.help {
        return Ok(stdout.write_all(HELP.as_bytes())?);
    }
    let artifact =
        arguments.artifact.clone().ok_or("no artifact\n\nhint: see `flamingo-run --help`")?;
    let prompt = match (&arguments.prompt, &arguments.prompt_file) {
        (Some(text), None) => PromptFile::from_text(text, &arguments.images)?,
        (None, Some(path)) => PromptFile::read(path)?,
        _ => return Err("expected one of `--prompt` and `--prompt-file`".into()),
    };
    let options = options(&arguments, &prompt)?;
    arguments.opening.visual_cache = Some(Arc::new(visual_cache(&arguments)));
    let model = Model::open(&artifact, &arguments.opening)?;
    let mut shown = Ok(());
    let answer = model.generate(&prompt, &options, &mut |piece| {
        if !arguments.json && shown.is_ok() {
            shown = stdout.write_all(piece.as_bytes()).and_then(|()| stdout.flush());
        }
    })?;
    shown?;
    for warning in model.take_warnings() {
        // A closed stderr must not end the work.
        let _ = writeln!(io::stderr(), "warning: {warning}");
    }
    match arguments.json {
        true => writeln!(stdout, "{}", answer.to_json())?,
        false => writeln!(stdout)?,
    }
    Ok(())
}

fn parse(mut parser: lexopt::Parser) -> Result<Arguments, lexopt::Error> {
    let mut arguments = Arguments::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Value(path) if arguments.artifact.is_none() => arguments.artifact = Some(path.into()),
            Long("prompt") => arguments.prompt = Some(parser.value()?.string()?),
            Long("image") => arguments.images.push(parser.value()?.into()),
            Long("prompt-file") => arguments.prompt_file = Some(parser.value()?.into()),
            Long("max-new-tokens") => arguments.max_new_tokens = Some(parser.value()?.parse()?),
            Long("temperature") => arguments.temperature = Some(parser.value()?.parse()?),
            Long("seed") => arguments.seed = parser.value()?.parse()?,
            Long("threads") => arguments.opening.n_threads = Some(parser.value()?.parse()?),
            Long("kv") => {
                arguments.opening.kv_format = Some(parser.value()?.parse_with(kv_format)?)
            }
            Long("cache-dir") => arguments.cache.dir = Some(parser.value()?.into()),
            Long("cache-limit") => {
                arguments.cache.disk_bytes = parser.value()?.parse_with(bytes_from_text)?;
            }
            Long("no-cache") => arguments.no_cache = true,
            Long("verify") => arguments.opening.verify = true,
            Long("json") => arguments.json = true,
            Long("help") | Short('h') => arguments.help = true,
            other => return Err(other.unexpected()),
        }
    }
    Ok(arguments)
}

fn kv_format(name: &str) -> Result<KvFormat, String> {
    KvFormat::from_name(name).ok_or_else(|| format!("expected f32, f16 or int8, got `{name}`"))
}

fn visual_cache(arguments: &Arguments) -> VisualCache {
    if arguments.no_cache {
        return VisualCache::new(&VisualCacheOptions::off());
    }
    let dir = arguments.cache.dir.clone().or_else(env::cache_dir);
    VisualCache::new(&VisualCacheOptions { dir, ..arguments.cache.clone() })
}

fn options(arguments: &Arguments, prompt: &PromptFile) -> Result<GenerateOptions, Failure> {
    let temperature = arguments.temperature.or(prompt.temperature).unwrap_or(0.0);
    if !temperature.is_finite() || !(0.0..=100.0).contains(&temperature) {
        return Err(format!("`--temperature`: expected 0 to 100, got {temperature}").into());
    }
    let sampling =
        SamplingOptions { temperature, seed: arguments.seed, ..SamplingOptions::default() };
    let max_new_tokens = arguments.max_new_tokens.or(prompt.max_new_tokens).unwrap_or(64);
    Ok(GenerateOptions { max_new_tokens, sampling, ..GenerateOptions::default() })
}
