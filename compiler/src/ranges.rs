//! What f16 can hold: the largest magnitude of each value that graphs of half precision keep in f16, and the ops that they
//! compute in f32 instead.
//!
//! The graphs of TensorRT 10.3, which have every value between two operators, run in f32 over prompts. An op with a value
//! near the end of f16 first puts out f32: a residual stream is too large while what is added to it is not. If another of
//! its values is too large still, it is in f32 as a whole. So until nothing is too large; other flavours have the same ops.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail, ensure};
use flamingo_ir::onnx::{Island, Islands, inline_typed};
use flamingo_ir::op::Flavour;
use flamingo_ir::{Graph, Node, Tensor};
use flamingo_runtime::Artifact;
use half::f16;
use serde::{Deserialize, Serialize};

use crate::calibrate::Example;
use crate::walk::{Walk, on_all_cores};

/// The form of the graphs in which every value is seen.
const FORM: Flavour = Flavour::Trt10_3;
/// How much larger than what was seen other prompts' values may be.
const MARGIN: f32 = 4.0;

/// What graphs of half precision keep in f16.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HalfRanges {
    /// Prompts that were run.
    pub n_prompts: usize,
    /// The magnitude from which on a value is not kept in f16: a quarter of its largest number.
    pub limit: f32,
    /// The ops, in the order of the graphs.
    pub ops: Vec<OpRange>,
}

/// The largest of an op's values that would be in f16.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OpRange {
    /// The graph: `media` or `decoder`.
    pub stage: String,
    /// Name of the op: `decoder.3.mlp`.
    pub op: String,
    /// The value by what makes it in the op: `decoder.3.mlp/down/sum`.
    pub value: String,
    /// Its largest magnitude.
    pub largest: f32,
    /// What is in f32 for that: `output` or `whole`; nothing where f16 holds all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_f32: Option<String>,
}

impl OpRange {
    /// Whether both are of one op.
    fn is_of(&self, other: &OpRange) -> bool {
        (&self.stage, &self.op) == (&other.stage, &other.op)
    }
}

impl HalfRanges {
    /// What of a stage is in f32.
    pub fn islands(&self, stage: &str) -> Islands {
        let own = self.ops.iter().filter(|op| op.stage == stage);
        let island =
            |op: &OpRange| Some((op.op.clone(), op.in_f32.as_deref().and_then(Island::from_name)?));
        own.filter_map(island).collect()
    }

    /// The ops that are in f32.
    pub fn in_f32(&self) -> impl Iterator<Item = &OpRange> {
        self.ops.iter().filter(|op| op.in_f32.is_some())
    }

    /// The largest value of all.
    pub fn largest(&self) -> Option<&OpRange> {
        self.ops.iter().max_by(|a, b| a.largest.total_cmp(&b.largest))
    }
}

/// Runs prompts through the graphs of an artifact in f32; tells each before it begins.
///
/// # Errors
/// An artifact that cannot be read, numbers that are not finite in f32, or keys and values that f16 cannot hold.
pub fn measure(
    artifact: &Path,
    examples: &[Example],
    on_example: &mut dyn FnMut(usize),
) -> Result<HalfRanges> {
    let artifact = Artifact::open(artifact, false)?;
    let graphs = artifact.load()?;
    let config = &artifact.manifest.config;
    let mut islands = [Islands::new(), Islands::new()];
    let mut ops: Vec<OpRange> = Vec::new();
    loop {
        let stages = [
            inline_typed(&graphs.media, FORM, &islands[0].clone().into())?,
            inline_typed(&graphs.decoder, FORM, &islands[1].clone().into())?,
        ];
        let walk = Walk::new(config, &graphs, stages);
        let found = ops_of(&walk.stages, &look(&walk, examples, on_example)?)?;
        let is_raised = raise(&found, [&graphs.media, &graphs.decoder], &mut islands)?;
        // Of an op that is in f32 by now, what it would have had in f16 was found before.
        let is_new = |op: &OpRange| !ops.iter().any(|known| known.is_of(op));
        let new: Vec<OpRange> = found.into_iter().filter(is_new).collect();
        ops.extend(new);
        if !is_raised {
            for op in &mut ops {
                let island = islands[place(&op.stage)].get(&op.op);
                op.in_f32 = island.map(|island| island.name().to_owned());
            }
            return Ok(HalfRanges { n_prompts: examples.len(), limit: limit(), ops });
        }
    }
}

/// The magnitude from which on a value is not kept in f16.
fn limit() -> f32 {
    f32::from(f16::MAX) / MARGIN
}

