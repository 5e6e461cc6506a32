//! `Linear`: act(x Wᵀ + bias) + residual, W as checkpoints store it; and `Activate`.

use super::contrib::{FusedMatMul, Gelu, QuickGelu};
use super::{
    Add, Attribute, Attributes, Div, Erf, Flavour, MatMul, Mul, OpError, Operator, Relu, Rounding,
    Sigmoid, Tanh, Transpose, expect_fact, input_error,
};
use crate::graph::{Graph, GraphError, ValueId};
use crate::{DType, Dim, Fact, Tensor};

/// An activation function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x · (1 + erf(x / √2)) / 2.
    Gelu,
    /// x · (1 + tanh(√(2/π) · (x + 0.044715 x³))) / 2, of SigLIP.
    GeluTanh,
    /// x · σ(1.702 x), of CLIP.
    QuickGelu,
    /// max(x, 0).
    Relu,
    /// max(x, 0)², of the Flamingo paper.
    SquaredRelu,
    /// x · σ(x).
    Silu,
}

impl Activation {
    const NAMES: [(Activation, &'static str); 6] = [
        (Activation::Gelu, "gelu"),
        (Activation::GeluTanh, "gelu_tanh"),
        (Activation::QuickGelu, "quick_gelu"),
        (Activation::Relu, "relu"),
        (Activation::SquaredRelu, "squared_relu"),
        (Activation::Silu, "silu"),
    ];

    /// Name in configs, the text form and ONNX attributes.
    pub fn name(self) -> &'static str {
        let found = Activation::NAMES.iter().find(|(activation, _)| *activation == self);
        found.map_or("", |(_, name)| name)
    }

    /// The activation called `name`.
    pub fn from_name(name: &str) -> Option<Activation> {
        Activation::NAMES
            .iter()
            .find(|(_, known)| *known == name)
            .map(|(activation, _)| *activation)
    }

    pub(crate) fn from_attributes(attributes: &Attributes) -> Result<Option<Activation>, OpError> {
        match attributes.text("activation")? {
            "none" => Ok(None),
            name => Activation::from_name(name).map(Some).ok_or_else(|| OpError::Attribute {
                name: "activation".into(),
                expected: "none, gelu, gelu_tanh, quick_gelu, relu, squared_relu or silu".into(),
                found: name.into(),
            }),
        }
    }

    pub(crate) fn attribute(activation: Option<Activation>) -> Attribute {
        Attribute::from(activation.map_or("none", Activation::name))
    }

    /// Appends the activation of `x` to `graph`.
    pub(super) fn define(
        self,
        graph: &mut Graph,
        x: ValueId,
        flavour: Flavour,
    ) -> Result<ValueId, GraphError> {
        match (self, flavour.has_contrib()) {
            (Activation::Gelu, true) => graph.add("gelu", Gelu, &[x]),
            (Activation::QuickGelu, true) => {
                graph.add("quick_gelu", QuickGelu { alpha: 1.702 }, &[x])
            }
            (Activation::Gelu, false) => {
                let root = graph.literal(Tensor::scalar(std::f32::consts::SQRT_2));
                let (one, half) = (Tensor::scalar(1.0), Tensor::scalar(0.5));
                let (one, half) = (graph.literal(one), graph.literal(half));
                let scaled = graph.add("scaled", Div, &[x, root])?;
                let erf = graph.add("erf", Erf, &[scaled])?;
                let shifted = graph.add("shifted", Add, &[erf, one])?;
                let product = graph.add("product", Mul, &[x, shifted])?;
                graph.add("gelu", Mul, &[product, half])
            }
            (Activation::GeluTanh, _) => define_gelu_tanh(graph, x),
            (Activation::QuickGelu, false) => {
                let alpha = graph.literal(Tensor::scalar(1.702));
                let scaled = graph.add("scaled", Mul, &[x, alpha])?;
                let gate = graph.add("gate", Sigmoid, &[scaled])?;
                graph.add("quick_gelu", Mul, &[x, gate])
            }
            (Activation::Relu, _) => graph.add("relu", Relu, &[x]),
            (Activation::SquaredRelu, _) => {
                let positive = graph.add("positive", Relu, &[x])?;
                graph.add("squared_relu", Mul, &[positive, positive])
            }
            (Activation::Silu, _) => {
                let gate = graph.add("gate", Sigmoid, &[x])?;
                graph.add("silu", Mul, &[x, gate])
            }
        }
    }
}

