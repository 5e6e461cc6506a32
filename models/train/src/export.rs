//! A trained model as OpenFlamingo's files, with the recipe that `flamingoc compile` takes.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use flamingo_scenes::words::{BEGIN, END_OF_CHUNK, IMAGE, PAD, vocabulary};
use serde_json::json;

use crate::checkpoint::write_tensors;
use crate::model::language::EMBEDDING;
use crate::recipe::Recipe;
use crate::weights::Weights;

/// The vision encoder in a model's folder.
pub const VISION_FILE: &str = "clip_visual.safetensors";
/// The language model in a model's folder; its row of `<eoc>` is the one that stage 3 learned.
pub const LANGUAGE_FILE: &str = "lang_encoder/model.safetensors";

/// Writes `recipe.toml`, `clip_visual.safetensors`, `checkpoint.safetensors`, `lang_encoder/`, `tokenizer.json`.
///
/// # Errors
/// A file that cannot be written.
pub fn export(folder: &Path, recipe: &Recipe, weights: &Weights) -> Result<()> {
    let language = folder.join("lang_encoder");
    fs::create_dir_all(&language)
        .with_context(|| format!("cannot make `{}`", language.display()))?;
    let is_gated = |name: &str| name.contains("gated_cross_attn_layer");
    let is_language = |name: &str| name.starts_with("model.") && !is_gated(name);
    let is_perceiver = |name: &str| name.starts_with("perceiver.");
    let is_vision = |name: &str| {
        !name.starts_with("model.")
            && !is_perceiver(name)
            && !name.starts_with("text.")
            && name != "logit_scale"
    };
    let visual = weights.filtered(is_vision);
    write_tensors(&folder.join(VISION_FILE), &visual, None)?;
    let frozen = weights.filtered(is_language);
    write_tensors(&folder.join(LANGUAGE_FILE), &frozen, None)?;
    let bridge = |name: &str| is_gated(name) || is_perceiver(name) || name == EMBEDDING;
    let bridge = weights.filtered(bridge).renamed(|name| match is_perceiver(name) {
        true => name.to_owned(),
        false => format!("lang_encoder.{name}"),
    });
    write_tensors(&folder.join("checkpoint.safetensors"), &bridge, None)?;
    let write = |path: &Path, text: String| {
        fs::write(path, text).with_context(|| format!("cannot write `{}`", path.display()))
    };
    write(&language.join("config.json"), pretty(&language_config(recipe)))?;
    write_tokenizer(folder)?;
    write(&folder.join("recipe.toml"), compile_recipe(recipe))
}

/// Writes the `tokenizer.json` of all models of this trainer.
///
/// # Errors
/// A file that cannot be written.
pub fn write_tokenizer(folder: &Path) -> Result<()> {
    let path = folder.join("tokenizer.json");
    fs::write(&path, pretty(&tokenizer()))
        .with_context(|| format!("cannot write `{}`", path.display()))
}

fn pretty(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}

fn compile_recipe(recipe: &Recipe) -> String {
    let (vision, head_dim) = (&recipe.vision, recipe.resampler.head_dim);
    format!(
        "family = \"openflamingo\"\n\
         checkpoint = \"checkpoint.safetensors\"\n\
         language_model = \"lang_encoder\"\n\
         vision_encoder = \"clip_visual.safetensors\"\n\
         tokenizer = \"tokenizer.json\"\n\n\
         [vision]\nimage_size = {}\npatch_size = {}\nheads = {}\nactivation = \"quick_gelu\"\n\n\
         [resampler]\nhead_dim = {head_dim}\n\n\
         [tokens]\nimage = {IMAGE}\nend_of_chunk = {END_OF_CHUNK}\npad = {PAD}\n",
        vision.image_size, vision.patch_size, vision.heads
    )
}

fn language_config(recipe: &Recipe) -> serde_json::Value {
    let language = &recipe.language;
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": false,
        "bos_token_id": BEGIN,
        "eos_token_id": END_OF_CHUNK,
        "pad_token_id": PAD,
        "head_dim": language.width / language.heads,
        "hidden_act": "silu",
        "hidden_size": language.width,
        "intermediate_size": language.mlp_width,
        "max_position_embeddings": language.max_tokens,
        "mlp_bias": false,
        "num_attention_heads": language.heads,
        "num_hidden_layers": language.layers,
        "num_key_value_heads": language.heads,
        "rms_norm_eps": 1e-5,
        "rope_scaling": null,
        "rope_theta": 10000.0,
        "tie_word_embeddings": true,
        "vocab_size": vocabulary().len(),
    })
}

/// One word, one token; split at white space and punctuation, `<bos>` first.
fn tokenizer() -> serde_json::Value {
    let words = vocabulary();
    let ids: serde_json::Map<String, serde_json::Value> =
        words.iter().enumerate().map(|(id, word)| ((*word).to_owned(), json!(id))).collect();
    let marker = |id: u32| {
        json!({"id": id, "content": words[id as usize], "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": true})
    };
    let begin = words[BEGIN as usize];
    let single = json!([
        {"SpecialToken": {"id": begin, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]);
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [marker(PAD), marker(BEGIN), marker(IMAGE), marker(END_OF_CHUNK)],
        "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {begin: {"id": begin, "ids": [BEGIN], "tokens": [begin]}},
        },
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": words[PAD as usize]},
    })
}
