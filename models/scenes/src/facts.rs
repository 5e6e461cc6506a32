//! What a picture or a video shows, before it is drawn.

use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};

use crate::Split;
use crate::words::{COLOURS, DIRECTIONS, KINDS, NUMBERS, PLACES, SIZES};

/// A coloured object: indices into [`COLOURS`] and [`KINDS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Object {
    /// Index into [`COLOURS`].
    pub colour: usize,
    /// Index into [`KINDS`].
    pub kind: usize,
}

/// What a medium shows. Numbers count from 0: `count` 0 is one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Facts {
    /// One object of a size at a place.
    Single {
        /// What it is.
        object: Object,
        /// Index into [`SIZES`].
        size: usize,
        /// Index into [`PLACES`].
        place: usize,
    },
    /// One to four small objects of one kind and colour.
    Several {
        /// What they are.
        object: Object,
        /// Index into [`NUMBERS`].
        count: usize,
    },
    /// Two small objects side by side that differ in colour and kind: left, right.
    Pair(Object, Object),
    /// Four frames in which an object moves.
    Moves {
        /// What it is.
        object: Object,
        /// Index into [`DIRECTIONS`].
        direction: usize,
    },
    /// Four frames, in one to four of which an object is there.
    Flashes {
        /// What it is.
        object: Object,
        /// Index into [`NUMBERS`].
        count: usize,
    },
}

/// A property of a single object that a question asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attribute {
    /// Its colour.
    Colour,
    /// Its kind.
    Kind,
    /// Its size.
    Size,
    /// Its place.
    Place,
}

/// All properties of a single object.
pub const ATTRIBUTES: [Attribute; 4] =
    [Attribute::Colour, Attribute::Kind, Attribute::Size, Attribute::Place];

impl Object {
    /// Its colour's word.
    pub fn colour(self) -> &'static str {
        COLOURS[self.colour].0
    }

    /// Its kind's word.
    pub fn kind(self) -> &'static str {
        KINDS[self.kind]
    }

    /// True for the ten pairs of colour and kind that training never shows.
    pub fn is_held_out(self) -> bool {
        (0..10).any(|i| self.colour == i % COLOURS.len() && self.kind == (3 * i + 1) % KINDS.len())
    }

    /// A random object of a split.
    pub fn random(split: Split, rng: &mut impl Rng) -> Object {
        Object::random_where(split, rng, |_| true)
    }

    /// A random object of a split that `accept` accepts.
    pub fn random_where(
        split: Split,
        rng: &mut impl Rng,
        accept: impl Fn(Object) -> bool,
    ) -> Object {
        loop {
            let colour = rng.random_range(0..COLOURS.len());
            let object = Object { colour, kind: rng.random_range(0..KINDS.len()) };
            if object.is_held_out() == (split == Split::Unseen) && accept(object) {
                return object;
            }
        }
    }

    /// Random objects of which no two share a colour or a kind.
    pub fn distinct(count: usize, split: Split, rng: &mut impl Rng) -> Vec<Object> {
        let mut objects: Vec<Object> = Vec::with_capacity(count);
        while objects.len() < count {
            let differs = |new: Object| {
                objects.iter().all(|old| old.colour != new.colour && old.kind != new.kind)
            };
            objects.push(Object::random_where(split, rng, differs));
        }
        objects
    }
}

impl Facts {
    /// One object of a random size at a random place.
    pub fn single(object: Object, rng: &mut impl Rng) -> Facts {
        let size = rng.random_range(0..SIZES.len());
        Facts::Single { object, size, place: rng.random_range(0..PLACES.len()) }
    }

    /// One to four objects.
    pub fn several(split: Split, rng: &mut impl Rng) -> Facts {
        let count = rng.random_range(0..NUMBERS.len());
        Facts::Several { object: Object::random(split, rng), count }
    }

    /// Two objects.
    pub fn pair(split: Split, rng: &mut impl Rng) -> Facts {
        let objects = Object::distinct(2, split, rng);
        Facts::Pair(objects[0], objects[1])
    }

    /// A video.
    pub fn video(split: Split, rng: &mut impl Rng) -> Facts {
        let object = Object::random(split, rng);
        match rng.random_bool(0.5) {
            true => Facts::Moves { object, direction: rng.random_range(0..DIRECTIONS.len()) },
            false => Facts::Flashes { object, count: rng.random_range(0..NUMBERS.len()) },
        }
    }

    /// A picture of any kind, single objects twice as often.
    pub fn picture(split: Split, rng: &mut impl Rng) -> Facts {
        match rng.random_range(0..4) {
            0 | 1 => Facts::single(Object::random(split, rng), rng),
            2 => Facts::several(split, rng),
            _ => Facts::pair(split, rng),
        }
    }

