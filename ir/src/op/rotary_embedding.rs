//! ONNX's `RotaryEmbedding` (<https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html>, opset 23), by head and with the
//! angles of each token; and that of ONNX Runtime's domain `com.microsoft`, of rows of heads.

use ndarray::{Axis, IxDyn, Slice, Zip};

use super::contrib::contrib;
use super::contrib_attention::{expect_heads, split};
use super::{
    Attribute, Attributes, OnnxForm, OpError, Operator, Reshape, Transpose, expect_fact,
    expect_inputs, expect_rank, input_error,
};
use crate::{Dim, Fact, Tensor};

/// Rotates the first `n_dims` of each head, first half against second half. x [b, h, s, d], cos and sin [b, s, n_dims / 2]
/// → [b, h, s, d].
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryEmbedding {
    /// Rotated dimensions of a head; even.
    pub n_dims: usize,
}

impl RotaryEmbedding {
    pub(crate) fn parse(attributes: &Attributes) -> Result<RotaryEmbedding, OpError> {
        attributes.expect_only(&["n_dims"])?;
        Ok(RotaryEmbedding { n_dims: attributes.positive("n_dims")? })
    }
}

impl Operator for RotaryEmbedding {
    fn name(&self) -> &'static str {
        "RotaryEmbedding"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("n_dims", self.n_dims)
    }

    fn onnx_form(&self) -> OnnxForm {
        OnnxForm::Node {
            domain: "",
            op_type: "RotaryEmbedding",
            attributes: Attributes::none()
                .with("interleaved", Attribute::Int(0))
                .with("rotary_embedding_dim", self.n_dims),
            extra_inputs: Vec::new(),
            absent: &[],
        }
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 3)?;
        expect_rank(inputs, 0, "x", 4)?;
        let [batch, _, len, dim] = &inputs[0].shape[..] else { unreachable!("rank was checked") };
        let fits = |dim: usize| self.n_dims <= dim && self.n_dims.is_multiple_of(2);
        if !dim.known().is_some_and(fits) {
            let expected = format!("heads of {} dimensions or more, an even number", self.n_dims);
            return Err(input_error(0, "x", &expected, &inputs[0]));
        }
        let angles = Fact::f32([batch.clone(), len.clone(), Dim::from(self.n_dims / 2)]);
        expect_fact(inputs, 1, "cos", &angles)?;
        expect_fact(inputs, 2, "sin", &angles)?;
        Ok(vec![inputs[0].clone()])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let failed = || OpError::Evaluation("RotaryEmbedding takes x, cos, sin in f32".into());
        let facts: Vec<Fact> = inputs.iter().map(Tensor::fact).collect();
        self.infer(&facts)?;
        let [Tensor::F32(x), Tensor::F32(cos), Tensor::F32(sin)] = inputs else {
            return Err(failed());
        };
        let half = self.n_dims / 2;
        let part = |start: usize, end: usize| x.slice_axis(Axis(3), Slice::from(start..end));
        let (first, second) = (part(0, half), part(half, self.n_dims));
        let shape = IxDyn(first.shape());
        let [cos, sin] = [cos, sin].map(|angles| angles.view().insert_axis(Axis(1)));
        let cos = cos.broadcast(shape.clone()).ok_or_else(failed)?;
        let sin = sin.broadcast(shape).ok_or_else(failed)?;
        let mut out = x.to_owned();
        for (start, sign, other) in [(0, -1.0, second), (half, 1.0, first)] {
            let target = out.slice_axis_mut(Axis(3), Slice::from(start..start + half));
            Zip::from(target).and(&cos).and(&sin).and(other).for_each(|value, cos, sin, other| {
                *value = *value * cos + sign * other * sin;
            });
        }
        Ok(vec![Tensor::F32(out.into_shared())])
    }
}

/// The same of rows: x [1, s, h·d], place of the first row in the tables of angles i64 `[1]`, cos and sin [s, n_dims / 2] →
/// [1, s, h·d].
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryEmbeddingOfRows {
    /// Heads; each has an equal part of the last axis.
    pub n_heads: usize,
    /// Rotated dimensions of a head; even.
    pub n_dims: usize,
}

