//! `MatMul` (<https://onnx.ai/onnx/operators/onnx__MatMul.html>): [.., m, k] · [.., k, n].

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayD, ArrayView2, ArrayViewD, Axis, Dimension as _, Ix2, IxDyn};

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
        let out = match right.ndim() {
            // Rows of all batches meet one matrix.
            2 => {
                let n_rows = batch.iter().product::<usize>() * matrix[0];
                let rows = left.to_shape((n_rows, right.shape()[0])).map_err(|_| failed())?;
                let right = right.view().into_dimensionality::<Ix2>().map_err(|_| failed())?;
                let mut out = Array2::<f32>::zeros((n_rows, matrix[1]));
                general_mat_mul(1.0, &rows, &right, 0.0, &mut out);
                out.into_dyn()
            }
            _ => {
                let mut out = ArrayD::<f32>::zeros(shape.as_slice());
                for index in ndarray::indices(batch) {
                    let left = matrix_at(left.view(), index.slice()).ok_or_else(failed)?;
                    let right = matrix_at(right.view(), index.slice()).ok_or_else(failed)?;
                    let mut place = out.view_mut();
                    for position in index.slice() {
                        place.index_axis_inplace(Axis(0), *position);
                    }
                    let mut place = place.into_dimensionality::<Ix2>().map_err(|_| failed())?;
                    general_mat_mul(1.0, &left, &right, 0.0, &mut place);
                }
                out
            }
        };
        let out = out.into_shape_with_order(IxDyn(&shape)).map_err(|_| failed())?;
        Ok(vec![Tensor::F32(out.into_shared())])
    }
}

/// The matrix at a place of the batch, which the leading dimensions broadcast to.
fn matrix_at<'a>(mut all: ArrayViewD<'a, f32>, index: &[usize]) -> Option<ArrayView2<'a, f32>> {
    for position in index.get(index.len().checked_sub(all.ndim() - 2)?..)? {
        let position = if all.shape()[0] == 1 { 0 } else { *position };
        all = all.index_axis_move(Axis(0), position);
    }
    all.into_dimensionality::<Ix2>().ok()
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

        // [2, 1, 1, 2] and [3, 2, 1]: each of two rows meets each of three columns.
        let left = Tensor::f32(&[2, 1, 1, 2], vec![1.0, 2.0, 3.0, 4.0]).unwrap();
        let right = Tensor::f32(&[3, 2, 1], vec![1.0, 0.0, 0.0, 1.0, 1.0, 1.0]).unwrap();
        let product = MatMul.evaluate(&[left, right]).unwrap();
        assert_eq!(product[0].shape(), [2, 3, 1, 1]);
        assert_eq!(product[0].to_f32_vec().unwrap(), [1.0, 2.0, 3.0, 3.0, 4.0, 7.0]);
    }

    #[test]
    fn operands_may_be_transposed() {
        let x = Tensor::f32(&[2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        let swap = crate::op::Transpose { permutation: vec![1, 0] };
        let turned = swap.evaluate(std::slice::from_ref(&x)).unwrap().remove(0);
        let square = MatMul.evaluate(&[x.clone(), turned.clone()]).unwrap().remove(0);
        let twice = swap.evaluate(&[square]).unwrap().remove(0);
        let turned_both = MatMul.evaluate(&[turned.clone(), twice]).unwrap();
        assert_eq!(
            turned_both[0].to_f32_vec().unwrap(),
            [142.0, 340.0, 188.0, 449.0, 234.0, 558.0]
        );
        let product = MatMul.evaluate(&[turned, x]).unwrap();
        let expected = [17.0, 22.0, 27.0, 22.0, 29.0, 36.0, 27.0, 36.0, 45.0];
        assert_eq!(product[0].to_f32_vec().unwrap(), expected);
    }

    #[test]
    fn inner_sizes_must_agree() {
        assert!(MatMul.infer(&[Fact::f32([2, 3]), Fact::f32([2, 3])]).is_err());
    }
}