/// x · (1 + tanh(x · (c + 0.044715 c x²))) / 2 with c = √(2/π). The cube is never formed: where x² is infinite in half
/// precision, tanh is ±1 all the same.
fn define_gelu_tanh(graph: &mut Graph, x: ValueId) -> Result<ValueId, GraphError> {
    let c = std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2;
    let [linear, cubic, one, half] =
        [c, 0.044_715 * c, 1.0, 0.5].map(|number| graph.literal(Tensor::scalar(number)));
    let square = graph.add("square", Mul, &[x, x])?;
    let cubic = graph.add("cubic", Mul, &[square, cubic])?;
    let factor = graph.add("factor", Add, &[cubic, linear])?;
    let scaled = graph.add("scaled", Mul, &[x, factor])?;
    let tanh = graph.add("tanh", Tanh, &[scaled])?;
    let shifted = graph.add("shifted", Add, &[tanh, one])?;
    let product = graph.add("product", Mul, &[x, shifted])?;
    graph.add("gelu_tanh", Mul, &[product, half])
}

/// An activation function on its own.
#[derive(Debug, Clone, PartialEq)]
pub struct Activate {
    /// Which one.
    pub activation: Activation,
}

/// act(round(x) Wᵀ + bias) + residual. Inputs: x `[.., k]`, weight `[n, k]`, bias `[n]` if `bias`,
/// residual [.., n] if `residual`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Linear {
    /// Applied after the bias, before the residual.
    pub activation: Option<Activation>,
    /// Whether a bias input follows.
    pub bias: bool,
    /// Whether a residual input follows.
    pub residual: bool,
    /// How x is rounded before the product.
    pub rounding: Rounding,
}

impl Activate {
    pub(crate) fn parse(attributes: &Attributes) -> Result<Activate, OpError> {
        attributes.expect_only(&["activation"])?;
        match Activation::from_attributes(attributes)? {
            Some(activation) => Ok(Activate { activation }),
            None => Err(OpError::Attribute {
                name: "activation".into(),
                expected: "an activation".into(),
                found: "none".into(),
            }),
        }
    }
}

impl Linear {
    pub(crate) fn parse(attributes: &Attributes) -> Result<Linear, OpError> {
        attributes.expect_only(&["activation", "bias", "residual", "rounding"])?;
        Ok(Linear {
            activation: Activation::from_attributes(attributes)?,
            bias: attributes.flag("bias")?,
            residual: attributes.flag("residual")?,
            rounding: Rounding::from_attributes(attributes)?,
        })
    }

    fn definition(&self, inputs: &[Fact], flavour: Flavour) -> Result<Graph, GraphError> {
        let mut graph = Graph::new("Linear");
        let mut facts = inputs.iter().cloned();
        let mut input = |graph: &mut Graph, name| {
            let fact = facts.next().unwrap_or_else(|| Fact::f32([0; 0]));
            graph.input(name, fact)
        };
        let x = input(&mut graph, "x");
        let weight = input(&mut graph, "weight");
        let x = self.rounding.define(&mut graph, x, flavour)?;
        let product = match flavour.has_contrib() {
            true => graph.add("product", FusedMatMul, &[x, weight])?,
            false => {
                let columns = Transpose { permutation: vec![1, 0] };
                let transposed = graph.add("transposed", columns, &[weight])?;
                graph.add("product", MatMul, &[x, transposed])?
            }
        };
        let mut rest = Vec::new();
        if self.bias {
            rest.push(input(&mut graph, "bias"));
        }
        if self.residual {
            rest.push(input(&mut graph, "residual"));
        }
        let y = self.finish(&mut graph, product, &rest, flavour)?;
        graph.output("y", y);
        Ok(graph)
    }

