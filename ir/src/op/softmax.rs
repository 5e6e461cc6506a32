//! `Softmax`, `ReduceMean` and `ReduceMax` along the last axis
//! (<https://onnx.ai/onnx/operators/onnx__Softmax.html>, opset 13).

use ndarray::Axis;

use super::{Attribute, Attributes, OnnxForm, OpError, Operator, expect_inputs, input_error};
use crate::{DType, Dim, Fact, Tensor};

/// e^(x − max) / Σ e^(x − max) along the last axis.
#[derive(Debug, Clone, PartialEq)]
pub struct Softmax;

/// Mean along the last axis, which stays with size 1.
#[derive(Debug, Clone, PartialEq)]
pub struct ReduceMean;

/// Largest value along the last axis, which stays with size 1; NaN if one is.
#[derive(Debug, Clone, PartialEq)]
pub struct ReduceMax;

impl Softmax {
    pub(crate) fn parse(attributes: &Attributes) -> Result<Softmax, OpError> {
        attributes.expect_only(&[]).map(|()| Softmax)
    }
}

impl ReduceMean {
    pub(crate) fn parse(attributes: &Attributes) -> Result<ReduceMean, OpError> {
        attributes.expect_only(&[]).map(|()| ReduceMean)
    }
}

impl ReduceMax {
    pub(crate) fn parse(attributes: &Attributes) -> Result<ReduceMax, OpError> {
        attributes.expect_only(&[]).map(|()| ReduceMax)
    }
}

fn last_axis(inputs: &[Fact]) -> Result<&Fact, OpError> {
    expect_inputs(inputs, 1)?;
    match &inputs[0] {
        fact if fact.dtype == DType::F32 && fact.rank() > 0 => Ok(fact),
        fact => Err(input_error(0, "operand", &"f32 of rank 1 or more", fact)),
    }
}

impl Operator for Softmax {
    fn name(&self) -> &'static str {
        "Softmax"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn onnx_form(&self) -> OnnxForm {
        OnnxForm::Node {
            domain: "",
            op_type: "Softmax",
            attributes: Attributes::none().with("axis", Attribute::Int(-1)),
            extra_inputs: Vec::new(),
            absent: &[],
        }
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        last_axis(inputs).map(|fact| vec![fact.clone()])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let [Tensor::F32(x)] = inputs else {
            return Err(OpError::Evaluation("Softmax takes one f32 tensor".into()));
        };
        let mut out = x.to_owned();
        for mut lane in out.lanes_mut(Axis(x.ndim() - 1)) {
            let max = lane.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            lane.mapv_inplace(|value| (value - max).exp());
            let sum: f32 = lane.sum();
            lane.mapv_inplace(|value| value / sum);
        }
        Ok(vec![Tensor::F32(out.into_shared())])
    }
}

impl Operator for ReduceMean {
    fn name(&self) -> &'static str {
        "ReduceMean"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn onnx_form(&self) -> OnnxForm {
        reduction("ReduceMean")
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        reduced(inputs)
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let failed = || OpError::Evaluation("ReduceMean takes one non-empty f32 tensor".into());
        let [Tensor::F32(x)] = inputs else { return Err(failed()) };
        let axis = Axis(x.ndim().checked_sub(1).ok_or_else(failed)?);
        let mean = x.mean_axis(axis).ok_or_else(failed)?.insert_axis(axis);
        Ok(vec![Tensor::F32(mean.into_shared())])
    }
}

impl Operator for ReduceMax {
    fn name(&self) -> &'static str {
        "ReduceMax"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn onnx_form(&self) -> OnnxForm {
        reduction("ReduceMax")
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        reduced(inputs)
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let failed = || OpError::Evaluation("ReduceMax takes one non-empty f32 tensor".into());
        let [Tensor::F32(x)] = inputs else { return Err(failed()) };
        let axis = Axis(x.ndim().checked_sub(1).filter(|_| !x.is_empty()).ok_or_else(failed)?);
        let larger = |max: &f32, value: &f32| {
            if max.is_nan() || max > value { *max } else { *value }
        };
        let max = x.fold_axis(axis, f32::NEG_INFINITY, larger).insert_axis(axis);
        Ok(vec![Tensor::F32(max.into_shared())])
    }
}

/// A standard reduction of the last axis.
fn reduction(op_type: &'static str) -> OnnxForm {
    OnnxForm::Node {
        domain: "",
        op_type,
        attributes: Attributes::none()
            .with("axes", Attribute::Ints(vec![-1]))
            .with("keepdims", Attribute::Int(1)),
        extra_inputs: Vec::new(),
        absent: &[],
    }
}

/// Facts with a last axis of size 1.
fn reduced(inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
    let mut fact = last_axis(inputs)?.clone();
    fact.shape.pop();
    fact.shape.push(Dim::from(1));
    Ok(vec![fact])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn softmax_survives_large_values() {
        let x = Tensor::f32(&[1, 3], vec![1000.0, 1000.0, -1000.0]).unwrap();
        let y = Softmax.evaluate(&[x]).unwrap()[0].to_f32_vec().unwrap();
        assert_eq!(y, [0.5, 0.5, 0.0]);
    }

    #[test]
    fn mean_keeps_the_axis() {
        let x = Tensor::f32(&[2, 2], vec![1.0, 3.0, 5.0, 9.0]).unwrap();
        let y = ReduceMean.evaluate(&[x]).unwrap();
        assert_eq!((y[0].shape(), y[0].to_f32_vec().unwrap()), (&[2, 1][..], vec![2.0, 7.0]));
    }
}
