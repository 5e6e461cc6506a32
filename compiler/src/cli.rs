//! The command line: one file a verb. Results go to stdout, progress to stderr; exit status 0 is
//! success, 1 a failed check, 2 an error.

mod bank;
mod bench;
mod chat;
mod check;
mod compile;
mod coverage;
mod demo;
mod device;
mod doctor;
mod engine;
mod eval;
mod inspect;
mod output;
mod profile;
mod prompt;
mod run;
mod score;
mod source;
mod synth;
mod template;
mod thumbnail;
mod trace;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use flamingo_ir::op::Flavour;
use flamingo_runtime::{
    KvFormat, Model, OpenOptions, VisualCache, VisualCacheOptions, bytes_from_text, env,
};

use output::Output;

/// Compile Flamingo-family vision-language models for edge devices, and run them.
///
/// Takes an OpenFlamingo, IDEFICS-1 or Otter checkpoint and writes an artifact that runs
/// interleaved text, pictures and video on a CPU.
#[derive(Parser)]
#[command(name = "flamingoc", version, max_term_width = 80, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

const EXAMPLES: &str = "Examples:
  flamingoc demo
  flamingoc compile models/demo/recipe.toml -o demo.flamingo
  flamingoc run demo.flamingo --prompt \"<image>what color ?\" --image a.png

Exit status: 0 ok, 1 a check failed, 2 an error.";

#[derive(Subcommand)]
enum Verb {
    Demo(demo::Demo),
    Compile(compile::Compile),
    Run(run::Run),
    Chat(chat::Chat),
    Score(score::Score),
    Eval(eval::Eval),
    Bank(bank::Bank),
    Trace(trace::Trace),
    Check(check::Check),
    Inspect(inspect::Inspect),
    Bench(bench::Bench),
    Synth(synth::Synth),
    Doctor(doctor::Doctor),
    Engine(engine::Engine),
}

/// How a verb ended, if not with an error.
enum Outcome {
    Ok,
    CheckFailed,
}

/// How graphs are run.
#[derive(Args, Clone)]
struct EngineOptions {
    /// Engine that runs the graphs
    #[arg(long, value_name = "NAME", default_value = "native",
          value_parser = ["native", "ort", "tract"])]
    backend: String,
    /// Execution provider of `--backend ort`
    #[arg(long, value_name = "NAME", default_value = "cpu", value_parser = ["cpu", "cuda", "tensorrt"])]
    ep: String,
    /// Make it an error, not a warning, if another execution provider than `--ep` would run a node; target shapes, which
    /// are always computed on the CPU, do not count
    #[arg(long)]
    strict_ep: bool,
    /// Graphs that `--backend ort` runs [default: ort-cpu, cuda or trt-10.3 by execution provider]; those of a GPU run on
    /// the CPU, too, slowly
    #[arg(long, value_name = "FLAVOUR", value_parser = Flavour::ALL.map(Flavour::name))]
    flavour: Option<String>,
    /// ONNX Runtime's shared library [default: ORT_DYLIB_PATH, then known places]
    #[arg(long, value_name = "FILE")]
    ort_lib: Option<PathBuf>,
    /// Where ONNX Runtime writes what it did, two Chrome traces PREFIX_media_DATE.json and PREFIX_decoder_DATE.json: each
    /// node, the execution provider that ran it, its time
    #[arg(long, value_name = "PREFIX")]
    ort_trace: Option<PathBuf>,
    /// How the native engine keeps keys and values, of text and of pictures [default: f32 for an
    /// artifact in f32, f16 for others]
    #[arg(long, value_name = "FORMAT", value_parser = ["f32", "f16", "int8"])]
    kv: Option<String>,
    /// Check the hash of every file of the artifact first
    #[arg(long)]
    verify: bool,
}

/// Options of every verb that opens an artifact.
#[derive(Args, Clone)]
struct Opening {
    #[command(flatten)]
    engine: EngineOptions,
    /// Threads [default: one for each physical core]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
}

impl Opening {
    /// The flavour of the graphs that are run, if `--backend ort` runs them.
    fn flavour(&self) -> Option<Flavour> {
        self.engine.flavour()
    }

    fn options(&self) -> OpenOptions {
        self.engine.options(self.threads)
    }
}

impl EngineOptions {
    /// The flavour of the graphs that are run, if `--backend ort` runs them.
    fn flavour(&self) -> Option<Flavour> {
        let is_run = self.backend == "ort";
        is_run.then(|| Flavour::from_name(self.options(None).ort_flavour())).flatten()
    }

