//! OpenFlamingo checkpoints: resampler, gated blocks and embeddings under their genuine names,
//! open_clip's visual tower or an NFNet, and the recipe that joins the files.

use super::language::Language;
use super::nfnet::Nfnet;
use super::tensor::{Fill, TensorList};
use super::tokens::Tokens;

/// Heads × head width of resampler and cross-attention: 8 × 64, whatever the widths.
const INNER_WIDTH: usize = 512;
const N_LATENTS: usize = 64;
/// Rows of the paper's temporal embeddings: frames of a clip in training.
const N_FRAMES: usize = 8;

/// Shape of an OpenFlamingo.
#[derive(Clone, Debug)]
pub(super) struct OpenFlamingo {
    pub(super) vision: Encoder,
    pub(super) resampler_depth: usize,
    /// Whether the resampler has temporal embeddings and squared ReLU, as the paper's.
    pub(super) is_paper: bool,
    pub(super) language: Language,
    /// A gated block before every `interval`-th decoder layer: `interval − 1`, `2·interval − 1`, ….
    pub(super) interval: usize,
    pub(super) tokens: Tokens,
}

/// A vision encoder.
#[derive(Clone, Debug)]
pub(super) enum Encoder {
    Clip(Vision),
    Nfnet(Nfnet),
}

impl Encoder {
    /// Width of a token.
    pub(super) fn width(&self) -> usize {
        match self {
            Encoder::Clip(clip) => clip.width,
            Encoder::Nfnet(nfnet) => nfnet.width,
        }
    }

    /// Name of its file.
    pub(super) fn file(&self) -> &'static str {
        match self {
            Encoder::Clip(_) => "clip_visual.pt",
            Encoder::Nfnet(_) => "nfnet.pt",
        }
    }

    /// The tensors of its file.
    pub(super) fn tensors(&self) -> TensorList {
        match self {
            Encoder::Clip(clip) => clip.tensors(),
            Encoder::Nfnet(nfnet) => nfnet.tensors(),
        }
    }

    /// The lines of the recipe's `[vision]`.
    fn recipe(&self) -> String {
        match self {
            Encoder::Clip(Vision { image_size, patch_size, n_heads, .. }) => format!(
                "image_size = {image_size}\npatch_size = {patch_size}\nheads = {n_heads}\n\
                 activation = \"quick_gelu\"\n"
            ),
            Encoder::Nfnet(Nfnet { image_size, .. }) => {
                format!("kind = \"nfnet\"\nimage_size = {image_size}\n")
            }
        }
    }
}

/// Shape of open_clip's visual tower; its MLP is four times as wide.
#[derive(Clone, Debug)]
pub(super) struct Vision {
    pub(super) width: usize,
    pub(super) n_layers: usize,
    pub(super) n_heads: usize,
    pub(super) image_size: usize,
    pub(super) patch_size: usize,
    /// Width of the joint text-image space (not used by a Flamingo, but in the file).
    pub(super) output_width: usize,
}

impl OpenFlamingo {
    /// The tensors of `checkpoint.pt`, in the order of a state dict.
    pub(super) fn checkpoint(&self) -> TensorList {
        let mut list = TensorList::default();
        self.resampler(&mut list);
        self.language.checkpoint_embeddings(&mut list, self.tokens.n_rows());
        self.gated_blocks(&mut list);
        list
    }

    /// What joins vision encoder and language model: resampler and gated blocks.
    pub(super) fn bridge(&self) -> TensorList {
        let mut list = TensorList::default();
        self.resampler(&mut list);
        self.gated_blocks(&mut list);
        list
    }

    fn gated_blocks(&self, list: &mut TensorList) {
        for layer_idx in (0..self.language.n_layers).filter(|idx| (idx + 1) % self.interval == 0) {
            let prefix = self.language.layers_prefix();
            let block = format!("lang_encoder.{prefix}.{layer_idx}.gated_cross_attn_layer");
            self.gated_block(list, &block);
        }
        list.before_outliers(&format!("lang_encoder.{}.0", self.language.layers_prefix()));
    }

