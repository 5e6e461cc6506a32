//! How weights are stored: from `--precision` to a format for each layer group.

use std::collections::BTreeMap;
use std::fmt;

use clap::ValueEnum;
use flamingo_ir::op::PanelFormat;

/// Columns that share a scale in int4, unless said otherwise.
pub const INT4_BLOCK: usize = 32;

/// What `--precision` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    F32,
    /// Half-precision weights; activations stay f32.
    F16,
    /// bfloat16 weights and activations.
    Bf16,
    /// Weights and activations of 8 bits.
    Int8,
    /// Weights of 4 bits, of 8 in vision encoder, the resampler's attention, embedding and head; activations of 8.
    Int4,
}

impl Precision {
    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::F16 => "f16",
            Precision::Bf16 => "bf16",
            Precision::Int8 => "int8",
            Precision::Int4 => "int4",
        }
    }
}

/// Layers that share a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LayerGroup {
    /// The vision encoder.
    Vision,
    /// The resampler.
    Resampler,
    /// Keys and values of the media for every gated block.
    Media,
    /// The language model's own layers.
    Language,
    /// The gated blocks between them.
    Gated,
    /// The token embedding.
    Embedding,
    /// The language model's head.
    Head,
}

impl LayerGroup {
    /// Name in manifests and tables.
    pub fn name(self) -> &'static str {
        match self {
            LayerGroup::Vision => "vision",
            LayerGroup::Resampler => "resampler",
            LayerGroup::Media => "media",
            LayerGroup::Language => "language",
            LayerGroup::Gated => "gated",
            LayerGroup::Embedding => "embedding",
            LayerGroup::Head => "head",
        }
    }

    /// The group of the node `name` of the graph `stage`; none for positions, which are added and
    /// not multiplied.
    pub fn of(stage: &str, name: &str) -> Option<LayerGroup> {
        let mut parts = name.split('.');
        Some(match (parts.next()?, parts.next(), parts.next()) {
            ("vision", _, _) => LayerGroup::Vision,
            ("resampler", _, _) => LayerGroup::Resampler,
            ("media", _, _) => LayerGroup::Media,
            ("decoder", Some("embedding"), _) => LayerGroup::Embedding,
            ("decoder", Some("position_embedding"), _) => return None,
            ("decoder", Some("head"), _) => LayerGroup::Head,
            ("decoder", _, Some("cross_attention" | "cross_mlp")) => LayerGroup::Gated,
            _ if stage == "media" => LayerGroup::Media,
            _ => LayerGroup::Language,
        })
    }
}

/// How one layer is stored, whatever its group is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The format; none for f32.
    pub format: Option<PanelFormat>,
    /// Share of a row's, or block's, largest magnitude that its scale reaches; larger values are cut off there.
    /// None lets the rounding choose.
    pub reach: Option<f32>,
}

impl Choice {
    /// The next finer format, and nothing cut off by choice; none for f32.
    pub fn raised(self) -> Option<Choice> {
        let format = match self.format? {
            PanelFormat::Int4 { .. } => Some(PanelFormat::Int8),
            PanelFormat::Int8 => Some(PanelFormat::F16),
            PanelFormat::F16 | PanelFormat::Bf16 => None,
        };
        Some(Choice { format, reach: None })
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.format {
            Some(format) => write!(f, "{format}")?,
            None => f.write_str("f32")?,
        }
        self.reach.map_or(Ok(()), |reach| write!(f, ":reach={reach}"))
    }
}

/// A format for each layer group, and for single layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Scheme {
    /// What the user asked for.
    pub precision: Precision,
    /// Columns that share a scale in int4: a multiple of 8.
    pub int4_block: usize,
    /// Layers that differ from their group, by the name of their op: `decoder.2.mlp`.
    pub layers: BTreeMap<String, Choice>,
}

impl Default for Scheme {
    fn default() -> Scheme {
        Scheme::from(Precision::F32)
    }
}

impl From<Precision> for Scheme {
    fn from(precision: Precision) -> Scheme {
        Scheme { precision, int4_block: INT4_BLOCK, layers: BTreeMap::new() }
    }
}

impl Scheme {
    /// Whether anything is stored otherwise than in f32.
    pub fn is_rounded(&self) -> bool {
        self.precision != Precision::F32 || self.layers.values().any(|layer| layer.format.is_some())
    }

    /// How the weights of the op `name` in the graph `stage` are stored; none for what has no group.
    pub fn choice(&self, stage: &str, name: &str) -> Option<Choice> {
        let group = LayerGroup::of(stage, name)?;
        let own = self.layers.get(name).copied();
        Some(own.unwrap_or(Choice { format: self.format(group, name), reach: None }))
    }

    /// How the weights of the op `name` of a group are stored; none for f32.
    ///
    /// int4 is for what the language model's every token reads, for the media's keys and values, and for the
    /// resampler's feed-forwards, more than half of it. Every picture depends on the encoder and on what the latents
    /// attend to, and the head decides between tokens: there 4 bits would lose more than they save.
    fn format(&self, group: LayerGroup, name: &str) -> Option<PanelFormat> {
        match self.precision {
            Precision::F32 => None,
            Precision::F16 => Some(PanelFormat::F16),
            Precision::Bf16 => Some(PanelFormat::Bf16),
            Precision::Int8 => Some(PanelFormat::Int8),
            Precision::Int4 => Some(match group {
                LayerGroup::Language | LayerGroup::Gated | LayerGroup::Media => self.int4(),
                LayerGroup::Resampler if name.ends_with(".mlp") => self.int4(),
                LayerGroup::Resampler
                | LayerGroup::Vision
                | LayerGroup::Embedding
                | LayerGroup::Head => PanelFormat::Int8,
            }),
        }
    }

    fn int4(&self) -> PanelFormat {
        PanelFormat::Int4 { block: self.int4_block }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.precision {
            Precision::Int4 => write!(f, "int4/{}", self.int4_block)?,
            precision => f.write_str(precision.name())?,
        }
        self.layers.iter().try_for_each(|(name, choice)| write!(f, " {name}={choice}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_names_say_their_group() {
        let cases = [
            ("media", "vision.3.attention.merged_3", Some(LayerGroup::Vision)),
            ("media", "resampler.0.mlp", Some(LayerGroup::Resampler)),
            ("media", "media.merged_8", Some(LayerGroup::Media)),
            ("media", "merged_2", Some(LayerGroup::Media)),
            ("decoder", "decoder.2.attention.output", Some(LayerGroup::Language)),
            ("decoder", "decoder.2.cross_attention", Some(LayerGroup::Gated)),
            ("decoder", "decoder.2.cross_mlp", Some(LayerGroup::Gated)),
            ("decoder", "decoder.embedding", Some(LayerGroup::Embedding)),
            ("decoder", "decoder.position_embedding", None),
            ("decoder", "decoder.head", Some(LayerGroup::Head)),
        ];
        for (stage, name, group) in cases {
            assert_eq!(LayerGroup::of(stage, name), group, "{name}");
        }
    }

    #[test]
    fn a_tied_table_has_one_format() {
        for precision in Precision::value_variants() {
            let scheme = Scheme::from(*precision);
            let choice = |name| scheme.choice("decoder", name).unwrap();
            assert_eq!(choice("decoder.embedding"), choice("decoder.head"));
        }
    }
}
