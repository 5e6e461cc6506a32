//! The native stages against the reference evaluator.

mod errors;
mod model;
mod ops;
mod panels;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;

use flamingo_ir::op::{Operator, PackPanels, PanelFormat, UnpackPanels};
use flamingo_ir::{Bindings, DType, Fact, Graph, Tensor, ValueId, Weights, evaluate_with};
use flamingo_kernels::{Kernels, KvCache, KvFormat};

use super::plan::Role;
use super::stage::{Buffers, Call, NativeStage, Span};
use crate::backend::{Media, MediaKv, WeightBytes};

/// A small deterministic generator (splitmix64), so that tests need no seed file.
pub(super) struct Noise(u64);

impl Noise {
    pub(super) fn new(seed: u64) -> Noise {
        Noise(seed)
    }

    pub(super) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Uniform in -1..1.
    pub(super) fn number(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(super) fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.number()).collect()
    }

    pub(super) fn tensor(&mut self, shape: &[usize]) -> Tensor {
        Tensor::f32(shape, self.numbers(shape.iter().product())).unwrap()
    }
}

/// A graph under construction, and its weights.
pub(super) struct Model {
    pub(super) graph: Graph,
    pub(super) weights: BTreeMap<String, Tensor>,
    noise: Noise,
}

impl Model {
    pub(super) fn new(name: &str, seed: u64) -> Model {
        Model { graph: Graph::new(name), weights: BTreeMap::new(), noise: Noise::new(seed) }
    }

    /// A weight of the given shape, filled with noise that keeps activations near 1.
    pub(super) fn weight(&mut self, name: &str, shape: &[usize]) -> ValueId {
        let tensor = self.noise.tensor(shape);
        let spread = if shape.len() == 2 { (3.0 / shape[1] as f32).sqrt() } else { 0.5 };
        let data = tensor.to_f32_vec().unwrap().iter().map(|v| v * spread).collect();
        let tensor = Tensor::f32(shape, data).unwrap();
        self.weights.insert(name.to_owned(), tensor);
        self.graph.weight(name, Fact::f32(shape.iter().copied()))
    }

    pub(super) fn add(
        &mut self,
        name: &str,
        op: impl Into<flamingo_ir::op::Op>,
        inputs: &[ValueId],
    ) -> ValueId {
        self.graph.add(name, op, inputs).unwrap()
    }

    /// A weight in panels, filled as [`Model::weight`]: the value that unpacks it.
    pub(super) fn packed(
        &mut self,
        name: &str,
        format: PanelFormat,
        [n, k]: [usize; 2],
    ) -> ValueId {
        self.weight(name, &[n, k]);
        let weight = self.weights.remove(name).unwrap();
        let parts = PackPanels { format }.evaluate(&[weight]).unwrap();
        let mut ids = Vec::new();
        for (i, part) in parts.into_iter().enumerate() {
            let name = format!("{name}.{i}");
            ids.push(self.graph.weight(&name, part.fact()));
            self.weights.insert(name, part);
        }
        self.add(name, UnpackPanels { format, n, k }, &ids)
    }

    pub(super) fn bytes(&self) -> Stored {
        let stored = |tensor: &Tensor| {
            let bytes = tensor.to_le_bytes();
            let mut words = vec![0u64; bytes.len().div_ceil(8)];
            bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(&bytes);
            (tensor.dtype(), words, bytes.len())
        };
        Stored(self.weights.iter().map(|(name, tensor)| (name.clone(), stored(tensor))).collect())
    }

    pub(super) fn stage(&self, n_threads: usize) -> NativeStage {
        NativeStage::new(&self.graph, Arc::new(self.bytes()), kernels(n_threads)).unwrap()
    }
}

/// Tensors in memory: element type, aligned words, and how many of their bytes count.
pub(super) struct Stored(pub(super) BTreeMap<String, (DType, Vec<u64>, usize)>);

