//! The native backend: the two graphs of an artifact on our own CPU kernels.
//!
//! The media graph is cut at its visual tokens, so that keys and values can be made of tokens that
//! were kept. At load each part becomes a static plan: instructions over weights in the memory map, inputs,
//! and buffers that share memory. Keys and values of text live in caches that attention writes in
//! place; keys and values of media are read where the encoder left them. A prompt and a single
//! token take the same path.
#![forbid(unsafe_code)]

mod encoder;
mod execute;
mod lower;
mod pictures;
mod plan;
mod plans;
mod size;
mod stage;
#[cfg(test)]
mod tests;
mod work;

use std::any::Any;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};

use flamingo_ir::{Bindings, Graph, ValueId};
use flamingo_kernels::{KV_BLOCK, Kernels, KvCache, KvFormat, Matrix, SharedBlock};
use half::f16;

use crate::backend::{
    Backend, BackendError, BackendMemory, Media, MediaKv, Sequence, Step, TokenBlock, TokenFormat,
    WeightBytes, frame_weights,
};
use crate::contract::{Contract, broken, check_step, full, indices};
use crate::profile::Record;
use crate::watch::Watcher;

use encoder::Encoder;
pub use plans::{Plans, Text};
pub use stage::{Buffers, Call, NativeStage, Span, StageMemory};

/// Runs the media and decoder graphs of an artifact on the CPU, in f32.
#[derive(Clone, Debug)]
pub struct NativeBackend {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Patches, or pixels without an encoder of its own, → visual tokens.
    vision: NativeStage,
    /// Visual tokens → keys and values of every gated block.
    media_kv: NativeStage,
    /// Pixels → patches of the frozen vision encoder, if the graph says where it ends.
    encoder: Option<Encoder>,
    decoder: NativeStage,
    contract: Contract,
    isa: &'static str,
    /// Rows of the decoder's buffers are shared by all sequences that do not run at the same time.
    decoder_buffers: Mutex<Vec<Buffers>>,
    vision_buffers: Mutex<Vec<Buffers>>,
    media_kv_buffers: Mutex<Vec<Buffers>>,
    /// Heads of each gated block.
    media_heads: Vec<usize>,
    /// Bytes of the weights that the stages read.
    weight_bytes: usize,
    kv_format: KvFormat,
}

impl NativeBackend {
    /// Plans the two graphs. `n_threads` defaults to one for each physical core.
    ///
    /// # Errors
    /// Lists every node without a kernel, every difference between graphs and contract, or every
    /// weight that does not fit.
    pub fn new(
        media: &Graph,
        decoder: &Graph,
        weights: Arc<dyn WeightBytes>,
        n_threads: Option<NonZeroUsize>,
    ) -> Result<NativeBackend, BackendError> {
        let kernels = Arc::new(Kernels::new(n_threads)?);
        NativeBackend::with_kernels(media, decoder, weights, kernels)
    }

    /// As [`NativeBackend::new`], on kernels that are there already.
    ///
    /// # Errors
    /// As [`NativeBackend::new`].
    pub fn with_kernels(
        media: &Graph,
        decoder: &Graph,
        weights: Arc<dyn WeightBytes>,
        kernels: Arc<Kernels>,
    ) -> Result<NativeBackend, BackendError> {
        let contract = Contract::new(media, decoder)?;
        let isa = kernels.isa().name();
        let stage =
            |graph: &Graph| NativeStage::new(graph, Arc::clone(&weights), Arc::clone(&kernels));
        let [vision, media_kv] = cut_at_tokens(media)?;
        let decoder = stage(decoder)?;
        let (encoder, vision) = match encoder::cut(&vision) {
            Some([first, rest]) => {
                let [stage, rest] = both(stage(&first), stage(&rest))?;
                (Some(Encoder::new(&first, stage)), Ok(rest))
            }
            None => (None, stage(&vision)),
        };
        let [vision, media_kv] = both(vision, stage(&media_kv))?;
        let stages =
            [&vision, &media_kv, &decoder].into_iter().chain(encoder.as_ref().map(Encoder::stage));
        let used: BTreeMap<&str, usize> = stages.flat_map(NativeStage::weights_used).collect();
        let shared = Shared {
            weight_bytes: used.values().sum(),
            vision,
            media_kv,
            encoder,
            media_heads: decoder.media_heads(),
            decoder,
            contract,
            isa,
            decoder_buffers: Mutex::default(),
            vision_buffers: Mutex::default(),
            media_kv_buffers: Mutex::default(),
            kv_format: KvFormat::F32,
        };
        Ok(NativeBackend { shared: Arc::new(shared) })
    }

