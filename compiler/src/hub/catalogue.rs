//! The built-in table of published checkpoints: which repositories make a model.

use flamingo_models::TokensRecipe;
use serde::Deserialize;

use super::HubId;

/// The table, `catalogue.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalogue {
    /// Its rows.
    pub model: Vec<Published>,
}

/// A published checkpoint.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Published {
    /// `owner/name`.
    pub repository: String,
    /// Other names of the same.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// The file of OpenFlamingo's weights; none: the repository is a whole Hugging Face folder.
    pub checkpoint: Option<String>,
    /// The repository of the language model.
    pub language_model: Option<HubId>,
    /// The repository of the vision encoder.
    pub vision_encoder: Option<HubId>,
    /// Ids of special tokens.
    #[serde(default)]
    pub tokens: TokensRecipe,
    /// The part that cannot be downloaded, and why.
    pub lacks: Option<String>,
}

impl Catalogue {
    /// The table that comes with the program.
    ///
    /// # Errors
    /// None: a test reads it.
    pub fn bundled() -> Result<Catalogue, toml::de::Error> {
        toml::from_str(include_str!("catalogue.toml"))
    }

    /// The row of a repository.
    pub fn find(&self, repository: &str) -> Option<&Published> {
        let is_named = |row: &&Published| {
            row.repository == repository || row.aliases.iter().any(|alias| alias == repository)
        };
        self.model.iter().find(is_named)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_a_repository_of_its_own_with_all_parts_or_a_reason() {
        let table = Catalogue::bundled().unwrap();
        assert!(table.model.len() > 15);
        for row in &table.model {
            for name in row.aliases.iter().chain([&row.repository]) {
                name.parse::<HubId>().unwrap_or_else(|error| panic!("{name}: {error}"));
                let found = table.find(name).map(|found| &found.repository);
                assert_eq!(found, Some(&row.repository), "{name} is there twice");
            }
            let parts = [&row.language_model, &row.vision_encoder];
            let complete = parts.iter().all(|part| part.is_some());
            match row.checkpoint {
                Some(_) => assert_ne!(complete, row.lacks.is_some(), "{}", row.repository),
                None => assert!(parts.iter().all(|part| part.is_none()), "{}", row.repository),
            }
        }
        assert!(table.find("openflamingo/OpenFlamingo-9B-deprecated").is_some());
        assert!(table.find("openflamingo/nothing").is_none());
    }
}
