//! Times the stages of an artifact on the native backend, for comparison with peers:
//! encode (one picture), decode (one token after a context, one picture), prefill.

use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flamingo_runtime::backend::{BackendError, Media, Step};
use flamingo_runtime::{Model, OpenOptions};
use lexopt::prelude::*;
use serde_json::{Value, json};

const HELP: &str = "Usage: native-stages ARTIFACT [--threads N] [--seconds S] [--stage NAME]

Prints one JSON line a stage: {\"peer\", \"stage\", \"ms\": {\"median\", \"p10\", \"p90\"}}.
";

/// Tokens of the context before a decode step, and of a prefill.
const CONTEXT: usize = 128;

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
    let (mut artifact, mut stage) = (None::<PathBuf>, None::<String>);
    let (mut threads, mut seconds) = (None::<NonZeroUsize>, 4.0f64);
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Value(path) if artifact.is_none() => artifact = Some(path.into()),
            Long("threads") => threads = Some(parser.value()?.parse()?),
            Long("seconds") => seconds = parser.value()?.parse()?,
            Long("stage") => stage = Some(parser.value()?.string()?),
            Long("help") => return Ok(io::stdout().write_all(HELP.as_bytes())?),
            other => return Err(other.unexpected().into()),
        }
    }
    let artifact = artifact.ok_or(HELP)?;
    let options = OpenOptions { n_threads: threads, ..OpenOptions::default() };
    let opened = Instant::now();
    let model = Model::open(&artifact, &options)?;
    let load_ms = opened.elapsed().as_secs_f64() * 1e3;
    let budget = Duration::from_secs_f64(seconds);
    for (name, time) in [("encode", encode as Stage), ("decode", decode), ("prefill", prefill)] {
        if stage.as_deref().is_none_or(|wanted| wanted == name) {
            let ms = time(&model, budget)?;
            let line = json!({"peer": "flamingoc native f32", "stage": name, "ms": ms, "load_ms": load_ms});
            writeln!(io::stdout(), "{line}")?;
        }
    }
    Ok(())
}

type Stage = fn(&Model, Duration) -> Result<Value, Failure>;

fn pixels(model: &Model) -> Vec<f32> {
    let size = model.manifest().config.vision.image_size;
    (0..3 * size * size).map(|i| ((i * 7919) % 1000) as f32 / 250.0 - 2.0).collect()
}

fn encode(model: &Model, budget: Duration) -> Result<Value, Failure> {
    let pixels = pixels(model);
    timed(budget, || model.backend().encode(&pixels, 1, 1).map(|_| ()))
}

/// A context of words that see one picture.
struct Context {
    input_ids: Vec<u32>,
    media_time: Vec<u32>,
    media: Vec<Arc<Media>>,
}

fn context(model: &Model) -> Result<Context, Failure> {
    let input_ids = (0..CONTEXT).map(|i| u32::try_from(i * 37 % 5000)).collect::<Result<_, _>>()?;
    let media = model.encode_pixels(&pixels(model), 1, 1)?;
    Ok(Context { input_ids, media_time: vec![1; CONTEXT], media })
}

fn decode(model: &Model, budget: Duration) -> Result<Value, Failure> {
    let Context { input_ids, media_time, media } = context(model)?;
    let mut sequence = model.backend().new_sequence(CONTEXT + 1)?;
    let prompt = Step {
        input_ids: &input_ids,
        media_time: &media_time,
        media: &media,
        logit_rows: &[CONTEXT - 1],
    };
    sequence.advance(&prompt)?;
    let step =
        Step { input_ids: &input_ids[..1], media_time: &[1], media: &media, logit_rows: &[0] };
    timed(budget, || {
        sequence.truncate(CONTEXT);
        sequence.advance(&step).map(|_| ())
    })
}

fn prefill(model: &Model, budget: Duration) -> Result<Value, Failure> {
    let Context { input_ids, media_time, media } = context(model)?;
    let mut sequence = model.backend().new_sequence(CONTEXT)?;
    let prompt = Step {
        input_ids: &input_ids,
        media_time: &media_time,
        media: &media,
        logit_rows: &[CONTEXT - 1],
    };
    timed(budget, || {
        sequence.truncate(0);
        sequence.advance(&prompt).map(|_| ())
    })
}

/// Runs `f` twice to warm up, then for `budget` and at least five times.
fn timed(
    budget: Duration,
    mut f: impl FnMut() -> Result<(), BackendError>,
) -> Result<Value, Failure> {
    f()?;
    f()?;
    let mut ms = Vec::new();
    let started = Instant::now();
    while ms.len() < 5 || started.elapsed() < budget {
        let begun = Instant::now();
        f()?;
        ms.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    ms.sort_by(f64::total_cmp);
    let at = |part: usize| ms[(ms.len() - 1) * part / 10];
    Ok(json!({"median": at(5), "p10": at(1), "p90": at(9), "n": ms.len()}))
}
