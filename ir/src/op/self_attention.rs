//! Causal self-attention of a language model, with past keys and values.
//!
//! One sequence: q [m, h·d], k and v [m, g·d], past k and v [g, p, d], positions of the new
//! tokens i64 [m], positions of all keys i64 [p + m]. A query sees the keys whose position is
//! not above its own. Outputs: mixed values [m, h·d], present k and v [g, p + m, d] (k after
//! rotary embedding).

use super::attention::scaled;
use super::{
    Add, Attribute, Attributes, Cast, Concat, Cos, Flavour, LessOrEqual, MatMul, Mul, Neg, OpError,
    Operator, Reshape, RotaryEmbedding, ScaledDotProductAttention, Sin, Slice, Softmax, Sub,
    Transpose, Where, expect_fact, expect_inputs, expect_rank, input_error,
};
use crate::graph::{Graph, GraphError, ValueId};
use crate::{DType, Dim, Fact, Tensor};

/// What hides a key when it is added to its score, in every type.
pub(super) const HIDDEN: f32 = -65504.0;

/// How positions enter self-attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Position {
    /// Not at all (positions are in the embeddings).
    None,
    /// Bias slope_h · (key position − query position), slopes 2^(−bias_max · i / n) as in MPT.
    Alibi {
        /// Largest exponent.
        bias_max: f32,
    },
    /// Rotation of the first `n_dims` of each head, first half against second half.
    Rotary {
        /// Rotated dimensions of a head; even.
        n_dims: usize,
        /// Base of the frequencies.
        theta: f32,
    },
}

/// Causal multi-head attention over past and new tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct SelfAttention {
    /// Query heads (h).
    pub n_heads: usize,
    /// Key and value heads (g); divides h.
    pub n_kv_heads: usize,
    /// Width of a head (d).
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Positional scheme.
    pub position: Position,
}

/// ALiBi's slopes: powers of 2^(−bias_max / n) with n the next power of two; for other head
/// counts every second slope comes first (transformers `build_mpt_alibi_tensor`).
pub fn alibi_slopes(n_heads: usize, bias_max: f32) -> Vec<f32> {
    let n = n_heads.next_power_of_two();
    let slope = |k: usize| (-bias_max * k as f32 / n as f32).exp2();
    match n == n_heads {
        true => (1..=n).map(slope).collect(),
        false => (2..=n).step_by(2).chain((1..=n).step_by(2)).take(n_heads).map(slope).collect(),
    }
}

/// Rotary frequencies theta^(−2i / n_dims), i in 0..n_dims/2.
pub fn rotary_frequencies(n_dims: usize, theta: f32) -> Vec<f32> {
    (0..n_dims).step_by(2).map(|i| 1.0 / theta.powf(i as f32 / n_dims as f32)).collect()
}

impl SelfAttention {
    pub(crate) fn parse(attributes: &Attributes) -> Result<SelfAttention, OpError> {
        let names = ["n_heads", "n_kv_heads", "head_dim", "scale", "position", "n_dims", "base"];
        attributes.expect_only(&names)?;
        let op = SelfAttention {
            n_heads: attributes.positive("n_heads")?,
            n_kv_heads: attributes.positive("n_kv_heads")?,
            head_dim: attributes.positive("head_dim")?,
            scale: attributes.float("scale")?,
            position: Position::parse(attributes)?,
        };
        if !op.n_heads.is_multiple_of(op.n_kv_heads) {
            return Err(OpError::Attribute {
                name: "n_kv_heads".into(),
                expected: format!("a divisor of {}", op.n_heads),
                found: op.n_kv_heads.to_string(),
            });
        }
        Ok(op)
    }
}

impl Position {
    fn parse(attributes: &Attributes) -> Result<Position, OpError> {
        let base = attributes.float("base")?;
        match attributes.text("position")? {
            "none" => Ok(Position::None),
            "alibi" => Ok(Position::Alibi { bias_max: base }),
            "rotary" => {
                Ok(Position::Rotary { n_dims: attributes.positive("n_dims")?, theta: base })
            }
            other => Err(OpError::Attribute {
                name: "position".into(),
                expected: "none, alibi or rotary".into(),
                found: other.into(),
            }),
        }
    }
}

