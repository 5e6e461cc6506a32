//! The named shapes.

use super::idefics::{self, Idefics};
use super::language::{Architecture, Language};
use super::nfnet::Nfnet;
use super::openflamingo::{self, Encoder, OpenFlamingo};
use super::otter::Otter;
use super::random::Storage;
use super::tensor::Spread;
use super::tokens::{Kind, Tokens};

/// A checkpoint that can be made.
#[derive(Clone, Debug)]
pub(super) enum Model {
    OpenFlamingo(OpenFlamingo),
    Idefics(Idefics),
    Otter(Otter),
}

/// Names in the order in which they are listed.
pub(super) const NAMES: [&str; 20] = [
    "tiny-openflamingo-mpt1b",
    "tiny-openflamingo-mpt",
    "tiny-openflamingo-gpt-neox",
    "tiny-openflamingo-llama",
    "tiny-openflamingo-opt",
    "tiny-nfnet",
    "tiny-idefics",
    "tiny-otter",
    "of-mini",
    "of-3b-quarter",
    "of-3b",
    "of-4b",
    "of-9b",
    "of-9b-llama",
    "idefics-9b",
    "nfnet-f6",
    "idefics-80b",
    "otter-mpt1b",
    "otter-mpt7b",
    "otter-llama7b",
];

/// Rows of the embedding of MPT and RedPajama-INCITE.
const NEOX_VOCABULARY: usize = 50_432;
/// Tokens of the GPT-NeoX-20B tokenizer.
const NEOX_TOKENS: u32 = 50_277;
/// Tokens of LLaMA's tokenizer.
const LLAMA_TOKENS: u32 = 32_000;

/// The model of a preset and how its weights are spread.
pub(super) fn find(name: &str) -> Option<(Model, Spread)> {
    use Architecture::{GptNeox, Llama, MosaicGpt, Mpt, Opt};
    let model = match name {
        "tiny-openflamingo-mpt1b" => tiny_openflamingo(MosaicGpt, 256),
        "tiny-openflamingo-mpt" => tiny_openflamingo(Mpt, 256),
        "tiny-openflamingo-gpt-neox" => tiny_openflamingo(GptNeox, 256),
        "tiny-openflamingo-llama" => tiny_openflamingo(Llama, 112),
        "tiny-openflamingo-opt" => tiny_openflamingo(Opt, 128),
        "tiny-nfnet" => tiny_nfnet(),
        "tiny-idefics" => Model::Idefics(tiny_idefics()),
        "of-mini" => Model::OpenFlamingo(of_mini()),
        "of-3b-quarter" => Model::OpenFlamingo(of_3b_quarter()),
        "of-3b" => released(neox_vocabulary(MosaicGpt, 2048, 24, 16, Storage::F32), 1),
        "of-4b" => released(neox_vocabulary(GptNeox, 2560, 32, 32, Storage::F16), 2),
        "of-9b" => released(neox_vocabulary(Mpt, 4096, 32, 32, Storage::Bf16), 4),
        "of-9b-llama" => released(llama_7b(), 4),
        "idefics-9b" => Model::Idefics(idefics_9b()),
        "nfnet-f6" => Model::OpenFlamingo(nfnet_f6()),
        "idefics-80b" => Model::Idefics(idefics_80b()),
        "tiny-otter" => otter(tiny_openflamingo(Llama, 112)),
        "otter-mpt1b" => otter(released(neox_vocabulary(MosaicGpt, 2048, 24, 16, Storage::F32), 1)),
        "otter-mpt7b" => otter(released(neox_vocabulary(Mpt, 4096, 32, 32, Storage::F32), 4)),
        "otter-llama7b" => otter(released(llama_7b(), 4)),
        _ => return None,
    };
    let spread = if name.starts_with("tiny-") { Spread::TINY } else { Spread::LARGE };
    Some((model, spread))
}

/// Four layers of width 64 with gated blocks before layers 1 and 3. The embedding of GPT-NeoX's
/// kind is padded and shrinks when the tokens are added, the others grow, as in released models.
fn tiny_openflamingo(architecture: Architecture, mlp_width: usize) -> Model {
    let (kind, n_padding) = match architecture {
        Architecture::MosaicGpt | Architecture::Mpt | Architecture::GptNeox => (Kind::GptNeox, 6),
        Architecture::Llama => (Kind::Llama, 0),
        Architecture::Opt => (Kind::Opt, 0),
    };
    let n_tokens = kind.n_base_tokens();
    Model::OpenFlamingo(OpenFlamingo {
        vision: Encoder::Clip(openflamingo::Vision {
            width: 48,
            n_layers: 2,
            n_heads: 4,
            image_size: 28,
            patch_size: 14,
            output_width: 16,
        }),
        resampler_depth: 6,
        is_paper: false,
        language: Language {
            architecture,
            width: 64,
            n_layers: 4,
            n_heads: 4,
            mlp_width,
            vocabulary: n_tokens as usize + n_padding,
            max_context: 128,
            storage: Storage::F32,
        },
        interval: 2,
        tokens: Tokens::openflamingo(kind, n_tokens),
    })
}

