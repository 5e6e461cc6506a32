//! [`Rounding`]: what happens to activations before they meet a weight of low precision.

use super::{Abs, Attribute, Attributes, Cast, Div, Flavour, Max, Mul, OpError, ReduceMax, Round};
use crate::graph::{Graph, GraphError, ValueId};
use crate::{DType, Tensor};

/// How the activations of a linear are rounded before the product. It is a part of the op's
/// meaning: a kernel of bytes or of bfloat16 rounds so, and every engine that executes the op's
/// definition does the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Rounding {
    /// Not at all: f32.
    #[default]
    None,
    /// To the nearest bfloat16, ties to even.
    Bf16,
    /// Each row to 255 levels: s · round(x / s) with s = max |x| / 127, ties to even.
    Int8,
}

impl Rounding {
    const NAMES: [(Rounding, &'static str); 3] =
        [(Rounding::None, "none"), (Rounding::Bf16, "bf16"), (Rounding::Int8, "int8")];

    /// Name in the text form and in ONNX attributes.
    pub fn name(self) -> &'static str {
        let found = Rounding::NAMES.iter().find(|(rounding, _)| *rounding == self);
        found.map_or("", |(_, name)| name)
    }

    pub(crate) fn from_attributes(attributes: &Attributes) -> Result<Rounding, OpError> {
        let name = attributes.text("rounding")?;
        let found = Rounding::NAMES.iter().find(|(_, known)| *known == name);
        found.map(|(rounding, _)| *rounding).ok_or_else(|| OpError::Attribute {
            name: "rounding".into(),
            expected: "none, bf16 or int8".into(),
            found: name.into(),
        })
    }

    pub(crate) fn attribute(self) -> Attribute {
        Attribute::from(self.name())
    }

    /// Appends the rounding of `x` [.., k], f32, to `graph`, if the flavour has it.
    pub(crate) fn define(
        self,
        graph: &mut Graph,
        x: ValueId,
        flavour: Flavour,
    ) -> Result<ValueId, GraphError> {
        match self {
            _ if !flavour.rounds_activations() => Ok(x),
            Rounding::None => Ok(x),
            Rounding::Bf16 => {
                let half = graph.add("x_bf16", Cast { dtype: DType::BF16 }, &[x])?;
                graph.add("x_rounded", Cast { dtype: DType::F32 }, &[half])
            }
            Rounding::Int8 => {
                let (level, scale) = self.levels(graph, x)?;
                graph.add("x_rounded", Mul, &[level, scale])
            }
        }
    }

    /// Appends the levels, within ±127, of the rows of `x` [.., k], and the rows' scales [.., 1].
    pub(crate) fn levels(
        self,
        graph: &mut Graph,
        x: ValueId,
    ) -> Result<(ValueId, ValueId), GraphError> {
        // A row of zeros has no scale; the smallest one keeps its quotients zeros.
        let smallest = graph.literal(Tensor::scalar(f32::MIN_POSITIVE));
        let levels = graph.literal(Tensor::scalar(127.0));
        let magnitude = graph.add("x_magnitude", Abs, &[x])?;
        let largest = graph.add("x_largest", ReduceMax, &[magnitude])?;
        let scale = graph.add("x_fraction", Div, &[largest, levels])?;
        let scale = graph.add("x_scale", Max, &[scale, smallest])?;
        let quotient = graph.add("x_quotient", Div, &[x, scale])?;
        Ok((graph.add("x_level", Round, &[quotient])?, scale))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounded(rounding: Rounding, x: Tensor) -> Vec<f32> {
        let mut graph = Graph::new("rounding");
        let input = graph.input("x", x.fact());
        let y = rounding.define(&mut graph, input, Flavour::Portable).unwrap();
        graph.output("y", y);
        crate::evaluate(&graph, &[x]).unwrap()[0].to_f32_vec().unwrap()
    }

    #[test]
    fn rows_of_bytes_have_their_own_scales_and_ties_go_to_even() {
        let x = Tensor::f32(&[3, 3], vec![127.0, 0.5, -1.5, 0.0, 0.0, 0.0, -2.54, 0.0, 0.031]);
        let y = rounded(Rounding::Int8, x.unwrap());
        assert_eq!(y[..6], [127.0, 0.0, -2.0, 0.0, 0.0, 0.0]);
        assert!((y[6] + 2.54).abs() < 1e-6 && (y[8] - 0.04).abs() < 1e-6, "{y:?}");
    }

    #[test]
    fn bfloat16_has_eight_bits() {
        let x = Tensor::vector(vec![1.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -0.0]);
        assert_eq!(rounded(Rounding::Bf16, x.clone()), [1.0, 1.0, 1.015625, 0.0]);
        assert_eq!(rounded(Rounding::None, x.clone()), x.to_f32_vec().unwrap());
    }
}
