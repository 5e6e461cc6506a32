//! Bidirectional multi-head attention, and the Perceiver Resampler's form of it
//! (Flamingo paper, fig. 5: keys and values are the media features and the latents).

use super::{
    Attributes, Concat, Flavour, MatMul, Mul, MultiHeadAttention, OpError, Operator, Reshape,
    ScaledDotProductAttention, Softmax, Transpose, expect_fact, expect_inputs, expect_rank,
    input_error,
};
use crate::graph::{Graph, GraphError, ValueId};
use crate::{Dim, Fact, Tensor};

/// softmax(scale · q kᵀ) v per head. q [b, s, h·d], k and v [b, t, h·d] → [b, s, h·d].
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    /// Heads; each has an equal part of the last axis.
    pub n_heads: usize,
    /// Factor of the scores.
    pub scale: f32,
}

/// Attention whose keys and values come in two pieces: media first, then latents.
/// q [b, r, h·d], media k and v [b, t, h·d], latent k and v [b, r, h·d] → [b, r, h·d].
#[derive(Debug, Clone, PartialEq)]
pub struct ResamplerAttention {
    /// Heads; each has an equal part of the last axis.
    pub n_heads: usize,
    /// Factor of the scores.
    pub scale: f32,
}

impl Attention {
    pub(crate) fn parse(attributes: &Attributes) -> Result<Attention, OpError> {
        attributes.expect_only(&["n_heads", "scale"])?;
        let n_heads = attributes.positive("n_heads")?;
        Ok(Attention { n_heads, scale: attributes.float("scale")? })
    }
}

impl ResamplerAttention {
    pub(crate) fn parse(attributes: &Attributes) -> Result<ResamplerAttention, OpError> {
        let Attention { n_heads, scale } = Attention::parse(attributes)?;
        Ok(ResamplerAttention { n_heads, scale })
    }

    fn attention(&self) -> Attention {
        Attention { n_heads: self.n_heads, scale: self.scale }
    }
}

/// Multiplies by `scale` unless that is 1.
pub(crate) fn scaled(graph: &mut Graph, x: ValueId, scale: f32) -> Result<ValueId, GraphError> {
    if scale == 1.0 {
        return Ok(x);
    }
    let factor = graph.literal(Tensor::scalar(scale));
    graph.add("scaled", Mul, &[x, factor])
}

impl Attention {
    fn define(
        &self,
        graph: &mut Graph,
        [q, k, v]: [ValueId; 3],
        flavour: Flavour,
    ) -> Result<ValueId, GraphError> {
        if flavour.has_contrib() {
            let op = MultiHeadAttention { n_heads: self.n_heads, scale: self.scale };
            return graph.add("attention", op, &[q, k, v]);
        }
        let out_shape = graph.fact(q).shape.clone();
        let q = self.heads(graph, q, "q", vec![0, 2, 1, 3])?;
        let v = self.heads(graph, v, "v", vec![0, 2, 1, 3])?;
        let mixed = match flavour {
            Flavour::Trt10_15 => {
                let k = self.heads(graph, k, "k", vec![0, 2, 1, 3])?;
                let op = ScaledDotProductAttention { scale: self.scale };
                graph.add("mixed", op, &[q, k, v])?
            }
            _ => {
                let k = self.heads(graph, k, "k", vec![0, 2, 3, 1])?;
                let q = scaled(graph, q, self.scale)?;
                let scores = graph.add("scores", MatMul, &[q, k])?;
                let weights = graph.add("weights", Softmax, &[scores])?;
                graph.add("mixed", MatMul, &[weights, v])?
            }
        };
        let rows = graph.add("rows", Transpose { permutation: vec![0, 2, 1, 3] }, &[mixed])?;
        graph.add("joined", Reshape { shape: out_shape }, &[rows])
    }

    /// [b, s, h·d] → [b, s, h, d] → permuted.
    fn heads(
        &self,
        graph: &mut Graph,
        x: ValueId,
        name: &str,
        permutation: Vec<usize>,
    ) -> Result<ValueId, GraphError> {
        let mut shape = graph.fact(x).shape.clone();
        let width = shape.pop().as_ref().and_then(Dim::known).unwrap_or(0);
        shape.extend([Dim::from(self.n_heads), Dim::from(width / self.n_heads)]);
        let heads = graph.add(&format!("{name}_heads"), Reshape { shape }, &[x])?;
        graph.add(name, Transpose { permutation }, &[heads])
    }
}

