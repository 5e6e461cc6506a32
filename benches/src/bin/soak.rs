//! Random sessions under a small memory budget, for as long as asked: what must hold is checked all the time, and memory
//! must not grow. `cargo run --release -p flamingo-benches --bin soak -- ARTIFACT --seconds 600`.

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flamingo_runtime::{
    GenerateOptions, Limits, Mark, Medium, Model, OpenOptions, Session, VisualCache,
    VisualCacheOptions,
};
use lexopt::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Sessions alive at most.
const MAX_SESSIONS: usize = 6;

/// Different pictures.
const N_PICTURES: usize = 24;

/// How far memory may go beyond where it settled.
const MAX_GROWTH: f64 = 0.02;

/// Share of the time after which memory is taken to have settled.
const WARM_UP: f64 = 0.25;

struct Arguments {
    artifact: PathBuf,
    seconds: u64,
    visual_bytes: usize,
    prefix_bytes: usize,
    seed: u64,
}

fn arguments() -> Result<Arguments, lexopt::Error> {
    let mut parser = lexopt::Parser::from_env();
    let (mut artifact, mut seconds, mut seed) = (None, 60, 0);
    let (mut visual_bytes, mut prefix_bytes) = (2 << 20, 4 << 20);
    while let Some(argument) = parser.next()? {
        match argument {
            Value(path) if artifact.is_none() => artifact = Some(path.into()),
            Long("seconds") => seconds = parser.value()?.parse()?,
            Long("visual-bytes") => visual_bytes = parser.value()?.parse()?,
            Long("prefix-bytes") => prefix_bytes = parser.value()?.parse()?,
            Long("seed") => seed = parser.value()?.parse()?,
            other => return Err(other.unexpected()),
        }
    }
    let artifact = artifact
        .ok_or("soak ARTIFACT [--seconds N] [--visual-bytes N] [--prefix-bytes N] [--seed N]")?;
    Ok(Arguments { artifact, seconds, visual_bytes, prefix_bytes, seed })
}

/// Resident memory that belongs to this process alone, in bytes: without the mapped weights.
fn own_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kb| kb * 1024)
}

/// A session, and the places that it can go back to.
struct Open {
    session: Session,
    marks: Vec<Mark>,
}

struct Soak {
    model: Model,
    pictures: Vec<Vec<f32>>,
    random: ChaCha8Rng,
    open: Vec<Open>,
    n_steps: u64,
    largest_visual: usize,
    largest_prefix: usize,
}

impl Soak {
    fn session(&mut self) -> Result<(), Box<dyn Error>> {
        if self.open.len() == MAX_SESSIONS {
            let at = self.random.random_range(0..self.open.len());
            self.open.swap_remove(at);
        }
        self.open.push(Open { session: self.model.session()?, marks: Vec::new() });
        Ok(())
    }

    /// A few tokens, with a picture before them or not.
    fn append(&mut self, at: usize) -> Result<(), Box<dyn Error>> {
        let config = &self.model.manifest().config;
        let mut ids = Vec::new();
        let mut media: Vec<Medium> = Vec::new();
        let limits = &self.model.manifest().limits;
        let open = &mut self.open[at];
        if self.random.random_bool(0.5) && open.session.n_media() < limits.max_images {
            let picture = &self.pictures[self.random.random_range(0..self.pictures.len())];
            media.push(self.model.encode_medium(picture, 1)?);
            ids.push(config.tokens.image);
        }
        let vocabulary = u32::try_from(config.language.vocabulary)?;
        for _ in 0..self.random.random_range(1..24) {
            let id = self.random.random_range(4..vocabulary);
            if id != config.tokens.image && Some(id) != config.tokens.around_image {
                ids.push(id);
            }
        }
        let room =
            open.session.max_context() - open.session.ids().len().min(open.session.max_context());
        if ids.is_empty() || ids.len() >= room {
            self.open.swap_remove(at);
            return Ok(());
        }
        open.marks.push(open.session.mark());
        open.session.append_ids(&ids, &media, &Limits::default())?;
        Ok(())
    }

