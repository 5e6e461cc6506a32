//! One conversation: tokens given and generated, their keys and values, and the pictures they see. It grows at its end,
//! can be rewound to a mark, and forks share what they have in common.

mod media;

use std::sync::Arc;
use std::time::Instant;

use flamingo_kernels::KV_BLOCK;
use flamingo_models::MediaClock;
use flamingo_models::config::PositionConfig;

use crate::answer::{Answer, CacheCounts, GenerateOptions, Generated, Limits, Stop, Timings};
use crate::backend::{Media, Sequence, Step, TokenBlock};
use crate::bank::{BankPrefix, Shots};
use crate::model::{Model, RunError};
use crate::prefix_cache::{STEP, StepKey, step_keys};
use crate::prompt::{PromptError, PromptFile};
use crate::sampling::Sampler;
use crate::text_stream::TextStream;
use crate::visual_cache::MediaKey;

pub(crate) use media::Given;
use media::SessionMedia;

/// Tokens of a prompt that are read at once; between them a session looks whether to stop.
pub const PREFILL_TOKENS: usize = 512;

/// An encoded medium, and what tells it from others.
#[derive(Clone, Debug)]
pub struct Medium {
    /// Visual tokens, keys and values.
    pub media: Arc<Media>,
    /// Hash of the pixel values, if known: without it, tokens that see the medium are not shared with other sessions.
    pub key: Option<MediaKey>,
}

impl From<Arc<Media>> for Medium {
    fn from(media: Arc<Media>) -> Medium {
        Medium { media, key: None }
    }
}

/// A place in a session to come back to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    n_tokens: usize,
}

impl Mark {
    /// The mark after `n_tokens` tokens.
    pub fn at(n_tokens: usize) -> Mark {
        Mark { n_tokens }
    }

    /// Tokens before it.
    pub fn n_tokens(self) -> usize {
        self.n_tokens
    }
}

/// Memory that a session uses, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionMemory {
    /// Weights in the memory map, shared by all sessions of the model; 0 where the engine does not say.
    pub weight_bytes: usize,
    /// Keys and values of the session's tokens; blocks that it shares count in full.
    pub kv_bytes: usize,
    /// Visual tokens, keys and values of its media; each medium once.
    pub media_bytes: usize,
    /// Buffers of the model's calls, shared by all sessions; 0 where the engine does not say.
    pub buffer_bytes: usize,
    /// Keys and values that the model keeps for prompts that begin alike; each block once.
    pub prefix_bytes: usize,
}

/// One conversation with a model.
pub struct Session {
    model: Model,
    sequence: Box<dyn Sequence>,
    ids: Vec<u32>,
    /// The medium that each token sees, 0 for none.
    media_time: Vec<u32>,
    /// Whether each token was given, not generated.
    is_given: Vec<bool>,
    /// Media that there were when each token came.
    n_media: Vec<usize>,
    media: SessionMedia,
    clock: MediaClock,
    /// What the context forgets when it is full, and has forgotten.
    sliding: Sliding,
    /// Logits of the last token, if it was advanced and they were not used yet.
    logits: Option<Vec<f32>>,
    counts: CacheCounts,
}

/// The beginning of a session that its context no longer has.
#[derive(Clone, Debug)]
struct Sliding {
    is_on: bool,
    /// Tokens that were forgotten.
    n_tokens: usize,
    /// Media that had come by then.
    n_media: usize,
    /// The clock after them.
    clock: MediaClock,
}

impl Session {
    /// An empty conversation of up to `max_context` tokens.
    pub(crate) fn new(model: Model, max_context: usize) -> Result<Session, RunError> {
        let config = &model.manifest().config;
        let clock = MediaClock::new(config.family, &config.tokens);
        let sliding = Sliding { is_on: false, n_tokens: 0, n_media: 0, clock: clock.clone() };
        Ok(Session {
            sequence: model.backend().new_sequence(max_context)?,
            clock,
            sliding,
            model,
            ids: Vec::new(),
            media_time: Vec::new(),
            is_given: Vec::new(),
            n_media: Vec::new(),
            media: SessionMedia::default(),
            logits: None,
            counts: CacheCounts::default(),
        })
    }

