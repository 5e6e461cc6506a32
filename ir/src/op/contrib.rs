//! Operators of ONNX Runtime's domain `com.microsoft`, for the `ort-cpu` flavour's bodies
//! (<https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md>).

use ndarray::{ArcArray, Array2, IxDyn};

use super::{
    Attribute, Attributes, Flavour, MatMul, OnnxForm, OpError, Operator, Transpose, expect_fact,
    expect_inputs, input_error,
};
use crate::graph::Graph;
use crate::{DType, Fact, Tensor};

const DOMAIN: &str = "com.microsoft";

fn contrib(op_type: &'static str, attributes: Attributes) -> OnnxForm {
    OnnxForm::Node { domain: DOMAIN, op_type, attributes, extra_inputs: Vec::new() }
}

/// x Wᵀ without a transposed copy of W: x [.., k], weight [n, k].
#[derive(Debug, Clone, PartialEq)]
pub struct FusedMatMul;

/// (x − x₀)(W − w₀) · s · t, x and W bytes: x u8 `[.., k]`, weight u8 `[k, n]`, s f32, t f32 `[n]`, x₀ and w₀ u8.
#[derive(Debug, Clone, PartialEq)]
pub struct MatMulIntegerToFloat;

/// x Wᵀ: x f32 [.., k], weight u8 [n, blocks, block / 2] with two columns in a byte, the first in its low half, 8 more
/// than their levels, and scales f32 [n · blocks].
#[derive(Debug, Clone, PartialEq)]
pub struct MatMulNBits {
    /// Columns that share a scale: a power of two from 16 on.
    pub block: usize,
    /// Rows of W.
    pub n: usize,
    /// Columns of W; its last block may have more, which count for nothing.
    pub k: usize,
}

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

impl MatMulIntegerToFloat {
    pub(crate) fn parse(attributes: &Attributes) -> Result<MatMulIntegerToFloat, OpError> {
        attributes.expect_only(&[]).map(|()| MatMulIntegerToFloat)
    }
}

impl MatMulNBits {
    pub(crate) fn parse(attributes: &Attributes) -> Result<MatMulNBits, OpError> {
        attributes.expect_only(&["block", "n", "k"])?;
        let size = |name| attributes.positive(name);
        let (block, n, k) = (size("block")?, size("n")?, size("k")?);
        match block >= 16 && block.is_power_of_two() {
            true => Ok(MatMulNBits { block, n, k }),
            false => Err(OpError::Attribute {
                name: "block".into(),
                expected: "a power of two from 16 on".into(),
                found: block.to_string(),
            }),
        }
    }

    fn n_blocks(&self) -> usize {
        self.k.div_ceil(self.block)
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

impl Operator for MatMulIntegerToFloat {
    fn name(&self) -> &'static str {
        "MatMulIntegerToFloat"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn onnx_form(&self) -> OnnxForm {
        contrib("MatMulIntegerToFloat", Attributes::none())
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 6)?;
        let weight = &inputs[1];
        let shape = weight.known_shape();
        let Some([k, n]) = shape.as_deref().and_then(|shape| <[usize; 2]>::try_from(shape).ok())
        else {
            return Err(input_error(1, "weight", &"u8 [k, n] of known sizes", weight));
        };
        let nothing: [usize; 0] = [];
        expect_fact(inputs, 1, "weight", &Fact::new(DType::U8, [k, n]))?;
        expect_fact(inputs, 2, "scale of x", &Fact::f32(nothing))?;
        expect_fact(inputs, 3, "scales of the weight", &Fact::f32([n]))?;
        expect_fact(inputs, 4, "zero point of x", &Fact::new(DType::U8, nothing))?;
        expect_fact(inputs, 5, "zero point of the weight", &Fact::new(DType::U8, nothing))?;
        match &inputs[0] {
            x if x.dtype == DType::U8 => {
                MatMul.infer(&[Fact::f32(x.shape.clone()), Fact::f32([k, n])])
            }
            x => Err(input_error(0, "x", &DType::U8, x)),
        }
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let failed = || OpError::Evaluation("MatMulIntegerToFloat takes bytes that fit".into());
        let [
            Tensor::U8(x),
            Tensor::U8(weight),
            Tensor::F32(s),
            Tensor::F32(t),
            Tensor::U8(x0),
            Tensor::U8(w0),
        ] = inputs
        else {
            return Err(failed());
        };
        let around = |bytes: &ArcArray<u8, IxDyn>, zero: &ArcArray<u8, IxDyn>| {
            let zero = f32::from(*zero.first()?);
            Some(Tensor::F32(bytes.mapv(|byte| f32::from(byte) - zero).into_shared()))
        };
        let factors = [around(x, x0).ok_or_else(failed)?, around(weight, w0).ok_or_else(failed)?];
        let sums = MatMul.evaluate(&factors)?;
        let sums = sums[0].as_f32().ok_or_else(failed)?;
        Ok(vec![Tensor::F32((sums * s * t).into_shared())])
    }
}

impl Operator for MatMulNBits {
    fn name(&self) -> &'static str {
        "MatMulNBits"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("block", self.block).with("n", self.n).with("k", self.k)
    }

    /// `accuracy_level` 1: sums of f32.
    fn onnx_form(&self) -> OnnxForm {
        let attributes = Attributes::none()
            .with("K", self.k)
            .with("N", self.n)
            .with("accuracy_level", Attribute::Int(1))
            .with("bits", Attribute::Int(4))
            .with("block_size", self.block);
        contrib("MatMulNBits", attributes)
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 3)?;
        let blocks = [self.n, self.n_blocks(), self.block / 2];
        expect_fact(inputs, 1, "weight", &Fact::new(DType::U8, blocks))?;
        expect_fact(inputs, 2, "scales", &Fact::f32([self.n * self.n_blocks()]))?;
        FusedMatMul.infer(&[inputs[0].clone(), Fact::f32([self.n, self.k])])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let failed = || OpError::Evaluation("MatMulNBits takes f32, bytes and scales".into());
        let [x, Tensor::U8(bytes), Tensor::F32(scales)] = inputs else { return Err(failed()) };
        let (bytes, scales) = bytes.as_slice().zip(scales.as_slice()).ok_or_else(failed)?;
        let weight = Array2::from_shape_fn((self.n, self.k), |(row, col)| {
            let at = row * self.n_blocks() + col / self.block;
            let byte = bytes[at * (self.block / 2) + col % self.block / 2];
            let level = if col % 2 == 0 { byte & 15 } else { byte >> 4 };
            (f32::from(level) - 8.0) * scales[at]
        });
        FusedMatMul.evaluate(&[x.clone(), Tensor::F32(weight.into_dyn().into_shared())])
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