    fn options(&self, n_threads: Option<NonZeroUsize>) -> OpenOptions {
        OpenOptions {
            backend: Some(self.backend.clone()),
            execution_provider: Some(self.ep.clone()),
            flavour: self.flavour.clone(),
            strict_provider: self.strict_ep,
            ort_library: self.ort_lib.clone(),
            ort_trace: self.ort_trace.clone(),
            n_threads,
            kv_format: self.kv.as_deref().and_then(KvFormat::from_name),
            verify: self.verify,
            ..OpenOptions::default()
        }
    }
}

/// Options of verbs that keep what is known of pictures.
#[derive(Args, Clone)]
struct Caching {
    /// Keep what is known of each picture in this folder, for the next run too
    /// [default: FLAMINGO_CACHE_DIR, else none]
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Most bytes in the cache folder
    #[arg(long, value_name = "SIZE", default_value = "1GB", value_parser = bytes_from_text)]
    cache_limit: u64,
    /// Encode every picture, even one that comes twice
    #[arg(long, conflicts_with_all = ["cache_dir", "cache_limit"])]
    no_cache: bool,
}

impl Caching {
    /// Opens an artifact with this cache.
    fn open(&self, artifact: &Path, opening: &Opening) -> Result<Model> {
        let visual_cache = Some(self.visual_cache());
        Ok(Model::open(artifact, &OpenOptions { visual_cache, ..opening.options() })?)
    }

    fn visual_cache(&self) -> Arc<VisualCache> {
        let options = match self.no_cache {
            true => VisualCacheOptions::off(),
            false => VisualCacheOptions {
                dir: self.cache_dir.clone().or_else(env::cache_dir),
                disk_bytes: self.cache_limit,
                ..VisualCacheOptions::default()
            },
        };
        Arc::new(VisualCache::new(&options))
    }
}

/// Runs the command line.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut output = Output::new();
    match dispatch(cli.verb, &mut output) {
        Ok(Outcome::Ok) => ExitCode::SUCCESS,
        Ok(Outcome::CheckFailed) => ExitCode::from(1),
        Err(error) => {
            if !output::is_broken_pipe(&error) {
                output.note(&format!("error: {}", message(&error)));
            }
            ExitCode::from(2)
        }
    }
}

/// An error and its causes, each once, and the innermost hint at the end.
fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    let mut last_hint = None;
    for cause in error.chain() {
        let cause = cause.to_string();
        let (words, hint) = match cause.split_once("\n\nhint: ") {
            Some((words, hint)) => (words, Some(hint.to_owned())),
            None => (cause.as_str(), None),
        };
        if !text.contains(words) {
            let between = if text.is_empty() { "" } else { ": " };
            text.push_str(between);
            text.push_str(words);
        }
        last_hint = hint.or(last_hint);
    }
    match last_hint {
        Some(hint) => format!("{text}\n\nhint: {hint}"),
        None => text,
    }
}

fn dispatch(verb: Verb, output: &mut Output) -> Result<Outcome> {
    match verb {
        Verb::Demo(demo) => demo.run(output),
        Verb::Compile(compile) => compile.run(output),
        Verb::Run(run) => run.run(output),
        Verb::Chat(chat) => chat.run(output),
        Verb::Score(score) => score.run(output),
        Verb::Eval(eval) => eval.run(output),
        Verb::Bank(bank) => bank.run(output),
        Verb::Trace(trace) => trace.run(output),
        Verb::Check(check) => check.run(output),
        Verb::Inspect(inspect) => inspect.run(output),
        Verb::Bench(bench) => bench.run(output),
        Verb::Synth(synth) => synth.run(output),
        Verb::Doctor(doctor) => doctor.run(output),
        Verb::Engine(engine) => engine.run(output),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::message;

    #[test]
    fn messages_say_each_cause_once_and_the_hint_last() {
        assert_eq!(message(&anyhow!("a: b")), "a: b");
        let nested = anyhow!("no space\n\nhint: make some").context("cannot write `x`");
        assert_eq!(message(&nested), "cannot write `x`: no space\n\nhint: make some");
        let repeated = anyhow!("no space").context("`x`: no space\n\nhint: make some");
        assert_eq!(message(&repeated), "`x`: no space\n\nhint: make some");
    }
}
