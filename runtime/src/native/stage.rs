//! One graph, planned and checked against its weights: what a native backend runs.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use flamingo_ir::{Bindings, DType, Graph};
use flamingo_kernels::{KV_BLOCK, Kernels, KvCache, KvFormat};

use super::execute::{Context, Stored, Unresolved};
use super::plan::{
    Action, CacheShape, Indices, Instruction, MediaInput, Plan, PlanInput, PlanWeight, Role,
    Source, View, WeightOperand,
};
use super::size::Sizes;
use crate::backend::{BackendError, Media, WeightBytes, WeightMismatch};
use crate::contract;
use crate::profile::{Record, Recorder};
use crate::watch::{Watch, Watcher};

/// A graph as a static plan over mapped weights. Running it allocates nothing but the outputs
/// once its buffers have grown to the largest call.
pub struct NativeStage {
    plan: Plan,
    weights: Arc<dyn WeightBytes>,
    kernels: Arc<Kernels>,
    recorder: Recorder,
    watch: Watch,
}

/// Buffers of a stage; they grow when a call needs more, and one set serves one call at a time.
#[derive(Debug, Default)]
pub struct Buffers {
    slots: Vec<Vec<f32>>,
}

impl Buffers {
    /// Memory that the buffers take, in bytes.
    pub fn bytes(&self) -> usize {
        self.slots.iter().map(|slot| size_of_val(slot.as_slice())).sum()
    }
}

/// What one run of a stage reads.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// Values of the symbols `n_media`, `n_frames`, `text_len`, `past_len`, `n_logits`, those that
    /// occur in the graph.
    pub bindings: &'a Bindings,
    /// f32 inputs by name, row-major.
    pub numbers: &'a [(&'a str, &'a [f32])],
    /// i64 inputs by name; `positions` and `key_positions` only if the graph gathers by them.
    pub indices: &'a [(&'a str, &'a [i64])],
    /// Media of the sequence.
    pub media: &'a [Arc<Media>],
    /// For each row the medium it sees, 0 for none; empty for a graph without cross-attention.
    pub media_time: &'a [u32],
}

/// Rows of a call that belong to one sequence, and the caches that they read and extend. Sequences
/// share a pass over the weights; their rows lie one sequence after the other.
#[derive(Debug)]
pub struct Span<'a> {
    /// One a layer.
    pub caches: &'a mut [KvCache],
    /// Tokens that the caches hold.
    pub past_len: usize,
    /// New tokens.
    pub n_rows: usize,
}

/// Slices of a call's inputs by place; empty where an input is not read or not of that type.
struct Inputs<'a> {
    numbers: Vec<&'a [f32]>,
    indices: Vec<&'a [i64]>,
}

/// Memory of a stage, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageMemory {
    /// Weights, in the memory map.
    pub weight_bytes: usize,
    /// Literals of the graph, on the heap.
    pub literal_bytes: usize,
    /// Buffers of one call at a time.
    pub buffer_bytes: usize,
    /// What the buffers would take if none were shared.
    pub unshared_bytes: usize,
}

impl fmt::Debug for NativeStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NativeStage").field("plan", &self.plan).finish_non_exhaustive()
    }
}

impl Plan {
    /// All sizes of a call.
    ///
    /// # Errors
    /// If a symbol is unbound or a size overflows.
    pub(super) fn evaluate(&self, bindings: &Bindings) -> Result<Sizes, BackendError> {
        self.sizes.evaluate(bindings).map_err(|(dim, reason)| BackendError::Input {
            place: format!("graph \"{}\": dimension `{dim}`", self.graph),
            expected: "a size".into(),
            found: match reason.as_str() {
                "overflow" => reason,
                symbol => format!("no value of `{symbol}`"),
            },
            hint: "bind every symbol of the graph to a size that fits the machine",
        })
    }

    /// Elements of each slot.
    fn slot_sizes<'a>(&'a self, sizes: &'a Sizes) -> impl Iterator<Item = usize> + 'a {
        let largest = |slot: &Vec<_>| slot.iter().map(|size| sizes.get(*size)).max().unwrap_or(0);
        self.slots.iter().map(largest)
    }

