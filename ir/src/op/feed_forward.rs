//! `FeedForward`: the two (or, gated, three) linears of a transformer block.

use super::{
    Activate, Activation, Attributes, Flavour, Linear, Mul, OpError, Operator, Rounding, Split,
    expect_inputs, input_error, linear,
};
use crate::graph::{Graph, GraphError};
use crate::{Dim, Fact};

/// act(x Uᵀ) Dᵀ + residual, or gated: (act(x Gᵀ) · x Uᵀ) Dᵀ + residual with U stored as [G; U];
/// x and what meets D are rounded before.
/// Inputs: x [.., d], up [f, d] ([2f, d] gated), up bias if `up_bias`, down [e, f],
/// down bias `[e]` if `down_bias`, residual `[.., e]` if `residual`.
#[derive(Debug, Clone, PartialEq)]
pub struct FeedForward {
    /// Applied between the linears.
    pub activation: Activation,
    /// Whether the first half of the up rows gates the second (SwiGLU with SiLU).
    pub gated: bool,
    /// Whether the first linear has a bias.
    pub up_bias: bool,
    /// Whether the last linear has a bias.
    pub down_bias: bool,
    /// Whether a residual is added.
    pub residual: bool,
    /// How the inputs of both linears are rounded.
    pub rounding: Rounding,
}

impl FeedForward {
    pub(crate) fn parse(attributes: &Attributes) -> Result<FeedForward, OpError> {
        attributes.expect_only(&[
            "activation",
            "gated",
            "up_bias",
            "down_bias",
            "residual",
            "rounding",
        ])?;
        Ok(FeedForward {
            activation: Activate::parse(
                &Attributes::none().with("activation", attributes.text("activation")?),
            )?
            .activation,
            gated: attributes.flag("gated")?,
            up_bias: attributes.flag("up_bias")?,
            down_bias: attributes.flag("down_bias")?,
            residual: attributes.flag("residual")?,
            rounding: Rounding::from_attributes(attributes)?,
        })
    }

    fn up(&self) -> Linear {
        let activation = (!self.gated).then_some(self.activation);
        Linear { activation, bias: self.up_bias, residual: false, rounding: self.rounding }
    }

    fn down(&self) -> Linear {
        Linear {
            activation: None,
            bias: self.down_bias,
            residual: self.residual,
            rounding: self.rounding,
        }
    }

    fn n_up(&self) -> usize {
        2 + usize::from(self.up_bias)
    }

    fn definition(&self, inputs: &[Fact]) -> Result<Graph, GraphError> {
        let mut graph = Graph::new("FeedForward");
        let roles = [
            ("x", true),
            ("up", true),
            ("up_bias", self.up_bias),
            ("down", true),
            ("down_bias", self.down_bias),
            ("residual", self.residual),
        ];
        let present = roles.iter().filter(|(_, present)| *present);
        let ids: Vec<_> =
            present.zip(inputs).map(|((role, _), fact)| graph.input(role, fact.clone())).collect();
        let (up_inputs, down_inputs) = ids.split_at(self.n_up());
        let mut hidden = graph.add("up", self.up(), up_inputs)?;
        if self.gated {
            let f = linear::known_rows(&inputs[1]).unwrap_or(0) / 2;
            let axis = graph.fact(hidden).rank() - 1;
            let halves = graph.add_many("halves", Split { axis, sizes: vec![f, f] }, &[hidden])?;
            let gate = graph.add("gate", Activate { activation: self.activation }, &halves[..1])?;
            hidden = graph.add("gated", Mul, &[gate, halves[1]])?;
        }
        let y = graph.add("down", self.down(), &[&[hidden], down_inputs].concat())?;
        graph.output("y", y);
        Ok(graph)
    }
}

impl Operator for FeedForward {
    fn name(&self) -> &'static str {
        "FeedForward"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
            .with("activation", self.activation.name())
            .with("gated", self.gated)
            .with("up_bias", self.up_bias)
            .with("down_bias", self.down_bias)
            .with("residual", self.residual)
            .with("rounding", self.rounding.attribute())
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        let n_down = 1 + usize::from(self.down_bias) + usize::from(self.residual);
        expect_inputs(inputs, self.n_up() + n_down)?;
        let (up_inputs, down_inputs) = inputs.split_at(self.n_up());
        let mut hidden = self.up().infer(up_inputs)?.remove(0);
        if self.gated {
            let Some(rows) = linear::known_rows(&inputs[1]).filter(|rows| rows % 2 == 0) else {
                return Err(input_error(1, "up", &"an even number of rows", &inputs[1]));
            };
            hidden.shape.pop();
            hidden.shape.push(Dim::from(rows / 2));
        }
        self.down().infer(&[&[hidden], down_inputs].concat())
    }

    fn body(&self, inputs: &[Fact], _flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        Some(self.definition(inputs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tensor;

    #[test]
    fn the_first_half_gates_the_second() {
        let op = FeedForward {
            activation: Activation::Relu,
            gated: true,
            up_bias: false,
            down_bias: false,
            residual: true,
            rounding: Rounding::None,
        };
        let x = Tensor::f32(&[1, 1], vec![2.0]).unwrap();
        let up = Tensor::f32(&[4, 1], vec![1.0, -1.0, 3.0, 5.0]).unwrap();
        let down = Tensor::f32(&[1, 2], vec![1.0, 1.0]).unwrap();
        let residual = Tensor::f32(&[1, 1], vec![0.5]).unwrap();
        let y = op.evaluate(&[x, up, down, residual]).unwrap();
        assert_eq!(y[0].to_f32_vec().unwrap(), [12.5]);
    }
}
