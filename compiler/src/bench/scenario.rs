//! Named scenarios: what a user of a device waits for, from a camera's pixels to the last token, through sessions and
//! caches as a program uses them.
//!
//! Pictures are noise that no other turn shows, texts are random tokens, and answers have a fixed length, whatever the
//! model says: figures depend on shapes alone.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use flamingo_models::manifest::Manifest;
use flamingo_runtime::image::{Mode, Picture, preprocess};
use flamingo_runtime::visual_cache::CacheStats;
use flamingo_runtime::{GenerateOptions, Limits, Medium, Model, RunError, Session};
use image::RgbImage;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::inputs::{camera_picture, image_tokens, random_ids};
use super::measure;
use super::subject::{Label, Subject};
use super::{BenchError, BenchOptions, Milliseconds};

/// Tokens of an example's text, and of its end.
const EXAMPLE_TOKENS: usize = 8;
/// Turns that a scenario gets whatever its budget, after the first.
const LEAST_TURNS: usize = 2;

/// Something that a program does again and again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// What happens in it.
    pub about: &'static str,
    /// Examples before the question, of a picture and eight tokens each.
    pub shots: usize,
    /// Frames of the question's medium.
    pub frames: usize,
    /// Tokens of a question.
    pub question: usize,
    /// Tokens of an answer.
    pub answer: usize,
    /// Questions of a session about its one medium.
    pub turns: usize,
    /// Frames a second of a camera; the newest is asked about.
    pub fps: Option<f64>,
}

/// All scenarios, in the order of tables.
pub const SCENARIOS: [Scenario; 6] = [
    Scenario {
        name: "caption",
        about: "a new picture, 4 tokens, an answer of 20",
        shots: 0,
        frames: 1,
        question: 4,
        answer: 20,
        turns: 1,
        fps: None,
    },
    Scenario {
        name: "vqa-4shot",
        about: "4 examples that stay, a new picture with a question of 12 tokens, an answer of 5",
        shots: 4,
        frames: 1,
        question: 12,
        answer: 5,
        turns: 1,
        fps: None,
    },
    Scenario {
        name: "few-shot-32",
        about: "32 examples that stay, a new picture with 4 tokens, an answer of 5",
        shots: 32,
        frames: 1,
        question: 4,
        answer: 5,
        turns: 1,
        fps: None,
    },
    Scenario {
        name: "chat",
        about: "4 questions of 16 tokens about one new picture, answers of 24",
        shots: 0,
        frames: 1,
        question: 16,
        answer: 24,
        turns: 4,
        fps: None,
    },
    Scenario {
        name: "video",
        about: "a new video of 8 frames with 8 tokens, an answer of 20",
        shots: 0,
        frames: 8,
        question: 8,
        answer: 20,
        turns: 1,
        fps: None,
    },
    Scenario {
        name: "camera-stream",
        about: "the newest frame of a camera with 8 tokens, an answer of 8; frames that came meanwhile are dropped",
        shots: 0,
        frames: 1,
        question: 8,
        answer: 8,
        turns: 1,
        fps: Some(10.0),
    },
];

impl Scenario {
    /// The scenario of that name.
    pub fn from_name(name: &str) -> Option<Scenario> {
        SCENARIOS.into_iter().find(|scenario| scenario.name == name)
    }

    /// Whether an artifact has room for it.
    pub fn fits(&self, manifest: &Manifest) -> bool {
        let tokens = self.context(image_tokens(&manifest.config.tokens).len());
        tokens <= manifest.limits.max_context && self.shots < manifest.limits.max_images
    }

    /// Tokens that a session of it comes to, where a medium is `image_len` tokens.
    fn context(&self, image_len: usize) -> usize {
        let examples = self.shots * (image_len + EXAMPLE_TOKENS);
        examples + image_len + self.turns * (self.question + self.answer)
    }
}

