//! Replaces function ops by their definitions, all or some; and gives the result half-precision types.

use std::collections::{BTreeMap, BTreeSet};

use super::cuda::fewer_nodes;
use super::typing::{Island, Typing};
use crate::graph::{Constant, Graph, GraphError, Node, ValueId};
use crate::op::{
    CacheForm, Cast, Flavour, InPlaceSelfAttention, Linear, Op, PanelFormat, PanelLinear,
    QuantisedLinear, UnpackPanels, Width,
};
use crate::verify::definition;
use crate::{DType, Dim, Fact, Tensor};

/// The same graph without function ops: each is replaced by its definition of `flavour`,
/// definitions of definitions included. Node names become `outer/inner`.
///
/// Layers compute the same masks and angles: a node that repeats an earlier one is that one.
/// (Readers merge such nodes too, but tract-core 0.23.9 may merge each into the other and then
/// has neither: where the inputs of two equal nodes list them in different order.)
///
/// A flavour of half precision has products in that type, what is between them, and media's and tokens' keys and values.
/// In f32 are what would overflow or lose too much there, what no product was computed of, and pixels, visual tokens and
/// logits.
pub fn inline_functions(graph: &Graph, flavour: Flavour) -> Result<Graph, GraphError> {
    inline(graph, flavour, Which::All, &Typing::default())
}

/// As [`inline_functions`], typed so where the flavour is of half precision; linears that read weights in panels of integers
/// are one op with them where the flavour multiplies integers.
pub fn inline_typed(graph: &Graph, flavour: Flavour, typing: &Typing) -> Result<Graph, GraphError> {
    let multiplies_integers = flavour.has_contrib() || !typing.x_scales.is_empty();
    if !multiplies_integers || !has_panels(graph) {
        return inline(graph, flavour, Which::All, typing);
    }
    let mut joined = inline(graph, flavour, Which::OfPanels, typing)?;
    joined.sweep()?;
    inline(&joined, flavour, Which::All, typing)
}

/// The same graph with each linear that reads a weight in panels of integers as one op with it, a [`PanelLinear`]. Ops of
/// several such linears are replaced by their definitions.
pub fn linears_of_panels(graph: &Graph) -> Result<Graph, GraphError> {
    if !has_panels(graph) {
        return Ok(graph.clone());
    }
    let mut joined = inline(graph, Flavour::OrtCpu, Which::OfPanels, &Typing::default())?;
    joined.sweep()?;
    Ok(joined)
}

fn has_panels(graph: &Graph) -> bool {
    graph.nodes().iter().any(|node| matches!(node.op, Op::UnpackPanels(_)))
}

/// Whether an input or output of a graph is in half precision there: what stays on the device.
fn stays_on_device(name: &str) -> bool {
    ["media_k.", "media_v.", "past_", "present_"].iter().any(|prefix| name.starts_with(prefix))
}

/// An input of the decoder where keys and values have places of their own: past ones, which are `[heads, past_len, dim]`,
/// in buffers, and a position for each place.
fn of_fixed_caches(name: &str, fact: Fact, form: CacheForm) -> Fact {
    let n_places = Dim::symbol("cache_len");
    match (form, &fact.shape[..]) {
        (CacheForm::Joined, _) => fact,
        (_, [_]) if name == "key_positions" => Fact::new(fact.dtype, [n_places]),
        (CacheForm::Rows, [heads, _, dim]) if name.starts_with("past_") => {
            Fact::new(fact.dtype, [n_places, heads.clone() * dim.clone()])
        }
        (CacheForm::ByHead, [heads, _, dim]) if name.starts_with("past_") => {
            Fact::new(fact.dtype, [Dim::from(1), heads.clone(), n_places, dim.clone()])
        }
        _ => fact,
    }
}

/// Which function ops are replaced by their definitions.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    All,
    /// Those with linears that read weights in panels of integers, down to these linears.
    OfPanels,
}

fn inline(
    graph: &Graph,
    flavour: Flavour,
    which: Which,
    typing: &Typing,
) -> Result<Graph, GraphError> {
    let mut inliner = Inliner {
        out: Graph::new(&graph.name),
        flavour,
        which,
        half: flavour.half().filter(|_| which == Which::All),
        typing,
        island: None,
        is_wide: false,
        constants: BTreeSet::new(),
        literals: BTreeMap::new(),
        results: BTreeMap::new(),
        panels: BTreeMap::new(),
    };
    let caches = if which == Which::All { flavour.caches() } else { CacheForm::Joined };
    let mut inputs = Vec::new();
    for (name, id) in graph.inputs() {
        let mut fact = graph.fact(*id).clone();
        if let Some(half) =
            inliner.half.filter(|_| fact.dtype == DType::F32 && stays_on_device(name))
        {
            fact.dtype = half;
        }
        inputs.push(inliner.out.input(name, of_fixed_caches(name, fact, caches)));
    }
    let outputs = inliner.nodes(graph, &inputs, "")?;
    for ((name, given), id) in graph.outputs().iter().zip(outputs) {
        let is_f32 = graph.fact(*given).dtype == DType::F32;
        let id = match inliner.half.filter(|_| is_f32) {
            Some(half) if stays_on_device(name) => inliner.cast(name, id, half)?,
            Some(_) => inliner.cast(name, id, DType::F32)?,
            None => id,
        };
        inliner.out.output(name, id);
    }
    match inliner.half {
        Some(half) if flavour == Flavour::Cuda => fewer_nodes(inliner.out, half),
        _ => Ok(inliner.out),
    }
}