    /// The same facts with one of them changed: what a contrastive loss must tell apart.
    pub fn varied(self, split: Split, rng: &mut impl Rng) -> Facts {
        let mut other = |old: usize, count: usize| (old + rng.random_range(1..count)) % count;
        let varied = match self {
            Facts::Single { object, size, place } => match other(0, 5) {
                1 => Facts::Single { object, size: 1 - size, place },
                2 | 3 => Facts::Single { object, size, place: other(place, PLACES.len()) },
                _ => Facts::Single { object: object.varied(&mut other), size, place },
            },
            Facts::Several { object, count } => match other(0, 3) {
                1 => Facts::Several { object, count: other(count, NUMBERS.len()) },
                _ => Facts::Several { object: object.varied(&mut other), count },
            },
            Facts::Pair(left, right) => match other(0, 5) {
                1 => Facts::Pair(right, left),
                2 => Facts::Pair(
                    Object { colour: right.colour, ..left },
                    Object { colour: left.colour, ..right },
                ),
                3 => Facts::Pair(left.varied(&mut other), right),
                _ => Facts::Pair(left, right.varied(&mut other)),
            },
            Facts::Moves { object, direction } => {
                Facts::Moves { object, direction: other(direction, DIRECTIONS.len()) }
            }
            Facts::Flashes { object, count } => {
                Facts::Flashes { object, count: other(count, NUMBERS.len()) }
            }
        };
        let allowed = varied.objects().iter().all(|o| o.is_held_out() == (split == Split::Unseen));
        if allowed { varied } else { self.varied(split, rng) }
    }

    /// The objects that it shows.
    pub fn objects(self) -> Vec<Object> {
        match self {
            Facts::Pair(left, right) => vec![left, right],
            Facts::Single { object, .. }
            | Facts::Several { object, .. }
            | Facts::Moves { object, .. }
            | Facts::Flashes { object, .. } => vec![object],
        }
    }

    /// Number of frames: 4 of a video, 1 of a picture.
    pub fn n_frames(self) -> usize {
        match self {
            Facts::Moves { .. } | Facts::Flashes { .. } => 4,
            Facts::Single { .. } | Facts::Several { .. } | Facts::Pair(..) => 1,
        }
    }

    /// Its caption, one word a token.
    pub fn caption(self) -> Vec<&'static str> {
        match self {
            Facts::Single { object, size, place } => {
                vec![SIZES[size], object.colour(), object.kind(), PLACES[place]]
            }
            Facts::Several { object, count } => {
                vec![NUMBERS[count], object.colour(), object.kind()]
            }
            Facts::Pair(left, right) => {
                vec![left.colour(), left.kind(), "and", right.colour(), right.kind()]
            }
            Facts::Moves { object, direction } => {
                vec![object.colour(), object.kind(), "moves", DIRECTIONS[direction]]
            }
            Facts::Flashes { object, count } => {
                vec![object.colour(), object.kind(), "flash", NUMBERS[count]]
            }
        }
    }

    /// The word for a property of a single object.
    ///
    /// # Panics
    /// For facts that are not [`Facts::Single`].
    pub fn attribute(self, attribute: Attribute) -> &'static str {
        let Facts::Single { object, size, place } = self else {
            panic!("{self:?} has no single object");
        };
        match attribute {
            Attribute::Colour => object.colour(),
            Attribute::Kind => object.kind(),
            Attribute::Size => SIZES[size],
            Attribute::Place => PLACES[place],
        }
    }
}

impl Object {
    fn varied(self, other: &mut impl FnMut(usize, usize) -> usize) -> Object {
        match other(0, 3) {
            1 => Object { colour: other(self.colour, COLOURS.len()), ..self },
            _ => Object { kind: other(self.kind, KINDS.len()), ..self },
        }
    }
}

/// A random one of a list.
pub(crate) fn one_of<T: Copy>(list: &[T], rng: &mut impl Rng) -> T {
    *list.choose(rng).expect("a list that is not empty")
}

/// The numbers below `count` in random order.
pub(crate) fn shuffled(count: usize, rng: &mut impl Rng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.shuffle(rng);
    order
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn ten_pairs_of_colour_and_kind_are_held_out() {
        let all = (0..COLOURS.len())
            .flat_map(|colour| (0..KINDS.len()).map(move |kind| Object { colour, kind }));
        assert_eq!(all.filter(|object| object.is_held_out()).count(), 10);
    }

    #[test]
    fn splits_keep_their_pairs() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for split in [Split::Train, Split::Test, Split::Unseen] {
            for _ in 0..300 {
                let facts = Facts::picture(split, &mut rng);
                for facts in [facts, facts.varied(split, &mut rng)] {
                    for object in facts.objects() {
                        assert_eq!(object.is_held_out(), split == Split::Unseen, "{facts:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_variation_has_another_caption() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let mut seen = BTreeSet::new();
        for _ in 0..500 {
            let facts = match rng.random_bool(0.3) {
                true => Facts::video(Split::Train, &mut rng),
                false => Facts::picture(Split::Train, &mut rng),
            };
            let varied = facts.varied(Split::Train, &mut rng);
            assert_ne!(facts.caption(), varied.caption());
            seen.insert(std::mem::discriminant(&facts) == std::mem::discriminant(&varied));
        }
        assert_eq!(seen, BTreeSet::from([true]));
    }
}
