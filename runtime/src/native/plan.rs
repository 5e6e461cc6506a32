//! The plan of a stage: a graph as a flat list of instructions over views of weights, inputs and
//! shared buffers. Made once at load; nothing about it is decided again per call.
//!
//! A value is a matrix: its last axis gives the columns, the product of the others the rows.
//! `Reshape`, `MergeFrames`, and `Split` and `Slice` of the last or first axis are views and cost
//! nothing; every other value has a buffer, and buffers whose lifetimes do not overlap share a
//! slot.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use flamingo_ir::{Bindings, Constant, DType, Dim, Fact, Graph, ValueId};
use flamingo_kernels::{Activation, Convolution, PanelFormat, SelfAttention};

use super::size::{Size, SizeTable};
use crate::backend::{BackendError, UnsupportedNode};

/// Symbols that shapes may use; the caller of a stage binds those that occur.
pub(super) const SYMBOLS: [&str; 6] =
    ["n_media", "n_frames", "n_latents", "text_len", "past_len", "n_logits"];

/// Largest number of elements of a value when every symbol is 1: keeps products of dimensions far
/// from overflow while a plan is made.
const MAX_ELEMENTS: usize = 1 << 44;

/// Where the elements of a view lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A weight, by its place in [`Plan::weights`].
    Weight(usize),
    /// A literal, by its place in [`Plan::literals`].
    Literal(usize),
    /// An f32 input of the graph, by its place in [`Plan::inputs`].
    Input(usize),
    /// A buffer, by its place in [`Plan::slot_of`].
    Buffer(usize),
}

/// A matrix whose rows may lie apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub(super) source: Source,
    /// Element at which row 0 starts.
    pub(super) offset: Size,
    pub(super) rows: Size,
    pub(super) cols: Size,
    /// Elements from one row to the next.
    pub(super) row_stride: Size,
}

/// A weight in panels; numbers are places in [`Plan::weights`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PanelPlaces {
    pub(super) format: PanelFormat,
    /// Output features.
    pub(super) n: usize,
    /// Input features.
    pub(super) k: usize,
    pub(super) data: usize,
    pub(super) row_scales: Option<usize>,
    pub(super) block_scales: Option<usize>,
}

/// The weight of a linear, or a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WeightOperand {
    /// f32 numbers somewhere.
    Numbers(View),
    /// Panels in the weight file.
    Panels(PanelPlaces),
}

impl WeightOperand {
    fn view(&self) -> Option<View> {
        match self {
            WeightOperand::Numbers(view) => Some(*view),
            WeightOperand::Panels(_) => None,
        }
    }
}

/// A tensor of the weight file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PlanWeight {
    pub(super) name: String,
    pub(super) dtype: DType,
    pub(super) n_elements: usize,
}

impl PlanWeight {
    /// Bytes in the weight file.
    pub(super) fn bytes(&self) -> usize {
        self.n_elements.saturating_mul(self.dtype.size())
    }
}

/// Rows of a view that go to the output together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) view: View,
    /// First row of block 0.
    pub(super) first: Size,
    /// Rows from one block to the next; 0 repeats the same rows.
    pub(super) stride: Size,
    /// Rows of a block.
    pub(super) n_rows: Size,
}

/// Numbers of an index input, each moved by the same offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Indices {
    /// Place in [`Plan::inputs`].
    pub(super) input: usize,
    /// Added to each.
    pub(super) offset: i64,
}

