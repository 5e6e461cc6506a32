//! Operators of ONNX Runtime's domain `com.microsoft`, for bodies of the flavours of ONNX Runtime
//! (<https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md>).

use ndarray::{ArcArray, Array2, IxDyn};

use super::{
    Attribute, Attributes, Flavour, MatMul, OnnxForm, OpError, Operator, Transpose, expect_fact,
    expect_inputs, input_error,
};
use crate::graph::Graph;
use crate::{DType, Fact, Tensor};

const DOMAIN: &str = "com.microsoft";

pub(super) fn contrib(op_type: &'static str, attributes: Attributes) -> OnnxForm {
    OnnxForm::Node { domain: DOMAIN, op_type, attributes, extra_inputs: Vec::new(), absent: &[] }
}

/// x Wᵀ without a transposed copy of W: x [.., k], weight [n, k].
#[derive(Debug, Clone, PartialEq)]
pub struct FusedMatMul;

/// (x − x₀)(W − w₀) · s · t, x and W bytes: x u8 `[.., k]`, weight u8 `[k, n]`, s f32, t f32 `[n]`, x₀ and w₀ u8.
#[derive(Debug, Clone, PartialEq)]
pub struct MatMulIntegerToFloat;

/// x Wᵀ: x f32 [.., k], weight u8 [n, blocks, block · bits / 8], and scales f32 [n · blocks]. Of 4 bits a byte has two
/// columns, the first in its low half, 8 more than their levels; of 8 bits it is 128 more than its level.
#[derive(Debug, Clone, PartialEq)]
pub struct MatMulNBits {
    /// Bits of a level: 4 or 8.
    pub bits: usize,
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
        attributes.expect_only(&["bits", "block", "n", "k"])?;
        let size = |name| attributes.positive(name);
        let (bits, block, n, k) = (size("bits")?, size("block")?, size("n")?, size("k")?);
        let wrong = |name: &str, expected: &str, found: usize| OpError::Attribute {
            name: name.into(),
            expected: expected.into(),
            found: found.to_string(),
        };
        if ![4, 8].contains(&bits) {
            return Err(wrong("bits", "4 or 8", bits));
        }
        match block >= 16 && block.is_power_of_two() {
            true => Ok(MatMulNBits { bits, block, n, k }),
            false => Err(wrong("block", "a power of two from 16 on", block)),
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
        Attributes::none()
            .with("bits", self.bits)
            .with("block", self.block)
            .with("n", self.n)
            .with("k", self.k)
    }

    /// `accuracy_level` 1: sums of f32.
    fn onnx_form(&self) -> OnnxForm {
        let attributes = Attributes::none()
            .with("K", self.k)
            .with("N", self.n)
            .with("accuracy_level", Attribute::Int(1))
            .with("bits", self.bits)
            .with("block_size", self.block);
        contrib("MatMulNBits", attributes)
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 3)?;
        let blocks = [self.n, self.n_blocks(), self.block * self.bits / 8];
        expect_fact(inputs, 1, "weight", &Fact::new(DType::U8, blocks))?;
        expect_fact(inputs, 2, "scales", &Fact::f32([self.n * self.n_blocks()]))?;
        FusedMatMul.infer(&[inputs[0].clone(), Fact::f32([self.n, self.k])])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let failed = || OpError::Evaluation("MatMulNBits takes f32, bytes and scales".into());
        let [x, Tensor::U8(bytes), Tensor::F32(scales)] = inputs else { return Err(failed()) };
        let (bytes, scales) = (bytes.as_standard_layout(), scales.as_standard_layout());
        let (bytes, scales) = bytes.as_slice().zip(scales.as_slice()).ok_or_else(failed)?;
        let weight = Array2::from_shape_fn((self.n, self.k), |(row, col)| {
            let at = row * self.n_blocks() + col / self.block;
            let col = col % self.block;
            let level = match self.bits {
                8 => f32::from(bytes[at * self.block + col]) - 128.0,
                _ => {
                    let byte = bytes[at * (self.block / 2) + col / 2];
                    f32::from(if col.is_multiple_of(2) { byte & 15 } else { byte >> 4 }) - 8.0
                }
            };
            level * scales[at]
        });
        FusedMatMul.evaluate(&[x.clone(), Tensor::F32(weight.into_dyn().into_shared())])
    }
}

/// Evaluates a function of domain `flamingo` that means the same.
pub(super) fn same_as(op: &dyn Operator, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
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