impl Operator for SelfAttention {
    fn name(&self) -> &'static str {
        "SelfAttention"
    }

    fn attributes(&self) -> Attributes {
        let (position, n_dims, base) = match self.position {
            Position::None => ("none", 0, 0.0),
            Position::Alibi { bias_max } => ("alibi", 0, bias_max),
            Position::Rotary { n_dims, theta } => ("rotary", n_dims, theta),
        };
        Attributes::none()
            .with("n_heads", self.n_heads)
            .with("n_kv_heads", self.n_kv_heads)
            .with("head_dim", self.head_dim)
            .with("scale", self.scale)
            .with("position", position)
            .with("n_dims", n_dims)
            .with("base", Attribute::Float(base))
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 7)?;
        expect_rank(inputs, 0, "q", 2)?;
        expect_rank(inputs, 3, "past_k", 3)?;
        if let Position::Rotary { n_dims, .. } = self.position
            && (n_dims > self.head_dim || n_dims % 2 == 1)
        {
            let expected = format!("an even number of rotated dimensions up to {}", self.head_dim);
            return Err(input_error(0, "q", &expected, &n_dims));
        }
        let (text_len, past_len) = (inputs[0].shape[0].clone(), inputs[3].shape[1].clone());
        let row = |heads: usize| Fact::f32([text_len.clone(), Dim::from(heads * self.head_dim)]);
        let cache = |len: &Dim| {
            Fact::f32([Dim::from(self.n_kv_heads), len.clone(), Dim::from(self.head_dim)])
        };
        let total_len = past_len.clone() + text_len.clone();
        let expected = [
            ("q", row(self.n_heads)),
            ("k", row(self.n_kv_heads)),
            ("v", row(self.n_kv_heads)),
            ("past_k", cache(&past_len)),
            ("past_v", cache(&past_len)),
            ("positions", Fact::i64([text_len.clone()])),
            ("key_positions", Fact::i64([total_len.clone()])),
        ];
        for (index, (role, fact)) in expected.iter().enumerate() {
            expect_fact(inputs, index, role, fact)?;
        }
        Ok(vec![row(self.n_heads), cache(&total_len), cache(&total_len)])
    }

    fn body(&self, inputs: &[Fact], flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        Some(self.definition(inputs, flavour))
    }
}

impl SelfAttention {
    fn definition(&self, inputs: &[Fact], flavour: Flavour) -> Result<Graph, GraphError> {
        let mut graph = Graph::new("SelfAttention");
        let g = &mut graph;
        let names = ["q", "k", "v", "past_k", "past_v", "positions", "key_positions"];
        let [q, k, v, past_k, past_v, positions, key_positions] =
            [0, 1, 2, 3, 4, 5, 6].map(|i| g.input(names[i], inputs[i].clone()));
        let mut q = self.heads(g, "q_heads", q, self.n_heads)?;
        let mut k = self.heads(g, "k_heads", k, self.n_kv_heads)?;
        let v = self.heads(g, "v_heads", v, self.n_kv_heads)?;
        if let Position::Rotary { n_dims, theta } = self.position {
            if flavour == Flavour::Trt10_15 {
                let angles = rotary_angles(g, positions, n_dims, theta)?;
                [q, k] = rotate_by_head(g, [q, k], angles, n_dims)?;
            } else {
                [q, k] = self.rotate_both(g, [q, k], positions, n_dims, theta)?;
            }
        }
        let present_k = g.add("present_k", Concat { axis: 1 }, &[past_k, k])?;
        let present_v = g.add("present_v", Concat { axis: 1 }, &[past_v, v])?;
        let places = relative(g, positions, key_positions)?;
        let y = match flavour {
            Flavour::Trt10_15 => {
                let [k, v] = batch_of_one(g, [present_k, present_v])?;
                self.in_one(g, [q, k, v], places, &inputs[0])?
            }
            _ => self.in_steps(g, [q, present_k, present_v], places, &inputs[0])?,
        };
        graph.output("y", y);
        graph.output("present_k", present_k);
        graph.output("present_v", present_v);
        Ok(graph)
    }

    /// Queries and keys by head, rotated.
    pub(super) fn rotate_both(
        &self,
        graph: &mut Graph,
        [q, k]: [ValueId; 2],
        positions: ValueId,
        n_dims: usize,
        theta: f32,
    ) -> Result<[ValueId; 2], GraphError> {
        let angles = rotary_angles(graph, positions, n_dims, theta)?;
        let angles = both_halves(graph, angles)?;
        let q = self.rotate(graph, "q_rotated", q, angles, n_dims)?;
        Ok([q, self.rotate(graph, "k_rotated", k, angles, n_dims)?])
    }