    fn resampler(&self, list: &mut TensorList) {
        let width = self.vision.width();
        list.add("perceiver.latents", &[N_LATENTS, width], Fill::Latents);
        if self.is_paper {
            list.add("perceiver.frame_embs", &[N_FRAMES, width], Fill::Embedding);
        }
        for layer_idx in 0..self.resampler_depth {
            let attention = format!("perceiver.layers.{layer_idx}.0");
            list.layer_norm(&format!("{attention}.norm_media"), width);
            list.layer_norm(&format!("{attention}.norm_latents"), width);
            list.linear(&format!("{attention}.to_q"), INNER_WIDTH, width);
            list.linear(&format!("{attention}.to_kv"), 2 * INNER_WIDTH, width);
            list.linear(&format!("{attention}.to_out"), width, INNER_WIDTH);
            let name = format!("perceiver.layers.{layer_idx}.1");
            list.layer_norm(&format!("{name}.0"), width);
            feed_forward(list, &name, width);
        }
        list.layer_norm("perceiver.norm", width);
    }

    fn gated_block(&self, list: &mut TensorList, block: &str) {
        let width = self.language.width;
        list.add(format!("{block}.attn_gate"), &[1], Fill::Gate);
        list.add(format!("{block}.ff_gate"), &[1], Fill::Gate);
        list.residual_layer_norm(&format!("{block}.attn.norm"), width);
        list.linear(&format!("{block}.attn.to_q"), INNER_WIDTH, width);
        list.linear(&format!("{block}.attn.to_kv"), 2 * INNER_WIDTH, self.vision.width());
        list.linear(&format!("{block}.attn.to_out"), width, INNER_WIDTH);
        list.residual_layer_norm(&format!("{block}.ff.0"), width);
        feed_forward(list, &format!("{block}.ff"), width);
    }

    /// `recipe.toml`: which file is what, and what no file says.
    pub(super) fn recipe(&self) -> String {
        let (file, vision) = (self.vision.file(), self.vision.recipe());
        let resampler = match self.is_paper {
            true => "\n[resampler]\nactivation = \"squared_relu\"\n",
            false => "",
        };
        let specials = &self.tokens.added;
        let id = |name: &str| specials.iter().find(|(n, _)| *n == name).map_or(0, |(_, id)| *id);
        let (end_of_chunk, image, pad) = (id("<|endofchunk|>"), id("<image>"), id("<PAD>"));
        format!(
            "family = \"openflamingo\"\n\
             checkpoint = \"checkpoint.pt\"\n\
             language_model = \"lang_encoder\"\n\
             vision_encoder = \"{file}\"\n\
             tokenizer = \"tokenizer.json\"\n\n\
             [vision]\n{vision}{resampler}\n\
             [tokens]\n\
             end_of_chunk = {end_of_chunk}\n\
             image = {image}\n\
             pad = {pad}\n"
        )
    }
}

/// Two bias-free matrices, at 1 and 3 of a `Sequential` (0 is a layer norm, 2 the activation).
fn feed_forward(list: &mut TensorList, name: &str, width: usize) {
    list.linear(&format!("{name}.1"), 4 * width, width);
    list.linear(&format!("{name}.3"), width, 4 * width);
}

impl Vision {
    /// The tensors of `clip_visual.pt`.
    pub(super) fn tensors(&self) -> TensorList {
        let (width, patch) = (self.width, self.patch_size);
        let n_tokens = (self.image_size / patch).pow(2) + 1;
        let mut list = TensorList::default();
        list.add("class_embedding", &[width], Fill::Embedding);
        list.add("positional_embedding", &[n_tokens, width], Fill::Embedding);
        list.add("proj", &[width, self.output_width], Fill::Linear);
        list.add("conv1.weight", &[width, 3, patch, patch], Fill::Linear);
        list.layer_norm("ln_pre", width);
        for layer_idx in 0..self.n_layers {
            let block = format!("transformer.resblocks.{layer_idx}");
            list.layer_norm(&format!("{block}.ln_1"), width);
            list.add(format!("{block}.attn.in_proj_weight"), &[3 * width, width], Fill::Linear);
            list.add(format!("{block}.attn.in_proj_bias"), &[3 * width], Fill::Bias);
            list.linear_with_bias(&format!("{block}.attn.out_proj"), width, width);
            list.layer_norm(&format!("{block}.ln_2"), width);
            list.linear_with_bias(&format!("{block}.mlp.c_fc"), 4 * width, width);
            list.linear_with_bias(&format!("{block}.mlp.c_proj"), width, 4 * width);
        }
        list.layer_norm("ln_post", width);
        list
    }
}