    /// Appends what follows the product; `rest` are bias and residual, if the op has them.
    pub(super) fn finish(
        &self,
        graph: &mut Graph,
        product: ValueId,
        rest: &[ValueId],
        flavour: Flavour,
    ) -> Result<ValueId, GraphError> {
        let mut y = product;
        if let Some(bias) = rest.first().filter(|_| self.bias) {
            y = graph.add("biased", Add, &[y, *bias])?;
        }
        if let Some(activation) = self.activation {
            y = activation.define(graph, y, flavour)?;
        }
        if let Some(residual) = rest.last().filter(|_| self.residual) {
            y = graph.add("sum", Add, &[y, *residual])?;
        }
        Ok(y)
    }
}

impl Operator for Activate {
    fn name(&self) -> &'static str {
        "Activate"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("activation", self.activation.name())
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        super::expect_inputs(inputs, 1)?;
        match inputs[0].dtype {
            DType::F32 => Ok(inputs.to_vec()),
            _ => Err(input_error(0, "x", &DType::F32, &inputs[0])),
        }
    }

    fn body(&self, inputs: &[Fact], flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        let mut graph = Graph::new("Activate");
        let x = graph.input("x", inputs[0].clone());
        Some(self.activation.define(&mut graph, x, flavour).map(|y| {
            graph.output("y", y);
            graph
        }))
    }
}

impl Operator for Linear {
    fn name(&self) -> &'static str {
        "Linear"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
            .with("activation", Activation::attribute(self.activation))
            .with("bias", self.bias)
            .with("residual", self.residual)
            .with("rounding", self.rounding.attribute())
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        super::expect_inputs(inputs, 2 + usize::from(self.bias) + usize::from(self.residual))?;
        let (x, weight) = (&inputs[0], &inputs[1]);
        let (Some(n), Some(k)) = (weight.shape.first(), weight.shape.get(1)) else {
            return Err(input_error(1, "weight", &"f32 [n, k]", weight));
        };
        expect_fact(inputs, 1, "weight", &Fact::f32([n.clone(), k.clone()]))?;
        if x.shape.last() != Some(k) || x.dtype != DType::F32 {
            return Err(input_error(0, "x", &format!("f32 [.., {k}]"), x));
        }
        let mut out = x.clone();
        out.shape.pop();
        out.shape.push(n.clone());
        if self.bias {
            expect_fact(inputs, 2, "bias", &Fact::f32([n.clone()]))?;
        }
        if self.residual {
            expect_fact(inputs, inputs.len() - 1, "residual", &out)?;
        }
        Ok(vec![out])
    }

    fn body(&self, inputs: &[Fact], flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        Some(self.definition(inputs, flavour))
    }
}

/// The rows of a weight [n, k], where known.
pub(crate) fn known_rows(weight: &Fact) -> Option<usize> {
    weight.shape.first().and_then(Dim::known)
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;

    #[test]
    fn epilogue_order_is_bias_activation_residual() {
        let linear = Linear {
            activation: Some(Activation::Relu),
            bias: true,
            residual: true,
            ..Linear::default()
        };
        let x = Tensor::f32(&[1, 2], vec![1.0, 2.0]).unwrap();
        let weight = Tensor::f32(&[2, 2], vec![1.0, 1.0, -1.0, -1.0]).unwrap();
        let bias = Tensor::vector(vec![0.5, 1.0]);
        let residual = Tensor::f32(&[1, 2], vec![-10.0, 10.0]).unwrap();
        let y = linear.evaluate(&[x, weight, bias, residual]).unwrap();
        assert_eq!(y[0].to_f32_vec().unwrap(), [-6.5, 10.0]);
    }

    #[test]
    fn flavours_agree() {
        let x = Tensor::f32(&[2, 2], vec![-3.0, -0.5, 0.7, 2.0]).unwrap();
        for (activation, _) in Activation::NAMES {
            let op = Activate { activation };
            let reference = op.evaluate(from_ref(&x)).unwrap();
            let body = op.body(&[x.fact()], Flavour::OrtCpu).unwrap().unwrap();
            let other = crate::evaluate(&body, from_ref(&x)).unwrap();
            for (a, b) in
                reference[0].to_f32_vec().unwrap().iter().zip(other[0].to_f32_vec().unwrap())
            {
                assert!((a - b).abs() < 1e-6, "{activation:?}: {a} {b}");
            }
        }
    }
}