    /// The same with keys and values, of text and of media, kept in `format`; for a backend that
    /// has no sequences yet.
    #[must_use]
    pub fn with_kv_format(mut self, format: KvFormat) -> NativeBackend {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.kv_format = format;
        }
        self
    }

    /// The stages that encode media, in order: pixels → patches → visual tokens → keys and values.
    pub fn media_stages(&self) -> Vec<&NativeStage> {
        let encoder = self.shared.encoder.as_ref().map(Encoder::stage);
        encoder.into_iter().chain([&self.shared.vision, &self.shared.media_kv]).collect()
    }

    /// The stage that advances text.
    pub fn decoder_stage(&self) -> &NativeStage {
        &self.shared.decoder
    }
}

impl Backend for NativeBackend {
    fn name(&self) -> &'static str {
        "native"
    }

    /// One medium at a time: a row's numbers do not depend on its neighbours, and the buffers of
    /// one medium are enough.
    fn encode(
        &self,
        pixel_values: &[f32],
        n_media: usize,
        n_frames: usize,
    ) -> Result<Vec<Media>, BackendError> {
        let medium_elements =
            self.shared.contract.pictures.check(pixel_values.len(), n_media, n_frames)?;
        let n_max = self.shared.contract.pictures.n_max_frames.unwrap_or(0);
        let weights = frame_weights(n_frames, n_max);
        let bindings = bindings([("n_media", 1), ("n_frames", n_frames)]);
        let mut buffers = take(&self.shared.vision_buffers);
        let encode = |pixel_values: &[f32]| {
            let encoder = self.shared.encoder.as_ref();
            let patches = encoder.map(|encoder| encoder.patches(pixel_values, n_frames));
            let patches = patches.transpose()?;
            let numbers = match &patches {
                Some(patches) => encoder::resampler_inputs(patches, &weights),
                None => [("pixel_values", pixel_values), ("frame_weights", &weights)],
            };
            let call = media_call(&bindings, &numbers);
            let outputs = self.shared.vision.run(&call, &mut [], &mut buffers)?;
            let visual_tokens = outputs.into_iter().next().unwrap_or_default();
            self.shared.media_from_tokens(self.shared.rounded(visual_tokens), n_frames)
        };
        let media = pixel_values.chunks_exact(medium_elements).map(encode).collect();
        give_back(&self.shared.vision_buffers, buffers);
        media
    }

    /// Buffers of calls that run at this moment are not counted.
    fn release_weights(&self) {
        self.shared.decoder.release_weights();
    }

    fn memory(&self) -> Option<BackendMemory> {
        let bytes = |free: &Mutex<Vec<Buffers>>| -> usize {
            let free = free.lock().unwrap_or_else(PoisonError::into_inner);
            free.iter().map(Buffers::bytes).sum()
        };
        Some(BackendMemory {
            weight_bytes: self.shared.weight_bytes,
            buffer_bytes: bytes(&self.shared.decoder_buffers)
                + self.shared.encoder.as_ref().map_or(0, Encoder::bytes)
                + bytes(&self.shared.vision_buffers)
                + bytes(&self.shared.media_kv_buffers),
        })
    }

    fn token_format(&self) -> Option<TokenFormat> {
        Some(self.shared.token_format())
    }

    fn media_from_tokens(
        &self,
        visual_tokens: Vec<f32>,
        n_frames: usize,
    ) -> Result<Media, BackendError> {
        self.shared.media_from_tokens(visual_tokens, n_frames)
    }

    fn vision_features(
        &self,
        pixel_values: &[f32],
        n_frames: usize,
    ) -> Result<Option<Vec<f32>>, BackendError> {
        self.shared.contract.pictures.check(pixel_values.len(), 1, n_frames)?;
        let features = |encoder: &Encoder| encoder.features(pixel_values, n_frames);
        self.shared.encoder.as_ref().map(features).transpose()
    }

    fn arithmetic(&self) -> String {
        format!("{} {} {}", self.name(), self.shared.isa, self.shared.kv_format.name())
    }

    fn set_profiling(&self, is_on: bool) -> bool {
        self.shared.stages().iter().for_each(|stage| stage.set_profiling(is_on));
        true
    }

    fn set_watcher(&self, watcher: Option<Watcher>) -> bool {
        for stage in self.shared.stages() {
            stage.set_watcher(watcher.clone());
        }
        true
    }

    fn take_profile(&self) -> Vec<Record> {
        let stages = self.shared.stages();
        let mut records: Vec<Record> = stages.iter().flat_map(|s| s.take_profile()).collect();
        records.sort_by_key(|record| record.start);
        records
    }

    fn advance_together(
        &self,
        batch: &mut [(&mut dyn Sequence, Step<'_>)],
    ) -> Result<Vec<Vec<f32>>, BackendError> {
        let mut own = Vec::with_capacity(batch.len());
        for (sequence, step) in batch {
            let sequence = sequence.as_any_mut().downcast_mut::<NativeSequence>();
            let sequence = sequence.filter(|s| Arc::ptr_eq(&s.shared, &self.shared));
            own.push((sequence.ok_or_else(other_backend)?, *step));
        }
        self.shared.advance(&mut own)
    }

    fn new_sequence(&self, max_context: usize) -> Result<Box<dyn Sequence>, BackendError> {
        Ok(Box::new(NativeSequence {
            caches: self.shared.decoder.new_caches(max_context, self.shared.kv_format)?,
            shared: Arc::clone(&self.shared),
            max_context,
            len: 0,
        }))
    }
}

impl Shared {
    fn stages(&self) -> Vec<&NativeStage> {
        let encoder = self.encoder.as_ref().map(Encoder::stage);
        encoder.into_iter().chain([&self.vision, &self.media_kv, &self.decoder]).collect()
    }

    /// Visual tokens are rounded where keys and values are.
    fn token_format(&self) -> TokenFormat {
        match self.kv_format {
            KvFormat::F32 => TokenFormat::F32,
            KvFormat::F16 | KvFormat::Int8 => TokenFormat::F16,
        }
    }

    /// Visual tokens as they are kept. Rounding comes before keys and values, so that those of
    /// tokens that were kept are the same.
    fn rounded(&self, mut visual_tokens: Vec<f32>) -> Vec<f32> {
        match self.token_format() {
            TokenFormat::F32 => {}
            TokenFormat::F16 => {
                let largest = f16::MAX.to_f32();
                for value in &mut visual_tokens {
                    *value = f16::from_f32(value.clamp(-largest, largest)).to_f32();
                }
            }
        }
        visual_tokens
    }

    /// One medium with the keys and values of its visual tokens.
    fn media_from_tokens(
        &self,
        visual_tokens: Vec<f32>,
        n_frames: usize,
    ) -> Result<Media, BackendError> {
        let bindings = bindings([("n_media", 1), ("n_frames", n_frames)]);
        let numbers = [("visual_tokens", visual_tokens.as_slice())];
        let mut buffers = take(&self.media_kv_buffers);
        let outputs = self.media_kv.run(&media_call(&bindings, &numbers), &mut [], &mut buffers);
        give_back(&self.media_kv_buffers, buffers);
        let mut outputs = outputs?;
        outputs.insert(self.contract.tokens_place().min(outputs.len()), visual_tokens);
        Ok(self.pack(self.contract.media_from_outputs(outputs)))
    }

    /// Advances sequences in one pass over the weights; logits of each.
    fn advance(
        &self,
        batch: &mut [(&mut NativeSequence, Step<'_>)],
    ) -> Result<Vec<Vec<f32>>, BackendError> {
        let mut rows = BatchRows::default();
        for (sequence, step) in batch.iter() {
            check_step(step, sequence.len, sequence.max_context)?;
            self.decoder.check_media_time(step.media_time, step.media.len())?;
            rows.push(sequence, step)?;
        }
        let bindings = bindings([
            ("text_len", rows.input_ids.len()),
            ("past_len", batch.iter().map(|(sequence, _)| sequence.len).max().unwrap_or(0)),
            ("n_media", rows.media.len()),
            ("n_latents", rows.media.first().map_or(0, |media| media.n_latents)),
            ("n_logits", rows.logit_rows.len()),
        ]);
        let call = Call {
            bindings: &bindings,
            numbers: &[],
            indices: &[
                ("input_ids", &rows.input_ids),
                ("positions", &rows.positions),
                ("logit_rows", &rows.logit_rows),
            ],
            media: &rows.media,
            media_time: &rows.media_time,
        };
        let mut spans: Vec<Span<'_>> = Vec::with_capacity(batch.len());
        for (sequence, step) in batch.iter_mut() {
            spans.push(Span {
                past_len: sequence.len,
                n_rows: step.input_ids.len(),
                caches: &mut sequence.caches,
            });
        }
        let mut buffers = take(&self.decoder_buffers);
        let outputs = self.decoder.run(&call, &mut spans, &mut buffers);
        give_back(&self.decoder_buffers, buffers);
        let logits = outputs?.pop().unwrap_or_default();
        if let [(sequence, step)] = batch {
            sequence.len += step.input_ids.len();
            return Ok(vec![logits]);
        }
        let width = logits.len() / rows.logit_rows.len().max(1);
        let mut rest = logits.as_slice();
        let mut parts = Vec::with_capacity(batch.len());
        for (sequence, step) in batch {
            sequence.len += step.input_ids.len();
            let part = rest.split_off(..step.logit_rows.len() * width).unwrap_or_default();
            parts.push(part.to_vec());
        }
        Ok(parts)
    }

    /// Keys and values as attention reads them, in the format asked for.
    fn pack(&self, mut media: Media) -> Media {
        let n_latents = media.n_latents;
        for (block, n_heads) in media.blocks.iter_mut().zip(&self.media_heads) {
            let MediaKv::Rows { k, v } = block else { continue };
            let width = k.len() / n_latents.max(1);
            let is_whole = k.len() == v.len() && k.len() == width * n_latents;
            if is_whole && *n_heads > 0 && width.is_multiple_of(*n_heads) {
                let rows = |data| Matrix::new(data, n_latents, width);
                let cache = KvCache::from_rows(*n_heads, rows(k), rows(v), self.kv_format);
                *block = MediaKv::Cache(cache);
            }
        }
        for later in &mut media.later {
            *later = Arc::new(self.pack(Arc::unwrap_or_clone(std::mem::take(later))));
        }
        media
    }
}

/// The media graph in two: pixels → `visual_tokens`, and `visual_tokens` → keys and values.
fn cut_at_tokens(media: &Graph) -> Result<[Graph; 2], BackendError> {
    let (tokens, kv): (Vec<_>, Vec<(String, ValueId)>) =
        media.outputs().iter().cloned().partition(|(name, _)| name == "visual_tokens");
    let vision = media.part(media.inputs().to_vec(), tokens.clone());
    let media_kv = media.part(tokens, kv);
    let part = |part: Result<Graph, _>| {
        let expected = "keys and values: expected to be computed from `visual_tokens` alone";
        part.map_err(|error| broken(media, vec![format!("{expected}: {error}")]))
    };
    Ok([part(vision)?, part(media_kv)?])
}

/// Both parts of a graph, or what is wrong with either.
fn both(
    first: Result<NativeStage, BackendError>,
    second: Result<NativeStage, BackendError>,
) -> Result<[NativeStage; 2], BackendError> {
    use BackendError::{Unsupported, Weights};
    match (first, second) {
        (Ok(first), Ok(second)) => Ok([first, second]),
        (Err(Unsupported { graph, mut nodes }), Err(Unsupported { nodes: more, .. })) => {
            nodes.extend(more);
            Err(Unsupported { graph, nodes })
        }
        (Err(Weights { graph, mut weights }), Err(Weights { weights: more, .. })) => {
            weights.extend(more);
            Err(Weights { graph, weights })
        }
        (Err(error), _) | (_, Err(error)) => Err(error),
    }
}

fn media_call<'a>(bindings: &'a Bindings, numbers: &'a [(&'a str, &'a [f32])]) -> Call<'a> {
    Call { bindings, numbers, indices: &[], media: &[], media_time: &[] }
}

fn other_backend() -> BackendError {
    BackendError::Input {
        place: "sequences".into(),
        expected: "sequences that this backend made".into(),
        found: "one of another".into(),
        hint: "advance the sequences of each backend on their own",
    }
}

/// Buffers that are free, or new ones.
fn take(free: &Mutex<Vec<Buffers>>) -> Buffers {
    free.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
}

fn give_back(free: &Mutex<Vec<Buffers>>, buffers: Buffers) {
    free.lock().unwrap_or_else(PoisonError::into_inner).push(buffers);
}

/// Rows of several sequences, one after the other.
#[derive(Default)]
struct BatchRows {
    input_ids: Vec<i64>,
    positions: Vec<i64>,
    logit_rows: Vec<i64>,
    media: Vec<Arc<Media>>,
    media_time: Vec<u32>,
}

impl BatchRows {
    fn push(&mut self, sequence: &NativeSequence, step: &Step<'_>) -> Result<(), BackendError> {
        let too_many = || full(step, sequence.len, sequence.max_context);
        let n_media = u32::try_from(self.media.len()).map_err(|_| too_many())?;
        let first_row = self.input_ids.len();
        let own = sequence.len..sequence.len + step.input_ids.len();
        let logit_rows = step.logit_rows.iter().map(|row| first_row + row);
        self.logit_rows.extend(indices(logit_rows).ok_or_else(too_many)?);
        self.positions.extend(indices(own).ok_or_else(too_many)?);
        self.input_ids.extend(step.input_ids.iter().map(|id| i64::from(*id)));
        let time = |time: &u32| if *time == 0 { 0 } else { time.saturating_add(n_media) };
        self.media_time.extend(step.media_time.iter().map(time));
        self.media
            .extend(step.media.iter().enumerate().map(|(place, media)| media.at(place).clone()));
        Ok(())
    }
}

/// Keys and values of one sequence, in caches of fixed capacity.
#[derive(Clone, Debug)]
struct NativeSequence {
    shared: Arc<Shared>,
    caches: Vec<KvCache>,
    max_context: usize,
    len: usize,
}

impl Sequence for NativeSequence {
    fn len(&self) -> usize {
        self.len
    }

    fn max_context(&self) -> usize {
        self.max_context
    }

    fn advance(&mut self, step: &Step<'_>) -> Result<Vec<f32>, BackendError> {
        let shared = Arc::clone(&self.shared);
        let logits = shared.advance(&mut [(self, *step)])?;
        Ok(logits.into_iter().next().unwrap_or_default())
    }

    fn truncate(&mut self, len: usize) {
        if len < self.len {
            self.len = len;
            self.caches.iter_mut().for_each(|cache| cache.truncate(len));
        }
    }

    fn forget_oldest(&mut self) -> usize {
        if self.len <= KV_BLOCK {
            return 0;
        }
        self.caches.iter_mut().for_each(KvCache::forget_first_block);
        self.len -= KV_BLOCK;
        KV_BLOCK
    }

    fn fork(&self) -> Box<dyn Sequence> {
        Box::new(self.clone())
    }

    fn kv_bytes(&self) -> usize {
        self.caches.iter().map(KvCache::bytes).sum()
    }

    fn share(&self, block_idx: usize) -> Option<TokenBlock> {
        let is_there = block_idx < self.len.div_ceil(KV_BLOCK);
        let blocks = self.caches.iter().filter(|_| is_there).map(|cache| cache.share(block_idx));
        let blocks: Vec<SharedBlock> = blocks.collect::<Option<_>>()?;
        (!blocks.is_empty()).then(|| Arc::new(blocks))
    }

    fn adopt(&mut self, blocks: &[TokenBlock], len: usize) -> bool {
        let fits = self.len == 0
            && len <= self.max_context
            && blocks.len() == len.div_ceil(KV_BLOCK)
            && blocks.iter().all(|block| block.len() == self.caches.len());
        if !fits {
            return false;
        }
        for (layer, cache) in self.caches.iter_mut().enumerate() {
            let of_layer: Vec<SharedBlock> =
                blocks.iter().map(|block| block[layer].clone()).collect();
            cache.adopt(&of_layer);
        }
        self.len = len;
        true
    }

    fn block_from_bytes(&self, mut bytes: &[u8]) -> Option<TokenBlock> {
        let layer = |cache: &KvCache| cache.block_from_bytes(&mut bytes);
        let blocks: Vec<SharedBlock> = self.caches.iter().map(layer).collect::<Option<_>>()?;
        (bytes.is_empty() && !blocks.is_empty()).then(|| Arc::new(blocks))
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

fn bindings<const N: usize>(sizes: [(&str, usize); N]) -> Bindings {
    sizes.into_iter().map(|(name, size)| (name.to_owned(), size)).collect()
}
