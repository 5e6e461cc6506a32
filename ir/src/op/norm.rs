//! Normalisation: ONNX's `LayerNormalization`, and the functions `LayerNorm` and `RmsNorm`
//! that add optional affine terms and normalisation per attention head.
//!
//! `LayerNorm`: (x − mean) / √(var + ε) · scale + bias, population variance
//! (<https://onnx.ai/onnx/operators/onnx__LayerNormalization.html>).
//! `RmsNorm`: x / √(mean(x²) + ε) · scale (LLaMA).

use ndarray::Axis;

use super::{
    Add, Attributes, Div, Flavour, Mul, OnnxForm, OpError, Operator, ReduceMean, Reshape, Sqrt,
    expect_fact, expect_inputs, input_error,
};
use crate::graph::{Graph, GraphError, ValueId};
use crate::{DType, Dim, Fact, Tensor};

/// ONNX's layer normalisation over the last axis: x, scale, optional bias.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerNormalization {
    /// Added to the variance.
    pub epsilon: f32,
}

/// ONNX's normalisation by the root mean square over the last axis (opset 23): x, scale.
#[derive(Debug, Clone, PartialEq)]
pub struct RmsNormalization {
    /// Added to the mean square.
    pub epsilon: f32,
}

/// Layer normalisation over each of `n_heads` equal parts of the last axis.
/// Inputs: x [.., d], scale [d / n_heads] if `scale`, bias [d / n_heads] if `bias`.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerNorm {
    /// Added to the variance.
    pub epsilon: f32,
    /// Parts of the last axis that are normalised apart.
    pub n_heads: usize,
    /// Whether a scale input follows.
    pub scale: bool,
    /// Whether a bias input follows.
    pub bias: bool,
}

/// Root-mean-square normalisation over each of `n_heads` equal parts of the last axis.
/// Inputs: x [.., d], scale [d / n_heads] if `scale`.
#[derive(Debug, Clone, PartialEq)]
pub struct RmsNorm {
    /// Added to the mean square.
    pub epsilon: f32,
    /// Parts of the last axis that are normalised apart.
    pub n_heads: usize,
    /// Whether a scale input follows.
    pub scale: bool,
}

impl LayerNormalization {
    pub(crate) fn parse(attributes: &Attributes) -> Result<LayerNormalization, OpError> {
        attributes.expect_only(&["epsilon"])?;
        Ok(LayerNormalization { epsilon: attributes.float("epsilon")? })
    }
}

impl LayerNorm {
    pub(crate) fn parse(attributes: &Attributes) -> Result<LayerNorm, OpError> {
        attributes.expect_only(&["epsilon", "n_heads", "scale", "bias"])?;
        Ok(LayerNorm {
            epsilon: attributes.float("epsilon")?,
            n_heads: attributes.positive("n_heads")?,
            scale: attributes.flag("scale")?,
            bias: attributes.flag("bias")?,
        })
    }
}

impl RmsNorm {
    pub(crate) fn parse(attributes: &Attributes) -> Result<RmsNorm, OpError> {
        attributes.expect_only(&["epsilon", "n_heads", "scale"])?;
        Ok(RmsNorm {
            epsilon: attributes.float("epsilon")?,
            n_heads: attributes.positive("n_heads")?,
            scale: attributes.flag("scale")?,
        })
    }
}

