//! Cross-attention of text to the latents of one medium each: Flamingo's mask rule
//! (paper §2.4: a text token sees the last image before it).
//!
//! q [m, h·d], media k and v [n_media, n_latents, h·d], media time i64 [m] (0: no medium before
//! this token, t: medium t), media index i64 [n_media] (1, 2, …) → [m, h·d]. Rows with media
//! time 0 are exactly zero.

use super::attention::scaled;
use super::self_attention::{HIDDEN, batch_of_one};
use super::{
    Attributes, BiasedAttention, Equal, Expand, Flavour, MatMul, OpError, Operator, Reshape,
    ScaledDotProductAttention, Softmax, Transpose, Where, expect_fact, expect_inputs, expect_rank,
    input_error,
};
use crate::graph::{Graph, GraphError, ValueId};
use crate::{Dim, Fact, Tensor};

/// Multi-head attention of each text token to the latents of its medium.
#[derive(Debug, Clone, PartialEq)]
pub struct CrossAttention {
    /// Heads; each has an equal part of the last axis.
    pub n_heads: usize,
    /// Factor of the scores.
    pub scale: f32,
}

impl CrossAttention {
    pub(crate) fn parse(attributes: &Attributes) -> Result<CrossAttention, OpError> {
        attributes.expect_only(&["n_heads", "scale"])?;
        let n_heads = attributes.positive("n_heads")?;
        Ok(CrossAttention { n_heads, scale: attributes.float("scale")? })
    }

    fn definition(&self, inputs: &[Fact], flavour: Flavour) -> Result<Graph, GraphError> {
        let mut graph = Graph::new("CrossAttention");
        let g = &mut graph;
        let names = ["q", "media_k", "media_v", "media_time", "media_index"];
        let [q, media_k, media_v, media_time, media_index] =
            [0, 1, 2, 3, 4].map(|i| g.input(names[i], inputs[i].clone()));
        let text_len = inputs[0].shape[0].clone();
        let [n_media, n_latents, width] = &inputs[1].shape[..] else {
            return Err(g.broken("media_k of rank 3".into()));
        };
        let (n_heads, one) = (Dim::from(self.n_heads), Dim::from(1));
        let flat = vec![n_media.clone() * n_latents.clone(), width.clone()];
        let k = g.add("k_rows", Reshape { shape: flat.clone() }, &[media_k])?;
        let v = g.add("v_rows", Reshape { shape: flat.clone() }, &[media_v])?;
        let time = Reshape { shape: vec![text_len.clone(), one.clone(), one.clone()] };
        let time = g.add("time", time, &[media_time])?;
        let index = Reshape { shape: vec![n_media.clone(), one.clone()] };
        let index = g.add("index", index, &[media_index])?;
        let own = g.add("own", Equal, &[time, index])?;
        let by_media = [text_len.clone(), n_media.clone(), n_latents.clone()];
        let joined = match flavour {
            Flavour::Cuda => {
                let bias = hidden_media(g, own, by_media)?;
                let [q, k, v] = batch_of_one(g, [q, k, v])?;
                let op = BiasedAttention { n_heads: self.n_heads, scale: self.scale };
                let mixed = g.add("attention", op, &[q, k, v, bias])?;
                g.add("joined", Reshape { shape: inputs[0].shape.clone() }, &[mixed])?
            }
            Flavour::Trt10_15 => {
                let q = self.heads(g, "q_heads", q, vec![1, 0, 2])?;
                let k = self.heads(g, "k_heads", k, vec![1, 0, 2])?;
                let v = self.heads(g, "v_heads", v, vec![1, 0, 2])?;
                let bias = hidden_media(g, own, by_media)?;
                let shape = g.fact(q).shape.clone();
                let [q, k, v] = batch_of_one(g, [q, k, v])?;
                let op = ScaledDotProductAttention { scale: self.scale };
                let mixed = g.add("attention", op, &[q, k, v, bias])?;
                let mixed = g.add("mixed", Reshape { shape }, &[mixed])?;
                let rows = g.add("rows", Transpose { permutation: vec![1, 0, 2] }, &[mixed])?;
                g.add("joined", Reshape { shape: inputs[0].shape.clone() }, &[rows])?
            }
            _ => {
                let q = self.heads(g, "q_heads", q, vec![1, 0, 2])?;
                let k = self.heads(g, "k_heads", k, vec![1, 2, 0])?;
                let v = self.heads(g, "v_heads", v, vec![1, 0, 2])?;
                let q = scaled(g, q, self.scale)?;
                let scores = g.add("scores", MatMul, &[q, k])?;
                let by_media = [std::slice::from_ref(&n_heads), &by_media].concat();
                let scores = g.add("scores_by_media", Reshape { shape: by_media }, &[scores])?;
                let lowest = g.literal(Tensor::scalar(f32::MIN));
                let masked = g.add("masked", Where, &[own, scores, lowest])?;
                let rows = vec![n_heads, text_len.clone(), flat[0].clone()];
                let masked = g.add("masked_rows", Reshape { shape: rows }, &[masked])?;
                let weights = g.add("weights", Softmax, &[masked])?;
                let mixed = g.add("mixed", MatMul, &[weights, v])?;
                let rows = g.add("rows", Transpose { permutation: vec![1, 0, 2] }, &[mixed])?;
                g.add("joined", Reshape { shape: inputs[0].shape.clone() }, &[rows])?
            }
        };
        let time = Reshape { shape: vec![text_len, one] };
        let time = g.add("time_column", time, &[media_time])?;
        let none = g.literal(Tensor::scalar_i64(0));
        let blind = g.add("blind", Equal, &[time, none])?;
        let zero = g.literal(Tensor::scalar(0.0));
        let y = g.add("y", Where, &[blind, zero, joined])?;
        graph.output("y", y);
        Ok(graph)
    }

