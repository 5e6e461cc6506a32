//! Numbers of a model by component: what was trained for it, and what it found ready.

use std::collections::BTreeMap;

use flamingo_ir::{Constant, Graph};
use serde::Serialize;

use crate::config::Family;
use crate::family::{Graphs, Source};

/// A part of the architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Component {
    /// Vision encoder.
    Vision,
    /// Perceiver Resampler.
    Resampler,
    /// Gated cross-attention blocks.
    CrossAttention,
    /// Layers of the language model, and its norms and positions.
    Language,
    /// Embedding of tokens, and the output head where it is another matrix.
    Embeddings,
}

/// How many numbers a component has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Those that the recipe of the family trains: all that is new in a Flamingo.
    pub trained: u64,
    /// Those of the models that it is made of.
    pub frozen: u64,
}

/// Embeddings of the language models, by the ends of their names.
const EMBEDDINGS: [&str; 5] = [
    "token_emb.weight",
    "wte.weight",
    "embed_in.weight",
    "embed_tokens.weight",
    "additional_embedding.weight",
];
/// Their output heads.
const HEADS: [&str; 3] = ["lm_head.weight", "embed_out.weight", "additional_fc.weight"];

impl Component {
    /// The component of the tensor `part/key`.
    pub fn of(name: &str) -> Component {
        let key = name.split_once('/').map_or(name, |(_, key)| key);
        let ends = |ends: &[&str]| ends.iter().any(|end| key.ends_with(end));
        match () {
            () if name.starts_with("vision_encoder/") => Component::Vision,
            () if key.contains("vision_model.") || key.starts_with("vision_encoder.") => {
                Component::Vision
            }
            () if key.contains("perceiver") => Component::Resampler,
            () if key.contains("gated_cross_attn_layer") || is_palms_block(key) => {
                Component::CrossAttention
            }
            () if ends(&EMBEDDINGS) || ends(&HEADS) => Component::Embeddings,
            () => Component::Language,
        }
    }

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Component::Vision => "vision encoder",
            Component::Resampler => "resampler",
            Component::CrossAttention => "gated cross-attention",
            Component::Language => "language model",
            Component::Embeddings => "embeddings",
        }
    }
}

impl Count {
    /// Of tensors `part/key` with how many numbers each has.
    pub fn of<'n>(
        family: Family,
        tensors: impl Iterator<Item = (&'n str, u64)>,
    ) -> BTreeMap<Component, Count> {
        let mut counts: BTreeMap<Component, Count> = BTreeMap::new();
        for (name, n) in tensors {
            let count = counts.entry(Component::of(name)).or_default();
            match is_trained(family, name) {
                true => count.trained = count.trained.saturating_add(n),
                false => count.frozen = count.frozen.saturating_add(n),
            }
        }
        counts
    }
}

/// Whether a tensor is of a gated block in flamingo-pytorch's spelling, `layers.N.1.`; `layers.N.0.` is the frozen layer.
fn is_palms_block(key: &str) -> bool {
    let mut path = key.split('.');
    path.next() == Some("layers") && path.nth(1) == Some("1")
}

/// What is trained: resampler and gated blocks, and of the embeddings in OpenFlamingo the whole input table
/// (`factory.py`, as its count of trainable parameters says), in IDEFICS the rows of the added tokens.
fn is_trained(family: Family, name: &str) -> bool {
    match Component::of(name) {
        Component::Resampler | Component::CrossAttention => true,
        Component::Vision | Component::Language => false,
        Component::Embeddings => match family {
            Family::Idefics => name.contains(".additional_"),
            Family::FlamingoPytorch => false,
            Family::OpenFlamingo | Family::Otter => {
                EMBEDDINGS.iter().any(|end| name.ends_with(end))
            }
        },
    }
}

/// Whether a tensor of the checkpoint has the values of another one: OpenFlamingo's first release saved each block under
/// every name that its code had for it.
pub fn is_alias(name: &str) -> bool {
    let aliases = ["lang_encoder.gated_cross_attn_layers.", "lang_encoder.old_decoder_blocks."];
    let key = name.split_once('/').map_or(name, |(_, key)| key);
    aliases.iter().any(|alias| key.starts_with(alias))
}

impl Source {
    /// Tensors `part/key` that the graphs read, with how many numbers each has.
    pub fn used(&self, graphs: &Graphs) -> BTreeMap<String, u64> {
        let read = |graph: &Graph| -> Vec<String> {
            let weight = |constant: &Option<Constant>| match constant {
                Some(Constant::Weight(name)) => Some(name.clone()),
                Some(Constant::Literal(_)) | None => None,
            };
            graph.values().filter_map(|(_, value)| weight(&value.constant)).collect()
        };
        let names = read(&graphs.media).into_iter().chain(read(&graphs.decoder));
        let sized = |name: String| {
            let n = self.parts.get(&name)?.n_values();
            Some((name, n))
        };
        names.filter_map(sized).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_spells_its_components() {
        let of = |name: &str| Component::of(name);
        assert_eq!(of("checkpoint/layers.3.1.attn.norm.weight"), Component::CrossAttention);
        assert_eq!(of("checkpoint/layers.3.0.fn.attn_out.weight"), Component::Language);
        assert_eq!(of("checkpoint/token_emb.weight"), Component::Embeddings);
        assert_eq!(of("vision_encoder/conv1.weight"), Component::Vision);
        assert_eq!(
            of("checkpoint/vision_encoder.vision_model.pre_layrnorm.bias"),
            Component::Vision
        );
        assert_eq!(of("checkpoint/model.perceiver_resampler.latents"), Component::Resampler);
        let block =
            "checkpoint/lang_encoder.transformer.blocks.3.gated_cross_attn_layer.ff.1.weight";
        assert_eq!(of(block), Component::CrossAttention);
        assert_eq!(
            of("checkpoint/model.gated_cross_attn_layers.0.alpha_dense"),
            Component::CrossAttention
        );
        assert_eq!(of("language_model/model.layers.0.mlp.up_proj.weight"), Component::Language);
        assert_eq!(of("language_model/embed_out.weight"), Component::Embeddings);
    }

    #[test]
    fn what_is_new_is_trained() {
        let tensors = [
            ("checkpoint/perceiver.latents", 5),
            ("language_model/lm_head.weight", 7),
            ("checkpoint/lang_encoder.model.embed_tokens.weight", 11),
        ];
        let counts = Count::of(Family::OpenFlamingo, tensors.into_iter());
        assert_eq!(counts[&Component::Embeddings], Count { trained: 11, frozen: 7 });
        assert_eq!(counts[&Component::Resampler], Count { trained: 5, frozen: 0 });
        let added = [
            ("checkpoint/model.embed_tokens.additional_embedding.weight", 2),
            ("checkpoint/model.embed_tokens.weight", 3),
        ];
        let counts = Count::of(Family::Idefics, added.into_iter());
        assert_eq!(counts[&Component::Embeddings], Count { trained: 2, frozen: 3 });
    }

    #[test]
    fn aliases_are_those_of_the_first_release() {
        assert!(is_alias("checkpoint/lang_encoder.gated_cross_attn_layers.3.attn_gate"));
        assert!(!is_alias("checkpoint/model.gated_cross_attn_layers.3.alpha_dense"));
    }
}
