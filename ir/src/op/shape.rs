//! Ops that move or relabel elements: `Reshape Transpose Expand Concat Cast`
//! (<https://onnx.ai/onnx/operators/>, opset 13).

use half::{bf16, f16};
use ndarray::{Axis, IxDyn};

use super::{
    Attribute, Attributes, OnnxForm, OnnxInput, OpError, Operator, expect_inputs, input_error,
};
use crate::tensor::on_any;
use crate::{DType, Dim, Fact, Tensor};

/// The same elements in row-major order under another shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Reshape {
    /// Target shape.
    pub shape: Vec<Dim>,
}

/// Broadcast to a shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Expand {
    /// Target shape.
    pub shape: Vec<Dim>,
}

/// Permutation of axes.
#[derive(Debug, Clone, PartialEq)]
pub struct Transpose {
    /// Input axis at each output axis.
    pub permutation: Vec<usize>,
}

/// Join of inputs along an axis.
#[derive(Debug, Clone, PartialEq)]
pub struct Concat {
    /// The axis.
    pub axis: usize,
}

/// Change of element type.
#[derive(Debug, Clone, PartialEq)]
pub struct Cast {
    /// Target type.
    pub dtype: DType,
}

impl Reshape {
    pub(crate) fn parse(attributes: &Attributes) -> Result<Reshape, OpError> {
        attributes.expect_only(&["shape"])?;
        Ok(Reshape { shape: attributes.dims("shape")? })
    }
}

impl Expand {
    pub(crate) fn parse(attributes: &Attributes) -> Result<Expand, OpError> {
        attributes.expect_only(&["shape"])?;
        Ok(Expand { shape: attributes.dims("shape")? })
    }
}

impl Transpose {
    pub(crate) fn parse(attributes: &Attributes) -> Result<Transpose, OpError> {
        attributes.expect_only(&["permutation"])?;
        Ok(Transpose { permutation: attributes.sizes("permutation")? })
    }
}

impl Concat {
    pub(crate) fn parse(attributes: &Attributes) -> Result<Concat, OpError> {
        attributes.expect_only(&["axis"])?;
        Ok(Concat { axis: attributes.size("axis")? })
    }
}

impl Cast {
    pub(crate) fn parse(attributes: &Attributes) -> Result<Cast, OpError> {
        attributes.expect_only(&["to"])?;
        let name = attributes.text("to")?;
        let dtype = DType::from_name(name).ok_or_else(|| OpError::Attribute {
            name: "to".into(),
            expected: "an element type".into(),
            found: name.into(),
        })?;
        Ok(Cast { dtype })
    }
}

fn node(op_type: &'static str, attributes: Attributes, extra: Vec<OnnxInput>) -> OnnxForm {
    OnnxForm::Node { domain: "", op_type, attributes, extra_inputs: extra, absent: &[] }
}

fn known(shape: &[Dim]) -> Result<Vec<usize>, OpError> {
    let unbound = |dim: &Dim| OpError::Evaluation(format!("dimension `{dim}` is not bound"));
    shape.iter().map(|dim| dim.known().ok_or_else(|| unbound(dim))).collect()
}

fn cannot(op: &str, input: &Tensor) -> OpError {
    OpError::Evaluation(format!("{op} cannot take {}", input.fact()))
}

impl Operator for Reshape {
    fn name(&self) -> &'static str {
        "Reshape"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("shape", self.shape.as_slice())
    }

    fn onnx_form(&self) -> OnnxForm {
        node("Reshape", Attributes::none(), vec![OnnxInput::Shape(self.shape.clone())])
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 1)?;
        let fact = Fact { dtype: inputs[0].dtype, shape: self.shape.clone() };
        match fact.n_elements() == inputs[0].n_elements() {
            true => Ok(vec![fact]),
            false => {
                let expected = format!("{} elements", fact.n_elements());
                Err(input_error(0, "operand", &expected, &inputs[0]))
            }
        }
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let shape = IxDyn(&known(&self.shape)?);
        let out = on_any!(&inputs[0], x => x.to_shape(shape).ok().map(|view| view.to_owned()));
        out.map(|t| vec![t]).ok_or_else(|| cannot("Reshape", &inputs[0]))
    }
}