/// Size of the last axis of x over `n_heads`, after checking x and the affine inputs.
fn check(inputs: &[Fact], n_heads: usize, affine: &[&'static str]) -> Result<usize, OpError> {
    expect_inputs(inputs, 1 + affine.len())?;
    let size = inputs[0].shape.last().and_then(Dim::known);
    let part = size.filter(|size| size % n_heads == 0 && inputs[0].dtype == DType::F32);
    let part = part.map(|size| size / n_heads).ok_or_else(|| {
        let expected = format!("f32 whose last axis is a multiple of {n_heads}");
        input_error(0, "x", &expected, &inputs[0])
    })?;
    for (index, role) in affine.iter().enumerate() {
        expect_fact(inputs, index + 1, role, &Fact::f32([part]))?;
    }
    Ok(part)
}

impl Operator for LayerNormalization {
    fn name(&self) -> &'static str {
        "LayerNormalization"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("epsilon", self.epsilon)
    }

    fn onnx_form(&self) -> OnnxForm {
        OnnxForm::Node {
            domain: "",
            op_type: "LayerNormalization",
            attributes: self.attributes().with("axis", super::Attribute::Int(-1)),
            extra_inputs: Vec::new(),
            absent: &[],
        }
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        let affine = ["scale", "bias"];
        let n_affine = inputs.len().saturating_sub(1).clamp(1, 2);
        check(inputs, 1, &affine[..n_affine])?;
        Ok(vec![inputs[0].clone()])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let failed =
            || OpError::Evaluation("LayerNormalization takes x, scale, bias in f32".into());
        let x = inputs.first().and_then(Tensor::as_f32).ok_or_else(failed)?;
        let scale = inputs.get(1).and_then(Tensor::to_f32_vec).ok_or_else(failed)?;
        let bias = inputs.get(2).and_then(Tensor::to_f32_vec);
        let mut out = x.to_owned();
        for mut lane in out.lanes_mut(Axis(x.ndim() - 1)) {
            let n = lane.len() as f64;
            let mean = lane.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
            let variance = lane.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
            let inverse = 1.0 / (variance + f64::from(self.epsilon)).sqrt();
            for (i, value) in lane.iter_mut().enumerate() {
                let shift = bias.as_ref().map_or(0.0, |bias| bias[i]);
                *value = ((f64::from(*value) - mean) * inverse) as f32 * scale[i] + shift;
            }
        }
        Ok(vec![Tensor::F32(out.into_shared())])
    }
}

impl RmsNormalization {
    pub(crate) fn parse(attributes: &Attributes) -> Result<RmsNormalization, OpError> {
        attributes.expect_only(&["epsilon"])?;
        Ok(RmsNormalization { epsilon: attributes.float("epsilon")? })
    }
}

impl Operator for RmsNormalization {
    fn name(&self) -> &'static str {
        "RmsNormalization"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("epsilon", self.epsilon)
    }

    fn onnx_form(&self) -> OnnxForm {
        OnnxForm::Node {
            domain: "",
            op_type: "RMSNormalization",
            attributes: self.attributes().with("axis", super::Attribute::Int(-1)),
            extra_inputs: Vec::new(),
            absent: &[],
        }
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        check(inputs, 1, &["scale"])?;
        Ok(vec![inputs[0].clone()])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        RmsNorm { epsilon: self.epsilon, n_heads: 1, scale: true }.evaluate(inputs)
    }
}

/// Views x [.., d] as [.., n_heads, d / n_heads].
fn split_heads(
    graph: &mut Graph,
    x: ValueId,
    n_heads: usize,
    part: usize,
) -> Result<ValueId, GraphError> {
    if n_heads == 1 {
        return Ok(x);
    }
    let mut shape = graph.fact(x).shape.clone();
    shape.pop();
    shape.extend([Dim::from(n_heads), Dim::from(part)]);
    graph.add("heads", Reshape { shape }, &[x])
}

impl Operator for LayerNorm {
    fn name(&self) -> &'static str {
        "LayerNorm"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
            .with("epsilon", self.epsilon)
            .with("n_heads", self.n_heads)
            .with("scale", self.scale)
            .with("bias", self.bias)
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        let affine: Vec<&str> = [("scale", self.scale), ("bias", self.bias)]
            .into_iter()
            .filter_map(|(role, present)| present.then_some(role))
            .collect();
        check(inputs, self.n_heads, &affine)?;
        Ok(vec![inputs[0].clone()])
    }

    fn body(&self, inputs: &[Fact], _flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        Some(self.definition(inputs))
    }
}

impl LayerNorm {
    fn definition(&self, inputs: &[Fact]) -> Result<Graph, GraphError> {
        let mut graph = Graph::new("LayerNorm");
        let x = graph.input("x", inputs[0].clone());
        let part = inputs[0].shape.last().and_then(Dim::known).unwrap_or(0) / self.n_heads;
        let scale = match self.scale {
            true => graph.input("scale", inputs[1].clone()),
            false => graph.literal(Tensor::vector(vec![1.0; part])),
        };
        let parts = split_heads(&mut graph, x, self.n_heads, part)?;
        let mut operands = vec![parts, scale];
        if self.bias {
            operands.push(graph.input("bias", Fact::f32([part])));
        }
        let normed = graph.add("norm", LayerNormalization { epsilon: self.epsilon }, &operands)?;
        let y = match self.n_heads {
            1 => normed,
            _ => graph.add("join", Reshape { shape: inputs[0].shape.clone() }, &[normed])?,
        };
        graph.output("y", y);
        Ok(graph)
    }
}