struct Inliner<'a> {
    out: Graph,
    flavour: Flavour,
    which: Which,
    /// The type of the result's products, if it is not f32.
    half: Option<DType>,
    typing: &'a Typing,
    /// What of the function that is being replaced stays in f32.
    island: Option<Island>,
    /// Whether the function that is being replaced is computed in f32, whatever its outputs are.
    is_wide: bool,
    /// Values that are constants or computed from constants alone.
    constants: BTreeSet<ValueId>,
    /// Literals by fact and bytes: definitions repeat the same few.
    literals: BTreeMap<(String, Vec<u8>), ValueId>,
    /// Outputs by op, as it prints, and inputs.
    results: BTreeMap<(String, Vec<ValueId>), Vec<ValueId>>,
    /// Weights in panels of integers: how they are stored, and their parts.
    panels: BTreeMap<ValueId, (UnpackPanels, Vec<ValueId>)>,
}

impl Inliner<'_> {
    /// Appends the nodes of `graph` applied to `inputs`; returns its outputs.
    fn nodes(
        &mut self,
        graph: &Graph,
        inputs: &[ValueId],
        prefix: &str,
    ) -> Result<Vec<ValueId>, GraphError> {
        let ends = graph.inputs().iter().map(|(_, id)| *id);
        let mut ids: BTreeMap<ValueId, ValueId> = ends.zip(inputs.iter().copied()).collect();
        for (id, value) in graph.values() {
            match &value.constant {
                Some(Constant::Weight(name)) => {
                    let weight = self.out.weight(name, value.fact.clone());
                    self.constants.insert(weight);
                    ids.insert(id, weight);
                }
                Some(Constant::Literal(tensor)) => {
                    ids.insert(id, self.literal(tensor.clone()));
                }
                None => {}
            }
        }
        let map = |ids: &BTreeMap<ValueId, ValueId>, id: &ValueId| {
            ids.get(id)
                .copied()
                .ok_or_else(|| graph.broken("a value is read before it is computed".into()))
        };
        for node in graph.nodes() {
            let inputs: Result<Vec<ValueId>, GraphError> =
                node.inputs.iter().map(|id| map(&ids, id)).collect();
            let facts: Vec<Fact> = node.inputs.iter().map(|id| graph.fact(*id).clone()).collect();
            let makes_output = graph.outputs().iter().any(|(_, id)| node.outputs.contains(id));
            let island = self.island_of(node, prefix, makes_output);
            let outputs = self.node(node, &inputs?, &facts, (prefix, island))?;
            ids.extend(node.outputs.iter().copied().zip(outputs));
        }
        graph.outputs().iter().map(|(_, id)| map(&ids, id)).collect()
    }

    fn literal(&mut self, tensor: Tensor) -> ValueId {
        let key = (tensor.fact().to_string(), tensor.to_le_bytes());
        let out = &mut self.out;
        let literal = *self.literals.entry(key).or_insert_with(|| out.literal(tensor));
        self.constants.insert(literal);
        literal
    }

    /// What of a node stays in f32, one of the graph or of the function that is being replaced.
    fn island_of(&self, node: &Node, prefix: &str, makes_output: bool) -> Option<Island> {
        if !prefix.is_empty() {
            return self.island.filter(|island| *island == Island::Whole || makes_output);
        }
        // Parts of an op that was taken apart before, and the weights that it reads, go by its name.
        let op = node.name.split('/').next()?;
        let owner = op.rsplit_once('.').map(|(owner, _)| owner);
        let owner = owner.filter(|_| matches!(node.op, Op::UnpackPanels(_)));
        let of_weight = owner.and_then(|owner| self.typing.islands.get(owner));
        let of_weight = of_weight.filter(|island| **island == Island::Whole);
        self.typing.islands.get(op).or(of_weight).copied()
    }

    /// `facts` are those that the node's inputs have in the graph that it is from; `island` is what of it stays in f32.
    fn node(
        &mut self,
        node: &Node,
        inputs: &[ValueId],
        facts: &[Fact],
        (prefix, island): (&str, Option<Island>),
    ) -> Result<Vec<ValueId>, GraphError> {
        let name = format!("{prefix}{}", node.name);
        let reads_panels = inputs.iter().any(|id| self.panels.contains_key(id));
        let is_replaced = match (self.which, &node.op) {
            (Which::All, op) => op.is_function(),
            (Which::OfPanels, Op::Linear(linear)) if reads_panels => {
                return self.panel_linear(&name, linear, inputs);
            }
            (Which::OfPanels, op) => op.is_function() && reads_panels,
        };
        if is_replaced {
            let body = match &node.op {
                Op::SelfAttention(attention) if self.out.fact(inputs[3]).rank() != 3 => {
                    let op = InPlaceSelfAttention { attention: attention.clone() };
                    let mut facts = facts.to_vec();
                    for place in [3, 4, 6] {
                        facts[place].shape = self.out.fact(inputs[place]).shape.clone();
                    }
                    definition(&op.into(), &facts, self.flavour)?
                }
                op => definition(op, facts, self.flavour)?,
            };
            let is_norm = matches!(node.op, Op::RmsNorm(_)) && !self.flavour.has_contrib();
            // Products of bytes lie between numbers of f32, as engines look for them.
            let is_of_bytes = matches!(node.op, Op::QuantisedLinear(_));
            let is_wide = self.is_wide || is_norm || is_of_bytes || island == Some(Island::Whole);
            let outside = (self.is_wide, self.island);
            (self.is_wide, self.island) = (is_wide, island);
            let outputs = self.nodes(&body, inputs, &format!("{name}/"))?;
            (self.is_wide, self.island) = outside;
            return match self.half.filter(|_| island.is_none()) {
                None => Ok(outputs),
                Some(half) => outputs.into_iter().map(|id| self.cast(&name, id, half)).collect(),
            };
        }
        let outputs = match self.half {
            None => self.once(&name, node.op.clone(), inputs)?,
            Some(_) if island.is_some() => self.in_f32(&name, node.op.clone(), inputs)?,
            Some(half) => self.typed(&name, node.op.clone(), inputs, half)?,
        };
        if let (Which::OfPanels, Op::UnpackPanels(op)) = (self.which, &node.op)
            && PanelLinear::takes(op.format, op.format.rounding())
        {
            self.panels.insert(outputs[0], (op.clone(), inputs.to_vec()));
        }
        Ok(outputs)
    }

    /// Appends a node, or finds the one that is equal.
    fn once(&mut self, name: &str, op: Op, inputs: &[ValueId]) -> Result<Vec<ValueId>, GraphError> {
        let key = (format!("{op:?}"), inputs.to_vec());
        if let Some(outputs) = self.results.get(&key) {
            return Ok(outputs.clone());
        }
        let outputs = self.out.add_many(name, op, inputs)?;
        if inputs.iter().all(|id| self.constants.contains(id)) {
            self.constants.extend(&outputs);
        }
        self.results.insert(key, outputs.clone());
        Ok(outputs)
    }

    /// Appends a standard op with its inputs in the type that it computes in.
    fn typed(
        &mut self,
        name: &str,
        op: Op,
        inputs: &[ValueId],
        half: DType,
    ) -> Result<Vec<ValueId>, GraphError> {
        let dtype_of = |inliner: &Inliner<'_>, id: &ValueId| inliner.out.fact(*id).dtype;
        if let (Op::Cast(cast), [x]) = (&op, inputs)
            && cast.dtype == DType::F32
            && dtype_of(self, x).is_half()
        {
            return Ok(vec![self.cast(name, *x, half)?]);
        }
        let has = |dtype: DType| inputs.iter().any(|id| dtype_of(self, id) == dtype);
        let is_computed = |id: &&ValueId| !self.constants.contains(id);
        let computes =
            |dtype: DType| inputs.iter().filter(is_computed).any(|id| dtype_of(self, id) == dtype);
        let dtype = match op.width() {
            _ if self.is_wide => Some(DType::F32),
            Some(Width::Half) => Some(half),
            Some(Width::Wide) => Some(DType::F32),
            Some(Width::WideForTensorRt) if !self.flavour.has_contrib() => Some(DType::F32),
            Some(Width::OfInputs | Width::WideForTensorRt) if computes(DType::F32) => {
                Some(DType::F32)
            }
            Some(Width::OfInputs | Width::WideForTensorRt) => has(half).then_some(half),
            None => match &op {
                Op::Gather(_) => Some(half),
                Op::Concat(_) => has(half).then_some(half),
                _ => None,
            },
        };
        let mut typed = inputs.to_vec();
        if let Some(dtype) = dtype {
            for id in &mut typed {
                *id = self.cast(name, *id, dtype)?;
            }
        }
        self.once(name, op, &typed)
    }

    /// Appends a standard op with its inputs in f32.
    fn in_f32(
        &mut self,
        name: &str,
        op: Op,
        inputs: &[ValueId],
    ) -> Result<Vec<ValueId>, GraphError> {
        let wide = inputs.iter().map(|id| self.cast(name, *id, DType::F32));
        let wide = wide.collect::<Result<Vec<ValueId>, GraphError>>()?;
        let are_floats = wide.iter().all(|id| self.out.fact(*id).dtype == DType::F32);
        match &op {
            Op::Cast(cast) if are_floats && (cast.dtype == DType::F32 || cast.dtype.is_half()) => {
                Ok(wide)
            }
            _ => self.once(name, op, &wide),
        }
    }

    /// A float as `dtype`; other values as they are.
    fn cast(&mut self, name: &str, id: ValueId, dtype: DType) -> Result<ValueId, GraphError> {
        let value = self.out.value(id);
        let found = value.fact.dtype;
        if found == dtype || !(found == DType::F32 || found.is_half()) {
            return Ok(id);
        }
        if let (Some(Constant::Literal(literal)), Some(half)) = (&value.constant, half_of(dtype))
            && let Some(literal) = literal.as_f32()
        {
            let literal = Tensor::F32(literal.mapv(half).into_shared());
            let cast = Op::from(Cast { dtype }).evaluate(&[literal]);
            let mut cast = cast.map_err(|error| self.out.broken(error.to_string()))?;
            return Ok(self.literal(cast.remove(0)));
        }
        let outputs = self.once(&format!("{name}/{dtype}"), Cast { dtype }.into(), &[id])?;
        Ok(outputs[0])
    }

    fn panel_linear(
        &mut self,
        name: &str,
        linear: &Linear,
        inputs: &[ValueId],
    ) -> Result<Vec<ValueId>, GraphError> {
        let weight = inputs.get(1).and_then(|weight| self.panels.get(weight)).cloned();
        match weight {
            Some((weight, parts)) if PanelLinear::takes(weight.format, linear.rounding) => {
                let x_scale = self.typing.x_scales.get(name).copied();
                let (format, linear) = (weight.format, linear.clone());
                let op: Op = match (self.flavour.has_contrib(), x_scale) {
                    (true, _) => PanelLinear { linear, weight }.into(),
                    (false, Some(x_scale)) if format == PanelFormat::Int8 => {
                        QuantisedLinear { linear, n: weight.n, k: weight.k, x_scale }.into()
                    }
                    (false, _) => return self.once(name, linear.into(), inputs),
                };
                let inputs = [&inputs[..1], &parts, &inputs[2..]].concat();
                self.once(name, op, &inputs)
            }
            _ => self.once(name, linear.clone().into(), inputs),
        }
    }
}

