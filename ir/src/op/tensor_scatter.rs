//! ONNX's `TensorScatter` (<https://onnx.ai/onnx/operators/onnx__TensorScatter.html>, opset 24): new keys or values written
//! into a buffer by head, which TensorRT does in place.

use super::{Attributes, OnnxForm, OpError, Operator, expect_fact, expect_inputs, expect_rank};
use crate::{Fact, Tensor};

/// Cache [b, h, n, d] with the rows from place i64 `[b]` on replaced by updates [b, h, m, d].
#[derive(Debug, Clone, PartialEq)]
pub struct TensorScatter;

impl TensorScatter {
    pub(crate) fn parse(attributes: &Attributes) -> Result<TensorScatter, OpError> {
        attributes.expect_only(&[]).map(|()| TensorScatter)
    }
}

impl Operator for TensorScatter {
    fn name(&self) -> &'static str {
        "TensorScatter"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn onnx_form(&self) -> OnnxForm {
        OnnxForm::Node {
            domain: "",
            op_type: "TensorScatter",
            attributes: Attributes::none(),
            extra_inputs: Vec::new(),
            absent: &[],
        }
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 3)?;
        expect_rank(inputs, 0, "cache", 4)?;
        expect_rank(inputs, 1, "updates", 4)?;
        let mut updates = inputs[0].shape.clone();
        updates[2] = inputs[1].shape[2].clone();
        expect_fact(inputs, 1, "updates", &Fact::f32(updates))?;
        expect_fact(inputs, 2, "places", &Fact::i64([inputs[0].shape[0].clone()]))?;
        Ok(vec![inputs[0].clone()])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let facts: Vec<Fact> = inputs.iter().map(Tensor::fact).collect();
        self.infer(&facts)?;
        let [Tensor::F32(cache), Tensor::F32(updates), Tensor::I64(places)] = inputs else {
            return Err(OpError::Evaluation("TensorScatter takes f32 rows and i64 places".into()));
        };
        let mut out = cache.to_owned();
        let n_rows = cache.shape()[2];
        for (at, update) in updates.indexed_iter() {
            let row = usize::try_from(places[[at[0]]]).ok().and_then(|row| row.checked_add(at[2]));
            let row = row.filter(|row| *row < n_rows).ok_or_else(|| {
                OpError::Evaluation(format!("place {} outside 0..{n_rows}", places[[at[0]]]))
            })?;
            out[[at[0], at[1], row, at[3]]] = *update;
        }
        Ok(vec![Tensor::F32(out.into_shared())])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_from_a_place_on_are_replaced() {
        let cache = Tensor::f32(&[1, 2, 3, 1], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        let updates = Tensor::f32(&[1, 2, 2, 1], vec![6.0, 7.0, 8.0, 9.0]).unwrap();
        let at = |place| Tensor::i64(&[1], vec![place]).unwrap();
        let found = TensorScatter.evaluate(&[cache.clone(), updates.clone(), at(1)]).unwrap();
        assert_eq!(found[0].to_f32_vec().unwrap(), [0.0, 6.0, 7.0, 3.0, 8.0, 9.0]);
        for place in [2, -1] {
            assert!(TensorScatter.evaluate(&[cache.clone(), updates.clone(), at(place)]).is_err());
        }
    }
}