    /// Heads of each gated block that the stage attends to, by block; 0 for others.
    pub(super) fn media_heads(&self) -> Vec<usize> {
        let mut heads = Vec::new();
        for instruction in &self.instructions {
            if let Action::CrossAttention { media, n_heads, .. } = &instruction.action {
                heads.resize(heads.len().max(media.block + 1), 0);
                heads[media.block] = *n_heads;
            }
        }
        heads
    }

    /// Memory that a call with these sizes needs.
    ///
    /// # Errors
    /// If a symbol is unbound or a size overflows.
    pub(super) fn memory(&self, bindings: &Bindings) -> Result<StageMemory, BackendError> {
        let sizes = self.evaluate(bindings)?;
        let bytes = |n_elements: usize| n_elements.saturating_mul(size_of::<f32>());
        let weight_bytes = |total: usize, weight: &PlanWeight| total.saturating_add(weight.bytes());
        let sum = |total: usize, n_elements| total.saturating_add(bytes(n_elements));
        let buffers = self.instructions.iter();
        let unshared = buffers.map(|i| sizes.get(i.rows).saturating_mul(sizes.get(i.cols)));
        Ok(StageMemory {
            weight_bytes: self.weights.iter().fold(0, weight_bytes),
            literal_bytes: self.literals.iter().map(Vec::len).fold(0, sum),
            buffer_bytes: self.slot_sizes(&sizes).fold(0, sum),
            unshared_bytes: unshared.fold(0, sum),
        })
    }
}

/// The tensor that a plan reads, if it is there and of that type.
fn stored<'a>(weights: &'a dyn WeightBytes, weight: &PlanWeight) -> Option<Stored<'a>> {
    match weight.dtype {
        DType::F32 => weights.f32(&weight.name).map(Stored::Numbers),
        dtype => {
            let (found, bytes) = weights.bytes(&weight.name)?;
            (found == dtype).then_some(Stored::Bytes(bytes))
        }
    }
}

impl NativeStage {
    /// Plans `graph` and checks that `weights` has what it needs.
    ///
    /// # Errors
    /// Lists every node without a kernel, every difference from the contract of stages, or every
    /// weight that is missing or of another size.
    pub fn new(
        graph: &Graph,
        weights: Arc<dyn WeightBytes>,
        kernels: Arc<Kernels>,
    ) -> Result<NativeStage, BackendError> {
        let plan = Plan::new(graph)?;
        let mismatch = |weight: &PlanWeight| {
            let found = weights.bytes(&weight.name);
            let found = found.map(|(dtype, bytes)| (dtype, bytes.len() / dtype.size()));
            let expected = (weight.dtype, weight.n_elements);
            let fits = found == Some(expected) && stored(weights.as_ref(), weight).is_some();
            (!fits).then(|| WeightMismatch { name: weight.name.clone(), expected, found })
        };
        let mismatches: Vec<WeightMismatch> = plan.weights.iter().filter_map(mismatch).collect();
        match mismatches.is_empty() {
            true => Ok(NativeStage {
                plan,
                weights,
                kernels,
                recorder: Recorder::default(),
                watch: Watch::default(),
            }),
            false => Err(BackendError::Weights { graph: plan.graph, weights: mismatches }),
        }
    }

    /// Gives back the memory of the weights; the next run reads them again.
    pub fn release_weights(&self) {
        self.weights.release();
    }

    /// Starts or stops recording what each instruction does.
    pub fn set_profiling(&self, is_on: bool) {
        self.recorder.set(is_on);
    }

    /// Shows a watcher all rows that meet a weight stored in f32, from now on; none stops it.
    pub fn set_watcher(&self, watcher: Option<Watcher>) {
        self.watch.set(watcher);
    }

    /// The instructions recorded since the last call, in the order in which they ended.
    pub fn take_profile(&self) -> Vec<Record> {
        self.recorder.take()
    }

    /// Names of the outputs of [`NativeStage::run`]: the graph's, without `present_k` and
    /// `present_v`.
    pub fn output_names(&self) -> impl Iterator<Item = &str> {
        self.plan.outputs.iter().map(|(name, _)| name.as_str())
    }