/// What a scenario took.
#[derive(Clone, Debug, Serialize)]
pub struct ScenarioResult {
    /// Artifact, engine and threads.
    #[serde(flatten)]
    pub label: Label,
    /// Its name.
    pub scenario: &'static str,
    /// Milliseconds to the first token of the very first question, with nothing known but the weights.
    pub cold_first_token_ms: f64,
    /// To the first token of the questions after it: from a picture's pixels, of a camera from the frame's arrival.
    pub first_token_ms: Milliseconds,
    /// Between one token and the next.
    pub token_ms: Milliseconds,
    /// To the last token.
    pub end_to_end_ms: Milliseconds,
    /// Tokens a second of whole answers, reading included.
    pub tokens_per_s: f64,
    /// Bytes of keys and values, and of media, of a session at its end.
    pub session_bytes: usize,
    /// Media that were in the visual cache before they came, though every one is new: more than 0 would flatter the times.
    pub media_found: u64,
    /// What became of a camera's frames.
    pub stream: Option<Stream>,
}

/// Frames of a camera.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Stream {
    /// Frames a second.
    pub fps: f64,
    /// Frames that came while the scenario ran.
    pub arrived: usize,
    /// Frames that were answered.
    pub answered: usize,
    /// Frames that nothing looked at, as newer ones had come.
    pub dropped: usize,
}

/// Refuses scenarios that the artifact has no room for, all at once.
pub(super) fn check(
    artifact: &Path,
    manifest: &Manifest,
    scenarios: &[Scenario],
) -> Result<(), BenchError> {
    let limits = &manifest.limits;
    let image_len = image_tokens(&manifest.config.tokens).len();
    let problem = |scenario: &Scenario| {
        (!scenario.fits(manifest)).then(|| {
            format!(
                "`{}`: expected room for {} tokens and {} pictures, found {} and {}",
                scenario.name,
                scenario.context(image_len),
                scenario.shots + 1,
                limits.max_context,
                limits.max_images
            )
        })
    };
    match scenarios.iter().filter_map(problem).collect::<Vec<_>>() {
        problems if problems.is_empty() => Ok(()),
        problems => Err(BenchError::Scenarios { path: artifact.to_owned(), problems }),
    }
}

/// Times the scenarios of all subjects, in turn.
pub(super) fn time(
    subjects: &[Subject],
    options: &BenchOptions,
    limits: &measure::Limits,
    on_progress: &mut dyn FnMut(&'static str, usize, usize),
) -> Result<Vec<ScenarioResult>, RunError> {
    let mut plays: Vec<Play<'_>> = Vec::new();
    for (scenario, seed) in options.scenarios.iter().zip(options.seed..) {
        let camera = camera_picture(options.picture, seed);
        plays.extend(subjects.iter().map(|subject| Play::new(scenario, subject, &camera)));
    }
    let all = plays.len();
    let mut random = ChaCha8Rng::seed_from_u64(options.seed);
    loop {
        let mut turn: Vec<usize> = (0..all).filter(|play| !plays[*play].is_done(limits)).collect();
        on_progress("playing scenarios", all - turn.len(), all);
        if turn.is_empty() {
            return Ok(plays.into_iter().map(Play::result).collect());
        }
        turn.shuffle(&mut random);
        for play in turn {
            plays[play].round(limits.budget)?;
            on_progress(
                "playing scenarios",
                plays.iter().filter(|p| p.is_done(limits)).count(),
                all,
            );
        }
    }
}

/// A scenario with one subject, as far as it was played.
struct Play<'a> {
    scenario: Scenario,
    label: &'a Label,
    model: &'a Model,
    /// What a camera sees; of another scenario it sees something else, as all share the visual cache.
    camera: RgbImage,
    n_pictures: u32,
    media_found: u64,
    /// Tokens of the examples, and their media once a session has shown them.
    example_ids: Vec<u32>,
    example_media: Vec<Medium>,
    /// Tokens of the question's medium, and of each question.
    medium_ids: Vec<u32>,
    questions: Vec<Vec<u32>>,
    turns: Vec<Turn>,
    rounds: usize,
    spent: Duration,
    session_bytes: usize,
    stream: Option<Stream>,
}

/// Times of one question, in milliseconds.
struct Turn {
    first_token: f64,
    tokens: Vec<f64>,
    end_to_end: f64,
}

