//! Where a model comes from: a path, or a repository of the Hugging Face hub.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use flamingo_models::Source;

use crate::hub::{Download, Hub, HubId};

/// Where a model or a part of one is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A file or folder.
    Path(PathBuf),
    /// A repository of the hub.
    Hub(HubId),
}

/// Parts of a model of the hub that come from elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GivenParts {
    /// The language model.
    pub language_model: Option<Origin>,
    /// The vision encoder.
    pub vision_encoder: Option<Origin>,
}

impl Origin {
    /// A path if there is one, else a name of the hub.
    ///
    /// # Errors
    /// If it is neither.
    pub fn of(text: &Path) -> Result<Origin> {
        if text.exists() {
            return Ok(Origin::Path(text.to_owned()));
        }
        let id = text.to_str().and_then(|text| text.parse().ok());
        id.map(Origin::Hub).ok_or_else(|| {
            anyhow!(
                "`{}`: no such file or folder, and not the name of a repository on the Hugging Face hub, `owner/name` or \
                 `owner/name@revision`\n\nhint: a source is a recipe `.toml`, a folder with a `recipe.toml`, the \
                 Hugging Face folder of an IDEFICS-1 or Otter model, or such a name",
                text.display()
            )
        })
    }

    /// Opens the model, downloading what is not here.
    ///
    /// # Errors
    /// A source that cannot be downloaded or read.
    pub fn open(&self, given: &GivenParts, progress: &mut dyn FnMut(Download)) -> Result<Source> {
        match self {
            Origin::Path(path) => {
                given.refuse(&format!("the recipe of `{}` names its parts", path.display()))?;
                Ok(Source::open(path)?)
            }
            Origin::Hub(id) => Hub::from_env()?.open(id, given, progress),
        }
    }

    /// The path, or what the hub calls it.
    pub fn to_path(&self) -> PathBuf {
        match self {
            Origin::Path(path) => path.clone(),
            Origin::Hub(id) => PathBuf::from(id.to_string()),
        }
    }

    /// The artifact's folder when none is given: in the working folder, with the model's name.
    pub fn default_output(&self) -> PathBuf {
        let name = match self {
            Origin::Hub(id) => Some(OsStr::new(&id.name)),
            Origin::Path(path) if path.extension().is_some_and(|extension| extension == "toml") => {
                path.parent().and_then(Path::file_name)
            }
            Origin::Path(path) => path.file_name(),
        };
        let name = name.map_or("model".into(), OsStr::to_string_lossy);
        PathBuf::from(format!("{name}.flamingo"))
    }
}

impl GivenParts {
    /// Errors if there are any, which would not be used.
    pub(crate) fn refuse(&self, reason: &str) -> Result<()> {
        let parts = [
            ("--language-model", &self.language_model),
            ("--vision-encoder", &self.vision_encoder),
        ];
        match parts.into_iter().find(|(_, part)| part.is_some()) {
            Some((flag, _)) => bail!("`{flag}`: {reason}\n\nhint: leave the option out"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_exist_come_first() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let error = Origin::of(&path).unwrap_err().to_string();
        assert!(error.contains("no such file") && error.contains("owner/name"), "{error}");
        std::fs::create_dir(&path).unwrap();
        assert_eq!(Origin::of(&path).unwrap(), Origin::Path(path));
        let id = Origin::of("no-one/nothing@v1".as_ref()).unwrap();
        assert_eq!(id, Origin::Hub("no-one/nothing@v1".parse().unwrap()));
        assert_eq!(id.default_output(), Path::new("nothing.flamingo"));
    }

    #[test]
    fn artifacts_are_called_after_their_source() {
        let name = |path: &str| Origin::Path(path.into()).default_output();
        assert_eq!(name("x/of-3b/recipe.toml"), Path::new("of-3b.flamingo"));
        assert_eq!(name("x/idefics"), Path::new("idefics.flamingo"));
        assert_eq!(name("recipe.toml"), Path::new("model.flamingo"));
    }

    #[test]
    fn parts_that_nothing_would_use_are_refused() {
        let given =
            GivenParts { language_model: Some(Origin::Path("l".into())), ..GivenParts::default() };
        let error = given.refuse("it is whole").unwrap_err().to_string();
        assert!(error.contains("`--language-model`: it is whole"), "{error}");
        assert!(GivenParts::default().refuse("").is_ok());
    }
}