    /// Mixed values [m, h·d], step by step.
    pub(super) fn in_steps(
        &self,
        graph: &mut Graph,
        [q, k, v]: [ValueId; 3],
        (row, column): (ValueId, ValueId),
        out: &Fact,
    ) -> Result<ValueId, GraphError> {
        let q = scaled(graph, q, self.scale)?;
        let mut scores = self.scores(graph, q, k)?;
        if let Position::Alibi { bias_max } = self.position {
            let bias = self.alibi(graph, row, column, bias_max)?;
            scores = graph.add("biased", Add, &[scores, bias])?;
        }
        let visible = graph.add("visible", LessOrEqual, &[column, row])?;
        let lowest = graph.literal(Tensor::scalar(f32::MIN));
        let masked = graph.add("masked", Where, &[visible, scores, lowest])?;
        let weights = graph.add("weights", Softmax, &[masked])?;
        self.mix(graph, weights, v, out)
    }

    /// Mixed values [m, h·d] of q [h, m, d], k and v [1, g, n, d] by one operator.
    pub(super) fn in_one(
        &self,
        graph: &mut Graph,
        [q, k, v]: [ValueId; 3],
        places: (ValueId, ValueId),
        out: &Fact,
    ) -> Result<ValueId, GraphError> {
        let bias = self.bias(graph, places)?;
        let shape = graph.fact(q).shape.clone();
        let [q] = batch_of_one(graph, [q])?;
        let op = ScaledDotProductAttention { scale: self.scale };
        let mixed = graph.add("attention", op, &[q, k, v, bias])?;
        let mixed = graph.add("mixed", Reshape { shape }, &[mixed])?;
        self.joined(graph, mixed, out)
    }

    /// What is added to the scores, [1, h or 1, m, p + m]: positions, and what hides later keys.
    pub(super) fn bias(
        &self,
        graph: &mut Graph,
        (row, column): (ValueId, ValueId),
    ) -> Result<ValueId, GraphError> {
        let visible = graph.add("visible", LessOrEqual, &[column, row])?;
        let (heads, bias) = match self.position {
            Position::Alibi { bias_max } => {
                (self.n_heads, self.alibi(graph, row, column, bias_max)?)
            }
            _ => (1, graph.literal(Tensor::scalar(0.0))),
        };
        let lowest = graph.literal(Tensor::scalar(HIDDEN));
        let bias = graph.add("bias", Where, &[visible, bias, lowest])?;
        let fact = graph.fact(visible);
        let shape = [&[Dim::from(1), Dim::from(heads)], &fact.shape[..]].concat();
        graph.add("bias_by_head", Reshape { shape }, &[bias])
    }

    /// [h, m, d] → [m, h·d].
    pub(super) fn joined(
        &self,
        graph: &mut Graph,
        x: ValueId,
        out: &Fact,
    ) -> Result<ValueId, GraphError> {
        let rows = graph.add("rows", Transpose { permutation: vec![1, 0, 2] }, &[x])?;
        graph.add("joined", Reshape { shape: out.shape.clone() }, &[rows])
    }

    /// [m, n·d] → [n, m, d].
    pub(super) fn heads(
        &self,
        graph: &mut Graph,
        name: &str,
        x: ValueId,
        n: usize,
    ) -> Result<ValueId, GraphError> {
        let text_len = graph.fact(x).shape[0].clone();
        let shape = vec![text_len, Dim::from(n), Dim::from(self.head_dim)];
        let split = graph.add(&format!("{name}.split"), Reshape { shape }, &[x])?;
        graph.add(name, Transpose { permutation: vec![1, 0, 2] }, &[split])
    }

    /// Whether several query heads share a key head. Values per query head then have one more
    /// axis: [h, ..] → [g, h/g, ..].
    pub(super) fn is_grouped(&self) -> bool {
        self.n_heads != self.n_kv_heads
    }

    /// Keys or values beside query heads: [g, p + m, d], or [g, 1, p + m, d] where heads are
    /// shared.
    fn shared(&self, graph: &mut Graph, name: &str, x: ValueId) -> Result<ValueId, GraphError> {
        if !self.is_grouped() {
            return Ok(x);
        }
        let mut shape = graph.fact(x).shape.clone();
        shape.insert(1, Dim::from(1));
        graph.add(name, Reshape { shape }, &[x])
    }

    /// Sizes of values per query head.
    fn head_shape(&self, rest: [Dim; 2]) -> Vec<Dim> {
        let heads = match self.is_grouped() {
            true => vec![Dim::from(self.n_kv_heads), Dim::from(self.n_heads / self.n_kv_heads)],
            false => vec![Dim::from(self.n_heads)],
        };
        [heads, rest.to_vec()].concat()
    }

