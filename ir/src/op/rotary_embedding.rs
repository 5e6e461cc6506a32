//! ONNX's `RotaryEmbedding` (<https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html>, opset 23), by head and with the
//! angles of each token.

use ndarray::{Axis, IxDyn, Slice, Zip};

use super::{
    Attribute, Attributes, OnnxForm, OpError, Operator, expect_fact, expect_inputs, expect_rank,
    input_error,
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

#[cfg(test)]
mod tests {
    use super::*;

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
