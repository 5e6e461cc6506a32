//! What a backend is: it encodes media once, and advances sequences of text over them.
//!
//! A session (prompt, caches, sampling) talks to [`Backend`] and [`Sequence`] only; which engine
//! executes the graphs is decided when an artifact is opened.
#![forbid(unsafe_code)]

use std::any::Any;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use flamingo_ir::DType;
use flamingo_kernels::{KernelError, KvCache, Matrix, SharedBlock};

use crate::profile::Record;
use crate::watch::Watcher;

/// What is known of one medium (a picture, or the frames of a video) after it was encoded: its
/// visual tokens, and the keys and values of every gated block. Shared between sequences.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Media {
    /// Output of the resampler, `[n_latents, dim]`, f32; where places have embeddings, of each place a medium can have in a
    /// prompt, one after the other.
    pub visual_tokens: Vec<f32>,
    /// Keys and values of each gated block, at the first place of a prompt.
    pub blocks: Vec<MediaKv>,
    /// Latents of a medium at one place.
    pub n_latents: usize,
    /// What it is at the second place and after, where places have embeddings, without visual tokens; else empty.
    pub later: Vec<Arc<Media>>,
}

/// Keys and values of a medium for one gated block.
#[derive(Clone, Debug, PartialEq, Default)]
pub enum MediaKv {
    /// The block has none.
    #[default]
    None,
    /// As graphs give and take them.
    Rows {
        /// Keys `[n_latents, inner]`, f32.
        k: Vec<f32>,
        /// Values `[n_latents, inner]`, f32.
        v: Vec<f32>,
    },
    /// As native attention reads them.
    Cache(KvCache),
}

impl MediaKv {
    /// Keys `[n_latents, inner]`, f32; empty if there are none.
    pub fn keys(&self) -> Cow<'_, [f32]> {
        match self {
            MediaKv::None => Cow::Borrowed(&[]),
            MediaKv::Rows { k, .. } => Cow::Borrowed(k),
            MediaKv::Cache(cache) => Cow::Owned(cache.key_rows()),
        }
    }

    /// Values `[n_latents, inner]`, f32; empty if there are none.
    pub fn values(&self) -> Cow<'_, [f32]> {
        match self {
            MediaKv::None => Cow::Borrowed(&[]),
            MediaKv::Rows { v, .. } => Cow::Borrowed(v),
            MediaKv::Cache(cache) => Cow::Owned(cache.value_rows()),
        }
    }

    /// Numbers of the keys and of the values.
    pub(crate) fn lens(&self) -> [usize; 2] {
        match self {
            MediaKv::None => [0, 0],
            MediaKv::Rows { k, v } => [k.len(), v.len()],
            MediaKv::Cache(cache) => [cache.capacity() * cache.n_kv_heads() * cache.head_dim(); 2],
        }
    }

    /// The same shapes and format with all numbers 0: what visual tokens of zeros give, since keys and values are
    /// products of them without a bias.
    fn zeroed(&self) -> MediaKv {
        match self {
            MediaKv::None => MediaKv::None,
            MediaKv::Rows { k, v } => {
                MediaKv::Rows { k: vec![0.0; k.len()], v: vec![0.0; v.len()] }
            }
            MediaKv::Cache(cache) => {
                let (n_latents, heads) = (cache.capacity(), cache.n_kv_heads());
                let zeros = vec![0.0; n_latents * heads * cache.head_dim()];
                let rows = Matrix::new(&zeros, n_latents, heads * cache.head_dim());
                MediaKv::Cache(KvCache::from_rows(heads, rows, rows, cache.format()))
            }
        }
    }

    fn bytes(&self) -> usize {
        match self {
            MediaKv::None => 0,
            MediaKv::Rows { k, v } => (k.len() + v.len()) * size_of::<f32>(),
            MediaKv::Cache(cache) => cache.bytes(),
        }
    }
}

impl Media {
    /// Memory that the numbers take, in bytes.
    pub fn bytes(&self) -> usize {
        let blocks: usize = self.blocks.iter().map(MediaKv::bytes).sum();
        let later: usize = self.later.iter().map(|media| media.bytes()).sum();
        self.visual_tokens.len() * size_of::<f32>() + blocks + later
    }

    /// What the medium is as the `place`-th of a prompt, from 0.
    pub(crate) fn at(self: &Arc<Media>, place: usize) -> &Arc<Media> {
        place.checked_sub(1).and_then(|place| self.later.get(place)).unwrap_or(self)
    }