impl WeightBytes for Stored {
    fn bytes(&self, name: &str) -> Option<(DType, &[u8])> {
        let (dtype, words, len) = self.0.get(name)?;
        Some((*dtype, &bytemuck::cast_slice(words)[..*len]))
    }
}

impl Weights for Model {
    fn tensor(&self, name: &str) -> Result<Tensor, String> {
        self.weights.get(name).cloned().ok_or_else(|| format!("no weight `{name}`"))
    }
}

pub(super) fn kernels(n_threads: usize) -> Arc<Kernels> {
    Arc::new(Kernels::new(NonZeroUsize::new(n_threads)).unwrap())
}

pub(super) fn ids(values: impl IntoIterator<Item = usize>) -> Tensor {
    let values: Vec<i64> = values.into_iter().map(|value| value as i64).collect();
    Tensor::i64(&[values.len()], values).unwrap()
}

/// Fails unless `found` is within the project's f32 bound of `expected`: 1e-4 of the largest
/// magnitude (floor 1e-6), cosine 0.999999, no NaN.
#[track_caller]
pub(super) fn assert_close(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let bound = (1e-4 * largest).max(1e-6);
    let error = |(a, b): (&f32, &f32)| if a.is_finite() { (a - b).abs() } else { f32::INFINITY };
    let errors = found.iter().zip(expected).map(error).enumerate();
    let Some((worst, error)) = errors.max_by(|a, b| a.1.total_cmp(&b.1)) else { return };
    assert!(
        error <= bound,
        "{what}: element {worst}: expected {}, found {}; off by {error}, bound {bound}",
        expected[worst],
        found[worst]
    );
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let norms = (dot(found, found) * dot(expected, expected)).sqrt();
    let cosine = dot(found, expected) / norms;
    assert!(norms < 1e-12 || cosine >= 0.999_999, "{what}: cosine {cosine}");
}

/// Values of the symbols that stand bare in the shapes of inputs.
fn bindings_of(graph: &Graph, inputs: &[Tensor]) -> Bindings {
    let mut bindings = Bindings::new();
    for ((_, id), tensor) in graph.inputs().iter().zip(inputs) {
        for (dim, size) in graph.fact(*id).shape.iter().zip(tensor.shape()) {
            bindings.extend(dim.as_symbol().map(|symbol| (symbol.to_owned(), *size)));
        }
    }
    bindings
}

/// Media whose blocks hold the inputs `media_k.N` and `media_v.N`.
fn media_of(stage: &NativeStage, inputs: &[Tensor]) -> Vec<Arc<Media>> {
    let mut media: Vec<Media> = Vec::new();
    for (input, tensor) in stage.plan_inputs().iter().zip(inputs) {
        let Role::Media(role) = input.role else { continue };
        media.resize_with(tensor.shape()[0], Media::default);
        let data = tensor.to_f32_vec().unwrap();
        let n_latents = tensor.shape()[1];
        for (medium, part) in media.iter_mut().zip(data.chunks(n_latents * role.width)) {
            medium.n_latents = n_latents;
            medium.blocks.resize(medium.blocks.len().max(role.block + 1), MediaKv::None);
            let block = &mut medium.blocks[role.block];
            let (k, v) = (block.keys().into_owned(), block.values().into_owned());
            *block = match role.is_key {
                true => MediaKv::Rows { k: part.to_vec(), v },
                false => MediaKv::Rows { k, v: part.to_vec() },
            };
        }
    }
    media.into_iter().map(Arc::new).collect()
}

