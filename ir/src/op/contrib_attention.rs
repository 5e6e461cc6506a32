//! ONNX Runtime's `MultiHeadAttention` (domain `com.microsoft`), in the two forms that our graphs use: alone, and with a bias
//! of the scores.

use super::contrib::{contrib, same_as};
use super::{
    Attributes, OnnxForm, OpError, Operator, Reshape, ScaledDotProductAttention, Transpose,
    expect_inputs, expect_rank, input_error,
};
use crate::{Dim, Fact, Tensor};

/// Bidirectional attention of q [b, s, h·d], k [b, t, h·d], v [b, t, h·d].
#[derive(Debug, Clone, PartialEq)]
pub struct MultiHeadAttention {
    /// Heads.
    pub n_heads: usize,
    /// Factor of the scores.
    pub scale: f32,
}

/// The same of one sequence with a bias [1, h or 1, s, t] of the scores: q [1, s, h·d], k and v [1, t, h·d] → [1, s, h·d].
#[derive(Debug, Clone, PartialEq)]
pub struct BiasedAttention {
    /// Heads.
    pub n_heads: usize,
    /// Factor of the scores.
    pub scale: f32,
}

fn parse(attributes: &Attributes) -> Result<(usize, f32), OpError> {
    attributes.expect_only(&["n_heads", "scale"])?;
    Ok((attributes.positive("n_heads")?, attributes.float("scale")?))
}

/// `absent`: neither bias of the projections nor mask of the keys, which stand before the bias of the scores.
fn form(n_heads: usize, scale: f32, absent: &'static [usize]) -> OnnxForm {
    let attributes = Attributes::none().with("num_heads", n_heads).with("scale", scale);
    let mut form = contrib("MultiHeadAttention", attributes);
    if let OnnxForm::Node { absent: places, .. } = &mut form {
        *places = absent;
    }
    form
}

/// [b, s, h·d] as [b, s, h, d], or as [b, h, s, d].
fn heads(fact: &Fact, n_heads: usize, by_head: bool) -> Option<Vec<Dim>> {
    let [batch, len, width] = &fact.shape[..] else { return None };
    let width = width.known().filter(|width| width.is_multiple_of(n_heads))?;
    let (n_heads, dim) = (Dim::from(n_heads), Dim::from(width / n_heads));
    let (batch, len) = (batch.clone(), len.clone());
    Some(match by_head {
        true => vec![batch, n_heads, len, dim],
        false => vec![batch, len, n_heads, dim],
    })
}

const SWAP: [usize; 4] = [0, 2, 1, 3];

/// [b, s, h·d] → [b, h, s, d].
pub(super) fn split(rows: &Tensor, n_heads: usize) -> Result<Tensor, OpError> {
    let shape = heads(&rows.fact(), n_heads, false)
        .ok_or_else(|| OpError::Evaluation("rows of heads".into()))?;
    let apart = Reshape { shape }.evaluate(std::slice::from_ref(rows))?;
    Ok(Transpose { permutation: SWAP.to_vec() }.evaluate(&apart)?.remove(0))
}

/// Attention by head of values by head and a bias, back in rows of `shape`.
fn mix(scale: f32, operands: &[Tensor], shape: &[Dim]) -> Result<Tensor, OpError> {
    let mixed = ScaledDotProductAttention { scale }.evaluate(operands)?;
    let rows = Transpose { permutation: SWAP.to_vec() }.evaluate(&mixed)?;
    Ok(Reshape { shape: shape.to_vec() }.evaluate(&rows)?.remove(0))
}

pub(super) fn expect_heads(
    inputs: &[Fact],
    index: usize,
    n_heads: usize,
) -> Result<Vec<Dim>, OpError> {
    let role = ["q", "k", "v"][index.min(2)];
    expect_rank(inputs, index, role, 3)?;
    heads(&inputs[index], n_heads, true).ok_or_else(|| {
        let expected = format!("a last axis that is a multiple of {n_heads}");
        input_error(index, role, &expected, &inputs[index])
    })
}

impl MultiHeadAttention {
    pub(crate) fn parse(attributes: &Attributes) -> Result<MultiHeadAttention, OpError> {
        parse(attributes).map(|(n_heads, scale)| MultiHeadAttention { n_heads, scale })
    }

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
        form(self.n_heads, self.scale, &[])
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        self.same().infer(inputs)
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        same_as(&self.same(), inputs)
    }
}

impl BiasedAttention {
    pub(crate) fn parse(attributes: &Attributes) -> Result<BiasedAttention, OpError> {
        parse(attributes).map(|(n_heads, scale)| BiasedAttention { n_heads, scale })
    }
}

impl Operator for BiasedAttention {
    fn name(&self) -> &'static str {
        "BiasedAttention"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("n_heads", self.n_heads).with("scale", self.scale)
    }

    fn onnx_form(&self) -> OnnxForm {
        form(self.n_heads, self.scale, &[3, 4])
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 4)?;
        let mut by_head = Vec::new();
        for index in 0..3 {
            by_head.push(Fact::f32(expect_heads(inputs, index, self.n_heads)?));
        }
        by_head.push(inputs[3].clone());
        ScaledDotProductAttention { scale: self.scale }.infer(&by_head)?;
        Ok(vec![inputs[0].clone()])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let facts: Vec<Fact> = inputs.iter().map(Tensor::fact).collect();
        self.infer(&facts)?;
        let by_head: Result<Vec<Tensor>, OpError> =
            inputs[..3].iter().map(|rows| split(rows, self.n_heads)).collect();
        let operands = [&by_head?[..], &inputs[3..]].concat();
        Ok(vec![mix(self.scale, &operands, &facts[0].shape)?])
    }
}
