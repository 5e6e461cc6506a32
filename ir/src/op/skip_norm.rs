//! ONNX Runtime's `SkipLayerNormalization` and `SkipSimplifiedLayerNormalization` (domain `com.microsoft`): a residual sum
//! and the norm of it in one pass.

use super::contrib::contrib;
use super::{
    Add, Attributes, LayerNormalization, OnnxForm, OpError, Operator, RmsNormalization,
    expect_inputs,
};
use crate::{Fact, Tensor};

/// x `[.., d]`, residual `[.., d]`, scale `[d]` → norm(x + residual) · scale, x + residual.
#[derive(Debug, Clone, PartialEq)]
pub struct SkipNormalization {
    /// Added to the variance or mean square.
    pub epsilon: f32,
    /// Whether the norm is that of the root mean square, without a mean (`Simplified`).
    pub simplified: bool,
}

impl SkipNormalization {
    pub(crate) fn parse(attributes: &Attributes) -> Result<SkipNormalization, OpError> {
        attributes.expect_only(&["epsilon", "simplified"])?;
        let simplified = attributes.flag("simplified")?;
        Ok(SkipNormalization { epsilon: attributes.float("epsilon")?, simplified })
    }

    fn norm(&self) -> Box<dyn Operator> {
        let epsilon = self.epsilon;
        match self.simplified {
            true => Box::new(RmsNormalization { epsilon }),
            false => Box::new(LayerNormalization { epsilon }),
        }
    }
}

impl Operator for SkipNormalization {
    fn name(&self) -> &'static str {
        "SkipNormalization"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("epsilon", self.epsilon).with("simplified", self.simplified)
    }

    fn onnx_form(&self) -> OnnxForm {
        let op_type = match self.simplified {
            true => "SkipSimplifiedLayerNormalization",
            false => "SkipLayerNormalization",
        };
        contrib(op_type, Attributes::none().with("epsilon", self.epsilon))
    }

    /// Mean and inverse deviation.
    fn absent_outputs(&self) -> &'static [usize] {
        &[1, 2]
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 3)?;
        super::expect_fact(inputs, 1, "residual", &inputs[0])?;
        let normed = self.norm().infer(&[inputs[0].clone(), inputs[2].clone()])?;
        Ok([&normed[..], &inputs[..1]].concat())
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let facts: Vec<Fact> = inputs.iter().map(Tensor::fact).collect();
        self.infer(&facts)?;
        let sum = Add.evaluate(&inputs[..2])?;
        let normed = self.norm().evaluate(&[sum[0].clone(), inputs[2].clone()])?;
        Ok([normed, sum].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_comes_second() {
        let [x, residual] = [[1.0, 2.0], [3.0, -2.0]].map(|row| Tensor::f32(&[1, 2], row.to_vec()));
        let inputs = [x.unwrap(), residual.unwrap(), Tensor::vector(vec![1.0, 1.0])];
        for (simplified, expected) in [(true, 2.0f32.sqrt()), (false, 1.0)] {
            let op = SkipNormalization { epsilon: 0.0, simplified };
            let found = op.evaluate(&inputs).unwrap();
            assert!((found[0].to_f32_vec().unwrap()[0] - expected).abs() < 1e-6, "{found:?}");
            assert_eq!(found[1].to_f32_vec().unwrap(), [4.0, 0.0]);
        }
    }
}