/// What an instruction computes.
#[derive(Debug)]
pub(super) enum Action {
    /// act(x Wᵀ + bias) + residual; with `only_seen`, rows that see no medium get the residual
    /// alone, or stay unwritten if there is none.
    Linear {
        x: View,
        weight: WeightOperand,
        bias: Option<View>,
        activation: Option<Activation>,
        residual: Option<View>,
        only_seen: bool,
    },
    /// act(x Gᵀ) · x Uᵀ with the weight [G; U].
    GatedLinear { x: View, weight: WeightOperand, bias: Option<View>, activation: Activation },
    /// act(x).
    Activate { x: View, activation: Activation },
    /// Layer (centred) or root-mean-square normalisation of each of `n_heads` parts of a row.
    Norm {
        x: View,
        scale: Option<View>,
        bias: Option<View>,
        epsilon: f32,
        n_heads: usize,
        is_centred: bool,
        only_seen: bool,
    },
    /// Bidirectional attention over segments of keys and values.
    Attention { q: View, segments: Vec<[View; 2]>, n_groups: Size, n_heads: usize, scale: f32 },
    /// Causal attention over the cache of `layer`.
    SelfAttention { q: View, k: View, v: View, layer: usize, attributes: SelfAttention },
    /// Attention to the keys and values of the medium that each row sees.
    CrossAttention { q: View, media: MediaInput, n_heads: usize, scale: f32 },
    /// Patches of pictures `[n, channels, height, width]`, as rows.
    Patches { x: View, channels: usize, height: usize, patch_size: usize },
    /// act(convolution(x) + bias) of each picture.
    Convolution {
        x: View,
        weight: View,
        bias: Option<View>,
        activation: Option<Activation>,
        geometry: Convolution,
    },
    /// Mean of each square of `side` pixels of pictures `[height, width]`.
    MeanPool { x: View, input: [usize; 2], side: usize },
    /// Mean of the pixels of each picture.
    PictureMean { x: View, n_pixels: usize },
    /// x · gain σ(gates) + residual, with gates of a picture for all its pixels.
    ChannelGate { x: View, gates: View, gain: View, residual: Option<View>, n_pixels: usize },
    /// Row i is a's row i plus b's row (i / repeat) mod (rows of b).
    Add { a: View, b: View, repeat: Size },
    /// Row i is a's row i times b's row i mod (rows of b).
    Mul { a: View, b: View },
    /// a b, for small matrices.
    Product { a: View, b: View },
    /// Rows of a table by an index input.
    Gather { table: WeightOperand, indices: Indices },
    /// For each of `n_blocks` blocks, the rows of each part.
    Copy { n_blocks: Size, parts: Vec<Part> },
}

impl Action {
    /// All views that the action reads.
    pub(super) fn views(&self) -> Vec<View> {
        let optional = |views: &[Option<View>]| views.iter().flatten().copied().collect::<Vec<_>>();
        match self {
            Action::Linear { x, weight, bias, residual, .. } => {
                optional(&[Some(*x), weight.view(), *bias, *residual])
            }
            Action::GatedLinear { x, weight, bias, .. } => {
                optional(&[Some(*x), weight.view(), *bias])
            }
            Action::Activate { x, .. }
            | Action::Patches { x, .. }
            | Action::MeanPool { x, .. }
            | Action::PictureMean { x, .. } => vec![*x],
            Action::Convolution { x, weight, bias, .. } => {
                optional(&[Some(*x), Some(*weight), *bias])
            }
            Action::ChannelGate { x, gates, gain, residual, .. } => {
                optional(&[Some(*x), Some(*gates), Some(*gain), *residual])
            }
            Action::Norm { x, scale, bias, .. } => optional(&[Some(*x), *scale, *bias]),
            Action::Attention { q, segments, .. } => [&[*q], segments.as_flattened()].concat(),
            Action::SelfAttention { q, k, v, .. } => vec![*q, *k, *v],
            Action::CrossAttention { q, .. } => vec![*q],
            Action::Add { a, b, .. } | Action::Mul { a, b } | Action::Product { a, b } => {
                vec![*a, *b]
            }
            Action::Gather { table, .. } => table.view().into_iter().collect(),
            Action::Copy { parts, .. } => parts.iter().map(|part| part.view).collect(),
        }
    }
}

/// Keys or values of one gated block, a part for each medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MediaInput {
    /// Whether these are keys.
    pub(super) is_key: bool,
    /// The gated block.
    pub(super) block: usize,
    /// Latents of every medium; none where media differ.
    pub(super) n_latents: Option<usize>,
    pub(super) width: usize,
}

/// One step of a plan.
#[derive(Debug)]
pub(super) struct Instruction {
    /// The node it comes from.
    pub(super) node: String,
    pub(super) action: Action,
    /// The output's buffer; rows are dense.
    pub(super) buffer: usize,
    pub(super) rows: Size,
    pub(super) cols: Size,
}