/// Place of a stage among two.
pub(crate) fn place(stage: &str) -> usize {
    usize::from(stage == "decoder")
}

/// Computes more of the ops in f32 that have values beyond the limit; whether there were any.
fn raise(found: &[OpRange], graphs: [&Graph; 2], islands: &mut [Islands; 2]) -> Result<bool> {
    let mut is_raised = false;
    for op in found.iter().filter(|op| op.largest >= limit()) {
        let place = place(&op.stage);
        let is_op = |node: &Node| node.name == op.op;
        let before = islands[place].get(&op.op);
        let next = match before {
            _ if !graphs[place].nodes().iter().any(is_op) => None,
            None => Some(Island::Output),
            Some(Island::Output) => Some(Island::Whole),
            Some(Island::Whole) => None,
        };
        match next {
            Some(island) => {
                islands[place].insert(op.op.clone(), island);
                is_raised = true;
            }
            // What stays on the device is f16 in any case.
            None if op.largest <= f32::from(f16::MAX) => {}
            None => bail!(
                "graph \"{}\": `{}` reaches {:.2e}; keys and values are kept in f16, which ends at 65504\n\n\
                 hint: leave out `--target cuda` and `--target tensorrt`",
                op.stage,
                op.value,
                op.largest
            ),
        }
    }
    Ok(is_raised)
}

/// Largest magnitude of what each node gives in f16, by the node's name.
type Seen = BTreeMap<String, f32>;

/// Runs prompts through graphs of half precision.
fn look(
    walk: &Walk<'_>,
    examples: &[Example],
    on_example: &mut dyn FnMut(usize),
) -> Result<[Seen; 2]> {
    let of_each = on_all_cores(examples, on_example, |example| {
        let mut seen = [Seen::new(), Seen::new()];
        walk.run(example, &mut |graph, node, _, outputs| {
            for (id, tensor) in node.outputs.iter().zip(outputs) {
                if graph.fact(*id).dtype.is_half() {
                    keep(&mut seen[place(&graph.name)], &node.name, largest(tensor));
                }
            }
        })?;
        Ok(seen)
    })?;
    let mut all = [Seen::new(), Seen::new()];
    for seen in of_each {
        for (all, seen) in all.iter_mut().zip(seen) {
            seen.iter().for_each(|(name, magnitude)| keep(all, name, *magnitude));
        }
    }
    Ok(all)
}

/// Keeps the larger magnitude.
fn keep(seen: &mut Seen, name: &str, magnitude: f32) {
    match seen.get_mut(name) {
        Some(before) => *before = before.max(magnitude),
        None => drop(seen.insert(name.to_owned(), magnitude)),
    }
}

/// The largest value of each op, in the order of the graphs.
fn ops_of(stages: &[Graph; 2], seen: &[Seen; 2]) -> Result<Vec<OpRange>> {
    let mut ops: Vec<OpRange> = Vec::new();
    for (graph, seen) in stages.iter().zip(seen) {
        let mut places: BTreeMap<&str, usize> = BTreeMap::new();
        for node in graph.nodes() {
            let Some(largest) = seen.get(&node.name).copied() else { continue };
            let (stage, value) = (graph.name.clone(), node.name.clone());
            ensure!(largest.is_finite(), "graph \"{stage}\": `{value}` is not finite in f32");
            let op = node.name.split('/').next().unwrap_or(&node.name);
            let place = *places.entry(op).or_insert(ops.len());
            match ops.get_mut(place) {
                Some(known) if known.largest >= largest => {}
                Some(known) => (known.value, known.largest) = (value, largest),
                None => {
                    ops.push(OpRange { stage, op: op.to_owned(), value, largest, in_f32: None });
                }
            }
        }
    }
    Ok(ops)
}

/// Largest magnitude; NaN counts as infinite. Scores of keys that are not seen are f16's least number, and count for nothing.
fn largest(tensor: &Tensor) -> f32 {
    let hidden = f32::from(f16::MIN).to_bits();
    // Magnitudes are ordered as their bits are, with NaN beyond infinity.
    let magnitude = |value: &f32| match value.to_bits() {
        bits if bits == hidden => 0,
        bits => bits & !(1 << 31),
    };
    let Some(array) = tensor.as_f32() else { return 0.0 };
    let bits = match array.as_slice_memory_order() {
        Some(values) => values.iter().map(magnitude).fold(0, u32::max),
        None => array.iter().map(magnitude).fold(0, u32::max),
    };
    f32::from_bits(bits.min(f32::INFINITY.to_bits()))
}

