//! Prompts of every task: tokens, what each weighs in the loss, and the media that they show.
//!
//! The text twin of a prompt has a medium's description after its `<image>`: what a language model learns
//! from before it has seen any picture.

use rand::Rng;
use rand::seq::SliceRandom;

use crate::Split;
use crate::facts::{ATTRIBUTES, Attribute, Facts, Object, one_of, shuffled};
use crate::words::{
    BEGIN, COLOURS, DIRECTIONS, END_OF_CHUNK, IMAGE, KINDS, NEW_WORDS, NUMBERS, ORDINALS,
    Vocabulary,
};

/// What a prompt asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Task {
    /// All words of the caption.
    Caption,
    /// Colour, kind, size or place of one object.
    Attribute,
    /// How many objects there are.
    Count,
    /// Two objects: the colour of a kind, or the kind on a side.
    Pair,
    /// Two objects: whether a colour and kind is there; in training also one.
    YesNo,
    /// Which way it moves, or how many times it flashes.
    Video,
    /// Which of so many pictures shows an object.
    Which(usize),
    /// So many examples show which property is wanted; nothing else says it.
    FewShot(usize),
    /// So many examples give two new words their meaning.
    Bind(usize),
    /// The same; in half of these prompts one word has more examples, up to all: what choosing by likeness shows.
    Uneven(usize),
    /// So many examples of one new word, all of what is asked.
    Alike(usize),
    /// A caption after so many others.
    Captions(usize),
    /// A question after so many of its sort about other pictures, with their answers.
    Questions(usize),
    /// Random words twice: only for a language model.
    Repeat,
}

impl Task {
    /// The task's name, without its number.
    pub fn name(self) -> &'static str {
        match self {
            Task::Caption => "caption",
            Task::Attribute => "attribute",
            Task::Count => "count",
            Task::Pair => "pair",
            Task::YesNo => "yes_no",
            Task::Video => "video",
            Task::Which(_) => "which",
            Task::FewShot(_) => "few_shot",
            Task::Bind(_) => "bind",
            Task::Uneven(_) => "uneven",
            Task::Alike(_) => "alike",
            Task::Captions(_) => "captions",
            Task::Questions(_) => "questions",
            Task::Repeat => "repeat",
        }
    }

    /// How many pictures or examples the task's number asks for.
    pub fn size(self) -> Option<usize> {
        match self {
            Task::Which(n) | Task::FewShot(n) | Task::Bind(n) | Task::Uneven(n) => Some(n),
            Task::Alike(n) | Task::Captions(n) | Task::Questions(n) => Some(n),
            _ => None,
        }
    }
}

/// How a prompt is made.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// Which digits and pairs may appear.
    pub split: Split,
    /// Several scored answers in a prompt, for training; else one, the last.
    pub dense: bool,
    /// Descriptions after `<image>`: the text twin.
    pub described: bool,
}

/// A token of a prompt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Token {
    /// Its id in the vocabulary.
    pub id: u32,
    /// Its weight in the loss; 1 for an answer, 0 where nothing can be known.
    pub weight: f32,
}

/// A prompt with its answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Episode {
    /// Which task it is of.
    pub task: Task,
    /// From `<bos>` on.
    pub tokens: Vec<Token>,
    /// What the media show, one for each `<image>`, in order.
    pub media: Vec<Facts>,
}

impl Episode {
    /// A random prompt of a task.
    pub fn random(
        task: Task,
        style: Style,
        vocabulary: &Vocabulary,
        rng: &mut impl Rng,
    ) -> Episode {
        let mut writer = Writer::new(task, style, vocabulary, rng);
        match task {
            Task::Caption => writer.any_caption(),
            Task::Attribute => writer.attribute(4, true),
            Task::Count => writer.count(3, true),
            Task::Pair | Task::YesNo => writer.pair(task == Task::YesNo, 4, true),
            Task::Video => writer.video(),
            Task::Which(pictures) => writer.which(pictures),
            Task::FewShot(shots) => writer.few_shot(shots),
            Task::Bind(shots) => writer.bind((0..shots).map(|shot| shot % 2).collect()),
            Task::Uneven(shots) => writer.uneven(shots),
            Task::Alike(shots) => writer.bind(vec![0; shots]),
            Task::Captions(shots) => writer.captions(shots),
            Task::Questions(shots) => writer.questions(shots),
            Task::Repeat => writer.repeat(),
        }
        writer.episode
    }
}

/// Weight of a caption's word in training.
const CAPTION_WEIGHT: f32 = 0.5;
/// Weight of an `<eoc>` after an answer.
const END_WEIGHT: f32 = 0.1;

/// Share of training's yes/no prompts that show one object: what learns to compare on one finds it among two.
const ONE_OBJECT: f64 = 0.4;

