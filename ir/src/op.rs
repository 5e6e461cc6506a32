//! Ops: what a node means. One op, one file: attributes, shape rule, reference evaluation or
//! definition in other ops, ONNX form, tolerance, tests.
//!
//! Two kinds of op exist. *Standard* ops are ONNX operators and are evaluated here directly.
//! *Functions* (domain `flamingo`) are defined by a body of other ops: that body is their
//! reference evaluation, and is what an ONNX file stores beside the node.

mod attention;
mod attribute;
mod broadcast;
mod contrib;
mod contrib_attention;
mod convolution;
mod cross_attention;
mod elementwise;
mod feed_forward;
mod gated_cross_attention;
mod in_place_self_attention;
mod indexing;
mod linear;
mod matmul;
mod media;
mod norm;
mod panel_linear;
mod panels;
mod pixels;
mod quantised_linear;
mod quantize_linear;
mod rotary_embedding;
mod rounding;
mod scaled_dot_product_attention;
mod scatter_elements;
mod self_attention;
mod shape;
mod skip_norm;
mod softmax;
mod tensor_scatter;

use std::fmt;

pub use attention::{Attention, ResamplerAttention};
pub use attribute::{Attribute, Attributes};
pub use contrib::{FusedMatMul, Gelu, MatMulIntegerToFloat, MatMulNBits, QuickGelu};
pub use contrib_attention::{BiasedAttention, MultiHeadAttention};
pub use convolution::{Conv, Convolution};
pub use cross_attention::CrossAttention;
pub use elementwise::{
    Abs, Add, And, Cos, Div, Equal, Erf, Floor, LessOrEqual, Max, Mul, Neg, Relu, Round, Sigmoid,
    Sin, Sqrt, Sub, Tanh,
};
pub use feed_forward::FeedForward;
pub use gated_cross_attention::GatedCrossAttention;
pub use in_place_self_attention::InPlaceSelfAttention;
pub use indexing::{Gather, Slice, Split, Where};
pub use linear::{Activate, Activation, Linear};
pub use matmul::MatMul;
pub use media::{ClassEmbedding, ExpandBatch, FrameEmbedding, MergeFrames, Patches};
pub use norm::{LayerNorm, LayerNormalization, RmsNorm, RmsNormalization};
pub use panel_linear::PanelLinear;
pub use panels::{
    Fit, Inputs, PANEL_ROWS, PackPanels, PanelFormat, UnpackPanels, output_sqnr_db, sqnr_db,
};
pub use pixels::{AveragePool, ChannelGate, GlobalAveragePool, MeanPool, PictureMean};
pub use quantised_linear::QuantisedLinear;
pub use quantize_linear::{DequantizeLinear, QuantizeLinear};
pub use rotary_embedding::{RotaryEmbedding, RotaryEmbeddingOfRows};
pub use rounding::Rounding;
pub use scaled_dot_product_attention::ScaledDotProductAttention;
pub use scatter_elements::ScatterElements;
pub use self_attention::{Position, SelfAttention, alibi_slopes, rotary_frequencies};
pub use shape::{Cast, Concat, Expand, Reshape, Transpose};
pub use skip_norm::SkipNormalization;
pub use softmax::{ReduceMax, ReduceMean, Softmax};
pub use tensor_scatter::TensorScatter;

use crate::graph::{Graph, GraphError};
use crate::{DType, Dim, Fact, Tensor};

/// Why an op cannot take its inputs or attributes.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum OpError {
    /// Wrong number of inputs.
    #[error("takes {expected} inputs, got {found}")]
    InputCount {
        /// Inputs the op takes with its attributes.
        expected: usize,
        /// Inputs given.
        found: usize,
    },
    /// An input's element type or shape does not fit.
    #[error("input {index} ({role}): expected {expected}, got {found}")]
    Input {
        /// Position of the input.
        index: usize,
        /// What the input is for.
        role: &'static str,
        /// What would fit.
        expected: String,
        /// What came.
        found: String,
    },
    /// An attribute is missing, unknown, of the wrong kind, or out of range.
    #[error("attribute `{name}`: expected {expected}, got {found}")]
    Attribute {
        /// The attribute.
        name: String,
        /// What would fit.
        expected: String,
        /// What came.
        found: String,
    },
    /// No op has this name.
    #[error("no op is called `{0}`")]
    Unknown(String),
    /// The definition of a function could not be built or evaluated.
    #[error("definition of `{op}`: {reason}")]
    Body {
        /// The function.
        op: &'static str,
        /// What failed.
        reason: String,
    },
    /// A value cannot be computed (index out of range, unbound symbol, …).
    #[error("{0}")]
    Evaluation(String),
}

