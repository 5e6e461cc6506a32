//! Causal self-attention whose keys and values lie in buffers of a fixed size: new ones are written where their
//! positions say, past and present are one buffer, and shapes are the same in every step.

use super::self_attention::{batch_of_one, relative, rotary_angles, rotate_by_head};
use super::{
    Attributes, BiasedAttention, Expand, Flavour, Gather, OpError, Operator, Position, Reshape,
    RotaryEmbeddingOfRows, ScatterElements, SelfAttention, TensorScatter, expect_fact,
    expect_inputs, expect_rank,
};
use crate::graph::{Graph, GraphError, ValueId};
use crate::{Dim, Fact, Tensor};

/// [`SelfAttention`] of q [m, h·d], k and v [m, g·d] with buffers of k and v [n, g·d], or [1, g, n, d] by head, positions of
/// the new tokens i64 `[m]`, one after the other and below n, and of the buffers' rows i64 `[n]`: 0, 1, … Outputs: mixed
/// values [m, h·d] and the buffers with the new rows. Rows above a token's position are hidden from it, whatever they hold.
#[derive(Debug, Clone, PartialEq)]
pub struct InPlaceSelfAttention {
    /// Heads, scale and positions.
    pub attention: SelfAttention,
}

impl InPlaceSelfAttention {
    pub(crate) fn parse(attributes: &Attributes) -> Result<InPlaceSelfAttention, OpError> {
        SelfAttention::parse(attributes).map(|attention| InPlaceSelfAttention { attention })
    }

    fn definition(&self, inputs: &[Fact], flavour: Flavour) -> Result<Graph, GraphError> {
        let mut graph = Graph::new("InPlaceSelfAttention");
        let g = &mut graph;
        let names = ["q", "k", "v", "rows_k", "rows_v", "positions", "row_positions"];
        let values = [0, 1, 2, 3, 4, 5, 6].map(|i| g.input(names[i], inputs[i].clone()));
        let [y, k, v] = match flavour {
            _ if inputs[3].rank() == 4 => self.in_buffers_by_head(g, values)?,
            Flavour::Cuda if !self.attention.is_grouped() => self.by_row(g, values)?,
            _ => self.by_head(g, values)?,
        };
        graph.output("y", y);
        graph.output("new_rows_k", k);
        graph.output("new_rows_v", v);
        Ok(graph)
    }

    /// Operators of ONNX Runtime, which take heads side by side.
    fn by_row(
        &self,
        graph: &mut Graph,
        [mut q, mut k, v, rows_k, rows_v, positions, row_positions]: [ValueId; 7],
    ) -> Result<[ValueId; 3], GraphError> {
        let SelfAttention { n_heads, scale, .. } = self.attention;
        let out = graph.fact(q).shape.clone();
        if let Position::Rotary { n_dims, theta } = self.attention.position {
            let [cos, sin] = rotary_angles(graph, positions, n_dims, theta)?;
            let first = first_row(graph)?;
            for (name, x) in [("q_rotated", &mut q), ("k_rotated", &mut k)] {
                let [batch] = batch_of_one(graph, [*x])?;
                let op = RotaryEmbeddingOfRows { n_heads, n_dims };
                let rotated = graph.add(name, op, &[batch, first, cos, sin])?;
                *x = graph.add("rows", Reshape { shape: out.clone() }, &[rotated])?;
            }
        }
        let rows_k = self.write(graph, "rows_k", [rows_k, positions, k])?;
        let rows_v = self.write(graph, "rows_v", [rows_v, positions, v])?;
        let places = relative(graph, positions, row_positions)?;
        let bias = self.attention.bias(graph, places)?;
        let [q, k, v] = batch_of_one(graph, [q, rows_k, rows_v])?;
        let mixed = graph.add("attention", BiasedAttention { n_heads, scale }, &[q, k, v, bias])?;
        let y = graph.add("joined", Reshape { shape: out }, &[mixed])?;
        Ok([y, rows_k, rows_v])
    }