type Question = (Vec<&'static str>, &'static str);

fn is_there(object: Object, truth: bool) -> Question {
    let question = vec!["is", "there", "a", object.colour(), object.kind(), "?"];
    (question, if truth { "yes" } else { "no" })
}

struct Writer<'a, R> {
    episode: Episode,
    style: Style,
    vocabulary: &'a Vocabulary,
    rng: &'a mut R,
    /// In descriptions of colour and kind, the kind comes first.
    kind_first: bool,
}

impl<'a, R: Rng> Writer<'a, R> {
    fn new(task: Task, style: Style, vocabulary: &'a Vocabulary, rng: &'a mut R) -> Self {
        let begin = Token { id: BEGIN, weight: 0.0 };
        let kind_first = rng.random_bool(0.5);
        let episode = Episode { task, tokens: vec![begin], media: Vec::new() };
        Writer { episode, style, vocabulary, rng, kind_first }
    }

    fn put(&mut self, words: &[&str], weight: f32) {
        for word in words {
            self.episode.tokens.push(Token { id: self.vocabulary.id(word), weight });
        }
    }

    fn end_chunk(&mut self, weight: f32) {
        self.episode.tokens.push(Token { id: END_OF_CHUNK, weight });
    }

    /// A medium, with its whole caption in a text twin.
    fn show(&mut self, facts: Facts) {
        let caption = facts.caption();
        self.show_as(facts, &caption);
    }

    /// A medium, with its colour and kind in a text twin.
    fn show_object(&mut self, facts: Facts) {
        let object = facts.objects()[0];
        let mut words = [object.colour(), object.kind()];
        if self.kind_first {
            words.reverse();
        }
        self.show_as(facts, &words);
    }

    fn show_as(&mut self, facts: Facts, description: &[&str]) {
        self.episode.media.push(facts);
        self.episode.tokens.push(Token { id: IMAGE, weight: 0.0 });
        if self.style.described {
            self.put(description, 0.0);
        }
    }

    fn object(&mut self) -> Object {
        Object::random(self.style.split, self.rng)
    }

    /// Questions about a medium; one, or up to `most` in training. The answers of examples are not `scored`.
    fn ask(&mut self, facts: Facts, mut questions: Vec<Question>, most: usize, scored: bool) {
        self.show(facts);
        questions.truncate(if self.style.dense { most } else { 1 });
        questions.shuffle(self.rng);
        for (question, answer) in questions {
            self.put(&question, 0.0);
            self.put(&[answer], if scored { 1.0 } else { 0.0 });
        }
        self.end_chunk(if self.style.dense { END_WEIGHT } else { 0.0 });
    }

    fn any_caption(&mut self) {
        let facts = match self.rng.random_range(0..5) {
            0 if self.style.split != Split::Unseen => Facts::video(self.style.split, self.rng),
            _ => Facts::picture(self.style.split, self.rng),
        };
        self.caption(facts, true);
    }

    fn caption(&mut self, facts: Facts, scored: bool) {
        self.episode.media.push(facts);
        self.episode.tokens.push(Token { id: IMAGE, weight: 0.0 });
        let weight = match (scored, self.style.dense) {
            (false, _) => 0.0,
            (true, true) => CAPTION_WEIGHT,
            (true, false) => 1.0,
        };
        self.put(&facts.caption(), weight);
        self.end_chunk(weight);
    }

    /// Of pictures: the media of a shard's sample have one number of frames.
    fn captions(&mut self, shots: usize) {
        for index in 0..=shots {
            let facts = Facts::picture(self.style.split, self.rng);
            self.caption(facts, self.style.dense || index == shots);
        }
    }

    /// Half of these prompts ask whether something is there.
    fn questions(&mut self, shots: usize) {
        let sort = self.rng.random_range(0..6);
        for index in 0..=shots {
            let scored = self.style.dense || index == shots;
            match sort {
                0 => self.attribute(1, scored),
                1 => self.count(1, scored),
                2 => self.pair(false, 1, scored),
                _ => self.pair(true, 1, scored),
            }
        }
    }

    fn attribute(&mut self, most: usize, scored: bool) {
        let object = self.object();
        let facts = Facts::single(object, self.rng);
        let mut questions = vec![
            (vec!["what", "color", "?"], facts.attribute(Attribute::Colour)),
            (vec!["what", "shape", "?"], facts.attribute(Attribute::Kind)),
            (vec!["what", "size", "?"], facts.attribute(Attribute::Size)),
            (vec!["where", "?"], facts.attribute(Attribute::Place)),
        ];
        questions.shuffle(self.rng);
        self.ask(facts, questions, most, scored);
    }