/// Which operators a function's body may use, and of which type its values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Flavour {
    /// Standard operators of opset 17, decomposed attention: what any reader takes.
    Portable,
    /// Adds `com.microsoft` operators that ONNX Runtime's CPU provider has.
    OrtCpu,
    /// In f16, with `com.microsoft` operators that ONNX Runtime's CUDA provider has.
    Cuda,
    /// In f16 with norms and softmax in f32, for TensorRT 10.3 (JetPack 6.2): standard operators of opset 17.
    Trt10_3,
    /// The same for TensorRT from 10.15 on: opset 24, attention, rotary positions, norms of the root mean square and writing
    /// into a cache as one operator each.
    Trt10_15,
}

impl Flavour {
    /// Every flavour.
    pub const ALL: [Flavour; 5] =
        [Flavour::Portable, Flavour::OrtCpu, Flavour::Cuda, Flavour::Trt10_3, Flavour::Trt10_15];

    /// Name in file names and manifests.
    pub fn name(self) -> &'static str {
        match self {
            Flavour::Portable => "portable",
            Flavour::OrtCpu => "ort-cpu",
            Flavour::Cuda => "cuda",
            Flavour::Trt10_3 => "trt-10.3",
            Flavour::Trt10_15 => "trt-10.15",
        }
    }

    /// The type that products of floats are computed in; none where the graph is written as it is, in f32. Files of
    /// such a flavour have no functions.
    pub fn half(self) -> Option<DType> {
        match self {
            Flavour::Portable | Flavour::OrtCpu => None,
            Flavour::Cuda | Flavour::Trt10_3 | Flavour::Trt10_15 => Some(DType::F16),
        }
    }

    /// Version of the standard operators.
    pub fn opset(self) -> i64 {
        match self {
            Flavour::Trt10_15 => 24,
            _ => 17,
        }
    }

    /// Version of the ONNX format.
    pub(crate) fn ir_version(self) -> i64 {
        match self {
            Flavour::Trt10_15 => 11,
            _ => 8,
        }
    }

    /// Whether bodies may have operators of the domain `com.microsoft`.
    pub(crate) fn has_contrib(self) -> bool {
        matches!(self, Flavour::OrtCpu | Flavour::Cuda)
    }

    /// How the decoder's graph has keys and values of tokens.
    pub fn caches(self) -> CacheForm {
        match self {
            Flavour::Portable | Flavour::OrtCpu | Flavour::Trt10_3 => CacheForm::Joined,
            Flavour::Cuda => CacheForm::Rows,
            Flavour::Trt10_15 => CacheForm::ByHead,
        }
    }

    /// Whether activations are rounded as integer kernels round them; others only have rounded weights.
    pub(crate) fn rounds_activations(self) -> bool {
        self.half().is_none()
    }

    /// The flavour called `name`.
    pub fn from_name(name: &str) -> Option<Flavour> {
        Flavour::ALL.into_iter().find(|flavour| flavour.name() == name)
    }
}

/// How keys and values of tokens lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheForm {
    /// [heads, past_len, dim]; each step joins past and new.
    Joined,
    /// [cache_len, heads · dim]: a buffer of a fixed size into which a step writes. Past and present are one.
    Rows,
    /// [1, heads, cache_len, dim]: the same by head.
    ByHead,
}

/// How an op is written in ONNX.
#[derive(Debug, Clone, PartialEq)]
pub enum OnnxForm {
    /// One node of the standard domain, or of `domain`.
    Node {
        /// Operator set domain; empty for standard ONNX.
        domain: &'static str,
        /// Operator type.
        op_type: &'static str,
        /// Attributes in ONNX naming.
        attributes: Attributes,
        /// Further inputs after the op's own, stored as constants.
        extra_inputs: Vec<OnnxInput>,
        /// Places among the inputs that are left out.
        absent: &'static [usize],
    },
    /// A call of the local function of the op's name in domain `flamingo`.
    Function,
    /// Never written: the op is evaluated when an artifact is made.
    BuildTime,
}

/// A constant input that ONNX wants where the op has an attribute.
#[derive(Debug, Clone, PartialEq)]
pub enum OnnxInput {
    /// A list of i64.
    I64(Vec<i64>),
    /// A target shape; symbolic dimensions are written as 0, -1 or computed from an input.
    Shape(Vec<Dim>),
}

/// How far a fused kernel may be from the op's reference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// Absolute floor.
    pub absolute: f32,
    /// Part of the largest reference magnitude.
    pub relative: f32,
}