    /// Heads of each gated block that the stage attends to, by block; 0 for others.
    pub(super) fn media_heads(&self) -> Vec<usize> {
        self.plan.media_heads()
    }

    /// Names of the weights it reads, and their bytes.
    pub(super) fn weights_used(&self) -> impl Iterator<Item = (&str, usize)> {
        let weights = self.plan.weights.iter();
        weights.map(|weight| (weight.name.as_str(), weight.bytes()))
    }

    /// Number of layers with a cache.
    pub fn n_layers(&self) -> usize {
        self.plan.caches.len()
    }

    /// Memory that a call with these sizes needs.
    ///
    /// # Errors
    /// If a symbol is unbound or a size overflows.
    pub fn memory(&self, bindings: &Bindings) -> Result<StageMemory, BackendError> {
        self.plan.memory(bindings)
    }

    /// Empty caches for sequences of up to `capacity` tokens, one a layer. Their blocks are allocated as tokens come;
    /// that all of them could be had is checked here.
    ///
    /// # Errors
    /// If that memory cannot be had.
    pub fn new_caches(
        &self,
        capacity: usize,
        format: KvFormat,
    ) -> Result<Vec<KvCache>, BackendError> {
        let size = |shape: &CacheShape| {
            let n_slots = capacity.checked_next_multiple_of(KV_BLOCK)?;
            format.token_bytes(shape.n_kv_heads, shape.head_dim).checked_mul(n_slots)
        };
        let sizes = self.plan.caches.iter();
        let total = sizes.clone().try_fold(0usize, |total, shape| size(shape)?.checked_add(total));
        let bytes = total.unwrap_or(usize::MAX);
        // Asks for all of it once, so that a lack of memory is an error and not an abort.
        Vec::<u8>::new().try_reserve_exact(bytes).map_err(|_| BackendError::Memory {
            what: format!("keys and values of {capacity} tokens"),
            bytes,
            hint: "pass a smaller `--max-context`",
        })?;
        let cache = |shape: &CacheShape| {
            KvCache::with_format(shape.n_kv_heads, shape.head_dim, capacity, format)
        };
        Ok(self.plan.caches.iter().map(cache).collect())
    }

