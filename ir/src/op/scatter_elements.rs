//! ONNX's `ScatterElements` along the first axis (<https://onnx.ai/onnx/operators/onnx__ScatterElements.html>, opset 16):
//! a GPU's thread an element, where `ScatterND` has a thread a row in ONNX Runtime.

use super::{
    Attribute, Attributes, OnnxForm, OpError, Operator, expect_fact, expect_inputs, expect_rank,
};
use crate::{Fact, Tensor};

/// Data [n, w] with the elements at rows i64 [m, w] of the same column replaced by updates [m, w].
#[derive(Debug, Clone, PartialEq)]
pub struct ScatterElements;

impl ScatterElements {
    pub(crate) fn parse(attributes: &Attributes) -> Result<ScatterElements, OpError> {
        attributes.expect_only(&[]).map(|()| ScatterElements)
    }
}

impl Operator for ScatterElements {
    fn name(&self) -> &'static str {
        "ScatterElements"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn onnx_form(&self) -> OnnxForm {
        OnnxForm::Node {
            domain: "",
            op_type: "ScatterElements",
            attributes: Attributes::none().with("axis", Attribute::Int(0)),
            extra_inputs: Vec::new(),
            absent: &[],
        }
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 3)?;
        expect_rank(inputs, 0, "data", 2)?;
        expect_rank(inputs, 2, "updates", 2)?;
        let (width, m) = (inputs[0].shape[1].clone(), inputs[2].shape[0].clone());
        expect_fact(inputs, 1, "indices", &Fact::i64([m.clone(), width.clone()]))?;
        expect_fact(inputs, 2, "updates", &Fact::f32([m, width]))?;
        Ok(vec![inputs[0].clone()])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let failed =
            || OpError::Evaluation("ScatterElements takes f32 rows and i64 indices".into());
        let facts: Vec<Fact> = inputs.iter().map(Tensor::fact).collect();
        self.infer(&facts)?;
        let [Tensor::F32(data), Tensor::I64(indices), Tensor::F32(updates)] = inputs else {
            return Err(failed());
        };
        let mut out = data.to_owned();
        let n_rows = data.shape()[0];
        for ((place, index), update) in indices.indexed_iter().zip(updates.iter()) {
            let row = usize::try_from(*index).ok().filter(|row| *row < n_rows);
            let row = row
                .ok_or_else(|| OpError::Evaluation(format!("index {index} outside 0..{n_rows}")))?;
            out[[row, place[1]]] = *update;
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
        let at = |row| Tensor::i64(&[1, 2], vec![row, row]).unwrap();
        let found = ScatterElements.evaluate(&[data.clone(), at(1), updates.clone()]).unwrap();
        assert_eq!(found[0].to_f32_vec().unwrap(), [0.0, 1.0, 8.0, 9.0, 4.0, 5.0]);
        assert!(ScatterElements.evaluate(&[data, at(3), updates]).is_err());
    }
}