/// The tiny model over LLaMA with a small NFNet, whose sides are odd after the stem, and the paper's resampler.
fn tiny_nfnet() -> Model {
    let Model::OpenFlamingo(model) = tiny_openflamingo(Architecture::Llama, 112) else {
        unreachable!("made from an OpenFlamingo")
    };
    let nfnet = Nfnet {
        image_size: 36,
        stem_width: 32,
        stages: vec![(2, 48), (1, 32), (2, 48), (1, 48)],
        group_width: 8,
        width: 24,
    };
    let vision = Encoder::Nfnet(nfnet);
    Model::OpenFlamingo(OpenFlamingo { vision, resampler_depth: 2, is_paper: true, ..model })
}

/// The paper's NFNet-F6 at 320 pixels and its kind of resampler, before the language model of `of-mini`: what a picture
/// costs. The resampler is as wide as the encoder; the paper's has 194 million parameters, this one 491.
fn nfnet_f6() -> OpenFlamingo {
    let vision = Encoder::Nfnet(Nfnet::f(6));
    OpenFlamingo { vision, resampler_depth: 6, is_paper: true, ..of_mini() }
}

/// A language model over the GPT-NeoX-20B tokenizer.
fn neox_vocabulary(
    architecture: Architecture,
    width: usize,
    n_layers: usize,
    n_heads: usize,
    storage: Storage,
) -> Language {
    Language {
        architecture,
        width,
        n_layers,
        n_heads,
        mlp_width: 4 * width,
        vocabulary: NEOX_VOCABULARY,
        max_context: 2048,
        storage,
    }
}

/// LLaMA-7B, as Hugging Face has it.
fn llama_7b() -> Language {
    Language {
        architecture: Architecture::Llama,
        width: 4096,
        n_layers: 32,
        n_heads: 32,
        mlp_width: 11_008,
        vocabulary: LLAMA_TOKENS as usize,
        max_context: 2048,
        storage: Storage::F16,
    }
}

/// The same model over a CLIP in Otter's form; the embedding of a LLaMA has rows for the tokens that are added.
fn otter(model: Model) -> Model {
    match model {
        Model::OpenFlamingo(mut model) => match model.vision.clone() {
            Encoder::Clip(vision) => {
                let rows = model.language.vocabulary.max(model.tokens.n_rows());
                model.language.vocabulary = rows;
                Model::Otter(Otter { model, vision })
            }
            Encoder::Nfnet(_) => Model::OpenFlamingo(model),
        },
        other => other,
    }
}

/// A released OpenFlamingo: CLIP ViT-L/14 at 224 pixels and six resampler layers.
fn released(language: Language, interval: usize) -> Model {
    let vision = Encoder::Clip(clip_vit_large());
    let tokens = match language.architecture {
        Architecture::Llama => Tokens::openflamingo(Kind::Llama, LLAMA_TOKENS),
        _ => Tokens::openflamingo(Kind::GptNeox, NEOX_TOKENS),
    };
    Model::OpenFlamingo(OpenFlamingo {
        vision,
        resampler_depth: 6,
        is_paper: false,
        language,
        interval,
        tokens,
    })
}

/// CLIP ViT-L/14 at 224 pixels.
fn clip_vit_large() -> openflamingo::Vision {
    openflamingo::Vision {
        width: 1024,
        n_layers: 24,
        n_heads: 16,
        image_size: 224,
        patch_size: 14,
        output_width: 768,
    }
}

/// `of-3b` with 6 of its 24 vision layers and 6 of its 24 language layers: every matrix has its
/// real shape, and a stage takes a quarter of the time (`benches/peers`).
fn of_3b_quarter() -> OpenFlamingo {
    OpenFlamingo {
        vision: Encoder::Clip(openflamingo::Vision { n_layers: 6, ..clip_vit_large() }),
        resampler_depth: 6,
        is_paper: false,
        language: neox_vocabulary(Architecture::MosaicGpt, 2048, 6, 16, Storage::F32),
        interval: 1,
        tokens: Tokens::openflamingo(Kind::GptNeox, NEOX_TOKENS),
    }
}

