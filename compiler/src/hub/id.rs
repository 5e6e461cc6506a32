//! Names of repositories of the hub.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

/// The revision that is taken unless another is asked for.
const DEFAULT_REVISION: &str = "main";

/// A repository of the hub at a revision: `owner/name`, or `owner/name@revision`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct HubId {
    /// Who it belongs to.
    pub owner: String,
    /// What it is called.
    pub name: String,
    /// Branch, tag or commit.
    pub revision: String,
}

impl HubId {
    /// `owner/name`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }
}

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected `owner/name` or `owner/name@revision` of letters, digits, `-`, `_` and `.`, got `{0}`"
)]
pub struct NotAnId(String);

impl FromStr for HubId {
    type Err = NotAnId;

    /// Every piece becomes part of paths in the cache, so none may lead out of it.
    fn from_str(text: &str) -> Result<HubId, NotAnId> {
        let wrong = || NotAnId(text.to_owned());
        let (repository, revision) = text.split_once('@').unwrap_or((text, DEFAULT_REVISION));
        let (owner, name) = repository.split_once('/').ok_or_else(wrong)?;
        let is_sound = is_plain(owner) && is_plain(name) && revision.split('/').all(is_plain);
        match is_sound && !name.ends_with(".toml") {
            true => Ok(HubId {
                owner: owner.to_owned(),
                name: name.to_owned(),
                revision: revision.to_owned(),
            }),
            false => Err(wrong()),
        }
    }
}

impl TryFrom<String> for HubId {
    type Error = NotAnId;

    fn try_from(text: String) -> Result<HubId, NotAnId> {
        text.parse()
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)?;
        match self.revision.as_str() {
            DEFAULT_REVISION => Ok(()),
            revision => write!(f, "@{revision}"),
        }
    }
}

fn is_plain(piece: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !piece.is_empty()
        && !piece.starts_with('.')
        && !piece.contains("..")
        && piece.chars().all(plain)
}

#[cfg(test)]
mod tests {
    use super::HubId;

    #[test]
    fn names_are_taken_apart_and_put_together() {
        for text in ["a/b", "openflamingo/OpenFlamingo-3B", "a/b@v1.0", "a/b@refs/pr/1"] {
            let id: HubId = text.parse().unwrap();
            assert_eq!(id.to_string(), text);
        }
        let id: HubId = "a/b".parse().unwrap();
        assert_eq!((id.repository().as_str(), id.revision.as_str()), ("a/b", "main"));
    }

    #[test]
    fn what_leads_elsewhere_is_no_name() {
        for text in [
            "",
            "a",
            "a/",
            "/a",
            "a/b/c",
            "../b",
            "a/..",
            "a/b@",
            "a/b@../c",
            "a/b@/c",
            "a/b c",
            "~/b",
            "./b",
            "a/b@c..d",
            "of/recipe.toml",
            "a\\b/c",
            "a/b@c//d",
        ] {
            assert!(text.parse::<HubId>().is_err(), "{text}");
        }
    }
}