impl RotaryEmbeddingOfRows {
    pub(crate) fn parse(attributes: &Attributes) -> Result<RotaryEmbeddingOfRows, OpError> {
        attributes.expect_only(&["n_heads", "n_dims"])?;
        let n_heads = attributes.positive("n_heads")?;
        Ok(RotaryEmbeddingOfRows { n_heads, n_dims: attributes.positive("n_dims")? })
    }

    fn by_head(&self) -> RotaryEmbedding {
        RotaryEmbedding { n_dims: self.n_dims }
    }
}

impl Operator for RotaryEmbeddingOfRows {
    fn name(&self) -> &'static str {
        "RotaryEmbeddingOfRows"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("n_heads", self.n_heads).with("n_dims", self.n_dims)
    }

    fn onnx_form(&self) -> OnnxForm {
        let attributes = Attributes::none()
            .with("interleaved", Attribute::Int(0))
            .with("num_heads", self.n_heads)
            .with("rotary_embedding_dim", self.n_dims);
        contrib("RotaryEmbedding", attributes)
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 4)?;
        let x = Fact::f32(expect_heads(inputs, 0, self.n_heads)?);
        let batch = x.shape[0].clone();
        expect_fact(inputs, 1, "first row", &Fact::i64([Dim::from(1)]))?;
        let batched = |angles: &Fact| {
            Fact::new(angles.dtype, [std::slice::from_ref(&batch), &angles.shape[..]].concat())
        };
        self.by_head().infer(&[x, batched(&inputs[2]), batched(&inputs[3])])?;
        Ok(vec![inputs[0].clone()])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let facts: Vec<Fact> = inputs.iter().map(Tensor::fact).collect();
        self.infer(&facts)?;
        if !matches!(&inputs[1], Tensor::I64(first) if first.iter().all(|row| *row == 0)) {
            return Err(OpError::Evaluation("angles from row 0 on".into()));
        }
        let mut operands = vec![split(&inputs[0], self.n_heads)?];
        for angles in &inputs[2..] {
            let shape = [&[Dim::from(1)], &angles.fact().shape[..]].concat();
            operands.extend(Reshape { shape }.evaluate(std::slice::from_ref(angles))?);
        }
        let swap = Transpose { permutation: vec![0, 2, 1, 3] };
        let rows = swap.evaluate(&self.by_head().evaluate(&operands)?)?;
        Reshape { shape: facts[0].shape.clone() }.evaluate(&rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_turn_as_heads_do() {
        let x = Tensor::f32(&[1, 1, 6], vec![1.0, 2.0, 9.0, 3.0, 4.0, 8.0]).unwrap();
        let [cos, sin] = [0.0, 1.0].map(|angle| Tensor::f32(&[1, 1], vec![angle]).unwrap());
        let first = Tensor::i64(&[1], vec![0]).unwrap();
        let op = RotaryEmbeddingOfRows { n_heads: 2, n_dims: 2 };
        let y = op.evaluate(&[x, first, cos, sin]).unwrap();
        assert_eq!(y[0].to_f32_vec().unwrap(), [-2.0, 1.0, 9.0, -4.0, 3.0, 8.0]);
    }

    #[test]
    fn halves_turn_and_the_rest_stays() {
        let op = RotaryEmbedding { n_dims: 2 };
        let x = Tensor::f32(&[1, 1, 2, 3], vec![1.0, 2.0, 9.0, 3.0, 4.0, 8.0]).unwrap();
        let cos = Tensor::f32(&[1, 2, 1], vec![0.0, 1.0]).unwrap();
        let sin = Tensor::f32(&[1, 2, 1], vec![1.0, 0.0]).unwrap();
        let y = op.evaluate(&[x.clone(), cos.clone(), sin.clone()]).unwrap();
        assert_eq!(y[0].to_f32_vec().unwrap(), [-2.0, 1.0, 9.0, 3.0, 4.0, 8.0]);
        assert!(RotaryEmbedding { n_dims: 4 }.infer(&[x.fact(), cos.fact(), sin.fact()]).is_err());
    }
}