/// What an input of the graph is fed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// f32 numbers.
    Numbers,
    /// i64 indices.
    Indices,
    /// Keys or values of media.
    Media(MediaInput),
    /// Keys of a layer's cache.
    PastK(usize),
    /// Values of a layer's cache.
    PastV(usize),
}

/// An input of the graph.
#[derive(Debug)]
pub(super) struct PlanInput {
    pub(super) name: String,
    pub(super) role: Role,
    pub(super) n_elements: Size,
    /// Whether an instruction reads it.
    pub(super) is_read: bool,
}

/// Shape of one layer's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CacheShape {
    pub(super) n_kv_heads: usize,
    pub(super) head_dim: usize,
}

/// A stage, ready to run.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) graph: String,
    pub(super) sizes: SizeTable,
    pub(super) weights: Vec<PlanWeight>,
    pub(super) literals: Vec<Vec<f32>>,
    pub(super) inputs: Vec<PlanInput>,
    pub(super) instructions: Vec<Instruction>,
    /// Slot of each buffer.
    pub(super) slot_of: Vec<usize>,
    /// Numbers of elements of the buffers that share each slot.
    pub(super) slots: Vec<Vec<Size>>,
    /// f32 outputs that are not caches.
    pub(super) outputs: Vec<(String, View)>,
    /// Cache of each layer.
    pub(super) caches: Vec<CacheShape>,
    /// Indices, and the number of rows of the table they pick from.
    pub(super) limits: Vec<(Indices, Size)>,
}

impl Plan {
    /// Plans a graph.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] with every node that has no kernel, or
    /// [`BackendError::Graph`] with every way in which inputs and outputs break the contract.
    pub(super) fn new(graph: &Graph) -> Result<Plan, BackendError> {
        let mut planner = Planner::new(graph);
        planner.check_values();
        planner.declare_inputs();
        planner.stop_on_problems()?;
        planner.lower_nodes()?;
        planner.declare_outputs();
        planner.stop_on_problems()?;
        planner.share_slots();
        Ok(planner.plan)
    }
}

/// What a value of the graph has become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bound {
    /// Numbers somewhere.
    View(View),
    /// A weight in panels, which only linears and `Gather` know.
    Panels(PanelPlaces),
    /// An input that is not a view, by its place in [`Plan::inputs`].
    Input(usize),
    /// An index input with an offset.
    Shifted(Indices),
    /// Keys of a cache after the new tokens.
    PresentK(usize),
    /// Values of a cache after the new tokens.
    PresentV(usize),
}

/// Why a node was not lowered.
#[derive(Debug)]
pub(super) enum Refusal {
    /// There is no kernel for it.
    Unsupported(String),
    /// It reads a value of a node that was refused.
    Follows,
}

/// A buffer while the plan is made.
#[derive(Debug)]
struct Buffer {
    n_elements: Size,
    /// Instruction that writes it.
    first: usize,
    /// Last instruction that reads it.
    last: usize,
}

/// Makes a plan.
pub(super) struct Planner<'g> {
    pub(super) graph: &'g Graph,
    pub(super) plan: Plan,
    values: BTreeMap<ValueId, Bound>,
    weights: BTreeMap<&'g str, usize>,
    buffers: Vec<Buffer>,
    caches: BTreeMap<usize, CacheShape>,
    problems: Vec<String>,
}