    /// Takes the keys and values of `n_places` places apart, which lie one after the other.
    pub(crate) fn split(mut self, n_places: usize) -> Media {
        self.n_latents /= n_places.max(1);
        let blocks = std::mem::take(&mut self.blocks);
        let mut places = (0..n_places).map(|place| {
            let of_place = |rows: &[f32]| {
                let n = rows.len() / n_places;
                rows[place * n..(place + 1) * n].to_vec()
            };
            let block = |kv: &MediaKv| match kv {
                MediaKv::Rows { k, v } => MediaKv::Rows { k: of_place(k), v: of_place(v) },
                MediaKv::None | MediaKv::Cache(_) => kv.clone(),
            };
            blocks.iter().map(block).collect::<Vec<MediaKv>>()
        });
        let first = places.next().unwrap_or_default();
        let later =
            |blocks| Arc::new(Media { blocks, n_latents: self.n_latents, ..Media::default() });
        let later = places.map(later).collect();
        Media { blocks: first, later, ..self }
    }

    /// What a medium of visual tokens of zeros would be: the control of what a model answers without eyes.
    pub fn blind(&self) -> Media {
        Media {
            visual_tokens: vec![0.0; self.visual_tokens.len()],
            blocks: self.blocks.iter().map(MediaKv::zeroed).collect(),
            n_latents: self.n_latents,
            later: self.later.iter().map(|media| Arc::new(media.blind())).collect(),
        }
    }

    /// Numbers of the keys or the values of a block.
    pub(crate) fn block_len(&self, block: usize, is_key: bool) -> usize {
        let [k, v] = self.blocks.get(block).map_or([0, 0], MediaKv::lens);
        if is_key { k } else { v }
    }
}

/// New tokens of one sequence: a whole prompt, a part of it, or one token.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// The new tokens, at least one.
    pub input_ids: &'a [u32],
    /// For each new token the medium it sees: 0 none, t the t-th of `media`.
    pub media_time: &'a [u32],
    /// All media of the sequence so far, in the order of the text.
    pub media: &'a [Arc<Media>],
    /// Which of the new tokens' logits are wanted, as indices into `input_ids`.
    pub logit_rows: &'a [usize],
}

/// How visual tokens are kept without losing a bit of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenFormat {
    /// 4 bytes a number.
    F32,
    /// 2 bytes a number: the engine rounded the numbers to it.
    F16,
}

/// An engine that executes the two graphs of an artifact.
pub trait Backend: Send + Sync {
    /// Name on the command line: `native`, `ort`, `tract`.
    fn name(&self) -> &'static str;

    /// Encodes media: pixel values `[n_media, n_frames, 3, size, size]`, f32, normalised.
    ///
    /// # Errors
    /// If the sizes disagree with each other or with the model.
    fn encode(
        &self,
        pixel_values: &[f32],
        n_media: usize,
        n_frames: usize,
    ) -> Result<Vec<Media>, BackendError>;

    /// How the visual tokens of a medium may be kept for [`Backend::media_from_tokens`]; `None` if
    /// this engine has no such thing.
    fn token_format(&self) -> Option<TokenFormat> {
        None
    }

    /// The medium of `n_frames` frames whose visual tokens `[n_latents, dim]`, f32, these are: bit
    /// for bit what [`Backend::encode`] gave.
    ///
    /// # Errors
    /// If their number does not fit the model, or [`Backend::token_format`] is `None`.
    fn media_from_tokens(
        &self,
        _visual_tokens: Vec<f32>,
        _n_frames: usize,
    ) -> Result<Media, BackendError> {
        Err(BackendError::Engine {
            engine: self.name(),
            place: "visual tokens".into(),
            reason: "this engine encodes from pixels alone".into(),
            hint: "use `--backend native`",
        })
    }

    /// What the frozen vision encoder sees in a medium, `[vision_dim]`: its output, averaged over patches and frames and
    /// scaled to length 1. `None` if this engine cannot say.
    ///
    /// # Errors
    /// If the sizes do not fit the model.
    fn vision_features(
        &self,
        _pixel_values: &[f32],
        _n_frames: usize,
    ) -> Result<Option<Vec<f32>>, BackendError> {
        Ok(None)
    }

    /// What the user is to know of how the engine runs the graphs; each is told once.
    fn take_warnings(&self) -> Vec<String> {
        Vec::new()
    }