    /// [n, h·d] → [n, h, d] → permuted.
    fn heads(
        &self,
        graph: &mut Graph,
        name: &str,
        x: ValueId,
        permutation: Vec<usize>,
    ) -> Result<ValueId, GraphError> {
        let [rows, width] = &graph.fact(x).shape[..] else {
            return Err(graph.broken("rows of heads".into()));
        };
        let head_dim = width.known().unwrap_or(0) / self.n_heads;
        let shape = vec![rows.clone(), Dim::from(self.n_heads), Dim::from(head_dim)];
        let split = graph.add(&format!("{name}.split"), Reshape { shape }, &[x])?;
        graph.add(name, Transpose { permutation }, &[split])
    }
}

impl Operator for CrossAttention {
    fn name(&self) -> &'static str {
        "CrossAttention"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("n_heads", self.n_heads).with("scale", self.scale)
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 5)?;
        expect_rank(inputs, 0, "q", 2)?;
        expect_rank(inputs, 1, "media_k", 3)?;
        let width = &inputs[0].shape[1];
        if width.known().is_none_or(|width| width % self.n_heads != 0) {
            let expected = format!("last axis a multiple of {}", self.n_heads);
            return Err(input_error(0, "q", &expected, &inputs[0]));
        }
        let [n_media, n_latents, _] = &inputs[1].shape[..] else {
            unreachable!("rank was checked")
        };
        let media = Fact::f32([n_media.clone(), n_latents.clone(), width.clone()]);
        expect_fact(inputs, 1, "media_k", &media)?;
        expect_fact(inputs, 2, "media_v", &media)?;
        expect_fact(inputs, 3, "media_time", &Fact::i64([inputs[0].shape[0].clone()]))?;
        expect_fact(inputs, 4, "media_index", &Fact::i64([n_media.clone()]))?;
        Ok(vec![inputs[0].clone()])
    }

    fn body(&self, inputs: &[Fact], flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        Some(self.definition(inputs, flavour))
    }
}

/// What is added to the scores, [1, 1, m, n_media · n_latents]: `own` [m, n_media, 1] tells each token's medium.
fn hidden_media(
    graph: &mut Graph,
    own: ValueId,
    [text_len, n_media, n_latents]: [Dim; 3],
) -> Result<ValueId, GraphError> {
    let [seen, hidden] = [0.0, HIDDEN].map(|bias| graph.literal(Tensor::scalar(bias)));
    let bias = graph.add("bias_of_media", Where, &[own, seen, hidden])?;
    let shape = vec![text_len.clone(), n_media.clone(), n_latents.clone()];
    let bias = graph.add("bias_of_latents", Expand { shape }, &[bias])?;
    let shape = vec![Dim::from(1), Dim::from(1), text_len, n_media * n_latents];
    graph.add("bias", Reshape { shape }, &[bias])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_sees_its_own_medium_only() {
        let op = CrossAttention { n_heads: 1, scale: 1.0 };
        let q = Tensor::f32(&[3, 1], vec![1.0, 1.0, 1.0]).unwrap();
        let k = Tensor::f32(&[2, 2, 1], vec![1.0, 1.0, 5.0, 5.0]).unwrap();
        let v = Tensor::f32(&[2, 2, 1], vec![1.0, 3.0, 10.0, 30.0]).unwrap();
        let time = Tensor::i64(&[3], vec![0, 1, 2]).unwrap();
        let index = Tensor::i64(&[2], vec![1, 2]).unwrap();
        let y = op.evaluate(&[q, k, v, time, index]).unwrap();
        assert_eq!(y[0].to_f32_vec().unwrap(), [0.0, 2.0, 20.0]);
    }
}