impl Operator for Attention {
    fn name(&self) -> &'static str {
        "Attention"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("n_heads", self.n_heads).with("scale", self.scale)
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 3)?;
        expect_rank(inputs, 0, "q", 3)?;
        expect_rank(inputs, 1, "k", 3)?;
        let [batch, _, width] = &inputs[0].shape[..] else { unreachable!("rank was checked") };
        if width.known().is_none_or(|width| width % self.n_heads != 0) {
            let expected = format!("last axis a multiple of {}", self.n_heads);
            return Err(input_error(0, "q", &expected, &inputs[0]));
        }
        let keys = Fact::f32([batch.clone(), inputs[1].shape[1].clone(), width.clone()]);
        expect_fact(inputs, 1, "k", &keys)?;
        expect_fact(inputs, 2, "v", &keys)?;
        Ok(vec![inputs[0].clone()])
    }

    fn body(&self, inputs: &[Fact], flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        let mut graph = Graph::new("Attention");
        let [q, k, v] = [0, 1, 2].map(|i| graph.input(["q", "k", "v"][i], inputs[i].clone()));
        Some(self.define(&mut graph, [q, k, v], flavour).map(|y| {
            graph.output("y", y);
            graph
        }))
    }
}

impl ResamplerAttention {
    fn definition(&self, inputs: &[Fact], flavour: Flavour) -> Result<Graph, GraphError> {
        let mut graph = Graph::new("ResamplerAttention");
        let names = ["q", "media_k", "media_v", "latent_k", "latent_v"];
        let [q, media_k, media_v, latent_k, latent_v] =
            [0, 1, 2, 3, 4].map(|i| graph.input(names[i], inputs[i].clone()));
        let k = graph.add("keys", Concat { axis: 1 }, &[media_k, latent_k])?;
        let v = graph.add("values", Concat { axis: 1 }, &[media_v, latent_v])?;
        let y = self.attention().define(&mut graph, [q, k, v], flavour)?;
        graph.output("y", y);
        Ok(graph)
    }
}

impl Operator for ResamplerAttention {
    fn name(&self) -> &'static str {
        "ResamplerAttention"
    }

    fn attributes(&self) -> Attributes {
        self.attention().attributes()
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 5)?;
        let pick = |indices: [usize; 3]| indices.map(|i| inputs[i].clone());
        self.attention().infer(&pick([0, 1, 2]))?;
        self.attention().infer(&pick([0, 3, 4]))
    }

    fn body(&self, inputs: &[Fact], flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        Some(self.definition(inputs, flavour))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_keys_average_the_values() {
        let q = Tensor::f32(&[1, 1, 2], vec![1.0, -1.0]).unwrap();
        let k = Tensor::f32(&[1, 2, 2], vec![0.5; 4]).unwrap();
        let v = Tensor::f32(&[1, 2, 2], vec![1.0, 2.0, 3.0, 6.0]).unwrap();
        let y = Attention { n_heads: 2, scale: 0.7 }.evaluate(&[q, k, v]).unwrap();
        assert_eq!(y[0].to_f32_vec().unwrap(), [2.0, 4.0]);
    }

    #[test]
    fn the_resampler_attends_to_media_and_latents() {
        let one = |shape: &[usize], value| {
            Tensor::f32(shape, vec![value; shape.iter().product()]).unwrap()
        };
        let op = ResamplerAttention { n_heads: 1, scale: 1.0 };
        let y = op
            .evaluate(&[
                one(&[1, 1, 1], 0.0),
                one(&[1, 3, 1], 1.0),
                one(&[1, 3, 1], 4.0),
                one(&[1, 1, 1], 1.0),
                one(&[1, 1, 1], 8.0),
            ])
            .unwrap();
        assert_eq!(y[0].to_f32_vec().unwrap(), [5.0]);
    }
}
