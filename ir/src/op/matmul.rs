//! `MatMul` (<https://onnx.ai/onnx/operators/onnx__MatMul.html>): [.., m, k] · [.., k, n].

use ndarray::{ArrayD, Axis, Ix2, IxDyn, Zip};

use super::broadcast::broadcast;
use super::{Attributes, OnnxForm, OpError, Operator, expect_inputs, input_error};
use crate::{DType, Fact, Tensor};

/// Matrix product; leading dimensions broadcast.
#[derive(Debug, Clone, PartialEq)]
pub struct MatMul;

impl MatMul {
    pub(crate) fn parse(attributes: &Attributes) -> Result<MatMul, OpError> {
        attributes.expect_only(&[]).map(|()| MatMul)
    }
}

impl Operator for MatMul {
    fn name(&self) -> &'static str {
        "MatMul"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn onnx_form(&self) -> OnnxForm {
        OnnxForm::Node {
            domain: "",
            op_type: "MatMul",
            attributes: Attributes::none(),
            extra_inputs: Vec::new(),
            absent: &[],
        }
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 2)?;
        for (index, fact) in inputs.iter().enumerate() {
            if fact.rank() < 2 || fact.dtype != DType::F32 {
                return Err(input_error(index, "operand", &"f32 of rank 2 or more", fact));
            }
        }
        let [left, right] = [&inputs[0], &inputs[1]];
        let (m, k) = (&left.shape[left.rank() - 2], &left.shape[left.rank() - 1]);
        let (right_k, n) = (&right.shape[right.rank() - 2], &right.shape[right.rank() - 1]);
        if k != right_k {
            return Err(input_error(1, "right operand", &format!("{k} rows"), right));
        }
        let batch = |fact: &Fact| Fact::f32(fact.shape[..fact.rank() - 2].to_vec());
        let mut shape = broadcast(&batch(left), &batch(right))?;
        shape.extend([m.clone(), n.clone()]);
        Ok(vec![Fact::f32(shape)])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let failed = || OpError::Evaluation("MatMul takes two f32 tensors that fit".into());
        let [Tensor::F32(left), Tensor::F32(right)] = inputs else { return Err(failed()) };
        let facts = self.infer(&[inputs[0].fact(), inputs[1].fact()])?;
        let shape = facts[0].known_shape().ok_or_else(failed)?;
        let (batch, matrix) = shape.split_at(shape.len() - 2);
        let full = |array: &ndarray::ArcArray<f32, IxDyn>| {
            let own = array.shape();
            let target = [batch, &own[own.len() - 2..]].concat();
            array.broadcast(target).map(|view| view.to_owned())
        };
        let (left, right) = (full(left).ok_or_else(failed)?, full(right).ok_or_else(failed)?);
        let n_batch: usize = batch.iter().product();
        let stacked = |array: ArrayD<f32>| {
            let own = array.shape();
            let target = [n_batch, own[own.len() - 2], own[own.len() - 1]];
            array.to_shape(target).map(|view| view.to_owned()).map_err(|_| failed())
        };
        let (left, right) = (stacked(left)?, stacked(right)?);
        let mut out = ndarray::Array3::<f32>::zeros((n_batch, matrix[0], matrix[1]));
        Zip::from(out.axis_iter_mut(Axis(0)))
            .and(left.axis_iter(Axis(0)))
            .and(right.axis_iter(Axis(0)))
            .for_each(|mut out, left, right| {
                let (left, right) =
                    (left.into_dimensionality::<Ix2>(), right.into_dimensionality::<Ix2>());
                if let (Ok(left), Ok(right)) = (left, right) {
                    out.assign(&left.dot(&right));
                }
            });
        let out = out.into_shape_with_order(IxDyn(&shape)).map_err(|_| failed())?;
        Ok(vec![Tensor::F32(out.into_shared())])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_broadcast() {
        let left = Tensor::f32(&[2, 1, 2], vec![1.0, 2.0, 3.0, 4.0]).unwrap();
        let right = Tensor::f32(&[2, 2], vec![1.0, 0.0, 0.0, 10.0]).unwrap();
        let product = MatMul.evaluate(&[left, right]).unwrap();
        assert_eq!(product[0].shape(), [2, 1, 2]);
        assert_eq!(product[0].to_f32_vec().unwrap(), [1.0, 20.0, 3.0, 40.0]);
    }

    #[test]
    fn inner_sizes_must_agree() {
        assert!(MatMul.infer(&[Fact::f32([2, 3]), Fact::f32([2, 3])]).is_err());
    }
}