/// Caches with room to spare that hold the inputs `past_k.N` and `past_v.N`.
fn caches_of(stage: &NativeStage, inputs: &[Tensor], total_len: usize) -> Vec<KvCache> {
    let mut caches = stage.new_caches(total_len + 3, KvFormat::F32).unwrap();
    for (input, tensor) in stage.plan_inputs().iter().zip(inputs) {
        let (Role::PastK(layer) | Role::PastV(layer)) = input.role else { continue };
        let (cache, past_len) = (&mut caches[layer], tensor.shape()[1]);
        let data = tensor.to_f32_vec().unwrap();
        match input.role {
            Role::PastK(_) => cache.write_heads(past_len, &data, &cache.values(past_len)),
            _ => cache.write_heads(past_len, &cache.keys(past_len), &data),
        }
    }
    caches
}

/// The first `len` tokens of a cache's keys or values.
fn present(cache: &KvCache, is_key: bool, len: usize) -> Vec<f32> {
    if is_key { cache.keys(len) } else { cache.values(len) }
}

/// Runs a stage on the inputs of its graph, in order; outputs by name, caches included.
pub(super) fn run_native(
    model: &Model,
    stage: &NativeStage,
    buffers: &mut Buffers,
    inputs: &[Tensor],
) -> BTreeMap<String, Vec<f32>> {
    let graph = &model.graph;
    let bindings = bindings_of(graph, inputs);
    let (media, mut media_time) = (media_of(stage, inputs), Vec::new());
    let (mut numbers, mut indices) = (Vec::new(), Vec::new());
    for ((name, _), tensor) in graph.inputs().iter().zip(inputs) {
        match tensor {
            Tensor::F32(_) => numbers.push((name.as_str(), tensor.to_f32_vec().unwrap())),
            Tensor::I64(array) if name == "media_time" => {
                media_time = array.iter().map(|time| u32::try_from(*time).unwrap()).collect();
            }
            Tensor::I64(array) => {
                indices.push((name.as_str(), array.iter().copied().collect::<Vec<_>>()))
            }
            other => unreachable!("no graph takes {}", other.dtype()),
        }
    }
    let numbers: Vec<_> = numbers.iter().map(|(name, data)| (*name, data.as_slice())).collect();
    let indices: Vec<_> = indices.iter().map(|(name, data)| (*name, data.as_slice())).collect();
    let size = |name: &str| bindings.get(name).copied().unwrap_or(0);
    let total_len = size("past_len") + size("text_len");
    let mut caches = caches_of(stage, inputs, total_len);
    let call = Call {
        bindings: &bindings,
        numbers: &numbers,
        indices: &indices,
        media: &media,
        media_time: &media_time,
    };
    let (past_len, n_rows) = (size("past_len"), size("text_len"));
    let mut spans = [Span { caches: &mut caches, past_len, n_rows }];
    let outputs = stage.run(&call, &mut spans, buffers).unwrap();
    let names = stage.output_names().map(str::to_owned);
    let mut outputs: BTreeMap<String, Vec<f32>> = names.zip(outputs).collect();
    for (layer, cache) in caches.iter().enumerate() {
        outputs.insert(format!("present_k.{layer}"), present(cache, true, total_len));
        outputs.insert(format!("present_v.{layer}"), present(cache, false, total_len));
    }
    outputs
}

/// Runs the graph natively on one and two threads, and compares with the reference and with each
/// other, bit by bit.
#[track_caller]
pub(super) fn check(model: &Model, inputs: &[Tensor]) {
    let expected = evaluate_with(&model.graph, inputs, model).unwrap();
    let single = run_native(model, &model.stage(1), &mut Buffers::default(), inputs);
    let double = run_native(model, &model.stage(2), &mut Buffers::default(), inputs);
    for ((name, _), expected) in model.graph.outputs().iter().zip(&expected) {
        let what = format!("graph \"{}\", output `{name}`", model.graph.name);
        assert_close(&what, &single[name], &expected.to_f32_vec().unwrap());
    }
    let bits = |outputs: &BTreeMap<String, Vec<f32>>| -> Vec<u32> {
        outputs.values().flatten().map(|value| value.to_bits()).collect()
    };
    assert_eq!(bits(&single), bits(&double), "graph \"{}\": one thread, two", model.graph.name);
}
