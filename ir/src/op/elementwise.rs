//! Elementwise ops: `Add Sub Mul Div Max Neg Abs Floor Round Sqrt Erf Sigmoid Tanh Relu Cos Sin Equal
//! LessOrEqual And`
//! (<https://onnx.ai/onnx/operators/>, opset 17). Two-operand ops broadcast.

use ndarray::{ArcArray, IxDyn, Zip};

use super::broadcast::broadcast;
use super::{Attributes, OnnxForm, OpError, Operator, expect_inputs, input_error};
use crate::{DType, Fact, Tensor};

fn standard(op_type: &'static str) -> OnnxForm {
    OnnxForm::Node {
        domain: "",
        op_type,
        attributes: Attributes::none(),
        extra_inputs: Vec::new(),
        absent: &[],
    }
}

type Array<T> = ArcArray<T, IxDyn>;

/// Applies `f` to each pair of elements after broadcasting.
fn zip<T: Copy, R: Clone>(
    left: &Array<T>,
    right: &Array<T>,
    f: impl Fn(T, T) -> R,
) -> Option<Array<R>> {
    let rank = left.ndim().max(right.ndim());
    let dim = |array: &Array<T>, axis: usize| match (axis + array.ndim()).checked_sub(rank) {
        Some(own_axis) => array.shape()[own_axis],
        None => 1,
    };
    let larger = |axis| match (dim(left, axis), dim(right, axis)) {
        (a, 1) => a,
        (1, b) => b,
        (a, _) => a,
    };
    let shape: Vec<usize> = (0..rank).map(larger).collect();
    let (left, right) = (left.broadcast(shape.clone())?, right.broadcast(shape)?);
    Some(Zip::from(left).and(right).map_collect(|a, b| f(*a, *b)).into_shared())
}

fn mismatch(op: &str, left: &Tensor, right: &Tensor) -> OpError {
    OpError::Evaluation(format!("{op} of {} and {}", left.fact(), right.fact()))
}

/// Declares ops of two operands: result type rule, then the f32, i64 and bool arithmetic.
macro_rules! binary {
    ($($(#[$doc:meta])* $name:ident($onnx:literal): $f32:expr, $i64:expr;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name;

        impl $name {
            pub(crate) fn parse(attributes: &Attributes) -> Result<$name, OpError> {
                attributes.expect_only(&[]).map(|()| $name)
            }
        }

        impl Operator for $name {
            fn name(&self) -> &'static str { stringify!($name) }
            fn attributes(&self) -> Attributes { Attributes::none() }
            fn onnx_form(&self) -> OnnxForm { standard($onnx) }

            fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
                expect_inputs(inputs, 2)?;
                if inputs[1].dtype != inputs[0].dtype {
                    return Err(input_error(1, "right operand", &inputs[0].dtype, &inputs[1]));
                }
                let shape = broadcast(&inputs[0], &inputs[1])?;
                Ok(vec![Fact { dtype: inputs[0].dtype, shape }])
            }

            fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
                let result = match inputs {
                    [Tensor::F32(a), Tensor::F32(b)] => zip(a, b, $f32).map(Tensor::F32),
                    [Tensor::I64(a), Tensor::I64(b)] => zip(a, b, $i64).map(Tensor::I64),
                    _ => None,
                };
                result.map(|r| vec![r]).ok_or_else(|| mismatch($onnx, &inputs[0], &inputs[1]))
            }
        }
    )*};
}

binary! {
    /// a + b.
    Add("Add"): |a, b| a + b, |a, b| a.wrapping_add(b);
    /// a − b.
    Sub("Sub"): |a, b| a - b, |a, b| a.wrapping_sub(b);
    /// a · b.
    Mul("Mul"): |a, b| a * b, |a, b| a.wrapping_mul(b);
    /// a / b.
    Div("Div"): |a, b| a / b, |a, b| a.checked_div(b).unwrap_or(0);
    /// The larger of a and b; NaN if one is.
    Max("Max"): |a, b| if a.is_nan() || a > b { a } else { b }, |a, b| a.max(b);
}

/// Declares comparisons: the result is of truth values.
macro_rules! compare {
    ($($(#[$doc:meta])* $name:ident($onnx:literal): $compare:expr;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name;

        impl $name {
            pub(crate) fn parse(attributes: &Attributes) -> Result<$name, OpError> {
                attributes.expect_only(&[]).map(|()| $name)
            }
        }

        impl Operator for $name {
            fn name(&self) -> &'static str { stringify!($name) }
            fn attributes(&self) -> Attributes { Attributes::none() }
            fn onnx_form(&self) -> OnnxForm { standard($onnx) }

            fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
                expect_inputs(inputs, 2)?;
                if inputs[0].dtype != DType::I64 || inputs[1].dtype != DType::I64 {
                    return Err(input_error(0, "operand", &DType::I64, &inputs[0]));
                }
                Ok(vec![Fact { dtype: DType::Bool, shape: broadcast(&inputs[0], &inputs[1])? }])
            }

            fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
                let result = match inputs {
                    [Tensor::I64(a), Tensor::I64(b)] => zip(a, b, $compare).map(Tensor::Bool),
                    _ => None,
                };
                result.map(|r| vec![r]).ok_or_else(|| mismatch($onnx, &inputs[0], &inputs[1]))
            }
        }
    )*};
}

compare! {
    /// a = b, over integers.
    Equal("Equal"): |a, b| a == b;
    /// a ≤ b, over integers.
    LessOrEqual("LessOrEqual"): |a, b| a <= b;
}

/// a ∧ b.
#[derive(Debug, Clone, PartialEq)]
pub struct And;