    /// What beside graphs and weights decides the bits of media: engine, instruction set, formats.
    fn arithmetic(&self) -> String {
        self.name().to_owned()
    }

    /// Advances several sequences together, as [`Sequence::advance`] does each: engines that can
    /// read the weights once for all of them. Numbers do not depend on the company. After an error
    /// no sequence has changed.
    ///
    /// # Errors
    /// If a step does not fit, or a sequence is of another backend.
    fn advance_together(
        &self,
        batch: &mut [(&mut dyn Sequence, Step<'_>)],
    ) -> Result<Vec<Vec<f32>>, BackendError> {
        let lens: Vec<usize> = batch.iter().map(|(sequence, _)| sequence.len()).collect();
        let advance = |(sequence, step): &mut (&mut dyn Sequence, Step<'_>)| sequence.advance(step);
        let logits = batch.iter_mut().map(advance).collect::<Result<Vec<_>, _>>();
        if logits.is_err() {
            batch.iter_mut().zip(lens).for_each(|((sequence, _), len)| sequence.truncate(len));
        }
        logits
    }

    /// An empty sequence that can grow to `max_context` tokens.
    ///
    /// # Errors
    /// If the memory for its keys and values cannot be had.
    fn new_sequence(&self, max_context: usize) -> Result<Box<dyn Sequence>, BackendError>;

    /// Gives back the memory of weights that can be read again, at the cost of reading them: for programs that open
    /// several large models and run one after the other.
    fn release_weights(&self) {}

    /// Memory of weights and buffers; `None` if the engine does not say.
    fn memory(&self) -> Option<BackendMemory> {
        None
    }

    /// Starts or stops recording what each instruction does; whether this engine can.
    fn set_profiling(&self, _is_on: bool) -> bool {
        false
    }

    /// Shows a watcher the rows that meet each weight stored in f32, from now on; none stops it. False if the
    /// backend cannot.
    fn set_watcher(&self, _watcher: Option<Watcher>) -> bool {
        false
    }

    /// The instructions recorded since the last call, by their start.
    fn take_profile(&self) -> Vec<Record> {
        Vec::new()
    }
}

/// The keys and values of one sequence's tokens.
pub trait Sequence: Send {
    /// Tokens so far.
    fn len(&self) -> usize;

    /// Whether no token was given yet.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens it can hold.
    fn max_context(&self) -> usize;

    /// Appends tokens and returns logits `[n_logit_rows, vocab]`, f32. After an error the
    /// sequence is as before.
    ///
    /// # Errors
    /// If the step does not fit the model, its media or the room left.
    fn advance(&mut self, step: &Step<'_>) -> Result<Vec<f32>, BackendError>;

    /// Forgets the tokens from `len` on; nothing if there are fewer.
    fn truncate(&mut self, len: usize);

    /// Whether [`Sequence::truncate`] copies nothing; else a fork from before costs less.
    fn truncates_in_place(&self) -> bool {
        true
    }

    /// Forgets its oldest tokens and returns their number, 0 if this engine cannot or there are too few. What is left
    /// counts from 0 again, which changes nothing only where positions are distances (ALiBi).
    fn forget_oldest(&mut self) -> usize {
        0
    }

    /// A sequence of the same tokens that goes its own way from here on.
    fn fork(&self) -> Box<dyn Sequence>;

    /// Memory of keys and values, in bytes; what forks share counts in full.
    fn kv_bytes(&self) -> usize;

    /// Keys and values of block `block_idx` ([`KV_BLOCK`](flamingo_kernels::KV_BLOCK) tokens) of every layer, for sequences that begin alike; `None`
    /// if this engine shares none, or the block has no token.
    fn share(&self, _block_idx: usize) -> Option<TokenBlock> {
        None
    }

    /// Begins with the first `len` tokens of other sequences of this backend, whose blocks these are; whether it did. A
    /// sequence that has tokens does not.
    fn adopt(&mut self, _blocks: &[TokenBlock], _len: usize) -> bool {
        false
    }

    /// A block that [`block_bytes`] wrote of a sequence of the same model and format; `None` if the bytes are not one, or
    /// this engine shares none.
    fn block_from_bytes(&self, _bytes: &[u8]) -> Option<TokenBlock> {
        None
    }

    /// The sequence itself, for the backend that made it.
    fn as_any_mut(&mut self) -> &mut dyn Any;
}

/// Keys and values of a block of tokens, one [`SharedBlock`] a layer: memory that several sequences have.
pub type TokenBlock = Arc<Vec<SharedBlock>>;

/// The numbers of a block, layer after layer.
pub fn block_bytes(block: &TokenBlock) -> Vec<u8> {
    let mut bytes = Vec::new();
    block.iter().for_each(|layer| layer.append_to(&mut bytes));
    bytes
}

/// Memory of a backend, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendMemory {
    /// Weights that it reads from the memory map.
    pub weight_bytes: usize,
    /// Buffers that its calls work in; they grow to the largest call.
    pub buffer_bytes: usize,
}

/// Where weights lie: a memory map, so that no backend needs a copy. Answers never change.
pub trait WeightBytes: Send + Sync {
    /// Element type and little-endian bytes, row-major, of the tensor `name`, if there is one.
    fn bytes(&self, name: &str) -> Option<(DType, &[u8])>;

    /// Gives back the memory of weights that can be read again.
    fn release(&self) {}

    /// The f32 tensor `name`, row-major; `None` if there is none of that name and type.
    fn f32(&self, name: &str) -> Option<&[f32]> {
        match self.bytes(name)? {
            (DType::F32, bytes) => bytemuck::try_cast_slice(bytes).ok(),
            _ => None,
        }
    }
}

/// Weights in ordinary memory, for small models and tests.
impl WeightBytes for BTreeMap<String, Vec<f32>> {
    fn bytes(&self, name: &str) -> Option<(DType, &[u8])> {
        self.get(name).map(|data| (DType::F32, bytemuck::cast_slice(data)))
    }
}

/// A node that a backend has no kernel for.
#[derive(Clone, Debug, PartialEq)]
pub struct UnsupportedNode {
    /// The node's name.
    pub node: String,
    /// The op's name.
    pub op: &'static str,
    /// What about it is not supported.
    pub reason: String,
}

impl fmt::Display for UnsupportedNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node \"{}\" ({}): {}", self.node, self.op, self.reason)
    }
}