    /// Scores [h, m, p + m], or [g, h/g, m, p + m].
    fn scores(&self, graph: &mut Graph, q: ValueId, k: ValueId) -> Result<ValueId, GraphError> {
        let k = self.shared(graph, "shared_k", k)?;
        if !self.is_grouped() {
            let columns = graph.add("columns", Transpose { permutation: vec![0, 2, 1] }, &[k])?;
            return graph.add("scores", MatMul, &[q, columns]);
        }
        let columns = graph.add("columns", Transpose { permutation: vec![0, 1, 3, 2] }, &[k])?;
        let text_len = graph.fact(q).shape[1].clone();
        let shape = self.head_shape([text_len, Dim::from(self.head_dim)]);
        let q = graph.add("grouped_q", Reshape { shape }, &[q])?;
        graph.add("scores", MatMul, &[q, columns])
    }

    /// slope · (key position − query position), [h, m, p + m] or [g, h/g, m, p + m].
    fn alibi(
        &self,
        graph: &mut Graph,
        row: ValueId,
        column: ValueId,
        bias_max: f32,
    ) -> Result<ValueId, GraphError> {
        let distance = graph.add("distance", Sub, &[column, row])?;
        let distance = graph.add("distance_f32", Cast { dtype: DType::F32 }, &[distance])?;
        let shape = self.head_shape([Dim::from(1), Dim::from(1)]);
        let shape: Vec<usize> = shape.iter().filter_map(Dim::known).collect();
        let slopes = Tensor::f32(&shape, alibi_slopes(self.n_heads, bias_max));
        let slopes = slopes.ok_or_else(|| graph.broken("one slope a head".into()))?;
        let slopes = graph.literal(slopes);
        graph.add("alibi", Mul, &[slopes, distance])
    }

    /// Weighted values, back in rows: [m, h·d].
    fn mix(
        &self,
        graph: &mut Graph,
        weights: ValueId,
        v: ValueId,
        out: &Fact,
    ) -> Result<ValueId, GraphError> {
        let v = self.shared(graph, "shared_v", v)?;
        let mut mixed = graph.add("mixed", MatMul, &[weights, v])?;
        if self.is_grouped() {
            let shape =
                vec![Dim::from(self.n_heads), out.shape[0].clone(), Dim::from(self.head_dim)];
            mixed = graph.add("ungrouped", Reshape { shape }, &[mixed])?;
        }
        self.joined(graph, mixed, out)
    }

    /// x · cos + rotate_half(x) · sin over the first `n_dims` of each head.
    fn rotate(
        &self,
        graph: &mut Graph,
        name: &str,
        x: ValueId,
        [cos, sin]: [ValueId; 2],
        n_dims: usize,
    ) -> Result<ValueId, GraphError> {
        let part = |graph: &mut Graph, label: &str, start, end| {
            graph.add(&format!("{name}.{label}"), Slice { axis: 2, start, end }, &[x])
        };
        let first = part(graph, "first", 0, n_dims / 2)?;
        let second = part(graph, "second", n_dims / 2, n_dims)?;
        let whole = part(graph, "whole", 0, n_dims)?;
        let negated = graph.add(&format!("{name}.negated"), Neg, &[second])?;
        let turned = graph.add(&format!("{name}.turned"), Concat { axis: 2 }, &[negated, first])?;
        let straight = graph.add(&format!("{name}.cos"), Mul, &[whole, cos])?;
        let across = graph.add(&format!("{name}.sin"), Mul, &[turned, sin])?;
        let rotated = graph.add(name, Add, &[straight, across])?;
        if n_dims == self.head_dim {
            return Ok(rotated);
        }
        let rest = part(graph, "rest", n_dims, self.head_dim)?;
        graph.add(&format!("{name}.joined"), Concat { axis: 2 }, &[rotated, rest])
    }
}

/// Each with a batch of one before its axes.
pub(super) fn batch_of_one<const N: usize>(
    graph: &mut Graph,
    values: [ValueId; N],
) -> Result<[ValueId; N], GraphError> {
    let mut batches = values;
    for value in &mut batches {
        let shape = graph.fact(*value).batch_of_one().shape;
        *value = graph.add("batch", Reshape { shape }, &[*value])?;
    }
    Ok(batches)
}

/// Values by head [n, m, d] rotated by cos and sin, [m, n_dims / 2] each.
pub(super) fn rotate_by_head(
    graph: &mut Graph,
    values: [ValueId; 2],
    angles: [ValueId; 2],
    n_dims: usize,
) -> Result<[ValueId; 2], GraphError> {
    let [cos, sin] = batch_of_one(graph, angles)?;
    let mut rotated = batch_of_one(graph, values)?;
    for (rotated, value) in rotated.iter_mut().zip(values) {
        let shape = graph.fact(value).shape.clone();
        let turned = graph.add("rotated", RotaryEmbedding { n_dims }, &[*rotated, cos, sin])?;
        *rotated = graph.add("rotated_heads", Reshape { shape }, &[turned])?;
    }
    Ok(rotated)
}

