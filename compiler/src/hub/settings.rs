//! Where the hub is and what is kept of it: the environment variables of `huggingface_hub`, which share their cache with
//! Python.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// The server, if it is not Hugging Face's.
pub const HF_ENDPOINT: &str = "HF_ENDPOINT";
/// Folder of cache and token. Default: `huggingface` in `XDG_CACHE_HOME`, else in `~/.cache`.
pub const HF_HOME: &str = "HF_HOME";
/// Folder of the cache. Default: `hub` in [`HF_HOME`].
pub const HF_HUB_CACHE: &str = "HF_HUB_CACHE";
/// If `1`, `true`, `yes` or `on`, the cache is all there is.
pub const HF_HUB_OFFLINE: &str = "HF_HUB_OFFLINE";
/// Proves who asks. Default: the file `token` in [`HF_HOME`], where `hf auth login` puts it.
pub const HF_TOKEN: &str = "HF_TOKEN";

const HUGGING_FACE: &str = "https://huggingface.co";

/// How the hub is reached.
#[derive(Clone, PartialEq, Eq)]
pub struct Settings {
    /// Address of the server, without a slash at the end.
    pub endpoint: String,
    /// Folder of the cache.
    pub cache: PathBuf,
    /// Proves who asks.
    pub token: Option<String>,
    /// Whether the cache is all there is.
    pub offline: bool,
}

impl Settings {
    /// From the environment.
    ///
    /// # Errors
    /// If nothing says where the cache is.
    pub fn from_env() -> Result<Settings> {
        let home = home();
        let cache = variable(HF_HUB_CACHE).map(PathBuf::from);
        let cache = cache.or_else(|| Some(home.as_ref()?.join("hub")));
        let file = home.map(|home| home.join("token"));
        let kept = file.and_then(|file| std::fs::read_to_string(file).ok());
        let token = variable(HF_TOKEN).or(kept).map(|token| token.trim().to_owned());
        Ok(Settings {
            endpoint: endpoint(variable(HF_ENDPOINT)),
            cache: cache.context("no home folder\n\nhint: set `HF_HOME`")?,
            token: token.filter(|token| !token.is_empty()),
            offline: variable(HF_HUB_OFFLINE).is_some_and(|value| is_yes(&value)),
        })
    }
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn home() -> Option<PathBuf> {
    let cache = || {
        let named = variable("XDG_CACHE_HOME").map(PathBuf::from);
        named.or_else(|| Some(env::home_dir()?.join(".cache")))
    };
    variable(HF_HOME).map(PathBuf::from).or_else(|| Some(cache()?.join("huggingface")))
}

fn endpoint(named: Option<String>) -> String {
    named.unwrap_or_else(|| HUGGING_FACE.to_owned()).trim_end_matches('/').to_owned()
}

fn is_yes(value: &str) -> bool {
    matches!(value.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on")
}

#[cfg(test)]
mod tests {
    use super::{endpoint, is_yes};

    #[test]
    fn words_are_read_as_python_reads_them() {
        assert!(["1", "ON", "yes", "True"].into_iter().all(is_yes));
        assert!(!["0", "", "off", "2"].into_iter().any(is_yes));
        assert_eq!(endpoint(None), "https://huggingface.co");
        assert_eq!(endpoint(Some("http://x:1/".into())), "http://x:1");
    }
}
