//! ONNX's `QuantizeLinear` (<https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html>) and `DequantizeLinear`
//! (<https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html>) of signed bytes around 0, from opset 13 on: what
//! TensorRT calls explicit quantisation.

use ndarray::IxDyn;

use super::{
    Attribute, Attributes, OnnxForm, OpError, Operator, expect_fact, expect_inputs, input_error,
};
use crate::{DType, Dim, Fact, Tensor};

/// x f32, scale f32 [], zero point i8 [], which is 0 → the nearest level of x / scale, ties to even, within a signed byte.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizeLinear;

/// Level i8 `[n, ..]`, scale f32 [] → level · scale; or scale f32 `[n]`, one for each row.
#[derive(Debug, Clone, PartialEq)]
pub struct DequantizeLinear;

impl QuantizeLinear {
    pub(crate) fn parse(attributes: &Attributes) -> Result<QuantizeLinear, OpError> {
        attributes.expect_only(&[]).map(|()| QuantizeLinear)
    }
}

impl DequantizeLinear {
    pub(crate) fn parse(attributes: &Attributes) -> Result<DequantizeLinear, OpError> {
        attributes.expect_only(&[]).map(|()| DequantizeLinear)
    }
}

/// The zero point of signed bytes.
pub(super) fn zero_point() -> Tensor {
    Tensor::I8(ndarray::arr0(0i8).into_dyn().into_shared())
}

fn node(op_type: &'static str, attributes: Attributes) -> OnnxForm {
    let (extra_inputs, absent): (_, &'static [usize]) = (Vec::new(), &[]);
    OnnxForm::Node { domain: "", op_type, attributes, extra_inputs, absent }
}

fn nothing() -> [usize; 0] {
    []
}

impl Operator for QuantizeLinear {
    fn name(&self) -> &'static str {
        "QuantizeLinear"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn onnx_form(&self) -> OnnxForm {
        node("QuantizeLinear", Attributes::none())
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 3)?;
        expect_fact(inputs, 1, "scale", &Fact::f32(nothing()))?;
        expect_fact(inputs, 2, "zero point", &Fact::new(DType::I8, nothing()))?;
        match &inputs[0] {
            x if x.dtype == DType::F32 => Ok(vec![Fact { dtype: DType::I8, ..x.clone() }]),
            x => Err(input_error(0, "x", &DType::F32, x)),
        }
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let failed = || OpError::Evaluation("QuantizeLinear takes f32, a scale and 0".into());
        let [Tensor::F32(x), Tensor::F32(scale), Tensor::I8(zero)] = inputs else {
            return Err(failed());
        };
        let scale =
            *scale.first().filter(|_| zero.iter().all(|zero| *zero == 0)).ok_or_else(failed)?;
        let level = |x: f32| (x / scale).round_ties_even().clamp(-128.0, 127.0) as i8;
        Ok(vec![Tensor::I8(x.mapv(level).into_shared())])
    }
}

impl Operator for DequantizeLinear {
    fn name(&self) -> &'static str {
        "DequantizeLinear"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    /// `axis` says nothing where there is one scale.
    fn onnx_form(&self) -> OnnxForm {
        node("DequantizeLinear", Attributes::none().with("axis", Attribute::Int(0)))
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 2)?;
        let levels = &inputs[0];
        if levels.dtype != DType::I8 {
            return Err(input_error(0, "levels", &DType::I8, levels));
        }
        let is_whole = inputs[1].rank() == 0;
        let rows: Vec<Dim> = levels.shape.iter().take(usize::from(!is_whole)).cloned().collect();
        expect_fact(inputs, 1, "scale", &Fact::f32(rows))?;
        Ok(vec![Fact { dtype: DType::F32, ..levels.clone() }])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let failed = || OpError::Evaluation("DequantizeLinear takes i8 and scales in f32".into());
        self.infer(&inputs.iter().map(Tensor::fact).collect::<Vec<Fact>>())?;
        let [Tensor::I8(levels), Tensor::F32(scale)] = inputs else { return Err(failed()) };
        // One scale a row stands in the first axis of as many as the levels have.
        let mut shape = vec![1; levels.ndim()];
        if let (Some(first), Some(n)) = (shape.first_mut(), scale.shape().first()) {
            *first = *n;
        }
        let scale = scale.to_shape(IxDyn(&shape)).map_err(|_| failed())?;
        Ok(vec![Tensor::F32((levels.mapv(f32::from) * &scale).into_shared())])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_round_to_even_within_a_byte_and_come_back() {
        let x = Tensor::f32(&[2, 4], vec![0.5, 1.5, -2.5, 0.0, 200.0, -200.0, 1.0, -1.0]).unwrap();
        let one = Tensor::scalar(1.0);
        let levels = QuantizeLinear.evaluate(&[x, one.clone(), zero_point()]).unwrap().remove(0);
        let Tensor::I8(found) = &levels else { panic!("{levels:?}") };
        assert_eq!(found.iter().copied().collect::<Vec<i8>>(), [0, 2, -2, 0, 127, -128, 1, -1]);
        let back = |scale| {
            let values = DequantizeLinear.evaluate(&[levels.clone(), scale]).unwrap();
            values[0].to_f32_vec().unwrap()
        };
        assert_eq!(back(Tensor::scalar(0.5)), [0.0, 1.0, -1.0, 0.0, 63.5, -64.0, 0.5, -0.5]);
        let rows = back(Tensor::vector(vec![1.0, 0.25]));
        assert_eq!(rows, [0.0, 2.0, -2.0, 0.0, 31.75, -32.0, 0.25, -0.25]);
        assert!(DequantizeLinear.evaluate(&[levels, Tensor::vector(vec![1.0; 3])]).is_err());
    }
}
