//! Otter folders: OpenFlamingo's tensors under other names, with vision encoder and language model beside them.

use serde_json::{Value, json};

use super::idefics;
use super::openflamingo::{OpenFlamingo, Vision};
use super::random::Storage;
use super::tensor::TensorList;

/// Shape of an Otter: that of an OpenFlamingo over a CLIP, all stored in f32.
#[derive(Clone, Debug)]
pub(super) struct Otter {
    pub(super) model: OpenFlamingo,
    pub(super) vision: Vision,
}

impl Otter {
    /// How the numbers are stored.
    pub(super) const STORAGE: Storage = Storage::F32;

    /// Every tensor of the folder.
    pub(super) fn tensors(&self) -> TensorList {
        let model = &self.model;
        let mut list = TensorList::default();
        self.vision().tensors(&mut list, "vision_encoder.vision_model");
        list.extend(model.bridge().renamed(&|name| in_feed_forward(name)));
        let layers = model.language.layers_prefix();
        list.extend(model.language.tensors().renamed(&|name| in_wrapper(name, layers)));
        list
    }

    fn vision(&self) -> idefics::Vision {
        let vision = &self.vision;
        idefics::Vision {
            width: vision.width,
            n_layers: vision.n_layers,
            n_heads: vision.n_heads,
            mlp_width: 4 * vision.width,
            image_size: vision.image_size,
            patch_size: vision.patch_size,
        }
    }

    /// The folder's `config.json`.
    pub(super) fn config(&self) -> Value {
        let (model, vision) = (&self.model, self.vision());
        json!({
            "architectures": ["OtterForConditionalGeneration"], "model_type": "otter",
            "cross_attn_every_n_layers": model.interval, "torch_dtype": Self::STORAGE.torch_name(),
            "text_config": model.language.config(&model.tokens),
            "vision_config": {
                "model_type": "clip_vision_model", "hidden_size": vision.width,
                "intermediate_size": vision.mlp_width, "num_hidden_layers": vision.n_layers,
                "num_attention_heads": vision.n_heads, "image_size": vision.image_size,
                "patch_size": vision.patch_size, "num_channels": 3, "hidden_act": "quick_gelu",
                "layer_norm_eps": 1e-5
            }
        })
    }
}

/// OpenFlamingo's name in Otter: a resampler layer is one module, and feed-forwards have their whole name.
fn in_feed_forward(name: &str) -> String {
    let mut pieces: Vec<&str> = name.split('.').collect();
    match pieces[..] {
        ["perceiver", "layers", _, "0", ..] => drop(pieces.remove(3)),
        ["perceiver", "layers", _, "1", ..] => pieces[3] = "feed_forward",
        _ => pieces
            .iter_mut()
            .filter(|piece| **piece == "ff")
            .for_each(|piece| *piece = "feed_forward"),
    }
    pieces.join(".")
}

/// A language model's name inside the wrapper: layers gain `.decoder_layer`.
fn in_wrapper(name: &str, layers: &str) -> String {
    let rest = name.strip_prefix(layers).and_then(|rest| rest.strip_prefix('.'));
    match rest.and_then(|rest| rest.split_once('.')) {
        Some((layer, rest)) => format!("lang_encoder.{layers}.{layer}.decoder_layer.{rest}"),
        None => format!("lang_encoder.{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{in_feed_forward, in_wrapper};

    #[test]
    fn names_are_those_of_its_converter() {
        for (name, expected) in [
            ("perceiver.latents", "perceiver.latents"),
            ("perceiver.layers.2.0.to_kv.weight", "perceiver.layers.2.to_kv.weight"),
            ("perceiver.layers.2.1.3.weight", "perceiver.layers.2.feed_forward.3.weight"),
            (
                "l.3.gated_cross_attn_layer.ff.0.bias",
                "l.3.gated_cross_attn_layer.feed_forward.0.bias",
            ),
            ("l.3.gated_cross_attn_layer.ff_gate", "l.3.gated_cross_attn_layer.ff_gate"),
        ] {
            assert_eq!(in_feed_forward(name), expected);
        }
        assert_eq!(
            in_wrapper("model.layers.3.mlp.up_proj.weight", "model.layers"),
            "lang_encoder.model.layers.3.decoder_layer.mlp.up_proj.weight"
        );
        assert_eq!(in_wrapper("lm_head.weight", "model.layers"), "lang_encoder.lm_head.weight");
    }
}
