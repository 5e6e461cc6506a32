//! ONNX's `ScatterND` of whole rows (<https://onnx.ai/onnx/operators/onnx__ScatterND.html>, opset 16).

use super::{Attributes, OnnxForm, OpError, Operator, expect_fact, expect_inputs, expect_rank};
use crate::{Dim, Fact, Tensor};

/// Data [n, w] with the rows at indices i64 [m, 1] replaced by updates [m, w].
#[derive(Debug, Clone, PartialEq)]
pub struct ScatterRows;

impl ScatterRows {
    pub(crate) fn parse(attributes: &Attributes) -> Result<ScatterRows, OpError> {
        attributes.expect_only(&[]).map(|()| ScatterRows)
    }
}

impl Operator for ScatterRows {
    fn name(&self) -> &'static str {
        "ScatterRows"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn onnx_form(&self) -> OnnxForm {
        OnnxForm::Node {
            domain: "",
            op_type: "ScatterND",
            attributes: Attributes::none(),
            extra_inputs: Vec::new(),
            absent: &[],
        }
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 3)?;
        expect_rank(inputs, 0, "data", 2)?;
        expect_rank(inputs, 2, "updates", 2)?;
        let (width, m) = (inputs[0].shape[1].clone(), inputs[2].shape[0].clone());
        expect_fact(inputs, 1, "indices", &Fact::i64([m.clone(), Dim::from(1)]))?;
        expect_fact(inputs, 2, "updates", &Fact::f32([m, width]))?;
        Ok(vec![inputs[0].clone()])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let failed = || OpError::Evaluation("ScatterRows takes f32 rows and i64 indices".into());
        let facts: Vec<Fact> = inputs.iter().map(Tensor::fact).collect();
        self.infer(&facts)?;
        let [Tensor::F32(data), Tensor::I64(indices), Tensor::F32(updates)] = inputs else {
            return Err(failed());
        };
        let mut out = data.to_owned();
        let n_rows = data.shape()[0];
        for (index, update) in indices.iter().zip(updates.outer_iter()) {
            let row = usize::try_from(*index).ok().filter(|row| *row < n_rows);
            let row = row
                .ok_or_else(|| OpError::Evaluation(format!("index {index} outside 0..{n_rows}")))?;
            out.index_axis_mut(ndarray::Axis(0), row).assign(&update);
        }
        Ok(vec![Tensor::F32(out.into_shared())])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_replaced() {
        let data = Tensor::f32(&[3, 2], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        let updates = Tensor::f32(&[1, 2], vec![8.0, 9.0]).unwrap();
        let at = |row| Tensor::i64(&[1, 1], vec![row]).unwrap();
        let found = ScatterRows.evaluate(&[data.clone(), at(1), updates.clone()]).unwrap();
        assert_eq!(found[0].to_f32_vec().unwrap(), [0.0, 1.0, 8.0, 9.0, 4.0, 5.0]);
        assert!(ScatterRows.evaluate(&[data, at(3), updates]).is_err());
    }
}