    /// From now on a full context forgets its oldest tokens, 64 at a time, instead of ending: a sliding window. What is
    /// left keeps what it has taken from the tokens that went.
    ///
    /// # Errors
    /// If positions of the language model are not distances (ALiBi), the engine cannot, or the context is too short.
    pub fn slide(&mut self) -> Result<(), RunError> {
        let config = &self.model.manifest().config.language;
        let reason = match config.position {
            PositionConfig::Alibi { .. } => match self.model.backend().name() {
                "native" if self.max_context() > KV_BLOCK => {
                    self.sliding.is_on = true;
                    return Ok(());
                }
                "native" => "it is too short",
                _ => "the engine keeps it in one piece",
            },
            _ => "the language model counts positions from the beginning",
        };
        Err(PromptError::NoSliding { reason }.into())
    }

    /// Forgets the oldest tokens; whether it did.
    fn forget_oldest(&mut self) -> bool {
        let n = if self.sliding.is_on { self.sequence.forget_oldest() } else { 0 };
        for (id, _) in self.ids[..n].iter().zip(&self.is_given).filter(|(_, is_given)| **is_given) {
            self.sliding.clock.tick(*id);
        }
        self.sliding.n_media = self.n_media[..n].last().copied().unwrap_or(self.sliding.n_media);
        self.sliding.n_tokens += n;
        self.ids.drain(..n);
        self.media_time.drain(..n);
        self.is_given.drain(..n);
        self.n_media.drain(..n);
        n > 0
    }

    /// The tokens that its context has: all so far, unless it slid.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// What was found in caches since the last answer.
    pub fn cache(&self) -> CacheCounts {
        self.counts
    }

    /// Media so far.
    pub fn n_media(&self) -> usize {
        self.media.len()
    }

    /// Tokens that it can hold.
    pub fn max_context(&self) -> usize {
        self.sequence.max_context()
    }

    /// Appends a turn and reads it: text, pictures and videos, as a prompt. The first turn of a session has the
    /// tokenizer's beginning token, later ones do not. After an error the session is as before.
    ///
    /// # Errors
    /// Whatever is wrong with the turn; more tokens or media than there is room for; a limit that was reached.
    pub fn append(&mut self, turn: &PromptFile, limits: &Limits) -> Result<(), RunError> {
        self.append_after(&Shots::default(), turn, limits)
    }

    /// Appends examples of a bank and a turn after them, as [`Session::append`] does a turn that begins with the examples.
    /// No picture of the bank is decoded or encoded.
    ///
    /// # Errors
    /// As [`Session::append`]; a bank of another model, or one that is damaged.
    pub fn append_after(
        &mut self,
        shots: &Shots,
        turn: &PromptFile,
        limits: &Limits,
    ) -> Result<(), RunError> {
        let whole = shots.before(turn);
        let ids = self.model.encode_turn(self.ids.last().copied(), self.media.len(), &whole)?;
        self.append_encoded(shots, turn, &ids, limits)
    }

    /// As [`Session::append_after`], of a turn whose token ids, with those of the examples, are known.
    pub(crate) fn append_encoded(
        &mut self,
        shots: &Shots,
        turn: &PromptFile,
        ids: &[u32],
        limits: &Limits,
    ) -> Result<(), RunError> {
        shots.check(&self.model)?;
        self.check_room(ids.len())?;
        let mut given: Vec<Given> = shots.media().iter().cloned().map(Given::Kept).collect();
        self.counts.visual_hits += given.len();
        given.extend(self.model.media(turn, &mut self.counts)?.into_iter().map(Given::Made));
        self.append_given(ids, given, shots.prefix(), limits)
    }

    /// Appends tokens and reads them; `media` stand behind their image tokens, in order. After an error the session is as
    /// before, but for what a full context that slides has forgotten.
    ///
    /// # Errors
    /// Ids, media or lengths that do not fit the model; a limit that was reached.
    pub fn append_ids(
        &mut self,
        ids: &[u32],
        media: &[Medium],
        limits: &Limits,
    ) -> Result<(), RunError> {
        let given = media.iter().cloned().map(Given::Made).collect();
        self.append_given(ids, given, None, limits)
    }

    /// As [`Session::append_ids`], with media that need not be there before a token sees them, and with keys and values
    /// that a bank has.
    pub(crate) fn append_given(
        &mut self,
        ids: &[u32],
        media: Vec<Given>,
        prefix: Option<&BankPrefix>,
        limits: &Limits,
    ) -> Result<(), RunError> {
        let before = self.take(ids, media)?;
        let read = self.read(prefix, limits);
        if read.is_err() {
            self.rewind(before)?;
        }
        read
    }