/// What keeps a number within a half-precision type.
fn half_of(dtype: DType) -> Option<fn(f32) -> f32> {
    match dtype {
        DType::F16 => {
            Some(|value| value.clamp(f32::from(half::f16::MIN), f32::from(half::f16::MAX)))
        }
        DType::BF16 => Some(|value| value),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{Activate, Activation, Add, Mul};
    use crate::{Fact, Tensor, evaluate};

    #[test]
    fn chains_of_equal_nodes_become_one() {
        let mut graph = Graph::new("thrice");
        let [x, y] = ["x", "y"].map(|name| graph.input(name, Fact::f32([2])));
        let mut ends = Vec::new();
        for layer in 0..3 {
            let sum = graph.add(&format!("{layer}.sum"), Add, &[x, y]).unwrap();
            let op = Activate { activation: Activation::Silu };
            let active = graph.add(&format!("{layer}.active"), op, &[sum]).unwrap();
            ends.push(graph.add(&format!("{layer}.product"), Mul, &[active, x]).unwrap());
        }
        let other = graph.add("other", Add, &[y, x]).unwrap();
        for (i, value) in [ends[0], ends[2], other].into_iter().enumerate() {
            graph.output(&format!("y{i}"), value);
        }
        let inlined = inline_functions(&graph, Flavour::Portable).unwrap();
        let n_named =
            |prefix: &str| inlined.nodes().iter().filter(|n| n.name.starts_with(prefix)).count();
        assert_eq!((n_named("1."), n_named("2."), n_named("other")), (0, 0, 1));
        assert_eq!(n_named("0.sum"), 1);
        let inputs = [Tensor::vector(vec![1.0, 2.0]), Tensor::vector(vec![0.5, -1.0])];
        assert_eq!(evaluate(&inlined, &inputs).unwrap(), evaluate(&graph, &inputs).unwrap());
    }
}
