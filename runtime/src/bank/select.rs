//! Which examples stand before a prompt.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::{Bank, BankError, FEATURES, Shots};
use crate::model::RunError;
use crate::prompt::PromptFile;

/// A way to choose examples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Selection {
    /// The first ones, in the order of the bank.
    #[default]
    Fixed,
    /// Any, in any order; the same for the same seed.
    Random {
        /// Seed, one for each prompt.
        seed: u64,
    },
    /// Those whose first picture is most like the prompt's first picture to the frozen vision encoder (RICES: Yang et al.
    /// 2021; Flamingo paper, appendix A.2), the most similar last.
    Rices,
}

impl Bank {
    /// `n` examples for a prompt.
    ///
    /// # Errors
    /// More than the bank has; for [`Selection::Rices`] a prompt without picture, or one that cannot be read.
    pub fn choose(
        &self,
        n: usize,
        selection: Selection,
        prompt: &PromptFile,
    ) -> Result<Shots, RunError> {
        if n > self.len() {
            return Err(self.too_few(n).into());
        }
        if n == 0 {
            return Ok(Shots::default());
        }
        let mut places: Vec<usize> = (0..self.len()).collect();
        match selection {
            Selection::Fixed => {}
            Selection::Random { seed } => places.shuffle(&mut ChaCha8Rng::seed_from_u64(seed)),
            Selection::Rices => places = self.most_similar(prompt)?,
        }
        if n > places.len() {
            let reason =
                format!("expected at least {n} examples with a picture, found {}", places.len());
            return Err(BankError::Choice { reason, hint: "ask for fewer `--shots`" }.into());
        }
        places.truncate(n);
        if selection == Selection::Rices {
            places.reverse();
        }
        self.shots(&places)
    }

    /// The same examples in `n` orders, or in as many as there are: as chosen, then shuffled by the seed.
    ///
    /// # Errors
    /// Examples of a bank that has fewer.
    pub fn permutations(&self, shots: &Shots, n: usize, seed: u64) -> Result<Vec<Shots>, RunError> {
        let mut places: Vec<usize> = shots.numbers().iter().map(|number| number - 1).collect();
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let n_orders = (1..=places.len()).try_fold(1usize, |all, n| all.checked_mul(n));
        let n = n.min(n_orders.unwrap_or(usize::MAX));
        let mut orders = vec![places.clone()];
        while orders.len() < n {
            places.shuffle(&mut random);
            if !orders.contains(&places) {
                orders.push(places.clone());
            }
        }
        orders.iter().map(|places| self.shots(places)).collect()
    }

    /// Examples with pictures, the most similar to the prompt first.
    fn most_similar(&self, prompt: &PromptFile) -> Result<Vec<usize>, RunError> {
        let wrong = |reason: &str, hint| BankError::Choice { reason: reason.to_owned(), hint };
        let hint = "choose `--select fixed` or `--select random`";
        let no_picture = || wrong("the prompt has no picture to compare examples with", hint);
        let pixels = self.model.pixels(prompt.media().next().ok_or_else(no_picture)?)?;
        let found = self.model.backend().vision_features(&pixels.values, pixels.n_frames)?;
        let (Some(query), Some(entry)) = (found, &self.features) else {
            return Err(wrong("the engine has no features to compare pictures by", hint).into());
        };
        let features = entry.read(&self.dir.join(FEATURES), self.len())?;
        let similarity = |row: &[f32]| -> f64 {
            row.iter().zip(&query).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let rows = features.chunks_exact(entry.width.max(1)).enumerate();
        let with_picture = rows.filter(|(place, _)| !self.examples[*place].media.is_empty());
        let mut ranked: Vec<(f64, usize)> =
            with_picture.map(|(place, row)| (similarity(row), place)).collect();
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        Ok(ranked.into_iter().map(|(_, place)| place).collect())
    }
}
