//! Operators of ONNX Runtime's domain `com.microsoft`, for the `ort-cpu` flavour's bodies
//! (<https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md>).

use super::{
    Attribute, Attributes, Flavour, MatMul, OnnxForm, OpError, Operator, Transpose, expect_inputs,
};
use crate::graph::Graph;
use crate::{Fact, Tensor};

const DOMAIN: &str = "com.microsoft";

fn contrib(op_type: &'static str, attributes: Attributes) -> OnnxForm {
    OnnxForm::Node { domain: DOMAIN, op_type, attributes, extra_inputs: Vec::new() }
}

/// x Wᵀ without a transposed copy of W: x [.., k], weight [n, k].
#[derive(Debug, Clone, PartialEq)]
pub struct FusedMatMul;

/// x · (1 + erf(x / √2)) / 2.
#[derive(Debug, Clone, PartialEq)]
pub struct Gelu;

/// x · σ(alpha x).
#[derive(Debug, Clone, PartialEq)]
pub struct QuickGelu {
    /// Factor inside the logistic function.
    pub alpha: f32,
}

/// Bidirectional attention of q [b, s, h·d], k [b, t, h·d], v [b, t, h·d].
#[derive(Debug, Clone, PartialEq)]
pub struct MultiHeadAttention {
    /// Heads.
    pub n_heads: usize,
    /// Factor of the scores.
    pub scale: f32,
}

impl FusedMatMul {
    pub(crate) fn parse(attributes: &Attributes) -> Result<FusedMatMul, OpError> {
        attributes.expect_only(&[]).map(|()| FusedMatMul)
    }
}

impl Gelu {
    pub(crate) fn parse(attributes: &Attributes) -> Result<Gelu, OpError> {
        attributes.expect_only(&[]).map(|()| Gelu)
    }
}

impl QuickGelu {
    pub(crate) fn parse(attributes: &Attributes) -> Result<QuickGelu, OpError> {
        attributes.expect_only(&["alpha"])?;
        Ok(QuickGelu { alpha: attributes.float("alpha")? })
    }
}

impl MultiHeadAttention {
    pub(crate) fn parse(attributes: &Attributes) -> Result<MultiHeadAttention, OpError> {
        attributes.expect_only(&["n_heads", "scale"])?;
        let n_heads = attributes.positive("n_heads")?;
        Ok(MultiHeadAttention { n_heads, scale: attributes.float("scale")? })
    }
}

impl Operator for FusedMatMul {
    fn name(&self) -> &'static str {
        "FusedMatMul"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn onnx_form(&self) -> OnnxForm {
        contrib("FusedMatMul", Attributes::none().with("transB", Attribute::Int(1)))
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 2)?;
        let transpose = Transpose { permutation: vec![1, 0] };
        let transposed = transpose.infer(&inputs[1..])?;
        MatMul.infer(&[inputs[0].clone(), transposed[0].clone()])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let transpose = Transpose { permutation: vec![1, 0] };
        let transposed = transpose.evaluate(&inputs[1..])?;
        MatMul.evaluate(&[inputs[0].clone(), transposed[0].clone()])
    }
}

/// Evaluates a function of domain `flamingo` that means the same.
fn same_as(op: &dyn Operator, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
    let facts: Vec<Fact> = inputs.iter().map(Tensor::fact).collect();
    let failed = |reason: String| OpError::Body { op: op.name(), reason };
    let body: Graph = op
        .body(&facts, Flavour::Portable)
        .ok_or_else(|| failed("no body".into()))?
        .map_err(|error| failed(error.to_string()))?;
    crate::evaluate(&body, inputs).map_err(|error| failed(error.to_string()))
}

impl Operator for Gelu {
    fn name(&self) -> &'static str {
        "Gelu"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn onnx_form(&self) -> OnnxForm {
        contrib("Gelu", Attributes::none())
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        super::Activate { activation: super::Activation::Gelu }.infer(inputs)
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        same_as(&super::Activate { activation: super::Activation::Gelu }, inputs)
    }
}

impl Operator for QuickGelu {
    fn name(&self) -> &'static str {
        "QuickGelu"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("alpha", self.alpha)
    }

    fn onnx_form(&self) -> OnnxForm {
        contrib("QuickGelu", self.attributes())
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        super::Activate { activation: super::Activation::QuickGelu }.infer(inputs)
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let failed = || OpError::Evaluation("QuickGelu takes one f32 tensor".into());
        let x = inputs.first().and_then(Tensor::as_f32).ok_or_else(failed)?;
        let y = x.mapv(|x| x / (1.0 + (-self.alpha * x).exp()));
        Ok(vec![Tensor::F32(y.into_shared())])
    }
}

impl MultiHeadAttention {
    fn same(&self) -> super::Attention {
        super::Attention { n_heads: self.n_heads, scale: self.scale }
    }
}

impl Operator for MultiHeadAttention {
    fn name(&self) -> &'static str {
        "MultiHeadAttention"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("n_heads", self.n_heads).with("scale", self.scale)
    }

    fn onnx_form(&self) -> OnnxForm {
        let attributes =
            Attributes::none().with("num_heads", self.n_heads).with("scale", self.scale);
        contrib("MultiHeadAttention", attributes)
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        self.same().infer(inputs)
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        same_as(&self.same(), inputs)
    }
}
