//! `PanelLinear`: a linear with its weight in panels of integers as one op, for engines that multiply integers.

use super::{
    Add, Attributes, Cast, Flavour, Linear, MatMulIntegerToFloat, MatMulNBits, Mul, OpError,
    Operator, PanelFormat, Rounding, UnpackPanels,
};
use crate::graph::{Graph, GraphError, ValueId};
use crate::{DType, Fact, Tensor};

/// Columns of a block where all blocks of a row have one scale.
const BYTES_BLOCK: usize = 32;

/// `Linear` of the weight that `UnpackPanels` makes. Inputs: x `[.., k]`, data, row scales, of int4 block scales, bias `[n]`
/// if `bias`, residual `[.., n]` if `residual`.
///
/// For ONNX Runtime's CPU provider int8 is a product of bytes, whose sums are exact, and int4 a `MatMulNBits` of rounded
/// activations. For its CUDA provider both are `MatMulNBits`.
#[derive(Debug, Clone, PartialEq)]
pub struct PanelLinear {
    /// What is done with the weight.
    pub linear: Linear,
    /// How the weight is stored.
    pub weight: UnpackPanels,
}

impl PanelLinear {
    /// Whether the op is for weights stored so.
    pub(crate) fn takes(format: PanelFormat, rounding: Rounding) -> bool {
        rounding == Rounding::Int8
            && match format {
                PanelFormat::Int8 => true,
                // What `MatMulNBits` takes.
                PanelFormat::Int4 { block } => block >= 16 && block.is_power_of_two(),
                PanelFormat::F16 | PanelFormat::Bf16 => false,
            }
    }

    pub(crate) fn parse(attributes: &Attributes) -> Result<PanelLinear, OpError> {
        let (weight, linear) = attributes
            .0
            .iter()
            .cloned()
            .partition(|(name, _)| ["format", "n", "k"].contains(&name.as_str()));
        let (weight, linear) = (Attributes(weight), Attributes(linear));
        Ok(PanelLinear { linear: Linear::parse(&linear)?, weight: UnpackPanels::parse(&weight)? })
    }

    fn n_parts(&self) -> usize {
        self.weight.format.facts(self.weight.n, self.weight.k).len()
    }

    fn definition(&self, inputs: &[Fact], flavour: Flavour) -> Result<Graph, GraphError> {
        let mut graph = Graph::new("PanelLinear");
        let roles = ["x", "data", "row_scales", "block_scales"];
        let roles = roles[..=self.n_parts().min(3)].iter();
        let roles = roles.chain(self.linear.bias.then_some(&"bias"));
        let roles = roles.chain(self.linear.residual.then_some(&"residual"));
        let ids: Vec<ValueId> =
            roles.zip(inputs).map(|(role, fact)| graph.input(role, fact.clone())).collect();
        let (x, parts, rest) = match ids.split_first() {
            Some((x, others)) if others.len() >= self.n_parts() => {
                let (parts, rest) = others.split_at(self.n_parts());
                (*x, parts, rest)
            }
            _ => return Err(graph.broken(format!("{} inputs", ids.len()))),
        };
        let is_fitting = PanelLinear::takes(self.weight.format, self.linear.rounding);
        let y = match (flavour, self.weight.format, parts) {
            (Flavour::OrtCpu, PanelFormat::Int8, [data, row_scales]) if is_fitting => {
                let product = self.integer_product(&mut graph, x, *data, *row_scales)?;
                self.linear.finish(&mut graph, product, rest, flavour)?
            }
            (Flavour::Cuda, PanelFormat::Int8, [data, row_scales]) if is_fitting => {
                let product = self.byte_blocks_product(&mut graph, x, *data, *row_scales)?;
                self.linear.finish(&mut graph, product, rest, flavour)?
            }
            (_, PanelFormat::Int4 { block }, [data, row_scales, block_scales])
                if is_fitting && flavour.has_contrib() =>
            {
                let x = self.linear.rounding.define(&mut graph, x, flavour)?;
                let (weight, scales) = self.weight.blocks_of_nibbles(
                    &mut graph,
                    *data,
                    *row_scales,
                    *block_scales,
                    block,
                )?;
                let UnpackPanels { n, k, .. } = self.weight;
                let product = MatMulNBits { bits: 4, block, n, k };
                let product = graph.add("product", product, &[x, weight, scales])?;
                self.linear.finish(&mut graph, product, rest, flavour)?
            }
            _ => {
                let weight = graph.add("weight", self.weight.clone(), parts)?;
                graph.add("y", self.linear.clone(), &[&[x, weight], rest].concat())?
            }
        };
        graph.output("y", y);
        Ok(graph)
    }