impl Operator for Expand {
    fn name(&self) -> &'static str {
        "Expand"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("shape", self.shape.as_slice())
    }

    fn onnx_form(&self) -> OnnxForm {
        node("Expand", Attributes::none(), vec![OnnxInput::Shape(self.shape.clone())])
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 1)?;
        let target = Fact { dtype: inputs[0].dtype, shape: self.shape.clone() };
        match super::broadcast::broadcast(&inputs[0], &target)? == self.shape {
            true => Ok(vec![target]),
            false => Err(input_error(0, "operand", &"a shape below the target", &inputs[0])),
        }
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let shape = IxDyn(&known(&self.shape)?);
        let out = on_any!(&inputs[0], x => x.broadcast(shape).map(|view| view.to_owned()));
        out.map(|t| vec![t]).ok_or_else(|| cannot("Expand", &inputs[0]))
    }
}

impl Operator for Transpose {
    fn name(&self) -> &'static str {
        "Transpose"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("permutation", self.permutation.as_slice())
    }

    fn onnx_form(&self) -> OnnxForm {
        let attributes = Attributes::none().with("perm", self.permutation.as_slice());
        node("Transpose", attributes, Vec::new())
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 1)?;
        let mut sorted = self.permutation.clone();
        sorted.sort_unstable();
        if sorted != (0..inputs[0].rank()).collect::<Vec<usize>>() {
            let expected = format!("rank {} for {:?}", self.permutation.len(), self.permutation);
            return Err(input_error(0, "operand", &expected, &inputs[0]));
        }
        let shape = self.permutation.iter().map(|axis| inputs[0].shape[*axis].clone()).collect();
        Ok(vec![Fact { dtype: inputs[0].dtype, shape }])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        self.infer(&[inputs[0].fact()])?;
        let axes = IxDyn(&self.permutation);
        // The same numbers with other strides: weights that are turned for a product are not copied.
        let out = on_any!(&inputs[0], x => Some(x.clone().permuted_axes(axes)));
        out.map(|t| vec![t]).ok_or_else(|| cannot("Transpose", &inputs[0]))
    }
}

impl Operator for Concat {
    fn name(&self) -> &'static str {
        "Concat"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("axis", self.axis)
    }

    fn onnx_form(&self) -> OnnxForm {
        node("Concat", Attributes::none().with("axis", self.axis), Vec::new())
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        let Some(first) = inputs.first() else {
            return Err(OpError::InputCount { expected: 1, found: 0 });
        };
        if self.axis >= first.rank() {
            let expected = format!("rank above {}", self.axis);
            return Err(input_error(0, "operand", &expected, first));
        }
        let mut out = first.clone();
        for (index, fact) in inputs.iter().enumerate().skip(1) {
            let mut expected = first.clone();
            if fact.rank() == first.rank() {
                expected.shape[self.axis] = fact.shape[self.axis].clone();
            }
            if *fact != expected {
                return Err(input_error(index, "operand", &expected, fact));
            }
            out.shape[self.axis] = out.shape[self.axis].clone() + fact.shape[self.axis].clone();
        }
        Ok(vec![out])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let facts: Vec<Fact> = inputs.iter().map(Tensor::fact).collect();
        self.infer(&facts)?;
        let axis = Axis(self.axis);
        macro_rules! concat {
            ($variant:ident) => {{
                let views: Vec<_> = inputs
                    .iter()
                    .filter_map(|input| match input {
                        Tensor::$variant(array) => Some(array.view()),
                        _ => None,
                    })
                    .collect();
                ndarray::concatenate(axis, &views)
                    .ok()
                    .map(|out| Tensor::$variant(out.into_shared()))
            }};
        }
        let out = match inputs[0] {
            Tensor::F32(_) => concat!(F32),
            Tensor::I64(_) => concat!(I64),
            Tensor::Bool(_) => concat!(Bool),
            Tensor::F16(_) => concat!(F16),
            Tensor::BF16(_) => concat!(BF16),
            Tensor::I8(_) => concat!(I8),
            Tensor::U8(_) => concat!(U8),
        };
        out.map(|t| vec![t]).ok_or_else(|| cannot("Concat", &inputs[0]))
    }
}