/// Small enough to make and run in seconds, with the proportions of a released model.
fn of_mini() -> OpenFlamingo {
    OpenFlamingo {
        vision: Encoder::Clip(openflamingo::Vision {
            width: 512,
            n_layers: 6,
            n_heads: 8,
            image_size: 224,
            patch_size: 14,
            output_width: 512,
        }),
        resampler_depth: 2,
        is_paper: false,
        language: neox_vocabulary(Architecture::Mpt, 1024, 6, 8, Storage::F32),
        interval: 1,
        tokens: Tokens::openflamingo(Kind::GptNeox, NEOX_TOKENS),
    }
}

fn tiny_idefics() -> Idefics {
    let n_tokens = Kind::Llama.n_base_tokens();
    Idefics {
        width: 64,
        n_layers: 4,
        n_heads: 4,
        mlp_width: 112,
        vocabulary: n_tokens as usize,
        max_context: 128,
        interval: 2,
        vision: idefics::Vision {
            width: 48,
            n_layers: 2,
            n_heads: 4,
            mlp_width: 96,
            image_size: 28,
            patch_size: 14,
        },
        resampler: idefics::Resampler { depth: 2, n_latents: 6, n_heads: 4, head_dim: 12 },
        tokens: Tokens::idefics(n_tokens),
        storage: Storage::F32,
    }
}

fn idefics_9b() -> Idefics {
    Idefics {
        width: 4096,
        n_layers: 32,
        n_heads: 32,
        mlp_width: 11_008,
        vocabulary: 32_000,
        max_context: 2048,
        interval: 4,
        vision: idefics::Vision {
            width: 1280,
            n_layers: 32,
            n_heads: 16,
            mlp_width: 5120,
            image_size: 224,
            patch_size: 14,
        },
        resampler: idefics::Resampler { depth: 6, n_latents: 64, n_heads: 16, head_dim: 96 },
        tokens: Tokens::idefics(32_000),
        storage: Storage::Bf16,
    }
}

/// LLaMA-65B's shape; the rest is that of the smaller one.
fn idefics_80b() -> Idefics {
    Idefics { width: 8192, n_layers: 80, n_heads: 64, mlp_width: 22_016, ..idefics_9b() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn openflamingo(name: &str) -> OpenFlamingo {
        match find(name) {
            Some((Model::OpenFlamingo(model), _)) => model,
            other => panic!("`{name}`: {other:?}"),
        }
    }

    #[test]
    fn every_name_is_a_preset() {
        assert!(NAMES.iter().all(|name| find(name).is_some()));
        assert!(find("of-80b").is_none());
    }

    /// Bytes of f32 values in the released `checkpoint.pt` files: 4.19, 4.87 and 5.54 GB; the
    /// first is exact, from the count that OpenFlamingo prints (1 046 992 944 parameters).
    #[test]
    fn checkpoints_have_the_size_of_the_released_ones() {
        assert_eq!(openflamingo("of-3b").checkpoint().n_values(), 1_046_992_944);
        for (name, gigabytes) in [("of-4b", 4.873), ("of-9b", 5.539)] {
            let found = openflamingo(name).checkpoint().n_values() as f64 * 4e-9;
            assert!((found - gigabytes).abs() < 1e-3, "{name}: {found} GB, expected {gigabytes}");
        }
    }

    /// A gated block: q, k, v and output of 8 × 64, a feed-forward, two norms, two gates.
    #[test]
    fn the_quarter_of_3b_lacks_eighteen_gated_blocks() {
        let attention = 2048 * 512 + 1024 * 1024 + 512 * 2048;
        let block = attention + 2 * 2048 * 8192 + 4 * 2048 + 2;
        let (whole, quarter) = (openflamingo("of-3b"), openflamingo("of-3b-quarter"));
        let missing = whole.checkpoint().n_values() - quarter.checkpoint().n_values();
        assert_eq!(missing, 18 * block);
        let Encoder::Clip(vision) = quarter.vision else { panic!("{:?}", quarter.vision) };
        assert_eq!((vision.n_layers, quarter.language.n_layers), (6, 6));
    }

    /// A layer: q, k, v and output of 8 × 64, a feed-forward, three norms; then the last norm, latents and embeddings.
    #[test]
    fn the_resampler_of_nfnet_f6_has_491_million_parameters() {
        let layer = 4 * 3072 * 512 + 8 * 3072 * 3072 + 6 * 3072;
        let expected = 6 * layer + 2 * 3072 + (64 + 8) * 3072;
        let list = openflamingo("nfnet-f6").checkpoint();
        let own = list.specs().iter().filter(|spec| spec.name.starts_with("perceiver."));
        assert_eq!(own.map(|spec| spec.n_values()).sum::<usize>(), expected);
        assert_eq!(expected / 1_000_000, 491);
    }

    #[test]
    fn idefics_9b_has_the_published_number_of_parameters() {
        let found = idefics_9b().tensors().n_values() as f64 * 1e-9;
        assert!((found - 8.93).abs() < 0.01, "{found} billion, expected 8.93");
    }
}