/// What every op knows about itself.
pub trait Operator: fmt::Debug {
    /// Name in the text form; of functions also in ONNX.
    fn name(&self) -> &'static str;

    /// Attributes by name, in the order they print.
    fn attributes(&self) -> Attributes;

    /// Element types and shapes of the outputs; checks the inputs.
    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError>;

    /// How the op is written in ONNX.
    fn onnx_form(&self) -> OnnxForm {
        OnnxForm::Function
    }

    /// The definition in other ops for inputs of these facts; `None` for standard ops.
    fn body(&self, _inputs: &[Fact], _flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        None
    }

    /// Places among ONNX's outputs that are left out.
    fn absent_outputs(&self) -> &'static [usize] {
        &[]
    }

    /// Whether the op is left to the device even where all its inputs are known before.
    fn is_for_run_time(&self) -> bool {
        false
    }

    /// Reference evaluation. Functions evaluate their portable body.
    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let facts: Vec<Fact> = inputs.iter().map(Tensor::fact).collect();
        let failed = |reason: String| OpError::Body { op: self.name(), reason };
        let body = self
            .body(&facts, Flavour::Portable)
            .ok_or_else(|| failed("standard op without evaluation".into()))?
            .map_err(|error| failed(error.to_string()))?;
        crate::evaluate(&body, inputs).map_err(|error| failed(error.to_string()))
    }

    /// Allowed distance of a kernel from the reference.
    fn tolerance(&self) -> Tolerance {
        Tolerance { absolute: 1e-5, relative: 1e-5 }
    }
}

/// Declares the op table: one line makes an op exist.
macro_rules! ops {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The meaning of a node.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Op {
            $($(#[$doc])* $name($name),)*
        }

        impl Op {
            /// Names of all ops.
            pub const NAMES: &'static [&'static str] = &[$(stringify!($name)),*];

            /// The op as its behaviour.
            pub fn operator(&self) -> &dyn Operator {
                match self {
                    $(Op::$name(op) => op,)*
                }
            }

            /// The op called `name` with `attributes`; each attribute must be known and present.
            pub fn from_attributes(name: &str, attributes: &Attributes) -> Result<Op, OpError> {
                match name {
                    $(stringify!($name) => $name::parse(attributes).map(Op::$name),)*
                    _ => Err(OpError::Unknown(name.to_owned())),
                }
            }
        }

        $(impl From<$name> for Op {
            fn from(op: $name) -> Op {
                Op::$name(op)
            }
        })*
    };
}

