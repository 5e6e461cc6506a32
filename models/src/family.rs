//! Checkpoint families: which files there are, what their configs say, how tensors are called.

mod flamingo_pytorch;
mod hugging_face;
mod idefics;
mod nfnet;
mod open_flamingo;
mod otter;
mod recipe;
mod vision_transformer;

use std::path::{Path, PathBuf};

use flamingo_ir::Graph;

pub use recipe::{Recipe, RecipeFamily, TokensRecipe};

use crate::build::{KeyMap, build_decoder, build_media};
use crate::config::ModelConfig;
use crate::image_spec::ImageSpec;
use crate::source::{Binder, Parts, SourceError};

/// A model found in a checkpoint folder or recipe: its shape, its files, its tensors' names.
pub struct Source {
    /// Shapes and rules.
    pub config: ModelConfig,
    /// How pictures become pixel values.
    pub image: ImageSpec,
    /// Opened files.
    pub parts: Parts,
    /// `tokenizer.json`, if there is one.
    pub tokenizer: Option<PathBuf>,
    /// What a user should know: assumptions and fillings.
    pub notes: Vec<String>,
    keys: Box<dyn KeyMap>,
    ignorable: fn(&Parts, &str) -> bool,
}

/// The two graphs of a model as its reference computes them.
pub struct Graphs {
    /// Pixels → visual tokens, keys and values of the gated layers.
    pub media: Graph,
    /// New tokens → logits.
    pub decoder: Graph,
}

impl Source {
    /// Opens a recipe `.toml`, a folder with a `recipe.toml`, or a Hugging Face folder of a known
    /// family.
    pub fn open(path: &Path) -> Result<Source, SourceError> {
        let recipe = path.join("recipe.toml");
        match () {
            () if path.extension().is_some_and(|extension| extension == "toml") => {
                Source::from_recipe(&Recipe::read(path)?, path)
            }
            () if recipe.is_file() => Source::from_recipe(&Recipe::read(&recipe)?, &recipe),
            () if path.join("config.json").is_file() => open_folder(path),
            () => Err(SourceError::Config {
                path: path.to_owned(),
                reason: "expected a recipe `.toml`, a folder with `recipe.toml`, or a Hugging Face folder \
                         with `config.json`; found none of them\n\nhint: an OpenFlamingo checkpoint needs a \
                         recipe that names `checkpoint`, `language_model` and `vision_encoder`"
                    .into(),
            }),
        }
    }

    /// Opens the parts that a recipe names; `path` is what errors call the recipe.
    pub fn from_recipe(recipe: &Recipe, path: &Path) -> Result<Source, SourceError> {
        match recipe.family {
            RecipeFamily::OpenFlamingo => open_flamingo::open(recipe, path),
            RecipeFamily::FlamingoPytorch => flamingo_pytorch::open(recipe, path),
        }
    }

    /// Builds both graphs. Every tensor of the files must be used or be known to be of no use.
    pub fn graphs(&self) -> Result<Graphs, SourceError> {
        let mut binder = Binder::new(&self.parts);
        // Sizes that do not fit each other come first: what such a build leaves unused says nothing.
        let media = build_media(&mut binder, self.keys.as_ref(), &self.config)?;
        let decoder = build_decoder(&mut binder, self.keys.as_ref(), &self.config)?;
        binder.finish(&|name| (self.ignorable)(&self.parts, name))?;
        Ok(Graphs { media, decoder })
    }
}

fn open_folder(folder: &Path) -> Result<Source, SourceError> {
    let config = hugging_face::Config::read(&folder.join("config.json"))?;
    match config.text("model_type")? {
        "idefics" => idefics::open(folder, &config),
        "otter" | "flamingo" => otter::open(folder, &config),
        other => Err(config.error(format!(
            "`model_type`: expected \"idefics\" or \"otter\", got \"{other}\"\n\nhint: a bare language model \
             is one part of an OpenFlamingo recipe"
        ))),
    }
}