    fn count(&mut self, most: usize, scored: bool) {
        let facts = Facts::several(self.style.split, self.rng);
        let Facts::Several { object, count } = facts else { unreachable!("asked for several") };
        let questions = vec![
            (vec!["how", "many", "?"], NUMBERS[count]),
            (vec!["what", "color", "?"], object.colour()),
            (vec!["what", "shape", "?"], object.kind()),
        ];
        let most = self.rng.random_range(1..most + 1);
        self.ask(facts, questions, most, scored);
    }

    fn pair(&mut self, yes_no: bool, most: usize, scored: bool) {
        if yes_no && self.style.dense && self.rng.random_bool(ONE_OBJECT) {
            return self.yes_no_of_one(most, scored);
        }
        let facts = Facts::pair(self.style.split, self.rng);
        let Facts::Pair(left, right) = facts else { unreachable!("asked for a pair") };
        let mut open = Vec::new();
        for (object, side) in [(left, "left"), (right, "right")] {
            open.push((vec!["what", "color", "is", "the", object.kind(), "?"], object.colour()));
            open.push((vec!["what", "shape", "is", "on", "the", side, "?"], object.kind()));
        }
        open.shuffle(self.rng);
        let mut closed = || self.is_one_there(left, right);
        let questions = match yes_no {
            true => vec![closed(), closed(), closed(), open.remove(0)],
            false => vec![open.remove(0), open.remove(0), closed()],
        };
        self.ask(facts, questions, most, scored);
    }

    /// Whether a single object is what is asked for; half of those asked for differ in colour or in kind.
    fn yes_no_of_one(&mut self, most: usize, scored: bool) {
        let object = self.object();
        let facts = Facts::single(object, self.rng);
        let mut question = || {
            let rng = &mut *self.rng;
            let (colours, kinds) = (COLOURS.len(), KINDS.len());
            let asked = match rng.random_range(0..4) {
                0 | 1 => object,
                2 => Object {
                    colour: (object.colour + rng.random_range(1..colours)) % colours,
                    ..object
                },
                _ => Object { kind: (object.kind + rng.random_range(1..kinds)) % kinds, ..object },
            };
            is_there(asked, asked == object)
        };
        let questions = (0..4).map(|_| question()).collect();
        self.ask(facts, questions, most, scored);
    }

    /// Half of the objects asked for are there; the others differ in colour, in kind, or mix the two.
    fn is_one_there(&mut self, left: Object, right: Object) -> Question {
        let rng = &mut *self.rng;
        let truth = rng.random_bool(0.5);
        let new = |rng: &mut R, old: [usize; 2], count: usize| loop {
            let value = rng.random_range(0..count);
            if !old.contains(&value) {
                break value;
            }
        };
        let object = match (truth, rng.random_range(0..4)) {
            (true, _) => one_of(&[left, right], rng),
            (false, 0) => Object { colour: left.colour, kind: right.kind },
            (false, 1) => Object { colour: right.colour, kind: left.kind },
            (false, 2) => {
                let colour = new(rng, [left.colour, right.colour], COLOURS.len());
                Object { colour, ..one_of(&[left, right], rng) }
            }
            (false, _) => {
                let kind = new(rng, [left.kind, right.kind], KINDS.len());
                Object { kind, ..one_of(&[left, right], rng) }
            }
        };
        is_there(object, truth)
    }

    fn video(&mut self) {
        let facts = Facts::video(self.style.split, self.rng);
        let object = facts.objects()[0];
        let question = match facts {
            Facts::Moves { direction, .. } => (vec!["which", "way", "?"], DIRECTIONS[direction]),
            Facts::Flashes { count, .. } => (vec!["how", "many", "times", "?"], NUMBERS[count]),
            Facts::Single { .. } | Facts::Several { .. } | Facts::Pair(..) => {
                unreachable!("asked for a video")
            }
        };
        let more = [
            (vec!["what", "color", "?"], object.colour()),
            (vec!["what", "shape", "?"], object.kind()),
        ];
        let [colour, kind] = more;
        let more = if self.rng.random_bool(0.5) { colour } else { kind };
        self.ask(facts, vec![question, more], 2, true);
    }

    /// The word asked for stands right before its label.
    fn which(&mut self, pictures: usize) {
        let objects = Object::distinct(pictures, self.style.split, self.rng);
        for (index, object) in objects.iter().enumerate() {
            let facts = Facts::single(*object, self.rng);
            self.show_object(facts);
            self.put(&[ORDINALS[index]], 0.0);
        }
        let asked = if self.style.dense { pictures } else { 1 };
        for index in shuffled(pictures, self.rng).into_iter().take(asked) {
            let object = objects[index];
            let words = match self.rng.random_range(0..3) {
                0 => vec![object.colour()],
                1 => vec![object.kind()],
                _ => vec![object.colour(), object.kind()],
            };
            self.put(&["which"], 0.0);
            self.put(&words, 0.0);
            self.put(&[ORDINALS[index]], 1.0);
        }
        self.end_chunk(if self.style.dense { END_WEIGHT } else { 0.0 });
    }