#[cfg(test)]
mod tests {
    use flamingo_ir::op::{FeedForward, Linear};
    use flamingo_ir::{Fact, evaluate, evaluate_wide, verify};

    use super::*;

    fn range(op: &str, largest: f32) -> OpRange {
        let (stage, op) = ("media".to_owned(), op.to_owned());
        OpRange { stage, value: format!("{op}/x"), op, largest, in_f32: None }
    }

    #[test]
    fn an_op_is_raised_step_by_step_and_what_no_op_makes_must_fit() {
        let mut graph = Graph::new("media");
        let x = graph.input("x", Fact::f32([2, 2]));
        let y = graph.add("linear", Linear::default(), &[x, x]).unwrap();
        graph.output("y", y);
        let mut islands = [Islands::new(), Islands::new()];
        let mut step = |op: &str, largest| {
            let raised = raise(&[range(op, largest)], [&graph, &graph], &mut islands);
            raised.map(|raised| (raised, islands[0].get("linear").copied()))
        };
        assert_eq!(step("linear", 16_000.0).unwrap(), (false, None));
        assert_eq!(step("linear", 16_400.0).unwrap(), (true, Some(Island::Output)));
        assert_eq!(step("linear", 1e9).unwrap(), (true, Some(Island::Whole)));
        assert_eq!(step("media_k.0", 60_000.0).unwrap(), (false, Some(Island::Whole)));
        let error = step("media_k.0", 7e4).unwrap_err().to_string();
        assert!(error.contains("`media_k.0/x` reaches 7.00e4"), "{error}");
    }

    #[test]
    fn magnitudes_leave_hidden_scores_out_and_see_nan() {
        let largest = |values: &[f32]| largest(&Tensor::vector(values.to_vec()));
        assert_eq!(largest(&[1.0, -65504.0, -3.0]), 3.0);
        assert_eq!(largest(&[65504.0]), 65504.0);
        assert_eq!(largest(&[f32::NAN, 0.0]), f32::INFINITY);
    }

    /// Two products and a residual: their sum alone in f32, then the whole op.
    #[test]
    fn islands_are_in_f32_and_the_rest_is_not() {
        let op = FeedForward {
            activation: flamingo_ir::op::Activation::Relu,
            gated: false,
            up_bias: false,
            down_bias: false,
            residual: true,
            rounding: flamingo_ir::op::Rounding::None,
        };
        let mut graph = Graph::new("decoder");
        let x = graph.input("x", Fact::f32([1, 2]));
        let up = graph.input("up", Fact::f32([4, 2]));
        let down = graph.input("down", Fact::f32([2, 4]));
        let y = graph.add("mlp", op, &[x, up, down, x]).unwrap();
        graph.output("y", y);
        let inputs = [
            Tensor::f32(&[1, 2], vec![3e4, 1.0]).unwrap(),
            Tensor::f32(&[4, 2], vec![1.0, 0.5, -1.0, 2.0, 0.5, 0.5, 0.25, -1.0]).unwrap(),
            Tensor::f32(&[2, 4], vec![1.0, 0.0, 1.0, 0.5, 0.25, 1.0, 0.0, 0.0]).unwrap(),
        ];
        let exact = evaluate(&graph, &inputs).unwrap()[0].to_f32_vec().unwrap();
        let with = |islands: &Islands| {
            let typed =
                verify(inline_typed(&graph, FORM, &islands.clone().into()).unwrap()).unwrap();
            let mut halves = Vec::new();
            evaluate_wide(&typed, &inputs, &flamingo_ir::NoWeights, &mut |node, _, _| {
                if typed.fact(node.outputs[0]).dtype.is_half() {
                    halves.push(node.name.clone());
                }
            })
            .unwrap();
            let y = evaluate(&typed, &inputs).unwrap()[0].to_f32_vec().unwrap();
            (halves, y)
        };
        let only = |island| Islands::from([("mlp".to_owned(), island)]);
        let (halves, y) = with(&Islands::new());
        assert!(halves.iter().any(|name| name == "mlp/down/f16") && y[0].is_infinite(), "{y:?}");
        let (halves, y) = with(&only(Island::Output));
        assert!(!halves.iter().any(|name| name == "mlp/down/f16"), "{halves:?}");
        assert!(halves.iter().any(|name| name == "mlp/up/product"), "{halves:?}");
        assert!((y[0] - exact[0]).abs() < 1e-3 * exact[0], "{y:?} {exact:?}");
        let (halves, y) = with(&only(Island::Whole));
        assert!(halves.is_empty(), "{halves:?}");
        assert_eq!(y, exact);
    }
}