ops! {
    /// Elementwise sum.
    Add,
    /// Elementwise difference.
    Sub,
    /// Elementwise product.
    Mul,
    /// Elementwise quotient.
    Div,
    /// Elementwise maximum.
    Max,
    /// Elementwise negation.
    Neg,
    /// Magnitude.
    Abs,
    /// Largest integer below.
    Floor,
    /// Nearest integer, ties to even.
    Round,
    /// Square root.
    Sqrt,
    /// Error function.
    Erf,
    /// Logistic function.
    Sigmoid,
    /// Hyperbolic tangent.
    Tanh,
    /// max(x, 0).
    Relu,
    /// Cosine.
    Cos,
    /// Sine.
    Sin,
    /// Elementwise equality.
    Equal,
    /// Elementwise ≤.
    LessOrEqual,
    /// Elementwise and.
    And,
    /// Choice by condition.
    Where,
    /// Change of element type.
    Cast,
    /// Matrix product.
    MatMul,
    /// Softmax along the last axis.
    Softmax,
    /// Mean along the last axis.
    ReduceMean,
    /// Maximum along the last axis.
    ReduceMax,
    /// ONNX's convolution of pictures.
    Conv,
    /// ONNX's mean of squares of pixels.
    AveragePool,
    /// ONNX's mean of all pixels.
    GlobalAveragePool,
    /// Permutation of axes.
    Transpose,
    /// Change of shape.
    Reshape,
    /// Broadcast to a shape.
    Expand,
    /// Join along an axis.
    Concat,
    /// Part of an axis.
    Slice,
    /// Cut an axis into parts.
    Split,
    /// Rows by index.
    Gather,
    /// Elements replaced by index of their rows.
    ScatterElements,
    /// Rows replaced from a place on.
    TensorScatter,
    /// ONNX's rounding to signed bytes.
    QuantizeLinear,
    /// ONNX's bytes back to numbers.
    DequantizeLinear,
    /// ONNX's layer normalisation.
    LayerNormalization,
    /// com.microsoft: x Wᵀ.
    FusedMatMul,
    /// com.microsoft: product of bytes, scaled.
    MatMulIntegerToFloat,
    /// com.microsoft: x Wᵀ with W of 4 bits.
    MatMulNBits,
    /// com.microsoft: exact GELU.
    Gelu,
    /// com.microsoft: CLIP GELU.
    QuickGelu,
    /// com.microsoft: bidirectional attention.
    MultiHeadAttention,
    /// com.microsoft: attention with a bias of the scores.
    BiasedAttention,
    /// com.microsoft: rotation by positions, of rows of heads.
    RotaryEmbeddingOfRows,
    /// com.microsoft: residual sum and its norm.
    SkipNormalization,
    /// ONNX's attention by head, with a bias of the scores.
    ScaledDotProductAttention,
    /// ONNX's normalisation by the root mean square.
    RmsNormalization,
    /// ONNX's rotation by positions.
    RotaryEmbedding,
    /// Weight → panels of 16 rows, at build time.
    PackPanels,
    /// Panels of 16 rows → weight.
    UnpackPanels,
    /// x Wᵀ with epilogue.
    Linear,
    /// x Wᵀ with epilogue, W in panels.
    PanelLinear,
    /// x Wᵀ with epilogue, x and W of bytes with scales known before.
    QuantisedLinear,
    /// Activation function.
    Activate,
    /// Two linears with an activation between.
    FeedForward,
    /// Layer normalisation with optional affine and head groups.
    LayerNorm,
    /// Root-mean-square normalisation with optional scale and head groups.
    RmsNorm,
    /// Bidirectional multi-head attention.
    Attention,
    /// Latents attend to media and latents.
    ResamplerAttention,
    /// Causal attention with past.
    SelfAttention,
    /// Causal attention with keys and values in buffers of a fixed size.
    InPlaceSelfAttention,
    /// Text attends to the latents of its medium.
    CrossAttention,
    /// Query projection, cross-attention, gated output projection, residual.
    GatedCrossAttention,
    /// Picture → rows of patch pixels.
    Patches,
    /// Prepend the class token, add positions.
    ClassEmbedding,
    /// Add temporal embeddings.
    FrameEmbedding,
    /// Frames of a medium → one sequence.
    MergeFrames,
    /// Repeat for each medium.
    ExpandBatch,
    /// Grouped convolution with SAME padding, channels last.
    Convolution,
    /// Mean of each square of pixels.
    MeanPool,
    /// Mean of all pixels of a picture.
    PictureMean,
    /// Channels times their gates.
    ChannelGate,
}

impl Op {
    /// Name in the text form.
    pub fn name(&self) -> &'static str {
        self.operator().name()
    }

    /// Element types and shapes of the outputs; checks the inputs. Standard ops of floats take f16 and bf16 as they take
    /// f32.
    ///
    /// # Errors
    /// Inputs that do not fit.
    pub fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        let Some(half) = self.half(inputs.iter().map(|fact| fact.dtype)) else {
            return self.operator().infer(inputs);
        };
        let as_type = |from: DType, to: DType, fact: &Fact| Fact {
            dtype: if fact.dtype == from { to } else { fact.dtype },
            shape: fact.shape.clone(),
        };
        let wide: Vec<Fact> = inputs.iter().map(|fact| as_type(half, DType::F32, fact)).collect();
        let outputs = self.operator().infer(&wide)?;
        Ok(outputs.iter().map(|fact| as_type(DType::F32, half, fact)).collect())
    }

    /// Reference evaluation; of f16 and bf16 in f32, then rounded.
    ///
    /// # Errors
    /// Inputs that do not fit, or a value that cannot be computed.
    pub fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let Some(half) = self.half(inputs.iter().map(Tensor::dtype)) else {
            return self.operator().evaluate(inputs);
        };
        let cast = |from: DType, to: DType, tensor: &Tensor| match tensor.dtype() == from {
            true => Ok(Cast { dtype: to }.evaluate(std::slice::from_ref(tensor))?.remove(0)),
            false => Ok(tensor.clone()),
        };
        let wide: Result<Vec<Tensor>, OpError> =
            inputs.iter().map(|tensor| cast(half, DType::F32, tensor)).collect();
        let outputs = self.operator().evaluate(&wide?)?;
        outputs.iter().map(|tensor| cast(DType::F32, half, tensor)).collect()
    }

    /// The half-precision type that all floats among the inputs have, if the op takes such.
    fn half(&self, dtypes: impl Iterator<Item = DType>) -> Option<DType> {
        let mut floats =
            dtypes.filter(|dtype| matches!(dtype, DType::F32 | DType::F16 | DType::BF16));
        let first = floats.next()?;
        let is_half = first != DType::F32 && floats.all(|dtype| dtype == first);
        (is_half && self.width().is_some()).then_some(first)
    }

    /// How wide a standard op of floats computes in a graph of half precision; none for ops that only move elements, and
    /// for functions.
    pub(crate) fn width(&self) -> Option<Width> {
        Some(match self {
            Op::MatMul(_)
            | Op::Conv(_)
            | Op::FusedMatMul(_)
            | Op::MatMulNBits(_)
            | Op::MultiHeadAttention(_)
            | Op::BiasedAttention(_)
            | Op::ScatterElements(_)
            | Op::TensorScatter(_)
            | Op::RotaryEmbeddingOfRows(_)
            | Op::SkipNormalization(_)
            | Op::ScaledDotProductAttention(_)
            | Op::RotaryEmbedding(_)
            | Op::Gelu(_)
            | Op::QuickGelu(_) => Width::Half,
            Op::Softmax(_)
            | Op::LayerNormalization(_)
            | Op::RmsNormalization(_)
            | Op::Erf(_)
            | Op::Sigmoid(_)
            | Op::Tanh(_) => Width::WideForTensorRt,
            Op::QuantizeLinear(_)
            | Op::DequantizeLinear(_)
            | Op::ReduceMean(_)
            | Op::ReduceMax(_)
            | Op::AveragePool(_)
            | Op::GlobalAveragePool(_)
            | Op::Sqrt(_)
            | Op::Cos(_)
            | Op::Sin(_) => Width::Wide,
            Op::Add(_)
            | Op::Sub(_)
            | Op::Mul(_)
            | Op::Div(_)
            | Op::Max(_)
            | Op::Neg(_)
            | Op::Abs(_)
            | Op::Floor(_)
            | Op::Round(_)
            | Op::Relu(_)
            | Op::Where(_) => Width::OfInputs,
            _ => return None,
        })
    }

    /// Whether the op is a function of domain `flamingo`.
    pub fn is_function(&self) -> bool {
        self.operator().onnx_form() == OnnxForm::Function
    }
}