impl<'g> Planner<'g> {
    fn new(graph: &'g Graph) -> Planner<'g> {
        Planner {
            graph,
            plan: Plan { graph: graph.name.clone(), ..Plan::default() },
            values: BTreeMap::new(),
            weights: BTreeMap::new(),
            buffers: Vec::new(),
            caches: BTreeMap::new(),
            problems: Vec::new(),
        }
    }

    fn stop_on_problems(&mut self) -> Result<(), BackendError> {
        match self.problems.is_empty() {
            true => Ok(()),
            false => Err(BackendError::Graph {
                graph: self.graph.name.clone(),
                problems: std::mem::take(&mut self.problems),
            }),
        }
    }

    /// Refuses unknown symbols and sizes whose products could overflow.
    fn check_values(&mut self) {
        let ones: Bindings = SYMBOLS.iter().map(|name| ((*name).to_owned(), 1)).collect();
        for (id, value) in self.graph.values() {
            let n_elements = value.fact.shape.iter().try_fold(1usize, |product, dim| {
                let size = dim.evaluate(&ones)?.max(1);
                product.checked_mul(size).ok_or_else(|| "overflow".to_owned())
            });
            let reason = match n_elements {
                Ok(n_elements) if n_elements <= MAX_ELEMENTS => continue,
                Err(symbol) if symbol != "overflow" => {
                    format!("expected the symbols {SYMBOLS:?}, found `{symbol}`")
                }
                Ok(_) | Err(_) => format!("expected at most {MAX_ELEMENTS} elements, found more"),
            };
            self.problems.push(format!("value {} ({}): {reason}", id.index(), value.fact));
        }
    }

    fn declare_inputs(&mut self) {
        for (name, id) in self.graph.inputs() {
            let fact = self.graph.fact(*id);
            let place = self.plan.inputs.len();
            let role = match role(name, fact) {
                Ok(role) => role,
                Err(expected) => {
                    let problem = format!("input `{name}`: expected {expected}, found {fact}");
                    self.problems.push(problem);
                    continue;
                }
            };
            let n_elements = self.plan.sizes.place(fact.n_elements());
            let input = PlanInput { name: name.clone(), role, n_elements, is_read: false };
            self.plan.inputs.push(input);
            let bound = match role {
                Role::Numbers => Bound::View(self.dense_view(Source::Input(place), fact)),
                Role::Indices | Role::Media(_) | Role::PastK(_) | Role::PastV(_) => {
                    Bound::Input(place)
                }
            };
            self.values.insert(*id, bound);
        }
    }

    fn lower_nodes(&mut self) -> Result<(), BackendError> {
        let mut refused = Vec::new();
        for node in self.graph.nodes() {
            if let Err(Refusal::Unsupported(reason)) = self.lower(node) {
                let (node, op) = (node.name.clone(), node.op.name());
                refused.push(UnsupportedNode { node, op, reason });
            }
        }
        match refused.is_empty() {
            true => Ok(()),
            false => {
                Err(BackendError::Unsupported { graph: self.graph.name.clone(), nodes: refused })
            }
        }
    }

    fn declare_outputs(&mut self) {
        for (name, id) in self.graph.outputs() {
            let expected = match self.bound(*id) {
                Ok(Bound::View(view)) => {
                    self.touch(view, usize::MAX);
                    self.plan.outputs.push((name.clone(), view));
                    continue;
                }
                Ok(Bound::PresentK(layer)) => format!("present_k.{layer}"),
                Ok(Bound::PresentV(layer)) => format!("present_v.{layer}"),
                Ok(Bound::Input(_) | Bound::Shifted(_) | Bound::Panels(_)) | Err(_) => {
                    "a computed f32 value".to_owned()
                }
            };
            if *name != expected {
                self.problems.push(format!("output `{name}`: expected {expected}, found another"));
            }
        }
        self.plan.caches = self.caches.values().copied().collect();
        let layers: Vec<usize> = self.caches.keys().copied().collect();
        if layers.iter().copied().ne(0..layers.len()) {
            let problem = format!("caches: expected layers 0, 1, … without gaps, found {layers:?}");
            self.problems.push(problem);
        }
    }

    /// What a value has become; constants are placed when first asked for.
    pub(super) fn bound(&mut self, id: ValueId) -> Result<Bound, Refusal> {
        if let Some(bound) = self.values.get(&id) {
            return Ok(*bound);
        }
        let value = self.graph.value(id);
        let source = match &value.constant {
            Some(Constant::Weight(name)) if value.fact.dtype == DType::F32 => {
                Source::Weight(self.weight_place(name, &value.fact)?)
            }
            Some(Constant::Weight(name)) => {
                return Err(refuse(format!("weight `{name}` is {}, not plain f32", value.fact)));
            }
            Some(Constant::Literal(tensor)) => {
                let data =
                    tensor.to_f32_vec().ok_or_else(|| refuse("a literal that is not f32"))?;
                self.plan.literals.push(data);
                Source::Literal(self.plan.literals.len() - 1)
            }
            None => return Err(Refusal::Follows),
        };
        let bound = Bound::View(self.dense_view(source, &value.fact));
        self.values.insert(id, bound);
        Ok(bound)
    }

    fn weight_place(&mut self, name: &'g str, fact: &Fact) -> Result<usize, Refusal> {
        let n_elements = fact.n_elements().known();
        let n_elements = n_elements
            .ok_or_else(|| refuse(format!("weight `{name}` is {fact}, not of one size")))?;
        let next = self.plan.weights.len();
        let place = *self.weights.entry(name).or_insert(next);
        if place == next {
            let weight = PlanWeight { name: name.to_owned(), dtype: fact.dtype, n_elements };
            self.plan.weights.push(weight);
        }
        Ok(place)
    }

    /// The place of a value that must be a tensor of the weight file.
    pub(super) fn stored(&mut self, id: ValueId) -> Result<usize, Refusal> {
        let value = self.graph.value(id);
        match &value.constant {
            Some(Constant::Weight(name)) => self.weight_place(name, &value.fact),
            Some(Constant::Literal(_)) | None => {
                Err(refuse("panels must lie in the weight file, and not be computed"))
            }
        }
    }

    /// The view of an f32 value.
    pub(super) fn view(&mut self, id: ValueId) -> Result<View, Refusal> {
        match self.bound(id)? {
            Bound::View(view) => Ok(view),
            Bound::Input(place) => {
                let name = &self.plan.inputs[place].name;
                Err(refuse(format!("input `{name}` is only known to attention and `Gather`")))
            }
            Bound::Panels(_) => Err(refuse(
                "panels are only known to `Linear`, `FeedForward`, `GatedCrossAttention` and `Gather`",
            )),
            Bound::Shifted(_) => Err(refuse("indices are only known to `Gather`")),
            Bound::PresentK(_) | Bound::PresentV(_) => {
                Err(refuse("present keys and values can only be outputs of the graph"))
            }
        }
    }

    /// The input that a value is, marked as read.
    pub(super) fn input(&mut self, id: ValueId) -> Result<&PlanInput, Refusal> {
        match self.bound(id)? {
            Bound::Input(place) => {
                let input = &mut self.plan.inputs[place];
                input.is_read = true;
                Ok(input)
            }
            Bound::View(_)
            | Bound::Panels(_)
            | Bound::Shifted(_)
            | Bound::PresentK(_)
            | Bound::PresentV(_) => {
                Err(refuse("expected an input of the graph, found a computed value"))
            }
        }
    }

    /// The indices that a value is, if it is an i64 input, or that plus a number.
    pub(super) fn indices(&mut self, id: ValueId) -> Result<Indices, Refusal> {
        match self.bound(id)? {
            Bound::Input(input) if self.plan.inputs[input].role == Role::Indices => {
                Ok(Indices { input, offset: 0 })
            }
            Bound::Shifted(indices) => Ok(indices),
            Bound::Input(_)
            | Bound::View(_)
            | Bound::Panels(_)
            | Bound::PresentK(_)
            | Bound::PresentV(_) => {
                Err(refuse("expected indices that are an i64 input of the graph"))
            }
        }
    }

    /// Notes that instruction `at` reads what `view` shows.
    fn touch(&mut self, view: View, at: usize) {
        match view.source {
            Source::Buffer(buffer) => {
                self.buffers[buffer].last = self.buffers[buffer].last.max(at);
            }
            Source::Input(place) => self.plan.inputs[place].is_read = true,
            Source::Weight(_) | Source::Literal(_) => {}
        }
    }

    /// Makes `id` stand for `bound`.
    pub(super) fn bind(&mut self, id: ValueId, bound: Bound) {
        self.values.insert(id, bound);
    }

    /// Notes the cache of a layer.
    pub(super) fn declare_cache(&mut self, layer: usize, shape: CacheShape) -> Result<(), Refusal> {
        match self.caches.insert(layer, shape) {
            None => Ok(()),
            Some(_) => Err(refuse(format!("the cache of layer {layer} has two users"))),
        }
    }

    /// Appends an instruction whose output has `fact`, and returns the view of that.
    pub(super) fn emit(&mut self, node: &str, action: Action, fact: &Fact) -> View {
        let at = self.plan.instructions.len();
        for view in action.views() {
            self.touch(view, at);
        }
        let n_elements = self.plan.sizes.place(fact.n_elements());
        self.buffers.push(Buffer { n_elements, first: at, last: at });
        let buffer = self.buffers.len() - 1;
        let view = self.dense_view(Source::Buffer(buffer), fact);
        let (rows, cols) = (view.rows, view.cols);
        let instruction = Instruction { node: node.to_owned(), action, buffer, rows, cols };
        self.plan.instructions.push(instruction);
        view
    }

    /// The whole of `source` as a value of `fact`.
    pub(super) fn dense_view(&mut self, source: Source, fact: &Fact) -> View {
        let (rows, cols) = rows_and_cols(&fact.shape);
        let (rows, cols) = (self.plan.sizes.place(rows), self.plan.sizes.place(cols));
        let offset = self.plan.sizes.place(Dim::from(0));
        View { source, offset, rows, cols, row_stride: cols }
    }

    /// Gives each buffer a slot: buffers of overlapping lifetimes get different ones.
    fn share_slots(&mut self) {
        let typical: Bindings = SYMBOLS.iter().map(|name| ((*name).to_owned(), 64)).collect();
        let size = |dim: &Dim| dim.evaluate(&typical).unwrap_or(usize::MAX);
        // Slots as (free from this instruction on, typical size).
        let mut slots: Vec<(usize, usize)> = Vec::new();
        for buffer in &self.buffers {
            let needed = size(self.plan.sizes.dim(buffer.n_elements));
            let free = (0..slots.len()).filter(|slot| slots[*slot].0 <= buffer.first);
            // The tightest slot that fits, else the one that must grow least.
            let best =
                free.min_by_key(|slot| (slots[*slot].1 < needed, slots[*slot].1.abs_diff(needed)));
            let slot = best.unwrap_or(slots.len());
            if slot == slots.len() {
                slots.push((0, 0));
                self.plan.slots.push(Vec::new());
            }
            slots[slot] = (buffer.last.saturating_add(1), slots[slot].1.max(needed));
            if !self.plan.slots[slot].contains(&buffer.n_elements) {
                self.plan.slots[slot].push(buffer.n_elements);
            }
            self.plan.slot_of.push(slot);
        }
    }
}

pub(super) fn refuse(reason: impl Into<String>) -> Refusal {
    Refusal::Unsupported(reason.into())
}

/// Rows and columns of a value: all axes but the last, and the last.
pub(super) fn rows_and_cols(shape: &[Dim]) -> (Dim, Dim) {
    match shape.split_last() {
        Some((cols, outer)) => (product(outer), cols.clone()),
        None => (Dim::from(1), Dim::from(1)),
    }
}

/// Product of dimensions.
pub(super) fn product(dims: &[Dim]) -> Dim {
    dims.iter().fold(Dim::from(1), |product, dim| product * dim.clone())
}

/// What an input is, by name and type.
fn role(name: &str, fact: &Fact) -> Result<Role, &'static str> {
    let numbered = |prefix: &str| -> Option<usize> { name.strip_prefix(prefix)?.parse().ok() };
    let media = |is_key, block| match (&fact.shape[..], fact.dtype) {
        ([_, n_latents, width], DType::F32) => {
            let n_latents = n_latents.known();
            let input = width.known().map(|width| MediaInput { is_key, block, n_latents, width });
            input.map(Role::Media).ok_or("a known width")
        }
        _ => Err("f32 [n_media, n_latents, inner]"),
    };
    if let Some(block) = numbered("media_k.") {
        return media(true, block);
    }
    if let Some(block) = numbered("media_v.") {
        return media(false, block);
    }
    let cache = |role| match fact.rank() == 3 && fact.dtype == DType::F32 {
        true => Ok(role),
        false => Err("f32 [n_kv_heads, past_len, head_dim]"),
    };
    if let Some(layer) = numbered("past_k.") {
        return cache(Role::PastK(layer));
    }
    if let Some(layer) = numbered("past_v.") {
        return cache(Role::PastV(layer));
    }
    match fact.dtype {
        DType::F32 => Ok(Role::Numbers),
        DType::I64 => Ok(Role::Indices),
        DType::F64
        | DType::F16
        | DType::BF16
        | DType::I32
        | DType::I16
        | DType::I8
        | DType::U8
        | DType::Bool => Err("f32 or i64"),
    }
}
