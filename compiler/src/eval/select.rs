//! Which examples stand before a question, and in which orders.

use flamingo_scenes::random::stream;
use rand::seq::SliceRandom;
use serde::Serialize;

/// A way to choose examples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Select {
    /// The same for all questions, drawn once.
    Fixed,
    /// Drawn anew for each question.
    Random,
    /// Those whose first picture is most like the question's to the frozen vision encoder, the most similar last (RICES:
    /// Yang et al. 2021; Flamingo paper, appendix A.2).
    Rices,
}

/// Chooses examples by their places; the same for the same seed.
#[derive(Clone, Debug)]
pub struct Chooser {
    /// How.
    pub select: Select,
    /// Decides what is drawn.
    pub seed: u64,
    /// Examples to choose from.
    pub n_support: usize,
    /// What the vision encoder sees in the first picture of each, for [`Select::Rices`].
    pub features: Vec<Vec<f32>>,
}

/// What choosing needs to know of a question.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// Its number.
    pub number: usize,
    /// Examples that are the question itself, and so never shown.
    pub same: Vec<usize>,
    /// What the vision encoder sees in its first picture, for [`Select::Rices`].
    pub features: Vec<f32>,
}

impl Chooser {
    /// Places of up to `n` examples that are `usable`, in the order in which they stand before the question. More examples
    /// are the same and others.
    pub fn choose(
        &self,
        n: usize,
        asked: &Asked,
        usable: &mut dyn FnMut(usize) -> bool,
    ) -> Vec<usize> {
        let mut places: Vec<usize> = (0..self.n_support).collect();
        match self.select {
            Select::Fixed => places.shuffle(&mut stream(self.seed, "in-context/fixed")),
            Select::Random => {
                places.shuffle(&mut stream(
                    self.seed,
                    &format!("in-context/random/{}", asked.number),
                ));
            }
            Select::Rices => {
                let likeness = |place: &usize| -> f64 {
                    let row = self.features.get(*place).map(Vec::as_slice).unwrap_or_default();
                    row.iter()
                        .zip(&asked.features)
                        .map(|(a, b)| f64::from(*a) * f64::from(*b))
                        .sum()
                };
                let mut ranked: Vec<(f64, usize)> =
                    places.iter().map(|place| (likeness(place), *place)).collect();
                ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
                places = ranked.into_iter().map(|(_, place)| place).collect();
            }
        }
        let shown = |place: &usize| !asked.same.contains(place) && usable(*place);
        let mut places: Vec<usize> = places.into_iter().filter(shown).take(n).collect();
        if self.select == Select::Rices {
            places.reverse();
        }
        places
    }

    /// The same examples in up to `n` orders: as chosen, then shuffled. Orders of fixed examples are fixed, too.
    pub fn orders(&self, places: &[usize], n: usize, asked: &Asked) -> Vec<Vec<usize>> {
        let n_orders = (1..=places.len()).try_fold(1usize, |all, n| all.checked_mul(n));
        let n = n.min(n_orders.unwrap_or(usize::MAX));
        let purpose = match self.select {
            Select::Fixed => "in-context/orders".to_owned(),
            Select::Random | Select::Rices => format!("in-context/orders/{}", asked.number),
        };
        let (mut rng, mut order) = (stream(self.seed, &purpose), places.to_vec());
        let mut orders = vec![order.clone()];
        while orders.len() < n {
            order.shuffle(&mut rng);
            if !orders.contains(&order) {
                orders.push(order.clone());
            }
        }
        orders
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn chooser(select: Select) -> Chooser {
        let features = (0..10).map(|n| vec![(n as f32).cos(), (n as f32).sin()]).collect();
        Chooser { select, seed: 5, n_support: 10, features }
    }

    fn choose(chooser: &Chooser, n: usize, asked: &Asked) -> Vec<usize> {
        chooser.choose(n, asked, &mut |_| true)
    }

    fn asked(number: usize) -> Asked {
        Asked { number, same: vec![3], features: vec![1.0, 0.0] }
    }

    #[test]
    fn more_examples_are_the_same_and_others() {
        for select in [Select::Fixed, Select::Random] {
            let chooser = chooser(select);
            let (four, eight) = (choose(&chooser, 4, &asked(1)), choose(&chooser, 8, &asked(1)));
            assert_eq!(four, eight[..4]);
            assert_eq!(eight.iter().collect::<BTreeSet<_>>().len(), 8);
            assert!(!choose(&chooser, 10, &asked(1)).contains(&3), "the question itself");
            let readable = chooser.choose(4, &asked(1), &mut |place| place != four[0]);
            assert_eq!(readable, eight[1..5], "what cannot be read is replaced");
            let other = choose(&chooser, 4, &asked(2));
            assert_eq!(other == four, select == Select::Fixed);
            assert_ne!(choose(&Chooser { seed: 6, ..chooser }, 8, &asked(1)), eight);
        }
    }

    #[test]
    fn the_most_similar_stands_last() {
        // Cosines of 0, 1, …, 9: 0 and 6 are nearest to 1, then 1 (7 and 5 after it); 3 is not shown.
        assert_eq!(choose(&chooser(Select::Rices), 4, &asked(0)), [1, 7, 6, 0]);
    }

    #[test]
    fn orders_are_different_and_as_many_as_there_are() {
        let chooser = chooser(Select::Random);
        assert_eq!(chooser.orders(&[], 6, &asked(0)), [Vec::<usize>::new()]);
        assert_eq!(chooser.orders(&[7], 6, &asked(0)), [[7]]);
        let orders = chooser.orders(&[1, 2, 3], 9, &asked(0));
        assert_eq!(orders.iter().collect::<BTreeSet<_>>().len(), 6);
        assert_eq!(orders[0], [1, 2, 3]);
        assert_eq!(chooser.orders(&[1, 2, 3, 4], 6, &asked(0)).len(), 6);
    }
}