impl Operator for RmsNorm {
    fn name(&self) -> &'static str {
        "RmsNorm"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
            .with("epsilon", self.epsilon)
            .with("n_heads", self.n_heads)
            .with("scale", self.scale)
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        check(inputs, self.n_heads, if self.scale { &["scale"] } else { &[] })?;
        Ok(vec![inputs[0].clone()])
    }

    fn body(&self, inputs: &[Fact], flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        Some(self.definition(inputs, flavour))
    }
}

impl RmsNorm {
    fn definition(&self, inputs: &[Fact], flavour: Flavour) -> Result<Graph, GraphError> {
        let mut graph = Graph::new("RmsNorm");
        let x = graph.input("x", inputs[0].clone());
        let part = inputs[0].shape.last().and_then(Dim::known).unwrap_or(0) / self.n_heads;
        let parts = split_heads(&mut graph, x, self.n_heads, part)?;
        let scale = self.scale.then(|| graph.input("scale", inputs[1].clone()));
        let mut y = match flavour {
            // CUDA's graphs have none of their own: the writer fuses it with the sum before, or takes it apart.
            Flavour::Trt10_15 | Flavour::Cuda => {
                let ones = || Tensor::vector(vec![1.0; part]);
                let scale = scale.unwrap_or_else(|| graph.literal(ones()));
                let op = RmsNormalization { epsilon: self.epsilon };
                graph.add("normed", op, &[parts, scale])?
            }
            _ => self.in_steps(&mut graph, parts, scale)?,
        };
        if self.n_heads > 1 {
            y = graph.add("join", Reshape { shape: inputs[0].shape.clone() }, &[y])?;
        }
        graph.output("y", y);
        Ok(graph)
    }

    /// x [.., d] normalised, step by step.
    pub(crate) fn in_steps(
        &self,
        graph: &mut Graph,
        x: ValueId,
        scale: Option<ValueId>,
    ) -> Result<ValueId, GraphError> {
        let square = graph.add("square", Mul, &[x, x])?;
        let mean = graph.add("mean", ReduceMean, &[square])?;
        let epsilon = graph.literal(Tensor::scalar(self.epsilon));
        let shifted = graph.add("shift", Add, &[mean, epsilon])?;
        let root = graph.add("root", Sqrt, &[shifted])?;
        let y = graph.add("normed", Div, &[x, root])?;
        scale.map_or(Ok(y), |scale| graph.add("scaled", Mul, &[y, scale]))
    }
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;

    #[test]
    fn parts_are_normalised_apart() {
        let x = Tensor::f32(&[1, 4], vec![1.0, 3.0, 10.0, 30.0]).unwrap();
        let norm = LayerNorm { epsilon: 0.0, n_heads: 2, scale: false, bias: false };
        let y = norm.evaluate(from_ref(&x)).unwrap()[0].to_f32_vec().unwrap();
        assert_eq!(y, [-1.0, 1.0, -1.0, 1.0]);
        let norm = RmsNorm { epsilon: 0.0, n_heads: 1, scale: true };
        let scale = Tensor::vector(vec![2.0; 4]);
        let y = norm.evaluate(&[x, scale]).unwrap()[0].to_f32_vec().unwrap();
        let rms = (1010.0f32 / 4.0).sqrt();
        assert!((y[3] - 60.0 / rms).abs() < 1e-6, "{y:?}");
    }

    #[test]
    fn scale_must_fit_the_part() {
        let norm = LayerNorm { epsilon: 1e-5, n_heads: 2, scale: true, bias: false };
        assert!(norm.infer(&[Fact::f32([1, 4]), Fact::f32([2])]).is_ok());
        assert!(norm.infer(&[Fact::f32([1, 4]), Fact::f32([4])]).is_err());
        assert!(norm.infer(&[Fact::f32([1, 5]), Fact::f32([2])]).is_err());
    }
}