/// Why a backend cannot load or run a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// Nodes without a kernel, all of them.
    #[error(
        "graph \"{graph}\": {} nodes cannot be executed:\n  {}\n\n\
         hint: compile with the standard passes, or run with `--backend ort`",
        nodes.len(), lines(nodes)
    )]
    Unsupported {
        /// The graph.
        graph: String,
        /// Every node concerned.
        nodes: Vec<UnsupportedNode>,
    },
    /// The graph is not one of an artifact of this version; all differences.
    #[error(
        "graph \"{graph}\": {}\n\nhint: compile the artifact again with this version",
        lines(problems)
    )]
    Graph {
        /// The graph.
        graph: String,
        /// Each difference: place, expected, found.
        problems: Vec<String>,
    },
    /// Weights are missing or of another size; all of them.
    #[error(
        "graph \"{graph}\": weights do not fit:\n  {}\n\n\
         hint: the weights file belongs to another graph; compile the artifact again",
        lines(weights)
    )]
    Weights {
        /// The graph.
        graph: String,
        /// Every weight concerned.
        weights: Vec<WeightMismatch>,
    },
    /// A value given by the caller does not fit.
    #[error("{place}: expected {expected}, found {found}\n\nhint: {hint}")]
    Input {
        /// Which input, and where in it.
        place: String,
        /// What would fit.
        expected: String,
        /// What came.
        found: String,
        /// What to do.
        hint: &'static str,
    },
    /// Memory that cannot be had.
    #[error("{what}: expected {bytes} bytes of memory, found less\n\nhint: {hint}")]
    Memory {
        /// What it is for.
        what: String,
        /// How much; `usize::MAX` where the number itself overflows.
        bytes: usize,
        /// What to do.
        hint: &'static str,
    },
    /// The kernels cannot be used.
    #[error(transparent)]
    Kernels(#[from] KernelError),
    /// An engine other than ours cannot be had, or cannot load or run a graph.
    #[error("{engine}: {place}: {reason}\n\nhint: {hint}")]
    Engine {
        /// Name of the backend.
        engine: &'static str,
        /// The library, file or graph.
        place: String,
        /// What the engine says; for a library what was looked for and found.
        reason: String,
        /// What to do.
        hint: &'static str,
    },
}

