//! `QuantisedLinear`: a linear of bytes with one scale for all activations that was chosen before, as explicit
//! quantisation writes it.

use super::quantize_linear::zero_point;
use super::{
    Attributes, DequantizeLinear, Flavour, Linear, MatMul, OpError, Operator, PanelFormat,
    QuantizeLinear, Transpose, UnpackPanels,
};
use crate::graph::{Graph, GraphError, ValueId};
use crate::{Fact, Tensor};

/// `Linear` of activations rounded to levels of `x_scale` and of a weight of bytes in panels. Inputs: x `[.., k]`, data, row
/// scales, bias `[n]` if `bias`, residual `[.., n]` if `residual`.
///
/// `QuantizeLinear` and `DequantizeLinear` stand before both sides of the product, so that an engine that knows the pattern
/// multiplies bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantisedLinear {
    /// What is done with the weight; its own rounding says nothing.
    pub linear: Linear,
    /// Rows of the weight.
    pub n: usize,
    /// Columns of the weight.
    pub k: usize,
    /// Distance of the levels of activations, above 0.
    pub x_scale: f32,
}

impl QuantisedLinear {
    pub(crate) fn parse(attributes: &Attributes) -> Result<QuantisedLinear, OpError> {
        let own = ["n", "k", "x_scale"];
        let (own, linear) =
            attributes.0.iter().cloned().partition(|(name, _)| own.contains(&name.as_str()));
        let (own, linear) = (Attributes(own), Attributes(linear));
        let x_scale = own.float("x_scale")?;
        if !(x_scale > 0.0 && x_scale.is_finite()) {
            return Err(OpError::Attribute {
                name: "x_scale".into(),
                expected: "a number above 0".into(),
                found: x_scale.to_string(),
            });
        }
        let (n, k) = (own.positive("n")?, own.positive("k")?);
        Ok(QuantisedLinear { linear: Linear::parse(&linear)?, n, k, x_scale })
    }

    fn weight(&self) -> UnpackPanels {
        UnpackPanels { format: PanelFormat::Int8, n: self.n, k: self.k }
    }

    fn definition(&self, inputs: &[Fact], flavour: Flavour) -> Result<Graph, GraphError> {
        let mut graph = Graph::new("QuantisedLinear");
        let roles = ["x", "data", "row_scales"].into_iter();
        let roles = roles.chain(self.linear.bias.then_some("bias"));
        let roles = roles.chain(self.linear.residual.then_some("residual"));
        let ids: Vec<ValueId> =
            roles.zip(inputs).map(|(role, fact)| graph.input(role, fact.clone())).collect();
        let [x, data, row_scales, rest @ ..] = &ids[..] else {
            return Err(graph.broken(format!("{} inputs", ids.len())));
        };
        let (levels, scales) = self.weight().rows_of_levels(&mut graph, *data, *row_scales)?;
        let weight = graph.add("weight", DequantizeLinear, &[levels, scales])?;
        let columns = graph.add("columns", Transpose { permutation: vec![1, 0] }, &[weight])?;
        let scale = graph.literal(Tensor::scalar(self.x_scale));
        let zero = graph.literal(zero_point());
        let level = graph.add("x_level", QuantizeLinear, &[*x, scale, zero])?;
        let x = graph.add("x_rounded", DequantizeLinear, &[level, scale])?;
        let product = graph.add("product", MatMul, &[x, columns])?;
        let y = self.linear.finish(&mut graph, product, rest, flavour)?;
        graph.output("y", y);
        Ok(graph)
    }
}

impl Operator for QuantisedLinear {
    fn name(&self) -> &'static str {
        "QuantisedLinear"
    }

    fn attributes(&self) -> Attributes {
        let own = self.linear.attributes();
        own.with("n", self.n).with("k", self.k).with("x_scale", self.x_scale)
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        if inputs.len() < 3 {
            return Err(OpError::InputCount { expected: 3, found: inputs.len() });
        }
        let weight = self.weight().infer(&inputs[1..3])?;
        self.linear.infer(&[&inputs[..1], &weight, &inputs[3..]].concat())
    }

    fn body(&self, inputs: &[Fact], flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        Some(self.definition(inputs, flavour))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{Activation, PackPanels, Rounding};

    #[test]
    fn both_sides_are_levels_times_their_scales() {
        let noise = |n: usize, seed: usize| -> Vec<f32> {
            (0..n).map(|i| (((i + seed) * 7919 + 13) % 1009) as f32 / 504.5 - 1.0).collect()
        };
        let linear = Linear {
            activation: Some(Activation::Gelu),
            bias: true,
            residual: true,
            rounding: Rounding::Int8,
        };
        for (n, k) in [(16, 16), (17, 33), (5, 70)] {
            let x_scale = 0.01;
            let weight = Tensor::f32(&[n, k], noise(n * k, 2)).unwrap();
            let panels = PackPanels { format: PanelFormat::Int8 };
            let packed = panels.evaluate(std::slice::from_ref(&weight)).unwrap();
            let unpack = UnpackPanels { format: PanelFormat::Int8, n, k };
            let rounded = unpack.evaluate(&packed).unwrap().remove(0);
            let x = noise(3 * k, 1);
            let levels = x.iter().map(|x| (x / x_scale).round_ties_even() * x_scale).collect();
            let rest =
                [Tensor::vector(noise(n, 3)), Tensor::f32(&[3, n], noise(3 * n, 4)).unwrap()];
            let exact = Linear { rounding: Rounding::None, ..linear.clone() };
            let plain = [&[Tensor::f32(&[3, k], levels).unwrap(), rounded], &rest[..]].concat();
            let expected = exact.evaluate(&plain).unwrap()[0].to_f32_vec().unwrap();
            let op = QuantisedLinear { linear: linear.clone(), n, k, x_scale };
            let x = [Tensor::f32(&[3, k], x).unwrap()];
            let inputs = [&x[..], &packed, &rest].concat();
            let found = op.evaluate(&inputs).unwrap()[0].to_f32_vec().unwrap();
            for (a, b) in found.iter().zip(&expected) {
                assert!((a - b).abs() < 1e-4, "{n}x{k}: {a} {b}");
            }
        }
    }
}