    fn step(&mut self) -> Result<(), Box<dyn Error>> {
        self.n_steps += 1;
        if self.open.is_empty() || self.random.random_bool(0.15) {
            return self.session();
        }
        let at = self.random.random_range(0..self.open.len());
        match self.random.random_range(0..10) {
            0 if self.open.len() < MAX_SESSIONS => {
                let (session, marks) = (self.open[at].session.fork(), self.open[at].marks.clone());
                self.open.push(Open { session, marks });
            }
            1 => {
                if let Some(mark) = self.open[at].marks.pop() {
                    self.open[at].session.rewind(mark)?;
                }
            }
            2..=4 if !self.open[at].session.ids().is_empty() => {
                let options = GenerateOptions { max_new_tokens: 6, ..GenerateOptions::default() };
                let mut tokens = self.open[at].session.tokens(&options);
                while tokens.next_id()?.is_some() {}
            }
            _ => self.append(at)?,
        }
        let visual = self.model.visual_cache().stats().memory_bytes;
        let prefix = self.open.first().map_or(0, |open| open.session.memory().prefix_bytes);
        self.largest_visual = self.largest_visual.max(visual);
        self.largest_prefix = self.largest_prefix.max(prefix);
        Ok(())
    }
}

#[expect(clippy::print_stdout, reason = "the result of the program")]
fn main() -> Result<(), Box<dyn Error>> {
    let arguments = arguments()?;
    let cache = VisualCacheOptions {
        memory_bytes: arguments.visual_bytes,
        ..VisualCacheOptions::default()
    };
    let options = OpenOptions {
        visual_cache: Some(Arc::new(VisualCache::new(&cache))),
        prefix_bytes: Some(arguments.prefix_bytes),
        ..OpenOptions::default()
    };
    let model = Model::open(&arguments.artifact, &options)?;
    let side = model.manifest().config.vision.image_size;
    let mut random = ChaCha8Rng::seed_from_u64(arguments.seed);
    let mut picture = || (0..3 * side * side).map(|_| random.random_range(-1.5..1.5)).collect();
    let pictures = (0..N_PICTURES).map(|_| picture()).collect();
    let mut soak = Soak {
        model,
        pictures,
        random,
        open: Vec::new(),
        n_steps: 0,
        largest_visual: 0,
        largest_prefix: 0,
    };
    let total = Duration::from_secs(arguments.seconds);
    let (start, mut settled, mut largest) = (Instant::now(), 0, 0);
    while start.elapsed() < total {
        soak.step()?;
        let own = own_memory().ok_or("/proc/self/status does not tell the memory")?;
        match start.elapsed() < total.mul_f64(WARM_UP) {
            true => settled = own.max(settled),
            false => largest = own.max(largest),
        }
    }
    let growth = largest as f64 / settled.max(1) as f64 - 1.0;
    println!(
        "{} steps in {} s; visual tokens up to {} of {} bytes, shared prompts up to {} of {}; memory {:.1} MB when settled, \
         at most {:.1} MB later ({:+.1} %)",
        soak.n_steps,
        arguments.seconds,
        soak.largest_visual,
        arguments.visual_bytes,
        soak.largest_prefix,
        arguments.prefix_bytes,
        settled as f64 / 1e6,
        largest as f64 / 1e6,
        100.0 * growth,
    );
    let is_within =
        |largest: usize, budget: usize| largest as f64 <= budget as f64 * (1.0 + MAX_GROWTH);
    if !is_within(soak.largest_visual, arguments.visual_bytes)
        || !is_within(soak.largest_prefix, arguments.prefix_bytes)
    {
        return Err("a cache went beyond its budget".into());
    }
    match growth <= MAX_GROWTH {
        true => Ok(()),
        false => Err(format!("memory grew by {:.1} %", 100.0 * growth).into()),
    }
}
