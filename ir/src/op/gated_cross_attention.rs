//! `GatedCrossAttention`: the attention half of Flamingo's gated block as one op
//! (paper fig. 4; the gate's tanh is folded into the output weight).

use super::{
    Attribute, Attributes, CrossAttention, Flavour, Linear, OpError, Operator, RmsNorm, Rounding,
    expect_inputs,
};
use crate::Fact;
use crate::graph::{Graph, GraphError};

/// residual + CrossAttention(norm(x Qᵀ + bias)) Oᵀ; x and what meets O are rounded before. Inputs: x [m, d] (normalised text),
/// query weight `[h·e, d]`, query bias `[h·e]` if `query_bias`, query scale `[e]` if `query_norm`
/// (RMS per head), media k and v `[n_media, n_latents, h·e]`, media time `[m]`, media index
/// `[n_media]`, output weight `[d, h·e]`, residual `[m, d]`.
#[derive(Debug, Clone, PartialEq)]
pub struct GatedCrossAttention {
    /// Heads (h).
    pub n_heads: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Whether the query projection has a bias.
    pub query_bias: bool,
    /// ε of the per-head RMS norm of the queries (IDEFICS), if any.
    pub query_norm: Option<f32>,
    /// How the inputs of both linears are rounded.
    pub rounding: Rounding,
}

impl GatedCrossAttention {
    pub(crate) fn parse(attributes: &Attributes) -> Result<GatedCrossAttention, OpError> {
        attributes.expect_only(&[
            "n_heads",
            "scale",
            "query_bias",
            "query_norm",
            "epsilon",
            "rounding",
        ])?;
        let epsilon = attributes.float("epsilon")?;
        Ok(GatedCrossAttention {
            n_heads: attributes.positive("n_heads")?,
            scale: attributes.float("scale")?,
            query_bias: attributes.flag("query_bias")?,
            query_norm: attributes.flag("query_norm")?.then_some(epsilon),
            rounding: Rounding::from_attributes(attributes)?,
        })
    }

    fn query(&self) -> Linear {
        Linear { bias: self.query_bias, rounding: self.rounding, ..Linear::default() }
    }

    fn output(&self) -> Linear {
        Linear { residual: true, rounding: self.rounding, ..Linear::default() }
    }

    fn norm(&self) -> Option<RmsNorm> {
        let norm = |epsilon| RmsNorm { epsilon, n_heads: self.n_heads, scale: true };
        self.query_norm.map(norm)
    }

    fn cross(&self) -> CrossAttention {
        CrossAttention { n_heads: self.n_heads, scale: self.scale }
    }

    fn n_query(&self) -> usize {
        2 + usize::from(self.query_bias)
    }

    fn definition(&self, inputs: &[Fact]) -> Result<Graph, GraphError> {
        let mut graph = Graph::new("GatedCrossAttention");
        let roles = [
            ("x", true),
            ("query_weight", true),
            ("query_bias", self.query_bias),
            ("query_scale", self.query_norm.is_some()),
            ("media_k", true),
            ("media_v", true),
            ("media_time", true),
            ("media_index", true),
            ("output_weight", true),
            ("residual", true),
        ];
        let present = roles.iter().filter(|(_, present)| *present);
        let ids: Vec<_> =
            present.zip(inputs).map(|((role, _), fact)| graph.input(role, fact.clone())).collect();
        let (query_inputs, rest) = ids.split_at(self.n_query());
        let (norm_inputs, rest) = rest.split_at(usize::from(self.query_norm.is_some()));
        let (media, output) = rest.split_at(4);
        let mut q = graph.add("query", self.query(), query_inputs)?;
        if let Some(norm) = self.norm() {
            q = graph.add("query_norm", norm, &[&[q], norm_inputs].concat())?;
        }
        let mixed = graph.add("attention", self.cross(), &[&[q], media].concat())?;
        let y = graph.add("output", self.output(), &[&[mixed], output].concat())?;
        graph.output("y", y);
        Ok(graph)
    }
}

impl Operator for GatedCrossAttention {
    fn name(&self) -> &'static str {
        "GatedCrossAttention"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
            .with("n_heads", self.n_heads)
            .with("scale", self.scale)
            .with("query_bias", self.query_bias)
            .with("query_norm", self.query_norm.is_some())
            .with("epsilon", Attribute::Float(self.query_norm.unwrap_or(0.0)))
            .with("rounding", self.rounding.attribute())
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        let n_norm = usize::from(self.query_norm.is_some());
        expect_inputs(inputs, self.n_query() + n_norm + 6)?;
        let (query_inputs, rest) = inputs.split_at(self.n_query());
        let (norm_inputs, rest) = rest.split_at(n_norm);
        let (media, output) = rest.split_at(4);
        let mut q = self.query().infer(query_inputs)?;
        if let Some(norm) = self.norm() {
            q = norm.infer(&[&q, norm_inputs].concat())?;
        }
        let mixed = self.cross().infer(&[&q, media].concat())?;
        self.output().infer(&[&mixed, output].concat())
    }

    fn body(&self, inputs: &[Fact], _flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        Some(self.definition(inputs))
    }
}
