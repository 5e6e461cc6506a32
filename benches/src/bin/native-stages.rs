//! Times the stages of an artifact, for comparison with peers: encode (one picture), decode (one
//! token after a context with N pictures), prefill (one picture).

use std::fs;
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

const HELP: &str = "\
Usage: native-stages ARTIFACT [--threads N] [--seconds S] [--stage NAME] [--images N]
                     [--backend native|ort|tract]

Prints one JSON line a stage: {\"stage\", \"ms\": {\"median\", \"min\", \"p10\", \"p90\", \"n\"}}.
";

/// Tokens of the context before a decode step, and of a prefill.
const CONTEXT: usize = 128;

/// Unit of Linux' processor times (USER_HZ).
const TICKS_PER_SECOND: f64 = 100.0;

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

/// What the command line asks for.
struct Request {
    artifact: PathBuf,
    open: OpenOptions,
    budget: Duration,
    stage: Option<String>,
    n_images: usize,
}

impl Request {
    fn from_arguments() -> Result<Option<Request>, Failure> {
        let (mut artifact, mut open) = (None::<PathBuf>, OpenOptions::default());
        let (mut seconds, mut stage, mut n_images) = (4.0f64, None, 1usize);
        let mut parser = lexopt::Parser::from_env();
        while let Some(argument) = parser.next()? {
            match argument {
                Value(path) if artifact.is_none() => artifact = Some(path.into()),
                Long("threads") => open.n_threads = Some(parser.value()?.parse::<NonZeroUsize>()?),
                Long("seconds") => seconds = parser.value()?.parse()?,
                Long("stage") => stage = Some(parser.value()?.string()?),
                Long("images") => n_images = parser.value()?.parse()?,
                Long("backend") => open.backend = Some(parser.value()?.string()?),
                Long("help") => return Ok(None),
                other => return Err(other.unexpected().into()),
            }
        }
        let artifact = artifact.ok_or(HELP)?;
        let budget = Duration::try_from_secs_f64(seconds)?;
        Ok(Some(Request { artifact, open, budget, stage, n_images }))
    }
}

fn run() -> Result<(), Failure> {
    let Some(request) = Request::from_arguments()? else {
        return Ok(io::stdout().write_all(HELP.as_bytes())?);
    };
    let opened = Instant::now();
    let model = Model::open(&request.artifact, &request.open)?;
    let load_ms = opened.elapsed().as_secs_f64() * 1e3;
    for (name, time) in [("encode", encode as Stage), ("decode", decode), ("prefill", prefill)] {
        if request.stage.as_deref().is_none_or(|wanted| wanted == name) {
            let ms = time(&model, &request)?;
            let line = json!({"stage": name, "ms": ms, "load_ms": load_ms});
            writeln!(io::stdout(), "{line}")?;
        }
    }
    Ok(())
}

type Stage = fn(&Model, &Request) -> Result<Value, Failure>;

fn pixels(model: &Model) -> Vec<f32> {
    let size = model.manifest().config.vision.image_size;
    (0..3 * size * size).map(|i| ((i * 7919) % 1000) as f32 / 250.0 - 2.0).collect()
}

fn encode(model: &Model, request: &Request) -> Result<Value, Failure> {
    let pixels = pixels(model);
    timed(request.budget, || model.backend().encode(&pixels, 1, 1).map(|_| ()))
}

/// A context of words that see the last of its pictures.
struct Context {
    input_ids: Vec<u32>,
    media_time: Vec<u32>,
    media: Vec<Arc<Media>>,
}

fn context(model: &Model, n_images: usize) -> Result<Context, Failure> {
    let input_ids = (0..CONTEXT).map(|i| u32::try_from(i * 37 % 5000)).collect::<Result<_, _>>()?;
    let image = model.encode_pixels(&pixels(model), 1, 1)?;
    let media = image.iter().cycle().take(n_images).cloned().collect();
    Ok(Context { input_ids, media_time: vec![u32::try_from(n_images)?; CONTEXT], media })
}

fn decode(model: &Model, request: &Request) -> Result<Value, Failure> {
    let Context { input_ids, media_time, media } = context(model, request.n_images)?;
    let mut sequence = model.backend().new_sequence(CONTEXT + 1)?;
    let prompt = Step {
        input_ids: &input_ids,
        media_time: &media_time,
        media: &media,
        logit_rows: &[CONTEXT - 1],
    };
    sequence.advance(&prompt)?;
    let step = Step {
        input_ids: &input_ids[..1],
        media_time: &media_time[..1],
        media: &media,
        logit_rows: &[0],
    };
    timed(request.budget, || {
        sequence.truncate(CONTEXT);
        sequence.advance(&step).map(|_| ())
    })
}

fn prefill(model: &Model, request: &Request) -> Result<Value, Failure> {
    let Context { input_ids, media_time, media } = context(model, 1)?;
    let mut sequence = model.backend().new_sequence(CONTEXT)?;
    let prompt = Step {
        input_ids: &input_ids,
        media_time: &media_time,
        media: &media,
        logit_rows: &[CONTEXT - 1],
    };
    timed(request.budget, || {
        sequence.truncate(0);
        sequence.advance(&prompt).map(|_| ())
    })
}

/// Runs `f` twice to warm up, then for `budget` and at least three times.
fn timed(
    budget: Duration,
    mut f: impl FnMut() -> Result<(), BackendError>,
) -> Result<Value, Failure> {
    f()?;
    f()?;
    let mut ms = Vec::new();
    let (started, busy) = (Instant::now(), foreign_seconds());
    while ms.len() < 3 || started.elapsed() < budget {
        let begun = Instant::now();
        f()?;
        ms.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    let elapsed = started.elapsed().as_secs_f64();
    let others = foreign_seconds().zip(busy).map(|(end, start)| ((end - start) / elapsed).max(0.0));
    ms.sort_by(f64::total_cmp);
    let at = |part: usize| ms[(ms.len() - 1) * part / 10];
    Ok(json!({
        "median": at(5), "min": at(0), "p10": at(1), "p90": at(9), "n": ms.len(), "others": others,
    }))
}

/// Seconds for which other programs have used the processors so far, summed over the cores; none
/// where the system does not tell as Linux does.
fn foreign_seconds() -> Option<f64> {
    let ticks = |word: &str| word.parse::<u64>().ok();
    let machine = fs::read_to_string("/proc/stat").ok()?;
    let times: Vec<u64> = machine.lines().next()?.split_whitespace().filter_map(ticks).collect();
    // user, nice, system, (idle, iowait,) irq, softirq.
    let busy: u64 = [0, 1, 2, 5, 6].iter().filter_map(|&idx| times.get(idx)).sum();
    let own = fs::read_to_string("/proc/self/stat").ok()?;
    let (_, fields) = own.rsplit_once(')')?;
    let own: u64 = fields.split_whitespace().skip(11).take(2).filter_map(ticks).sum();
    Some(busy.saturating_sub(own) as f64 / TICKS_PER_SECOND)
}