    /// Operators of TensorRT, which has buffers by head.
    fn in_buffers_by_head(
        &self,
        graph: &mut Graph,
        [q, k, v, rows_k, rows_v, positions, row_positions]: [ValueId; 7],
    ) -> Result<[ValueId; 3], GraphError> {
        let attention = &self.attention;
        let out = graph.fact(q).clone();
        let mut q = attention.heads(graph, "q_heads", q, attention.n_heads)?;
        let mut k = attention.heads(graph, "k_heads", k, attention.n_kv_heads)?;
        let v = attention.heads(graph, "v_heads", v, attention.n_kv_heads)?;
        if let Position::Rotary { n_dims, theta } = attention.position {
            let angles = rotary_angles(graph, positions, n_dims, theta)?;
            [q, k] = rotate_by_head(graph, [q, k], angles, n_dims)?;
        }
        let first = first_row(graph)?;
        let place = graph.add("place", Gather, &[positions, first])?;
        let [k, v] = batch_of_one(graph, [k, v])?;
        let rows_k = graph.add("rows_k", TensorScatter, &[rows_k, k, place])?;
        let rows_v = graph.add("rows_v", TensorScatter, &[rows_v, v, place])?;
        let places = relative(graph, positions, row_positions)?;
        let y = attention.in_one(graph, [q, rows_k, rows_v], places, &out)?;
        Ok([y, rows_k, rows_v])
    }

    /// Step by step.
    fn by_head(
        &self,
        graph: &mut Graph,
        [q, mut k, v, rows_k, rows_v, positions, row_positions]: [ValueId; 7],
    ) -> Result<[ValueId; 3], GraphError> {
        let attention = &self.attention;
        let (out, new) = (graph.fact(q).clone(), graph.fact(k).clone());
        let mut q = attention.heads(graph, "q_heads", q, attention.n_heads)?;
        if let Position::Rotary { n_dims, theta } = attention.position {
            let k_heads = attention.heads(graph, "k_heads", k, attention.n_kv_heads)?;
            let rotated = attention.rotate_both(graph, [q, k_heads], positions, n_dims, theta)?;
            q = rotated[0];
            k = attention.joined(graph, rotated[1], &new)?;
        }
        let rows_k = self.write(graph, "rows_k", [rows_k, positions, k])?;
        let rows_v = self.write(graph, "rows_v", [rows_v, positions, v])?;
        let k = attention.heads(graph, "all_k", rows_k, attention.n_kv_heads)?;
        let v = attention.heads(graph, "all_v", rows_v, attention.n_kv_heads)?;
        let places = relative(graph, positions, row_positions)?;
        let y = attention.in_steps(graph, [q, k, v], places, &out)?;
        Ok([y, rows_k, rows_v])
    }

    /// The buffer with new rows at their positions.
    fn write(
        &self,
        graph: &mut Graph,
        name: &str,
        [rows, positions, new]: [ValueId; 3],
    ) -> Result<ValueId, GraphError> {
        let shape = vec![graph.fact(positions).shape[0].clone(), Dim::from(1)];
        let indices = graph.add("place", Reshape { shape }, &[positions])?;
        let shape = graph.fact(new).shape.clone();
        let indices = graph.add("places", Expand { shape }, &[indices])?;
        graph.add(name, ScatterElements, &[rows, indices, new])
    }
}

/// The index 0, `[1]`.
fn first_row(graph: &mut Graph) -> Result<ValueId, GraphError> {
    let first = Tensor::i64(&[1], vec![0]);
    let first = first.ok_or_else(|| graph.broken("a place of the first row".into()))?;
    Ok(graph.literal(first))
}