/// A weight that is missing or of another size.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightMismatch {
    /// Name of the tensor.
    pub name: String,
    /// Element type and number of elements that the graph declares.
    pub expected: (DType, usize),
    /// What the file has; `None` if it has no tensor of that name.
    pub found: Option<(DType, usize)>,
}

impl fmt::Display for WeightMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (dtype, n) = self.expected;
        write!(f, "weight `{}`: expected {n} {dtype} elements, found ", self.name)?;
        match self.found {
            Some((found, n)) if found == dtype => write!(f, "{n}"),
            Some((found, n)) => write!(f, "{n} of {found}"),
            None => f.write_str("none"),
        }
    }
}

fn lines<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join("\n  ")
}

/// Mixing weights `[n_frames, n_max]` of learnt temporal embeddings: frame i takes row i; more
/// frames than rows are spread evenly from the first row to the last, linearly interpolated
/// (Flamingo paper, appendix on video: 8 embeddings for 30 frames).
pub fn frame_weights(n_frames: usize, n_max: usize) -> Vec<f32> {
    let mut weights = vec![0.0; n_frames.saturating_mul(n_max)];
    for (frame, row) in weights.chunks_exact_mut(n_max.max(1)).enumerate() {
        if n_frames <= n_max {
            row[frame] = 1.0;
            continue;
        }
        let time = frame * (n_max - 1);
        let (below, rest) = (time / (n_frames - 1), time % (n_frames - 1));
        let share = rest as f32 / (n_frames - 1) as f32;
        row[below] = 1.0 - share;
        if rest > 0 {
            row[below + 1] = share;
        }
    }
    weights
}

#[cfg(test)]
mod tests {
    use flamingo_kernels::{KvFormat, Matrix};

    use super::*;

    #[test]
    fn frames_beyond_the_table_are_interpolated() {
        assert_eq!(frame_weights(2, 3), [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]);
        assert_eq!(frame_weights(3, 2), [1.0, 0.0, 0.5, 0.5, 0.0, 1.0]);
        assert_eq!(frame_weights(3, 1), [1.0; 3]);
        assert!(frame_weights(3, 0).is_empty());
        assert!(frame_weights(0, 3).is_empty());
        for row in frame_weights(30, 8).chunks(8) {
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn errors_list_everything_and_end_with_a_hint() {
        let node = |node: &str| UnsupportedNode {
            node: node.into(),
            op: "Erf",
            reason: "no kernel; use `Activate`".into(),
        };
        let error =
            BackendError::Unsupported { graph: "media".into(), nodes: vec![node("a"), node("b")] };
        let text = error.to_string();
        assert!(text.contains("node \"a\" (Erf)") && text.contains("node \"b\" (Erf)"), "{text}");
        assert!(text.contains("\n\nhint: "), "{text}");
        let missing = WeightMismatch { name: "w".into(), expected: (DType::F32, 4), found: None };
        assert_eq!(missing.to_string(), "weight `w`: expected 4 f32 elements, found none");
    }

    #[test]
    fn media_know_their_size() {
        let zeros = [0.0; 256];
        let rows = Matrix::new(&zeros, 16, 16);
        let media = Media {
            visual_tokens: vec![0.0; 6],
            blocks: vec![
                MediaKv::Rows { k: vec![0.0; 4], v: vec![0.0; 4] },
                MediaKv::Cache(KvCache::from_rows(1, rows, rows, KvFormat::F32)),
                MediaKv::None,
            ],
            n_latents: 2,
            later: vec![Arc::new(Media { visual_tokens: vec![0.0; 3], ..Media::default() })],
        };
        assert_eq!(media.bytes(), (17 + 2 * 256) * 4);
    }

    #[test]
    fn places_are_taken_apart() {
        let rows = |first: usize| (first..first + 4).map(|n| n as f32).collect::<Vec<f32>>();
        let kv = |k: &[f32], v: &[f32]| MediaKv::Rows { k: k.to_vec(), v: v.to_vec() };
        let media =
            Media { blocks: vec![kv(&rows(0), &rows(10))], n_latents: 4, ..Media::default() };
        let media = Arc::new(media.split(2));
        assert_eq!((media.n_latents, media.later.len()), (2, 1));
        assert_eq!(media.at(0).blocks, [kv(&[0.0, 1.0], &[10.0, 11.0])]);
        assert_eq!(media.at(1).blocks, [kv(&[2.0, 3.0], &[12.0, 13.0])]);
    }
}