    /// x Wᵀ with W in blocks of bytes that share the scale of their row.
    fn byte_blocks_product(
        &self,
        graph: &mut Graph,
        x: ValueId,
        data: ValueId,
        row_scales: ValueId,
    ) -> Result<ValueId, GraphError> {
        let (weight, scales) = self.weight.blocks_of_bytes(graph, data, row_scales, BYTES_BLOCK)?;
        let UnpackPanels { n, k, .. } = self.weight;
        let product = MatMulNBits { bits: 8, block: BYTES_BLOCK, n, k };
        graph.add("product", product, &[x, weight, scales])
    }

    /// x Wᵀ with both sides as bytes around 128, which no processor's product of bytes saturates.
    fn integer_product(
        &self,
        graph: &mut Graph,
        x: ValueId,
        data: ValueId,
        row_scales: ValueId,
    ) -> Result<ValueId, GraphError> {
        let middle = graph.literal(Tensor::scalar(128.0));
        let one = graph.literal(Tensor::scalar(1.0));
        let bytes = Cast { dtype: DType::U8 };
        let zero_point = graph.add("zero_point", bytes.clone(), &[middle])?;
        let (level, scale) = self.linear.rounding.levels(graph, x)?;
        let shifted = graph.add("x_shifted", Add, &[level, middle])?;
        let x = graph.add("x_bytes", bytes.clone(), &[shifted])?;
        let (columns, scales) = self.weight.columns_of_levels(graph, data, row_scales)?;
        let shifted = graph.add("weight_shifted", Add, &[columns, middle])?;
        let weight = graph.add("weight_bytes", bytes, &[shifted])?;
        let inputs = [x, weight, one, scales, zero_point, zero_point];
        let product = graph.add("product_of_levels", MatMulIntegerToFloat, &inputs)?;
        graph.add("product", Mul, &[product, scale])
    }
}

impl Operator for PanelLinear {
    fn name(&self) -> &'static str {
        "PanelLinear"
    }

    fn attributes(&self) -> Attributes {
        let mut attributes = self.linear.attributes();
        attributes.0.extend(self.weight.attributes().0);
        attributes
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        let n_parts = self.n_parts();
        if inputs.len() < 1 + n_parts {
            return Err(OpError::InputCount { expected: 1 + n_parts, found: inputs.len() });
        }
        let weight = self.weight.infer(&inputs[1..=n_parts])?;
        self.linear.infer(&[&inputs[..1], &weight, &inputs[1 + n_parts..]].concat())
    }

    fn body(&self, inputs: &[Fact], flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        Some(self.definition(inputs, flavour))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{Activation, PackPanels};

    fn noise(shape: &[usize], seed: usize) -> Tensor {
        let n: usize = shape.iter().product();
        let value = |i: usize| (((i + seed) * 7919 + 13) % 1009) as f32 / 504.5 - 1.0;
        Tensor::f32(shape, (0..n).map(value).collect()).unwrap()
    }

    #[test]
    fn engines_bodies_compute_what_linear_and_unpacked_weight_do() {
        let linear = Linear {
            activation: Some(Activation::Gelu),
            bias: true,
            residual: true,
            rounding: Rounding::Int8,
        };
        for format in
            [PanelFormat::Int8, PanelFormat::Int4 { block: 16 }, PanelFormat::Int4 { block: 32 }]
        {
            for (n, k) in [(16, 16), (17, 33), (5, 70), (48, 129)] {
                let op =
                    PanelLinear { linear: linear.clone(), weight: UnpackPanels { format, n, k } };
                let mut inputs = vec![noise(&[3, k], 1)];
                inputs.extend(PackPanels { format }.evaluate(&[noise(&[n, k], 2)]).unwrap());
                inputs.extend([noise(&[n], 3), noise(&[3, n], 4)]);
                let facts: Vec<Fact> = inputs.iter().map(Tensor::fact).collect();
                let expected = op.evaluate(&inputs).unwrap()[0].to_f32_vec().unwrap();
                let body = op.body(&facts, Flavour::OrtCpu).unwrap().unwrap();
                assert!(body.nodes().iter().all(|node| node.op.name() != "UnpackPanels"));
                let found = crate::evaluate(&body, &inputs).unwrap()[0].to_f32_vec().unwrap();
                for (a, b) in found.iter().zip(&expected) {
                    assert!((a - b).abs() < 1e-4, "{format} {n}x{k}: {a} {b}");
                }
            }
        }
    }
}