/// cos and sin [m, n_dims / 2] twice, each [m, n_dims].
fn both_halves(graph: &mut Graph, angles: [ValueId; 2]) -> Result<[ValueId; 2], GraphError> {
    let mut both = angles;
    for (both, name) in both.iter_mut().zip(["cos_twice", "sin_twice"]) {
        *both = graph.add(name, Concat { axis: 1 }, &[*both, *both])?;
    }
    Ok(both)
}

/// cos and sin of position · frequency, each [m, n_dims / 2].
pub(super) fn rotary_angles(
    graph: &mut Graph,
    positions: ValueId,
    n_dims: usize,
    theta: f32,
) -> Result<[ValueId; 2], GraphError> {
    let text_len = graph.fact(positions).shape[0].clone();
    let column = Reshape { shape: vec![text_len, Dim::from(1)] };
    let column = graph.add("position_column", column, &[positions])?;
    let column = graph.add("position_f32", Cast { dtype: DType::F32 }, &[column])?;
    let frequencies = rotary_frequencies(n_dims, theta);
    let frequencies = graph.literal(Tensor::vector(frequencies));
    let angles = graph.add("angles", Mul, &[column, frequencies])?;
    Ok([graph.add("cos", Cos, &[angles])?, graph.add("sin", Sin, &[angles])?])
}

/// Query positions as a column [m, 1] and key positions as a row [1, p + m].
pub(super) fn relative(
    graph: &mut Graph,
    positions: ValueId,
    key_positions: ValueId,
) -> Result<(ValueId, ValueId), GraphError> {
    let (text_len, total_len) =
        (graph.fact(positions).shape[0].clone(), graph.fact(key_positions).shape[0].clone());
    let query = Reshape { shape: vec![text_len, Dim::from(1)] };
    let key = Reshape { shape: vec![Dim::from(1), total_len] };
    Ok((
        graph.add("query_position", query, &[positions])?,
        graph.add("key_position", key, &[key_positions])?,
    ))
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;

    fn op(position: Position) -> SelfAttention {
        SelfAttention { n_heads: 2, n_kv_heads: 1, head_dim: 4, scale: 0.5, position }
    }

    fn noise(shape: &[usize], seed: usize) -> Tensor {
        let n: usize = shape.iter().product();
        Tensor::f32(shape, (0..n).map(|i| ((i * 7 + seed * 13) as f32).sin()).collect()).unwrap()
    }

    fn rows(tensor: &Tensor, start: usize, end: usize) -> Tensor {
        Slice { axis: 0, start, end }.evaluate(from_ref(tensor)).unwrap().remove(0)
    }

    /// Steps with past give what one pass over all tokens gives.
    #[test]
    fn step_equals_prefill() {
        for position in [
            Position::None,
            Position::Alibi { bias_max: 8.0 },
            Position::Rotary { n_dims: 4, theta: 1e4 },
            Position::Rotary { n_dims: 2, theta: 1e4 },
        ] {
            let op = op(position);
            let (q, k, v) = (noise(&[3, 8], 1), noise(&[3, 4], 2), noise(&[3, 4], 3));
            let empty = Tensor::f32(&[1, 0, 4], vec![]).unwrap();
            let run = |from: usize, to: usize, past: [Tensor; 2]| {
                let ids = |a: usize, b: usize| {
                    Tensor::i64(&[b - a], (a..b).map(|i| i as i64).collect()).unwrap()
                };
                let [past_k, past_v] = past;
                let (q, k, v) = (rows(&q, from, to), rows(&k, from, to), rows(&v, from, to));
                op.evaluate(&[q, k, v, past_k, past_v, ids(from, to), ids(0, to)]).unwrap()
            };
            let full = run(0, 3, [empty.clone(), empty.clone()]);
            let first = run(0, 2, [empty.clone(), empty]);
            let last = run(2, 3, [first[1].clone(), first[2].clone()]);
            let expected = rows(&full[0], 2, 3).to_f32_vec().unwrap();
            for (a, b) in last[0].to_f32_vec().unwrap().iter().zip(expected) {
                assert!((a - b).abs() < 1e-6, "{position:?}");
            }
            assert_eq!(last[1].shape(), [1, 3, 4]);
        }
    }

    #[test]
    fn slopes_follow_the_reference() {
        assert_eq!(alibi_slopes(4, 8.0), [0.25, 0.0625, 0.015625, 0.00390625]);
        assert_eq!(alibi_slopes(3, 8.0), [0.0625, 0.00390625, 0.25]);
    }
}