impl And {
    pub(crate) fn parse(attributes: &Attributes) -> Result<And, OpError> {
        attributes.expect_only(&[]).map(|()| And)
    }
}

impl Operator for And {
    fn name(&self) -> &'static str {
        "And"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn onnx_form(&self) -> OnnxForm {
        standard("And")
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 2)?;
        for (index, fact) in inputs.iter().enumerate() {
            if fact.dtype != DType::Bool {
                return Err(input_error(index, "operand", &DType::Bool, fact));
            }
        }
        Ok(vec![Fact { dtype: DType::Bool, shape: broadcast(&inputs[0], &inputs[1])? }])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let result = match inputs {
            [Tensor::Bool(a), Tensor::Bool(b)] => zip(a, b, |a, b| a && b).map(Tensor::Bool),
            _ => None,
        };
        result.map(|r| vec![r]).ok_or_else(|| mismatch("And", &inputs[0], &inputs[1]))
    }
}

/// Declares f32 functions of one operand.
macro_rules! unary {
    ($($(#[$doc:meta])* $name:ident($onnx:literal): $f:expr;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name;

        impl $name {
            pub(crate) fn parse(attributes: &Attributes) -> Result<$name, OpError> {
                attributes.expect_only(&[]).map(|()| $name)
            }
        }

        impl Operator for $name {
            fn name(&self) -> &'static str { stringify!($name) }
            fn attributes(&self) -> Attributes { Attributes::none() }
            fn onnx_form(&self) -> OnnxForm { standard($onnx) }

            fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
                expect_inputs(inputs, 1)?;
                match inputs[0].dtype {
                    DType::F32 => Ok(inputs.to_vec()),
                    _ => Err(input_error(0, "operand", &DType::F32, &inputs[0])),
                }
            }

            fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
                match inputs {
                    [Tensor::F32(x)] => Ok(vec![Tensor::F32(x.mapv($f).into_shared())]),
                    _ => Err(OpError::Evaluation(concat!($onnx, " takes one f32 tensor").into())),
                }
            }
        }
    )*};
}

unary! {
    /// −x.
    Neg("Neg"): |x| -x;
    /// |x|.
    Abs("Abs"): f32::abs;
    /// The largest integer ≤ x.
    Floor("Floor"): f32::floor;
    /// The nearest integer, ties to even.
    Round("Round"): f32::round_ties_even;
    /// √x.
    Sqrt("Sqrt"): f32::sqrt;
    /// erf x, computed in f64.
    Erf("Erf"): |x| erf(f64::from(x)) as f32;
    /// 1 / (1 + e⁻ˣ).
    Sigmoid("Sigmoid"): |x| 1.0 / (1.0 + (-x).exp());
    /// tanh x.
    Tanh("Tanh"): f32::tanh;
    /// max(x, 0); NaN stays NaN.
    Relu("Relu"): |x| if x < 0.0 { 0.0 } else { x };
    /// cos x.
    Cos("Cos"): f32::cos;
    /// sin x.
    Sin("Sin"): f32::sin;
}

/// erf x: Maclaurin series below 3, continued fraction of erfc above; |error| < 1e-14.
fn erf(x: f64) -> f64 {
    let magnitude = x.abs();
    if x.is_nan() {
        return x;
    }
    if magnitude > 6.0 {
        return x.signum();
    }
    let two_over_sqrt_pi = std::f64::consts::FRAC_2_SQRT_PI;
    if magnitude < 3.0 {
        let (mut term, mut sum, mut n) = (x, x, 0.0);
        while term.abs() > 1e-17 * sum.abs() {
            n += 1.0;
            term *= -x * x / n;
            sum += term / (2.0 * n + 1.0);
        }
        return two_over_sqrt_pi * sum;
    }
    let fraction = (1..60).rev().fold(magnitude, |tail, k| magnitude + f64::from(k) / 2.0 / tail);
    let erfc = (-x * x).exp() / fraction * two_over_sqrt_pi / 2.0;
    x.signum() * (1.0 - erfc)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dim;

    #[test]
    fn erf_matches_published_values() {
        // Abramowitz & Stegun, table 7.1.
        let table = [(0.0, 0.0), (0.5, 0.5204998778), (1.0, 0.8427007929), (2.0, 0.9953222650)];
        for (x, expected) in table {
            assert!((erf(x) - expected).abs() < 1e-10, "erf({x}) = {}", erf(x));
            assert!((erf(-x) + expected).abs() < 1e-10);
        }
        assert!((erf(3.5) - 0.999_999_256_9).abs() < 1e-10);
        assert!((erf(2.999_999_999) - erf(3.000_000_001)).abs() < 1e-12);
        assert_eq!(erf(9.0), 1.0);
        assert!(erf(f64::NAN).is_nan());
    }

    #[test]
    fn operands_broadcast() {
        let row = Tensor::f32(&[1, 3], vec![1.0, 2.0, 3.0]).unwrap();
        let column = Tensor::f32(&[2, 1], vec![10.0, 20.0]).unwrap();
        let sum = Add.evaluate(&[row.clone(), column.clone()]).unwrap();
        assert_eq!(sum[0].to_f32_vec().unwrap(), [11.0, 12.0, 13.0, 21.0, 22.0, 23.0]);
        assert_eq!(
            Add.infer(&[row.fact(), column.fact()]).unwrap()[0].shape,
            [2, 3].map(Dim::from)
        );
        let other = Tensor::f32(&[4], vec![0.0; 4]).unwrap();
        assert!(Add.infer(&[row.fact(), other.fact()]).is_err());
        assert!(Add.evaluate(&[row, other]).is_err());
    }
}