    /// Runs the stage: appends to the caches of each span and returns the outputs named by
    /// [`NativeStage::output_names`], each row-major. The spans cover the rows of the call.
    ///
    /// # Errors
    /// If an input is missing, of another size or out of range, or memory cannot be had; the
    /// caches then hold nothing new at or before their `past_len`.
    pub fn run(
        &self,
        call: &Call<'_>,
        spans: &mut [Span<'_>],
        buffers: &mut Buffers,
    ) -> Result<Vec<Vec<f32>>, BackendError> {
        let sizes = self.plan.evaluate(call.bindings)?;
        let inputs = self.check_inputs(call, &sizes)?;
        self.check_spans(call, spans)?;
        self.grow(&sizes, buffers)?;
        let weights = self.plan.weights.iter();
        let weights: Option<Vec<Stored<'_>>> =
            weights.map(|weight| stored(self.weights.as_ref(), weight)).collect();
        let weights = weights.ok_or_else(|| self.unresolved("a weight that was there"))?;
        let context = Context {
            kernels: &self.kernels,
            plan: &self.plan,
            sizes: &sizes,
            weights: &weights,
            numbers: &inputs.numbers,
            indices: &inputs.indices,
            media: call.media,
            media_time: call.media_time,
            n_scores: spans.iter().map(|span| span.n_rows * (span.past_len + span.n_rows)).sum(),
            slots: &[],
        };
        for instruction in &self.plan.instructions {
            self.step(instruction, context, spans, buffers)
                .map_err(|Unresolved| self.unresolved(&instruction.node))?;
        }
        let context = Context { slots: &buffers.slots, ..context };
        let read = |(name, view): &(String, View)| {
            context.read(view).map_err(|Unresolved| self.unresolved(name))
        };
        self.plan.outputs.iter().map(read).collect()
    }

    /// Runs one instruction; its output's slot is out of `buffers` meanwhile.
    fn step(
        &self,
        instruction: &Instruction,
        context: Context<'_>,
        spans: &mut [Span<'_>],
        buffers: &mut Buffers,
    ) -> Result<(), Unresolved> {
        let [rows, cols] = [instruction.rows, instruction.cols].map(|size| context.sizes.get(size));
        if rows == 0 || cols == 0 {
            return Ok(());
        }
        if self.watch.is_on() {
            self.show(instruction, Context { slots: &buffers.slots, ..context }, rows)?;
        }
        let started = self.recorder.start();
        let slot = self.plan.slot_of[instruction.buffer];
        let mut out = std::mem::take(&mut buffers.slots[slot]);
        let with_slots = Context { slots: &buffers.slots, ..context };
        let target = out.get_mut(..rows * cols).ok_or(Unresolved);
        let run = |target| with_slots.execute(&instruction.action, spans, target, (rows, cols));
        let result = target.and_then(run);
        buffers.slots[slot] = out;
        if let Some(start) = started {
            self.record(instruction, context, (rows, cols), start);
        }
        result
    }

    /// Shows the watcher the rows that an instruction multiplies with a weight.
    fn show(
        &self,
        instruction: &Instruction,
        context: Context<'_>,
        n_rows: usize,
    ) -> Result<(), Unresolved> {
        let (x, weight, only_seen) = match &instruction.action {
            Action::Linear { x, weight, only_seen, .. } => (x, weight, *only_seen),
            Action::GatedLinear { x, weight, .. } => (x, weight, false),
            _ => return Ok(()),
        };
        let WeightOperand::Numbers(View { source: Source::Weight(place), .. }) = weight else {
            return Ok(());
        };
        let name = &self.plan.weights.get(*place).ok_or(Unresolved)?.name;
        let rows = context.read(x)?;
        let k = context.sizes.get(x.cols);
        for stretch in context.stretches(only_seen, n_rows) {
            let seen = rows.get(stretch.start * k..stretch.end * k).ok_or(Unresolved)?;
            self.watch.show(name, seen, k);
        }
        Ok(())
    }

    fn record(
        &self,
        instruction: &Instruction,
        context: Context<'_>,
        shape: (usize, usize),
        start: Instant,
    ) {
        let duration = start.elapsed();
        self.recorder.add(Record {
            graph: self.plan.graph.clone(),
            node: instruction.node.clone(),
            op: instruction.action.name(),
            start,
            duration,
            work: context.tally().work(&instruction.action, shape),
        });
    }

    fn unresolved(&self, place: &str) -> BackendError {
        BackendError::Graph {
            graph: self.plan.graph.clone(),
            problems: vec![format!("`{place}`: expected operands as planned, found others")],
        }
    }

    fn grow(&self, sizes: &Sizes, buffers: &mut Buffers) -> Result<(), BackendError> {
        buffers.slots.resize_with(self.plan.slots.len(), Vec::new);
        for (slot, needed) in buffers.slots.iter_mut().zip(self.plan.slot_sizes(sizes)) {
            let more = needed.saturating_sub(slot.len());
            if more > 0 {
                slot.try_reserve_exact(more).map_err(|_| BackendError::Memory {
                    what: format!("a buffer of graph \"{}\"", self.plan.graph),
                    bytes: needed.saturating_mul(size_of::<f32>()),
                    hint: "give fewer tokens or frames at once",
                })?;
                slot.resize(needed, 0.0);
            }
        }
        Ok(())
    }

    /// Slices of the inputs that are read, by place; the rest is empty.
    fn check_inputs<'a>(&self, call: &Call<'a>, sizes: &Sizes) -> Result<Inputs<'a>, BackendError> {
        let n_inputs = self.plan.inputs.len();
        let (mut numbers, mut indices) =
            (vec![&[] as &[f32]; n_inputs], vec![&[] as &[i64]; n_inputs]);
        for (place, input) in self.plan.inputs.iter().enumerate().filter(|(_, i)| i.is_read) {
            let expected = sizes.get(input.n_elements);
            match input.role {
                Role::Numbers => {
                    let found = call.numbers.iter().find(|(name, _)| *name == input.name);
                    numbers[place] =
                        self.expect_len(input, expected, found.map(|(_, data)| *data))?;
                }
                Role::Indices if input.name == "media_time" => {
                    self.expect_len(input, expected, Some(call.media_time))?;
                    self.check_media_time(call.media_time, call.media.len())?;
                }
                Role::Indices => {
                    let found = call.indices.iter().find(|(name, _)| *name == input.name);
                    indices[place] =
                        self.expect_len(input, expected, found.map(|(_, data)| *data))?;
                }
                Role::Media(media) => self.check_media(input, media, call)?,
                Role::PastK(_) | Role::PastV(_) => {}
            }
        }
        for (Indices { input, offset }, limit) in &self.plan.limits {
            let (name, limit) = (&self.plan.inputs[*input].name, sizes.get(*limit));
            contract::check_range(&self.plan.graph, name, indices[*input], *offset, limit)?;
        }
        Ok(Inputs { numbers, indices })
    }