    fn few_shot(&mut self, shots: usize) {
        let attribute = one_of(&ATTRIBUTES, self.rng);
        for index in 0..=shots {
            let object = self.object();
            let facts = Facts::single(object, self.rng);
            self.show(facts);
            let scored = index == shots || (self.style.dense && index > 0);
            self.put(&[facts.attribute(attribute)], if scored { 1.0 } else { 0.0 });
            self.end_chunk(if self.style.dense { END_WEIGHT / 2.0 } else { 0.0 });
        }
    }

    fn uneven(&mut self, shots: usize) {
        let equal = shots / 2;
        let n_second = match self.rng.random_bool(0.5) {
            true => self.rng.random_range(0..=equal),
            false => equal,
        };
        let is_second = |shot: usize| shot % 2 == 1 && shot / 2 < n_second;
        self.bind((0..shots).map(|shot| usize::from(is_second(shot))).collect());
    }

    /// Two colours or two kinds, two new words, of which the examples show these; each value is scored from its
    /// second time on.
    fn bind(&mut self, mut labels: Vec<usize>) {
        let shots = labels.len();
        let n_shown = labels.iter().max().map_or(2, |last| last + 1);
        let by_kind = self.rng.random_bool(0.5);
        self.kind_first = !by_kind;
        let values = shuffled(if by_kind { KINDS.len() } else { COLOURS.len() }, self.rng);
        let names = shuffled(NEW_WORDS.len(), self.rng);
        labels.shuffle(self.rng);
        let asked = if self.style.dense && self.style.described { 3 } else { 1 };
        labels.extend((0..asked).map(|_| self.rng.random_range(0..n_shown)));
        let mut seen = [false; 2];
        for (index, label) in labels.into_iter().enumerate() {
            let is_value = |o: Object| (if by_kind { o.kind } else { o.colour }) == values[label];
            let object = Object::random_where(self.style.split, self.rng, is_value);
            let facts = Facts::single(object, self.rng);
            self.show_object(facts);
            let scored = index >= shots || (self.style.dense && seen[label]);
            seen[label] = true;
            self.put(&[NEW_WORDS[names[label]]], if scored { 1.0 } else { 0.0 });
            self.end_chunk(if self.style.dense { END_WEIGHT / 2.0 } else { 0.0 });
        }
    }

    fn repeat(&mut self) {
        let ids = self.vocabulary.plain_ids();
        let length = self.rng.random_range(5..13);
        let words: Vec<u32> = (0..length).map(|_| self.rng.random_range(ids.clone())).collect();
        let mut put = |weight| {
            let tokens = words.iter().map(|id| Token { id: *id, weight });
            self.episode.tokens.extend(tokens);
        };
        put(0.0);
        put(1.0);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::random::stream;

    fn episodes(task: Task, dense: bool, count: usize) -> Vec<Episode> {
        let style = Style { split: Split::Train, dense, described: false };
        let (vocabulary, mut rng) = (Vocabulary::default(), stream(3, "episodes"));
        (0..count).map(|_| Episode::random(task, style, &vocabulary, &mut rng)).collect()
    }

    /// Tokens after each `<image>`.
    fn chunks(episode: &Episode) -> Vec<&[Token]> {
        episode.tokens.split(|token| token.id == IMAGE).skip(1).collect()
    }

    #[test]
    fn examples_are_scored_in_training_alone() {
        let is_scored = |chunk: &[Token]| chunk.iter().any(|token| token.weight >= CAPTION_WEIGHT);
        for task in [Task::Captions(2), Task::Questions(2)] {
            for episode in episodes(task, true, 50) {
                assert_eq!(episode.media.len(), 3);
                assert!(chunks(&episode).into_iter().all(is_scored), "{episode:?}");
            }
            for episode in episodes(task, false, 50) {
                let scored: Vec<bool> = chunks(&episode).into_iter().map(is_scored).collect();
                assert_eq!(scored, [false, false, true], "{episode:?}");
            }
        }
    }

    #[test]
    fn words_are_bound_in_equal_or_drawn_shares() {
        let fewer = |episode: &Episode| {
            let chunks = chunks(episode);
            let first = |chunk: &&&[Token]| chunk[0].id == chunks[0][0].id;
            let n = chunks[..8].iter().filter(first).count();
            n.min(8 - n)
        };
        let seen =
            |task| -> BTreeSet<usize> { episodes(task, true, 200).iter().map(fewer).collect() };
        assert_eq!(seen(Task::Bind(8)), BTreeSet::from([4]));
        assert_eq!(seen(Task::Uneven(8)), (0..=4).collect());
    }
}