impl<'a> Play<'a> {
    fn new(scenario: &Scenario, subject: &'a Subject, camera: &RgbImage) -> Play<'a> {
        let config = &subject.manifest.config;
        let text = |len: usize, seed: usize| {
            random_ids(&config.tokens, config.language.vocabulary, len, seed as u64)
        };
        let medium_ids = image_tokens(&config.tokens);
        let example = |shot| [medium_ids.clone(), text(EXAMPLE_TOKENS, shot)].concat();
        Play {
            scenario: *scenario,
            label: &subject.label,
            model: &subject.model,
            camera: camera.clone(),
            n_pictures: 0,
            media_found: 0,
            example_ids: (0..scenario.shots).flat_map(example).collect(),
            example_media: Vec::new(),
            questions: (0..scenario.turns)
                .map(|turn| text(scenario.question, 1000 + turn))
                .collect(),
            medium_ids,
            turns: Vec::new(),
            rounds: 0,
            spent: Duration::ZERO,
            session_bytes: 0,
            stream: scenario.fps.map(|fps| Stream { fps, ..Stream::default() }),
        }
    }

    fn is_done(&self, limits: &measure::Limits) -> bool {
        let is_spent = self.spent >= limits.budget;
        match self.stream {
            // A stream plays for its whole time: what is dropped shows in it.
            Some(_) => self.rounds > 0,
            None => {
                let n = self.turns.len().saturating_sub(1);
                n >= limits.reps || (is_spent && n >= LEAST_TURNS)
            }
        }
    }

    /// A session of the scenario; a camera's whole stream.
    fn round(&mut self, budget: Duration) -> Result<(), RunError> {
        let start = Instant::now();
        match self.scenario.fps {
            Some(fps) => self.stream(fps, budget)?,
            None => {
                let frames = (0..self.scenario.frames).map(|_| self.picture());
                let frames = frames.collect::<Result<Vec<_>, _>>()?;
                self.session(&frames, Instant::now())?;
            }
        }
        self.rounds += 1;
        self.spent += start.elapsed();
        Ok(())
    }

    /// Frames of a camera for as long as the budget allows. The next is always the newest: those that came while one was
    /// answered are dropped.
    fn stream(&mut self, fps: f64, budget: Duration) -> Result<(), RunError> {
        let interval = Duration::from_secs_f64(1.0 / fps);
        let (start, mut next, mut answered) = (Instant::now(), 0u32, 0);
        while interval * next < budget {
            let frame = [self.picture()?];
            let arrival = start + interval * next;
            thread::sleep(arrival.saturating_duration_since(Instant::now()));
            self.session(&frame, arrival)?;
            answered += 1;
            let newest = (start.elapsed().as_secs_f64() * fps) as u32;
            next = newest.max(next + 1);
        }
        let arrived = next as usize;
        self.stream = Some(Stream { fps, arrived, answered, dropped: arrived - answered });
        Ok(())
    }

    /// Examples and questions of one session about a medium that arrived at `arrival`.
    fn session(&mut self, frames: &[Picture], arrival: Instant) -> Result<(), RunError> {
        let medium = self.encode(frames)?;
        let mut session = self.model.session()?;
        if self.scenario.shots > 0 {
            let media = self.examples()?;
            session.append_ids(&self.example_ids, &media, &Limits::default())?;
        }
        let mut start = arrival;
        for (turn, question) in self.questions.iter().enumerate() {
            let (ids, media) = match turn {
                0 => ([self.medium_ids.as_slice(), question].concat(), vec![medium.clone()]),
                _ => (question.clone(), Vec::new()),
            };
            session.append_ids(&ids, &media, &Limits::default())?;
            self.turns.push(answer(&mut session, self.scenario.answer, start)?);
            start = Instant::now();
        }
        let memory = session.memory();
        self.session_bytes = memory.kv_bytes + memory.media_bytes;
        Ok(())
    }

    /// The examples' media, made by the first session.
    fn examples(&mut self) -> Result<Vec<Medium>, RunError> {
        for _ in self.example_media.len()..self.scenario.shots {
            let picture = [self.picture()?];
            let medium = self.encode(&picture)?;
            self.example_media.push(medium);
        }
        Ok(self.example_media.clone())
    }

    fn encode(&mut self, frames: &[Picture]) -> Result<Medium, RunError> {
        let mut values = Vec::new();
        for frame in frames {
            values.extend(preprocess(frame, &self.model.manifest().image)?);
        }
        let hits = |stats: CacheStats| stats.memory_hits + stats.disk_hits;
        let before = hits(self.model.visual_cache().stats());
        let medium = self.model.encode_medium(&values, frames.len())?;
        self.media_found += hits(self.model.visual_cache().stats()) - before;
        Ok(medium)
    }

    /// The next picture of the camera.
    fn picture(&mut self) -> Result<Picture, RunError> {
        self.n_pictures += 1;
        let [width, height] = [self.camera.width(), self.camera.height()].map(|side| side as usize);
        let pixels = numbered(&self.camera, self.n_pictures).into_raw();
        Ok(Picture::new(width, height, Mode::Rgb, pixels)?)
    }

    fn result(self) -> ScenarioResult {
        let (cold, others) = match self.turns.as_slice() {
            [cold, others @ ..] => (cold.first_token, others),
            [] => (f64::NAN, [].as_slice()),
        };
        let quantiles = |of: &dyn Fn(&Turn) -> Vec<f64>| {
            Milliseconds::of(&others.iter().flat_map(of).collect::<Vec<f64>>())
        };
        let end_to_end_ms = quantiles(&|turn| vec![turn.end_to_end]);
        ScenarioResult {
            label: self.label.clone(),
            scenario: self.scenario.name,
            cold_first_token_ms: cold,
            first_token_ms: quantiles(&|turn| vec![turn.first_token]),
            token_ms: quantiles(&|turn| turn.tokens.clone()),
            tokens_per_s: self.scenario.answer as f64 / end_to_end_ms.median * 1e3,
            end_to_end_ms,
            session_bytes: self.session_bytes,
            media_found: self.media_found,
            stream: self.stream,
        }
    }
}

/// A picture that no other number gives, however small it is made: in its middle are 32 tiles, one for each bit of the
/// number, which are of another brightness where the bit is set.
fn numbered(camera: &RgbImage, number: u32) -> RgbImage {
    let mut picture = camera.clone();
    let span = |side: u32, tile: u32, n_tiles: u32| {
        let edge = |tile: u32| side / 4 + side / 2 * tile / n_tiles;
        edge(tile)..edge(tile + 1)
    };
    for tile in (0..32).filter(|tile| number >> tile & 1 == 1) {
        for y in span(camera.height(), tile / 8, 4) {
            for x in span(camera.width(), tile % 8, 8) {
                picture.get_pixel_mut(x, y).0.iter_mut().for_each(|channel| *channel ^= 0x40);
            }
        }
    }
    picture
}

/// Generates `n` tokens; times are from `start`.
fn answer(session: &mut Session, n: usize, start: Instant) -> Result<Turn, RunError> {
    let options =
        GenerateOptions { max_new_tokens: n, ignore_stops: true, ..GenerateOptions::default() };
    let (mut tokens, mut times) = (session.tokens(&options), Vec::with_capacity(n));
    while tokens.next_id()?.is_some() {
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let at = |time: Option<&f64>| time.copied().unwrap_or(f64::NAN);
    Ok(Turn {
        first_token: at(times.first()),
        tokens: times.windows(2).map(|pair| pair[1] - pair[0]).collect(),
        end_to_end: at(times.last()),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn pictures_differ_when_they_are_small() {
        let small = |number| {
            let picture = numbered(&camera_picture((640, 480), 0), number);
            image::imageops::thumbnail(&picture, 32, 32).into_raw()
        };
        let all: BTreeSet<Vec<u8>> = (1..60).chain([1 << 16, 1 << 31]).map(small).collect();
        assert_eq!(all.len(), 61);
    }

    #[test]
    fn scenarios_are_known_by_name_and_by_size() {
        for scenario in SCENARIOS {
            assert_eq!(Scenario::from_name(scenario.name), Some(scenario));
        }
        assert_eq!(Scenario::from_name("nap"), None);
        let few_shot = Scenario::from_name("few-shot-32").unwrap();
        assert_eq!(few_shot.context(1), 32 * 9 + 1 + 4 + 5);
        assert_eq!(Scenario::from_name("chat").unwrap().context(3), 3 + 4 * 40);
    }
}