    /// Takes tokens and media without reading them; gives the place before them.
    fn take(&mut self, ids: &[u32], media: Vec<Given>) -> Result<Mark, RunError> {
        if self.ids.is_empty() && ids.is_empty() {
            return Err(PromptError::Empty.into());
        }
        self.check_room(ids.len())?;
        while self.ids.len() + ids.len() > self.max_context() && self.forget_oldest() {}
        let before = self.mark();
        media.into_iter().for_each(|medium| self.media.push(medium));
        for id in ids {
            let media_time = self.clock.tick(*id);
            self.push(*id, media_time, true);
        }
        Ok(before)
    }

    /// A session that goes on with these tokens and media, which [`Session::read_together`] will read.
    pub(crate) fn fork_with(&self, ids: &[u32], media: &[Medium]) -> Result<Session, RunError> {
        if ids.is_empty() {
            return Err(PromptError::Empty.into());
        }
        let mut fork = self.fork();
        fork.take(ids, media.iter().cloned().map(Given::Made).collect())?;
        Ok(fork)
    }

    /// Reads what each of several sessions of one model lacks, in one pass over the weights; of long ones all but the end
    /// before it, each on its own.
    pub(crate) fn read_together(sessions: &mut [Session], limits: &Limits) -> Result<(), RunError> {
        let Some(model) = sessions.first().map(|session| session.model.clone()) else {
            return Ok(());
        };
        let mut lasts = Vec::with_capacity(sessions.len());
        for session in &mut *sessions {
            while session.sequence.len() + PREFILL_TOKENS < session.ids.len() {
                limits.check()?;
                session.advance(session.sequence.len() + PREFILL_TOKENS)?;
            }
            let start = session.sequence.len();
            session.media.make(&session.media_time[start..], &model, &mut session.counts)?;
            lasts.push([session.ids.len() - start - 1]);
        }
        limits.check()?;
        let mut batch: Vec<(&mut dyn Sequence, Step<'_>)> = Vec::with_capacity(sessions.len());
        for (session, last) in sessions.iter_mut().zip(&lasts) {
            let Session { sequence, ids, media_time, media, .. } = session;
            let start = sequence.len();
            let step = Step {
                input_ids: &ids[start..],
                media_time: &media_time[start..],
                media: media.made(),
                logit_rows: last,
            };
            batch.push((sequence.as_mut(), step));
        }
        let logits = model.backend().advance_together(&mut batch)?;
        for (session, logits) in sessions.iter_mut().zip(logits) {
            session.logits = Some(logits);
        }
        Ok(())
    }

    fn push(&mut self, id: u32, media_time: u32, is_given: bool) {
        self.ids.push(id);
        self.media_time.push(media_time);
        self.is_given.push(is_given);
        self.n_media.push(self.media.len());
    }

    fn check_room(&self, n_new: usize) -> Result<(), RunError> {
        // A context that slides keeps a block at most, and a token that was not read yet.
        let n_kept = if self.sliding.is_on { KV_BLOCK + 1 } else { usize::MAX };
        let (tokens, limit) =
            (self.ids.len().min(n_kept).saturating_add(n_new), self.max_context());
        match tokens > limit {
            true => Err(PromptError::TooLong { tokens, limit }.into()),
            false => Ok(()),
        }
    }

    /// Advances the sequence over the tokens that it lacks.
    fn read(&mut self, prefix: Option<&BankPrefix>, limits: &Limits) -> Result<(), RunError> {
        let keys = step_keys(&self.ids, &self.media_time, self.media.keys());
        if let Some(prefix) = prefix.filter(|_| self.sequence.is_empty()) {
            prefix.load(&keys, &mut self.model.prefixes(), self.sequence.as_ref())?;
        }
        self.counts.prefix_tokens_reused += self.adopt(&keys);
        while self.sequence.len() < self.ids.len() {
            limits.check()?;
            self.advance(self.sequence.len() + PREFILL_TOKENS)?;
        }
        if self.sliding.n_tokens == 0 {
            self.model.prefixes().keep(&keys, self.sequence.as_ref());
        }
        Ok(())
    }

    /// Begins with what sessions before have read of the same; the last token is always left, for its logits.
    fn adopt(&mut self, keys: &[StepKey]) -> usize {
        if !self.sequence.is_empty() || self.sliding.n_tokens > 0 {
            return 0;
        }
        let n_steps = self.ids.len().saturating_sub(1) / STEP;
        let (blocks, len) = self.model.prefixes().find(&keys[..n_steps.min(keys.len())]);
        match len > 0 && self.sequence.adopt(&blocks, len) {
            true => len,
            false => 0,
        }
    }

    /// Advances the sequence up to `end`, or to the last token, whose logits are kept.
    fn advance(&mut self, end: usize) -> Result<(), RunError> {
        let (start, end) = (self.sequence.len(), end.min(self.ids.len()));
        self.media.make(&self.media_time[start..end], &self.model, &mut self.counts)?;
        let last = [end - start - 1];
        let is_whole = end == self.ids.len();
        let step = Step {
            input_ids: &self.ids[start..end],
            media_time: &self.media_time[start..end],
            media: self.media.made(),
            logit_rows: if is_whole { &last } else { &[] },
        };
        let logits = self.sequence.advance(&step)?;
        self.logits = is_whole.then_some(logits);
        Ok(())
    }

    /// Logits of the next token `[vocabulary]`; they are computed again when they were taken before.
    fn take_logits(&mut self) -> Result<Vec<f32>, RunError> {
        let last = self.ids.len().checked_sub(1).ok_or(PromptError::Empty)?;
        if self.logits.is_none() {
            self.sequence.truncate(last);
            while self.sequence.len() < self.ids.len() {
                self.advance(self.sequence.len() + PREFILL_TOKENS)?;
            }
        }
        Ok(self.logits.take().unwrap_or_default())
    }

    /// Logits of the token that comes next, `[vocabulary]`.
    ///
    /// # Errors
    /// If the session is empty or full.
    pub fn logits(&mut self) -> Result<Vec<f32>, RunError> {
        let logits = self.take_logits()?;
        self.logits = Some(logits.clone());
        Ok(logits)
    }

    /// Generates an answer, which becomes part of the session; `on_text` is given the text as it comes.
    ///
    /// # Errors
    /// If there is nothing to continue, or the artifact has no tokenizer.
    pub fn generate(
        &mut self,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<Answer, RunError> {
        self.answer(Instant::now(), options, on_text)
    }

    /// Generates an answer; the first token's time counts from `started`.
    pub(crate) fn answer(
        &mut self,
        started: Instant,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<Answer, RunError> {
        let n_prompt_tokens = self.ids.len();
        let cache = std::mem::take(&mut self.counts);
        if options.beams.n_beams > 1 {
            return self.searched(started, cache, options, on_text);
        }
        let (mut text, mut first) = (String::new(), None);
        let mut pieces = self.pieces(options)?;
        while let Some(piece) = pieces.next().transpose()? {
            first.get_or_insert_with(|| (started.elapsed(), Instant::now()));
            if !piece.text.is_empty() {
                on_text(&piece.text);
                text.push_str(&piece.text);
            }
        }
        let Generated { tokens, n_steps, stop } = pieces.finish();
        // The first token comes from the prompt's pass; the rate is that of the steps after it.
        let n_later = n_steps.saturating_sub(1);
        let rate = first
            .filter(|_| n_later > 0)
            .map(|(_, at)| n_later as f64 / at.elapsed().as_secs_f64());
        let first_token_ms = first.map_or(0.0, |(time, _)| time.as_secs_f64() * 1e3);
        let timings = Timings { first_token_ms, decode_tokens_per_s: rate };
        Ok(Answer { text, tokens, n_prompt_tokens, stop, timings, cache })
    }

    /// The answer that beam search finds: its text comes at once, at the end.
    fn searched(
        &mut self,
        started: Instant,
        cache: CacheCounts,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<Answer, RunError> {
        let (n_prompt_tokens, searching) = (self.ids.len(), Instant::now());
        let generated = self.search(options)?;
        let rate = generated.n_steps as f64 / searching.elapsed().as_secs_f64();
        let first_token_ms = started.elapsed().as_secs_f64() * 1e3;
        let (text, stop) = self.text_of(&generated, &options.stop_strings)?;
        on_text(&text);
        let timings = Timings { first_token_ms, decode_tokens_per_s: Some(rate) };
        Ok(Answer { text, tokens: generated.tokens, n_prompt_tokens, stop, timings, cache })
    }

    /// The text of what was generated, up to the first stop string, and why it ends.
    pub(crate) fn text_of(
        &self,
        generated: &Generated,
        stop_strings: &[String],
    ) -> Result<(String, Stop), RunError> {
        let mut stream = TextStream::new(stop_strings.to_vec());
        let (mut text, mut stop) = (String::new(), generated.stop.clone());
        for id in &generated.tokens {
            let (piece, found) = stream.push(self.model.tokenizer()?, *id)?;
            text.push_str(&piece);
            if let Some(found) = found {
                stop = Stop::Text(found);
                break;
            }
        }
        text.push_str(&stream.finish());
        Ok((text, stop))
    }

    /// Generates text piece by piece; what was taken is part of the session.
    ///
    /// # Errors
    /// If the artifact has no tokenizer.
    pub fn pieces<'a>(&'a mut self, options: &'a GenerateOptions) -> Result<Pieces<'a>, RunError> {
        self.model.tokenizer()?;
        let stream = TextStream::new(options.stop_strings.clone());
        Ok(Pieces { tokens: self.tokens(options), stream })
    }

    /// Generates token by token, without text: stop strings are not looked for.
    pub fn tokens<'a>(&'a mut self, options: &'a GenerateOptions) -> Tokens<'a> {
        let (forbidden, stops) =
            self.special_tokens(options.allow_image_token, options.ignore_stops);
        let generated = Generated { tokens: Vec::new(), n_steps: 0, stop: Stop::Length };
        let sampler = Sampler::new(options.sampling.clone());
        Tokens { session: self, options, sampler, forbidden, stops, generated, has_ended: false }
    }

    /// Tokens that are not generated, and those that end an answer, each once.
    pub(crate) fn special_tokens(
        &self,
        allow_image_token: bool,
        ignore_stops: bool,
    ) -> (Vec<u32>, Vec<u32>) {
        let tokens = &self.model.manifest().config.tokens;
        let mut forbidden = Vec::new();
        if !allow_image_token {
            forbidden.push(tokens.image);
            forbidden.extend(tokens.around_image);
        }
        let mut stops = Vec::new();
        if !ignore_stops {
            stops.extend_from_slice(&tokens.stop);
            stops.extend(tokens.end_of_chunk);
            stops.extend(tokens.end);
        }
        stops.sort_unstable();
        stops.dedup();
        (forbidden, stops)
    }

    /// Keys and values so far, for a continuation that may not last.
    pub(crate) fn fork_sequence(&self) -> Box<dyn Sequence> {
        self.sequence.fork()
    }

    /// The media that its tokens see; those that [`Session::make_media`] was not asked for may be others.
    pub(crate) fn media(&self) -> &[Arc<Media>] {
        self.media.made()
    }

    /// Makes the media of these numbers, as far as the session has them.
    pub(crate) fn make_media(&mut self, media_time: &[u32]) -> Result<(), RunError> {
        self.media.make(media_time, &self.model, &mut self.counts)
    }

    /// Keys and values of a block of its tokens.
    pub(crate) fn share(&self, block_idx: usize) -> Option<TokenBlock> {
        self.sequence.share(block_idx)
    }

    /// Keys of the whole steps of its tokens.
    pub(crate) fn step_keys(&self) -> Vec<StepKey> {
        step_keys(&self.ids, &self.media_time, self.media.keys())
    }

    /// Its model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The medium that generated tokens see.
    pub(crate) fn generated_time(&self) -> u32 {
        self.clock.generated()
    }

    /// The media that these tokens would see if they were given.
    pub(crate) fn given_times(&self, ids: &[u32]) -> Vec<u32> {
        let mut clock = self.clock.clone();
        ids.iter().map(|id| clock.tick(*id)).collect()
    }

    /// Makes tokens that were found by search part of the session.
    pub(crate) fn push_generated(&mut self, ids: &[u32]) {
        for id in ids {
            self.push(*id, self.clock.generated(), false);
            self.logits = None;
        }
    }

    /// Where the session is now.
    pub fn mark(&self) -> Mark {
        Mark { n_tokens: self.sliding.n_tokens + self.ids.len() }
    }

    /// Forgets everything since the mark, tokens and media.
    ///
    /// # Errors
    /// If the session has been rewound to before the mark, or has forgotten what was there.
    pub fn rewind(&mut self, mark: Mark) -> Result<(), RunError> {
        let tokens = self.ids.len();
        let place = mark.n_tokens.checked_sub(self.sliding.n_tokens);
        let Some(mark) = place.filter(|mark| *mark <= tokens) else {
            let tokens = self.sliding.n_tokens + tokens;
            return Err(PromptError::NoMark { mark: mark.n_tokens, tokens }.into());
        };
        if mark == tokens && self.sequence.len() == tokens {
            return Ok(());
        }
        self.ids.truncate(mark);
        self.media_time.truncate(mark);
        self.is_given.truncate(mark);
        self.sequence.truncate(mark);
        self.logits = None;
        self.clock = self.sliding.clock.clone();
        for (id, _) in self.ids.iter().zip(&self.is_given).filter(|(_, is_given)| **is_given) {
            self.clock.tick(*id);
        }
        self.n_media.truncate(mark);
        let n_media = self.n_media.last().copied().unwrap_or(self.sliding.n_media);
        self.media.truncate(n_media);
        Ok(())
    }

    /// A session that has the same so far, and goes its own way from here on.
    #[must_use]
    pub fn fork(&self) -> Session {
        Session {
            model: self.model.clone(),
            sequence: self.sequence.fork(),
            ids: self.ids.clone(),
            media_time: self.media_time.clone(),
            is_given: self.is_given.clone(),
            n_media: self.n_media.clone(),
            media: self.media.clone(),
            clock: self.clock.clone(),
            sliding: self.sliding.clone(),
            logits: self.logits.clone(),
            counts: CacheCounts::default(),
        }
    }

    /// Memory that it uses, and shares.
    pub fn memory(&self) -> SessionMemory {
        let backend = self.model.backend().memory().unwrap_or_default();
        SessionMemory {
            weight_bytes: backend.weight_bytes,
            kv_bytes: self.sequence.kv_bytes(),
            media_bytes: self.media.bytes(),
            buffer_bytes: backend.buffer_bytes,
            prefix_bytes: self.model.prefixes().bytes(),
        }
    }
}

/// Tokens as they are generated.
pub struct Tokens<'a> {
    session: &'a mut Session,
    options: &'a GenerateOptions,
    sampler: Sampler,
    forbidden: Vec<u32>,
    stops: Vec<u32>,
    generated: Generated,
    has_ended: bool,
}

impl Tokens<'_> {
    /// The next token, or `None` at the end.
    ///
    /// # Errors
    /// If there is nothing to continue.
    pub fn next_id(&mut self) -> Result<Option<u32>, RunError> {
        if self.has_ended {
            return Ok(None);
        }
        if let Some(stop) = self.reason_to_stop() {
            self.end(stop);
            return Ok(None);
        }
        let mut logits = self.session.take_logits()?;
        self.generated.n_steps += 1;
        let id = self.sampler.choose(&mut logits, &self.forbidden, &self.session.ids);
        if self.stops.contains(&id) {
            self.end(Stop::Token(id));
            return Ok(None);
        }
        self.session.push(id, self.session.clock.generated(), false);
        self.generated.tokens.push(id);
        Ok(Some(id))
    }

    /// What was generated, and why it ended.
    pub fn finish(self) -> Generated {
        self.generated
    }

    fn reason_to_stop(&mut self) -> Option<Stop> {
        if self.generated.tokens.len() >= self.options.max_new_tokens {
            return Some(Stop::Length);
        }
        // One token more than there is room for can be chosen: nothing comes after it.
        if self.session.ids.len() > self.session.max_context() && !self.session.forget_oldest() {
            return Some(Stop::Context);
        }
        self.options.limits.reached()
    }

    fn end(&mut self, stop: Stop) {
        self.generated.stop = stop;
        self.has_ended = true;
    }
}

/// A token with the text that is certain since it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The token; `None` for text that was held back until the end.
    pub id: Option<u32>,
    /// The text, often empty in the middle of a word or of what may be a stop string.
    pub text: String,
}

/// Text as it is generated.
pub struct Pieces<'a> {
    tokens: Tokens<'a>,
    stream: TextStream,
}

impl Pieces<'_> {
    /// What was generated, and why it ended.
    pub fn finish(self) -> Generated {
        self.tokens.finish()
    }

    fn piece(&mut self) -> Result<Option<Piece>, RunError> {
        let Some(id) = self.tokens.next_id()? else {
            let text = self.stream.finish();
            return Ok((!text.is_empty()).then_some(Piece { id: None, text }));
        };
        let (text, stop) = self.stream.push(self.tokens.session.model.tokenizer()?, id)?;
        if let Some(stop) = stop {
            self.tokens.end(Stop::Text(stop));
        }
        Ok(Some(Piece { id: Some(id), text }))
    }
}

impl Iterator for Pieces<'_> {
    type Item = Result<Piece, RunError>;

    fn next(&mut self) -> Option<Result<Piece, RunError>> {
        self.piece().transpose()
    }
}