impl Operator for Cast {
    fn name(&self) -> &'static str {
        "Cast"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("to", self.dtype.name())
    }

    fn onnx_form(&self) -> OnnxForm {
        // Values of ONNX's TensorProto.DataType.
        let code = match self.dtype {
            DType::F32 => 1,
            DType::U8 => 2,
            DType::I8 => 3,
            DType::I16 => 5,
            DType::I32 => 6,
            DType::I64 => 7,
            DType::Bool => 9,
            DType::F16 => 10,
            DType::F64 => 11,
            DType::BF16 => 16,
        };
        node("Cast", Attributes::none().with("to", Attribute::Int(code)), Vec::new())
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 1)?;
        Ok(vec![Fact { dtype: self.dtype, shape: inputs[0].shape.clone() }])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let out = match (&inputs[0], self.dtype) {
            (Tensor::I64(x), DType::F32) => Tensor::F32(x.mapv(|v| v as f32).into_shared()),
            (Tensor::Bool(x), DType::F32) => {
                Tensor::F32(x.mapv(|v| f32::from(u8::from(v))).into_shared())
            }
            (Tensor::Bool(x), DType::I64) => Tensor::I64(x.mapv(i64::from).into_shared()),
            (Tensor::F16(x), DType::F32) => Tensor::F32(x.mapv(f16::to_f32).into_shared()),
            (Tensor::BF16(x), DType::F32) => Tensor::F32(x.mapv(bf16::to_f32).into_shared()),
            (Tensor::BF16(x), DType::F16) => {
                Tensor::F16(x.mapv(|v| f16::from_f32(v.to_f32())).into_shared())
            }
            (Tensor::I8(x), DType::F32) => Tensor::F32(x.mapv(f32::from).into_shared()),
            (Tensor::U8(x), DType::F32) => Tensor::F32(x.mapv(f32::from).into_shared()),
            (Tensor::F32(x), DType::F16) => Tensor::F16(x.mapv(f16::from_f32).into_shared()),
            (Tensor::F32(x), DType::BF16) => Tensor::BF16(x.mapv(bf16::from_f32).into_shared()),
            (Tensor::F32(x), DType::U8) => Tensor::U8(x.mapv(|v| v as u8).into_shared()),
            (same, dtype) if same.dtype() == dtype => same.clone(),
            (other, _) => return Err(cannot("Cast", other)),
        };
        Ok(vec![out])
    }
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;

    fn counting(shape: &[usize]) -> Tensor {
        let n: usize = shape.iter().product();
        Tensor::f32(shape, (0..n).map(|i| i as f32).collect()).unwrap()
    }

    #[test]
    fn transpose_then_back_is_identity() {
        let x = counting(&[2, 3, 4]);
        let there = Transpose { permutation: vec![2, 0, 1] }.evaluate(from_ref(&x)).unwrap();
        let back = Transpose { permutation: vec![1, 2, 0] }.evaluate(&there).unwrap();
        assert_eq!(back[0], x);
        assert!(Transpose { permutation: vec![0, 0, 1] }.infer(&[x.fact()]).is_err());
    }

    #[test]
    fn reshape_checks_symbolic_sizes() {
        let media = Dim::symbol("n_media");
        let x = Fact::f32([media.clone() * Dim::from(6)]);
        let fits = Reshape { shape: vec![media.clone(), Dim::from(2), Dim::from(3)] };
        assert!(fits.infer(from_ref(&x)).is_ok());
        assert!(Reshape { shape: vec![media, Dim::from(5)] }.infer(&[x]).is_err());
    }

    #[test]
    fn concat_adds_sizes() {
        let out = Concat { axis: 1 }.evaluate(&[counting(&[1, 2]), counting(&[1, 1])]).unwrap();
        assert_eq!(out[0].to_f32_vec().unwrap(), [0.0, 1.0, 0.0]);
        assert!(Concat { axis: 1 }.infer(&[Fact::f32([1, 2]), Fact::f32([2, 2])]).is_err());
        assert!(Concat { axis: 0 }.infer(&[Fact::f32([1]), Fact::i64([1])]).is_err());
    }

    #[test]
    fn expand_repeats() {
        let out =
            Expand { shape: vec![2.into(), 2.into()] }.evaluate(&[counting(&[1, 2])]).unwrap();
        assert_eq!(out[0].to_f32_vec().unwrap(), [0.0, 1.0, 0.0, 1.0]);
    }
}
