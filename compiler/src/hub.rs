//! Models of the Hugging Face hub: which repositories make one ([`Catalogue`]), and how their files come into the cache
//! that is shared with Python.
//!
//! Without the feature `hub` everything is here but the download.

mod catalogue;
#[cfg(feature = "hub")]
mod download;
mod id;
mod settings;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use flamingo_models::{Recipe, RecipeFamily, Source};

pub use catalogue::{Catalogue, Published};
#[cfg(feature = "hub")]
pub use download::HubError;
pub use id::{HubId, NotAnId};
pub use settings::{HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN, Settings};

use crate::origin::{GivenParts, Origin};

/// How far a download is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Download<'a> {
    /// Bytes of a file that are here, of how many.
    Bytes {
        /// Its name in the repository.
        file: &'a str,
        /// Bytes that are here.
        done: u64,
        /// Its size.
        total: u64,
    },
    /// A file is here, and is hashed.
    Checking {
        /// Its name in the repository.
        file: &'a str,
    },
}

/// The hub, as this machine reaches it.
pub struct Hub {
    /// Server, cache, token.
    pub settings: Settings,
    /// Which repositories make a model.
    pub catalogue: Catalogue,
}

impl Hub {
    /// What the environment says, and the built-in table.
    ///
    /// # Errors
    /// If nothing says where the cache is.
    pub fn from_env() -> Result<Hub> {
        Ok(Hub { settings: Settings::from_env()?, catalogue: Catalogue::bundled()? })
    }

    /// Opens a model, whose files are downloaded as far as the cache lacks them.
    ///
    /// # Errors
    /// What the hub or the network refuses; a source that cannot be read.
    pub fn open(
        &self,
        id: &HubId,
        given: &GivenParts,
        progress: &mut dyn FnMut(Download),
    ) -> Result<Source> {
        let mut found = Vec::new();
        let mut source = match self.catalogue.find(&id.repository()) {
            Some(row) if row.checkpoint.is_some() => {
                let recipe = self.recipe(id, row, given, &mut found, progress)?;
                Source::from_recipe(&recipe, Path::new(&id.to_string()))?
            }
            _ => {
                given.refuse(&format!("`{id}` is a whole Hugging Face folder"))?;
                Source::open(&self.model_folder(id, &mut found, progress)?)?
            }
        };
        source.notes.push(format!("from the hub: {}", found.join(", ")));
        Ok(source)
    }

    /// The parts of a row, those that are given instead of them, and their places.
    fn recipe(
        &self,
        id: &HubId,
        row: &Published,
        given: &GivenParts,
        found: &mut Vec<String>,
        progress: &mut dyn FnMut(Download),
    ) -> Result<Recipe> {
        let mut part = |name: &str, own: &Option<HubId>, given: &Option<Origin>| {
            let origin = given.clone().or_else(|| own.clone().map(Origin::Hub));
            match origin {
                Some(Origin::Path(path)) => Ok(path),
                Some(Origin::Hub(id)) => self.model_folder(&id, found, progress),
                None => {
                    let lacks = row.lacks.as_deref().unwrap_or(name);
                    bail!(
                        "`{id}`: the hub lacks {lacks}\n\nhint: pass a folder or a repository that you may use with \
                         `--{name}`"
                    )
                }
            }
        };
        let language_model = part("language-model", &row.language_model, &given.language_model)?;
        let vision_encoder = part("vision-encoder", &row.vision_encoder, &given.vision_encoder)?;
        let checkpoint = row.checkpoint.as_deref().unwrap_or_default();
        Ok(Recipe {
            family: RecipeFamily::OpenFlamingo,
            checkpoint: self.file(id, checkpoint, found, progress)?,
            language_model,
            vision_encoder,
            tokenizer: None,
            vision: Default::default(),
            resampler: Default::default(),
            tokens: row.tokens.clone(),
        })
    }
}

#[cfg(feature = "hub")]
impl Hub {
    fn model_folder(
        &self,
        id: &HubId,
        found: &mut Vec<String>,
        progress: &mut dyn FnMut(Download),
    ) -> Result<PathBuf> {
        let snapshot = download::Snapshot::open(&self.settings, id)?;
        found.push(snapshot.place());
        Ok(snapshot.model_folder(progress)?)
    }

    fn file(
        &self,
        id: &HubId,
        name: &str,
        found: &mut Vec<String>,
        progress: &mut dyn FnMut(Download),
    ) -> Result<PathBuf> {
        let snapshot = download::Snapshot::open(&self.settings, id)?;
        found.push(snapshot.place());
        Ok(snapshot.file(name, progress)?)
    }
}

#[cfg(not(feature = "hub"))]
impl Hub {
    fn model_folder(
        &self,
        id: &HubId,
        _: &mut Vec<String>,
        _: &mut dyn FnMut(Download),
    ) -> Result<PathBuf> {
        Err(without_feature(id))
    }

    fn file(
        &self,
        id: &HubId,
        _: &str,
        _: &mut Vec<String>,
        _: &mut dyn FnMut(Download),
    ) -> Result<PathBuf> {
        Err(without_feature(id))
    }
}

#[cfg(not(feature = "hub"))]
fn without_feature(id: &HubId) -> anyhow::Error {
    anyhow::anyhow!(
        "`{id}`: no such path, and this program was built without the feature `hub`\n\nhint: build it with \
         `--features hub`, or download the files and name their folder"
    )
}