    fn wrong_input(&self, name: &str, expected: String, found: String) -> BackendError {
        contract::wrong_input(&self.plan.graph, name, expected, found)
    }

    fn expect_len<'a, T>(
        &self,
        input: &PlanInput,
        expected: usize,
        found: Option<&'a [T]>,
    ) -> Result<&'a [T], BackendError> {
        found.filter(|data| data.len() == expected).ok_or_else(|| {
            let found = found.map_or("none".into(), |data| data.len().to_string());
            self.wrong_input(&input.name, format!("{expected} elements"), found)
        })
    }

    /// Checks that every entry of `media_time` is 0 or one of `n_media`.
    ///
    /// # Errors
    /// The first that is not.
    pub(super) fn check_media_time(
        &self,
        media_time: &[u32],
        n_media: usize,
    ) -> Result<(), BackendError> {
        let is_outside = |time: &&u32| usize::try_from(**time).is_ok_and(|time| time > n_media);
        match media_time.iter().find(is_outside) {
            None => Ok(()),
            Some(time) => {
                let expected = format!("0 to {n_media}, the number of media");
                Err(self.wrong_input("media_time", expected, time.to_string()))
            }
        }
    }

    fn check_media(
        &self,
        input: &PlanInput,
        media_input: MediaInput,
        call: &Call<'_>,
    ) -> Result<(), BackendError> {
        for (index, media) in call.media.iter().enumerate() {
            let found = media.block_len(media_input.block, media_input.is_key);
            let n_latents = media_input.n_latents.unwrap_or(media.n_latents);
            let place = (self.plan.graph.as_str(), input.name.as_str());
            contract::check_medium(place, index, found, [n_latents, media_input.width])?;
        }
        Ok(())
    }

    fn check_spans(&self, call: &Call<'_>, spans: &[Span<'_>]) -> Result<(), BackendError> {
        if self.plan.caches.is_empty() {
            return Ok(());
        }
        let text_len = call.bindings.get("text_len").copied().unwrap_or(0);
        if spans.iter().map(|span| span.n_rows).sum::<usize>() != text_len {
            let expected = format!("sequences of together {text_len} tokens");
            return Err(self.wrong_input("input_ids", expected, "another number".into()));
        }
        let shape = |cache: &KvCache| CacheShape {
            n_kv_heads: cache.n_kv_heads(),
            head_dim: cache.head_dim(),
        };
        for Span { caches, past_len, n_rows } in spans {
            let total_len = past_len.saturating_add(*n_rows);
            let fits = caches.len() == self.plan.caches.len()
                && caches.iter().zip(&self.plan.caches).all(|(cache, expected)| {
                    shape(cache) == *expected && cache.capacity() >= total_len
                });
            if !fits {
                let expected = format!("room for {total_len} tokens in caches of this stage");
                let found = caches.iter().map(KvCache::capacity).min();
                let found = found.map_or("none".into(), |found| format!("room for {found}"));
                return Err(self.wrong_input("past_k", expected, found));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
impl NativeStage {
    /// Inputs of the graph, in order.
    pub(super) fn plan_inputs(&self) -> &[PlanInput] {
        &self.plan.inputs
    }
}