/// How wide an op computes in a graph of half precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    /// In half precision: what takes the time, and sums in f32 inside.
    Half,
    /// In f32: what overflows or loses too much.
    Wide,
    /// In f32 where the engine would otherwise keep sums in half precision.
    WideForTensorRt,
    /// As its inputs.
    OfInputs,
}

/// Checks the number of inputs.
pub(crate) fn expect_inputs(inputs: &[Fact], expected: usize) -> Result<(), OpError> {
    match inputs.len() == expected {
        true => Ok(()),
        false => Err(OpError::InputCount { expected, found: inputs.len() }),
    }
}

/// Checks that input `index` has this element type and these dimensions.
pub(crate) fn expect_fact(
    inputs: &[Fact],
    index: usize,
    role: &'static str,
    expected: &Fact,
) -> Result<(), OpError> {
    match inputs.get(index) {
        Some(found) if found == expected => Ok(()),
        Some(found) => Err(input_error(index, role, expected, found)),
        None => Err(OpError::InputCount { expected: index + 1, found: inputs.len() }),
    }
}

/// Checks the rank of an f32 input.
pub(crate) fn expect_rank(
    inputs: &[Fact],
    index: usize,
    role: &'static str,
    rank: usize,
) -> Result<(), OpError> {
    match &inputs[index] {
        fact if fact.rank() == rank && fact.dtype == crate::DType::F32 => Ok(()),
        fact => Err(input_error(index, role, &format!("f32 of rank {rank}"), fact)),
    }
}

pub(crate) fn input_error(
    index: usize,
    role: &'static str,
    expected: &dyn fmt::Display,
    found: &dyn fmt::Display,
) -> OpError {
    OpError::Input { index, role, expected: expected.to_string(), found: found.to_string() }
}

/// The op with symbols of its target shape replaced by their values.
pub(crate) fn bind_shapes(op: &Op, bindings: &crate::Bindings) -> Result<Op, OpError> {
    let bind = |shape: &[Dim]| {
        let size = |dim: &Dim| dim.evaluate(bindings).map(Dim::from);
        let unbound = |symbol| OpError::Evaluation(format!("symbol `{symbol}` is not bound"));
        shape.iter().map(size).collect::<Result<Vec<Dim>, String>>().map_err(unbound)
    };
    Ok(match op {
        Op::Reshape(Reshape { shape }) => Op::Reshape(Reshape { shape: bind(shape)? }),
        Op::Expand(Expand { shape }) => Op::Expand(Expand { shape: bind(shape)? }),
        other => other.clone(),
    })
}