impl Operator for InPlaceSelfAttention {
    fn name(&self) -> &'static str {
        "InPlaceSelfAttention"
    }

    fn attributes(&self) -> Attributes {
        self.attention.attributes()
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 7)?;
        expect_rank(inputs, 0, "q", 2)?;
        let m = inputs[0].shape[0].clone();
        let width = |heads: usize| Dim::from(heads * self.attention.head_dim);
        let (wide, narrow) = (width(self.attention.n_heads), width(self.attention.n_kv_heads));
        let new = Fact::f32([m.clone(), narrow.clone()]);
        let (n, buffer) = match &inputs[3].shape[..] {
            [_, _, n, _] => {
                let SelfAttention { n_kv_heads, head_dim, .. } = self.attention;
                let by_head = [Dim::from(1), n_kv_heads.into(), n.clone(), head_dim.into()];
                (n.clone(), Fact::f32(by_head))
            }
            _ => {
                expect_rank(inputs, 3, "rows_k", 2)?;
                let n = inputs[3].shape[0].clone();
                (n.clone(), Fact::f32([n, narrow]))
            }
        };
        let expected = [
            ("q", Fact::f32([m.clone(), wide])),
            ("k", new.clone()),
            ("v", new),
            ("rows_k", buffer.clone()),
            ("rows_v", buffer.clone()),
            ("positions", Fact::i64([m])),
            ("row_positions", Fact::i64([n])),
        ];
        for (index, (role, fact)) in expected.iter().enumerate() {
            expect_fact(inputs, index, role, fact)?;
        }
        Ok(vec![inputs[0].clone(), buffer.clone(), buffer])
    }

    fn body(&self, inputs: &[Fact], flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        Some(self.definition(inputs, flavour))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(shape: &[usize], seed: usize) -> Tensor {
        let n: usize = shape.iter().product();
        Tensor::f32(shape, (0..n).map(|i| ((i * 7 + seed * 13) as f32).sin()).collect()).unwrap()
    }

    /// A buffer with rows to spare gives what joined keys and values give.
    #[test]
    fn buffers_are_as_joined_keys() {
        for position in [
            Position::None,
            Position::Alibi { bias_max: 8.0 },
            Position::Rotary { n_dims: 2, theta: 1e4 },
        ] {
            let attention =
                SelfAttention { n_heads: 4, n_kv_heads: 2, head_dim: 4, scale: 0.5, position };
            let (q, k, v) = (noise(&[2, 16], 1), noise(&[2, 8], 2), noise(&[2, 8], 3));
            let past = [4, 5].map(|seed| noise(&[3, 2, 4], seed));
            let ids = |from: i64, to: i64| {
                Tensor::i64(&[(to - from) as usize], (from..to).collect()).unwrap()
            };
            let by_head = |rows: &Tensor| {
                super::super::Transpose { permutation: vec![1, 0, 2] }
                    .evaluate(std::slice::from_ref(rows))
                    .unwrap()
                    .remove(0)
            };
            let inputs = [
                q.clone(),
                k.clone(),
                v.clone(),
                by_head(&past[0]),
                by_head(&past[1]),
                ids(3, 5),
                ids(0, 5),
            ];
            let expected = attention.evaluate(&inputs).unwrap();
            let buffer = |past: &Tensor| {
                let mut rows = past.to_f32_vec().unwrap();
                rows.extend([7.0; 32]);
                Tensor::f32(&[7, 8], rows).unwrap()
            };
            let op = InPlaceSelfAttention { attention };
            let buffers = [0, 1].map(|i| buffer(&past[i]));
            let buffers_by_head = [0, 1].map(|i| {
                let rows = Reshape { shape: [7usize, 2, 4].map(Dim::from).to_vec() };
                let rows = rows.evaluate(std::slice::from_ref(&buffers[i])).unwrap().remove(0);
                let batch = Reshape { shape: [1usize, 2, 7, 4].map(Dim::from).to_vec() };
                batch.evaluate(&[by_head(&rows)]).unwrap().remove(0)
            });
            for [rows_k, rows_v] in [buffers, buffers_by_head] {
                let [q, k, v] = [&q, &k, &v].map(Tensor::clone);
                let found = op.evaluate(&[q, k, v, rows_k, rows_v, ids(3, 5), ids(0, 7)]).unwrap();
                let (found, expected) = (found[0].to_f32_vec(), expected[0].to_f32_vec());
                for (found, expected) in found.unwrap().iter().zip(expected.unwrap()) {
                    assert!((found - expected).abs() < 1e-6, "{position:?}: {found} {expected}");
                }
            }
        }
    }
}
