//! Asks a model the questions of a task: which examples stand before each, what of them is read once, candidates or text.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use flamingo_runtime::{
    BeamOptions, GenerateOptions, Limits, Medium, Model, PromptFile, Question, Segment, Session,
};
use flamingo_scenes::random::stream;
use rand::seq::SliceRandom;

use super::data::{MediaSource, Row};
use super::features::Features;
use super::journal::Answer;
use super::select::{Asked, Chooser, Select};
use super::task::{TEXT_EXAMPLES, Task};

/// How a task is asked.
#[derive(Clone, Debug)]
pub struct AskOptions {
    /// Which examples.
    pub select: Select,
    /// Over how many orders of the examples candidates' likelihoods are averaged.
    pub ensemble: usize,
    /// Decides which examples and questions, and orders.
    pub seed: u64,
    /// Most questions.
    pub n: usize,
    /// Keep the pictures of zero-shot's examples where candidates are compared, as the reference suite does: the
    /// question's image token then sees the first example's picture.
    pub reference_bugs: bool,
    /// What questions share.
    pub sharing: Sharing,
}

/// What questions share with each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Examples in common are read once, and questions in common passes over the weights.
    All,
    /// Every question is a prompt of its own; pictures are encoded once while the model's cache has them.
    Pictures,
    /// Nothing: every picture is encoded anew.
    Nothing,
}

/// A task that is being asked.
pub struct Asker<'a> {
    model: &'a Model,
    task: &'a Task,
    options: &'a AskOptions,
    /// Rows that examples are chosen from.
    support: Vec<&'a Row>,
    /// Questions, in the order of the data.
    queries: Vec<&'a Row>,
    chooser: Chooser,
    /// What RICES compares pictures by.
    features: Features,
    /// Whether the media of an example can be read, as far as that was asked.
    readable: BTreeMap<usize, bool>,
    /// Token ids of the task's candidates.
    candidates: Vec<Vec<u32>>,
    /// Pictures of the questions that are asked together.
    encoded: BTreeMap<usize, Medium>,
    /// What RICES compares the questions by, as far as they were asked.
    seen: BTreeMap<usize, Vec<f32>>,
    limits: Limits,
}

/// Examples that were read, in one order.
struct Prefix {
    order: Vec<usize>,
    ids: Vec<u32>,
    session: Session,
}

/// A question with the examples before it.
struct Prompt {
    /// Tokens of all.
    ids: Vec<u32>,
    /// Media of the examples.
    before: Vec<Medium>,
    /// Media of the question.
    own: Vec<Medium>,
}

/// Examples before a question: places, and whether they are shown without pictures.
#[derive(Clone, Copy)]
struct Showing {
    n: usize,
    has_pictures: bool,
    keeps_media: bool,
}

impl<'a> Asker<'a> {
    /// Chooses questions, and the rows that examples come from; for RICES looks at the pictures of all of these.
    ///
    /// # Errors
    /// Options that do not go with the task; an engine that cannot compare pictures.
    pub fn new(model: &'a Model, task: &'a Task, options: &'a AskOptions) -> Result<Asker<'a>> {
        Asker::with_features(model, task, options, Features::in_memory())
    }

    /// As [`Asker::new`], with features that are known already, and kept.
    ///
    /// # Errors
    /// As [`Asker::new`]; a file of features that cannot be written.
    pub fn with_features(
        model: &'a Model,
        task: &'a Task,
        options: &'a AskOptions,
        features: Features,
    ) -> Result<Asker<'a>> {
        ensure!(
            options.ensemble <= 1 || task.metric.is_closed(),
            "task `{}`: `--ensemble` averages likelihoods of candidates, and this task generates text\n\nhint: leave it out",
            task.name
        );
        let support = sample(&task.support.rows, task.support_size, options.seed, "support");
        let queries = sample(&task.queries.rows, options.n, options.seed, "queries");
        let chooser = Chooser {
            select: options.select,
            seed: options.seed,
            n_support: support.len(),
            features: Vec::new(),
        };
        let candidates = task.candidates.iter().map(|text| candidate_ids(model, task, text));
        let candidates = candidates.collect::<Result<_>>()?;
        let (readable, encoded, seen) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let limits = Limits::default();
        let mut asker = Asker {
            model,
            task,
            options,
            support,
            queries,
            chooser,
            features,
            readable,
            candidates,
            encoded,
            seen,
            limits,
        };
        if options.select == Select::Rices {
            asker.look_at_support()?;
        }
        Ok(asker)
    }

    /// For RICES: features of all examples. What cannot be read is not shown.
    fn look_at_support(&mut self) -> Result<()> {
        for (place, row) in self.support.iter().enumerate() {
            let features = self.features.of(self.model, row);
            self.readable.insert(place, features.is_ok());
            if features.as_ref().is_ok_and(Option::is_none) {
                ensure!(
                    row.media.is_empty(),
                    "the engine has no features to compare pictures by\n\nhint: use `--backend native`, or \
                     `--select random`"
                );
            }
            self.chooser.features.push(features.ok().flatten().unwrap_or_default());
        }
        self.features.check()
    }

    /// The task.
    pub fn task(&self) -> &'a Task {
        self.task
    }

    /// The questions.
    pub fn queries(&self) -> &[&'a Row] {
        &self.queries
    }

    /// Rows that examples are chosen from.
    pub fn support(&self) -> &[&'a Row] {
        &self.support
    }

    /// Answers to these questions after `shots` examples, in their order, given to `on_answer` as they come.
    ///
    /// # Errors
    /// Those of `on_answer`; what is wrong with a question is in its answer.
    pub fn ask(
        &mut self,
        shots: usize,
        numbers: &[usize],
        on_answer: &mut dyn FnMut(Answer) -> Result<()>,
    ) -> Result<()> {
        let prefixes = self.prefixes(shots);
        for part in numbers.chunks(TOGETHER) {
            let answers = match (self.options.sharing, self.task.metric.is_closed()) {
                (Sharing::All, true) => self.compare_together(shots, part, &prefixes),
                (Sharing::All, false) => self.generate_together(shots, part, &prefixes),
                _ => part.iter().map(|number| self.alone(shots, *number)).collect(),
            };
            answers.into_iter().try_for_each(&mut *on_answer)?;
        }
        self.features.check()
    }

    /// The same examples before all questions, read once in each order. What cannot be read is said with each question.
    fn prefixes(&mut self, shots: usize) -> Vec<Prefix> {
        if self.options.select != Select::Fixed || self.options.sharing != Sharing::All {
            return Vec::new();
        }
        let asked = Asked::default();
        let places = self.choose(self.showing(shots).n, &asked);
        let orders = self.chooser.orders(&places, self.options.ensemble, &asked);
        orders.into_iter().filter_map(|order| self.prefix(shots, order).ok().flatten()).collect()
    }

    fn prefix(&self, shots: usize, order: Vec<usize>) -> Result<Option<Prefix>> {
        let (segments, media) = self.examples(shots, &order)?;
        if segments.is_empty() {
            return Ok(None);
        }
        let ids = self.model.encode_prompt(&PromptFile { segments, ..PromptFile::default() })?;
        let mut session = self.model.session()?;
        session.append_ids(&ids, &media, &self.limits)?;
        Ok(Some(Prefix { order, ids, session }))
    }

    /// Without examples asked for, the task's text examples are shown.
    fn showing(&self, shots: usize) -> Showing {
        let keeps_media = self.options.reference_bugs && self.task.metric.is_closed();
        let n_text = match keeps_media {
            true => TEXT_EXAMPLES,
            false => self.task.text_examples,
        };
        match shots {
            0 => Showing { n: n_text, has_pictures: false, keeps_media },
            n => Showing { n, has_pictures: true, keeps_media: true },
        }
    }

    fn choose(&mut self, n: usize, asked: &Asked) -> Vec<usize> {
        let Asker { model, support, readable, chooser, .. } = self;
        chooser.choose(n, asked, &mut |place| {
            let is_readable =
                || support[place].media.iter().all(|media| media.pixel_values(model).is_ok());
            *readable.entry(place).or_insert_with(is_readable)
        })
    }

    /// Segments and media of examples in this order.
    fn examples(&self, shots: usize, order: &[usize]) -> Result<(Vec<Segment>, Vec<Medium>)> {
        let showing = self.showing(shots);
        let template = &self.task.template;
        let (mut segments, mut media) = (template.beginning(), Vec::new());
        for place in order {
            let row = self.support[*place];
            let example = template.example(row, showing.has_pictures);
            segments.extend(example.map_err(anyhow::Error::msg)?);
            if showing.keeps_media {
                media.extend(self.media(row)?);
            }
        }
        Ok((segments, media))
    }

    fn media(&self, row: &Row) -> Result<Vec<Medium>> {
        row.media.iter().map(|source| self.medium(source)).collect()
    }

    fn medium(&self, source: &MediaSource) -> Result<Medium> {
        let (values, n_frames) = source.pixel_values(self.model)?;
        match self.options.sharing {
            Sharing::All | Sharing::Pictures => Ok(self.model.encode_medium(&values, n_frames)?),
            Sharing::Nothing => {
                let media = self.model.encode_pixels(&values, 1, n_frames)?;
                media.into_iter().next().map(Medium::from).context("one medium")
            }
        }
    }

    /// Orders of the examples of a question.
    fn orders(&mut self, shots: usize, number: usize) -> Result<Vec<Vec<usize>>> {
        let row = self.queries[number];
        let is_same = |(_, other): &(usize, &&Row)| **other == row;
        let same = self.support.iter().enumerate().filter(is_same).map(|(place, _)| place);
        let mut asked = Asked { number, same: same.collect(), features: Vec::new() };
        let n = self.showing(shots).n;
        if self.options.select == Select::Rices && n > 0 {
            if !self.seen.contains_key(&number) {
                let features = self.features.of(self.model, row)?;
                self.seen.insert(number, features.unwrap_or_default());
            }
            asked.features = self.seen.get(&number).cloned().unwrap_or_default();
        }
        let places = self.choose(n, &asked);
        ensure!(places.len() == n, "{n} examples where the data has {}", places.len());
        Ok(self.chooser.orders(&places, self.options.ensemble, &asked))
    }

    fn prompt(&self, shots: usize, number: usize, order: &[usize], known: bool) -> Result<Prompt> {
        let row = self.queries[number];
        let (mut segments, before) = match known {
            // Media of examples that were read are not asked for again.
            true => (self.example_segments(shots, order)?, Vec::new()),
            false => self.examples(shots, order)?,
        };
        segments.extend(self.task.template.query(row, true).map_err(anyhow::Error::msg)?);
        let ids = self.model.encode_prompt(&PromptFile { segments, ..PromptFile::default() })?;
        let own = match self.encoded.get(&number) {
            Some(medium) => vec![medium.clone()],
            None => self.media(row)?,
        };
        Ok(Prompt { ids, before, own })
    }

    fn example_segments(&self, shots: usize, order: &[usize]) -> Result<Vec<Segment>> {
        let (template, has_pictures) = (&self.task.template, self.showing(shots).has_pictures);
        let mut segments = template.beginning();
        for place in order {
            let example = template.example(self.support[*place], has_pictures);
            segments.extend(example.map_err(anyhow::Error::msg)?);
        }
        Ok(segments)
    }

    /// The examples that were read in this order, and the question's tokens and media after them; without such the whole.
    fn after<'b>(
        &self,
        shots: usize,
        number: usize,
        order: &[usize],
        prefixes: &'b [Prefix],
    ) -> Result<(Option<&'b Prefix>, Vec<u32>, Vec<Medium>)> {
        let prefix = prefixes.iter().find(|prefix| prefix.order == order);
        if let Some(prefix) = prefix {
            let Prompt { ids, own, .. } = self.prompt(shots, number, order, true)?;
            // A tokenizer that joins across the border makes it another beginning.
            if let Some(rest) =
                ids.strip_prefix(prefix.ids.as_slice()).filter(|rest| !rest.is_empty())
            {
                return Ok((Some(prefix), rest.to_vec(), own));
            }
        }
        let Prompt { ids, before, own } = self.prompt(shots, number, order, false)?;
        Ok((None, ids, [before, own].concat()))
    }

    /// Compares the candidates of several questions in common passes.
    fn compare_together(
        &mut self,
        shots: usize,
        numbers: &[usize],
        prefixes: &[Prefix],
    ) -> Vec<Answer> {
        let started = Instant::now();
        self.encoded = self.encode_together(numbers);
        let mut asked: Vec<Result<Comparison>> =
            numbers.iter().map(|number| self.comparison(shots, *number)).collect();
        // By the beginning that they share; those without one are whole prompts, in passes of their own.
        let mut groups: BTreeMap<Option<usize>, Vec<(usize, Question)>> = BTreeMap::new();
        for (at, comparison) in asked.iter_mut().enumerate() {
            let questions = match comparison {
                Ok(comparison) => self.questions(shots, numbers[at], comparison, prefixes),
                Err(_) => continue,
            };
            match questions {
                Ok(all) => all.into_iter().for_each(|(group, question)| {
                    groups.entry(group).or_default().push((at, question));
                }),
                Err(error) => *comparison = Err(error),
            }
        }
        for (group, members) in groups {
            let (places, questions): (Vec<usize>, Vec<Question>) = members.into_iter().unzip();
            let base = group.and_then(|group| prefixes.get(group)).map(|prefix| &prefix.session);
            let scores = self.score_each(base, &questions);
            for (index, at) in places.into_iter().enumerate() {
                let own = scores.as_ref().map(|scores| &scores[index]);
                match own {
                    Ok(own) => {
                        if let Ok(comparison) = &mut asked[at] {
                            comparison.add(own, self.task.per_token);
                        }
                    }
                    Err(error) => asked[at] = Err(anyhow::anyhow!("{error:#}")),
                }
            }
        }
        let ms = started.elapsed().as_secs_f64() * 1e3 / numbers.len().max(1) as f64;
        let answer = |(number, comparison): (&usize, Result<Comparison>)| {
            self.answer(
                shots,
                *number,
                ms,
                comparison.map(|comparison| self.best(*number, comparison)),
            )
        };
        numbers.iter().zip(asked).map(answer).collect()
    }

    /// Generates the answers to several questions in common passes.
    fn generate_together(
        &mut self,
        shots: usize,
        numbers: &[usize],
        prefixes: &[Prefix],
    ) -> Vec<Answer> {
        let started = Instant::now();
        self.encoded = self.encode_together(numbers);
        let mut asked: Vec<Result<Found>> = Vec::with_capacity(numbers.len());
        let mut groups: BTreeMap<Option<usize>, Vec<(usize, Question)>> = BTreeMap::new();
        for (at, number) in numbers.iter().enumerate() {
            let question = self.open_question(shots, *number, prefixes);
            asked.push(question.map(|(examples, group, question)| {
                groups.entry(group).or_default().push((at, question));
                Found { examples, given: String::new(), likelihoods: Vec::new() }
            }));
        }
        for (group, members) in groups {
            let (places, questions): (Vec<usize>, Vec<Question>) = members.into_iter().unzip();
            let base = group.and_then(|group| prefixes.get(group)).map(|prefix| &prefix.session);
            let texts = self.generate_each(base, &questions);
            for (index, at) in places.into_iter().enumerate() {
                match (&texts, &mut asked[at]) {
                    (Ok(texts), Ok(found)) => found.given = self.task.postprocessed(&texts[index]),
                    (Err(error), place) => *place = Err(anyhow::anyhow!("{error:#}")),
                    (Ok(_), Err(_)) => {}
                }
            }
        }
        let ms = started.elapsed().as_secs_f64() * 1e3 / numbers.len().max(1) as f64;
        let answers = numbers.iter().zip(asked);
        answers.map(|(number, found)| self.answer(shots, *number, ms, found)).collect()
    }

    /// The examples of a question that is answered with text, the place of the beginning that was read, and the question.
    fn open_question(
        &mut self,
        shots: usize,
        number: usize,
        prefixes: &[Prefix],
    ) -> Result<(Vec<usize>, Option<usize>, Question)> {
        let order = self.orders(shots, number)?.into_iter().next().unwrap_or_default();
        let (prefix, ids, media) = self.after(shots, number, &order, prefixes)?;
        let group = prefix.and_then(|own| place_of(own, prefixes));
        Ok((order, group, Question { ids, media, continuations: Vec::new() }))
    }

    fn generate_each(&self, base: Option<&Session>, questions: &[Question]) -> Result<Vec<String>> {
        let options = self.generation();
        match base {
            Some(session) => Ok(session.search_each(questions, &options)?),
            None => Ok(self.model.session()?.search_each(questions, &options)?),
        }
    }

    /// Pictures of questions that have one each, encoded some at a time. What cannot be read is said where it is asked.
    fn encode_together(&self, numbers: &[usize]) -> BTreeMap<usize, Medium> {
        let picture = |number: &usize| {
            let [source] = self.queries[*number].media.as_slice() else { return None };
            let (values, n_frames) = source.pixel_values(self.model).ok()?;
            (n_frames == 1).then_some((*number, values))
        };
        let mut encoded = BTreeMap::new();
        for part in numbers.chunks(ENCODED_TOGETHER) {
            let (owners, pictures): (Vec<usize>, Vec<Vec<f32>>) =
                part.iter().filter_map(picture).unzip();
            if let Ok(media) = self.model.encode_pictures(&pictures) {
                encoded.extend(owners.into_iter().zip(media));
            }
        }
        encoded
    }

    fn score_each(&self, base: Option<&Session>, questions: &[Question]) -> Result<Scores> {
        match base {
            Some(session) => Ok(session.score_each(questions, &self.limits)?),
            None => Ok(self.model.session()?.score_each(questions, &self.limits)?),
        }
    }

    fn comparison(&mut self, shots: usize, number: usize) -> Result<Comparison> {
        let orders = self.orders(shots, number)?;
        let row = self.queries[number];
        let candidates = match &row.candidates {
            None => self.candidates.clone(),
            Some(own) => {
                let ids = own.iter().map(|text| candidate_ids(self.model, self.task, text));
                ids.collect::<Result<_>>()?
            }
        };
        let sums = vec![0.0; candidates.len()];
        Ok(Comparison { orders, candidates, sums })
    }

    /// A question for each order of its examples, with the place of the beginning that was read.
    fn questions(
        &self,
        shots: usize,
        number: usize,
        comparison: &Comparison,
        prefixes: &[Prefix],
    ) -> Result<Vec<(Option<usize>, Question)>> {
        let question = |order: &Vec<usize>| {
            let (prefix, ids, media) = self.after(shots, number, order, prefixes)?;
            let group = prefix.and_then(|own| place_of(own, prefixes));
            let continuations = comparison.candidates.clone();
            Ok((group, Question { ids, media, continuations }))
        };
        comparison.orders.iter().map(question).collect()
    }

    /// Answers one question on its own.
    fn alone(&mut self, shots: usize, number: usize) -> Answer {
        let started = Instant::now();
        let found = match self.task.metric.is_closed() {
            true => self.compare_alone(shots, number),
            false => self.generate(shots, number),
        };
        let ms = started.elapsed().as_secs_f64() * 1e3;
        self.answer(shots, number, ms, found)
    }

    fn compare_alone(&mut self, shots: usize, number: usize) -> Result<Found> {
        let mut comparison = self.comparison(shots, number)?;
        for order in comparison.orders.clone() {
            let Prompt { ids, before, own } = self.prompt(shots, number, &order, false)?;
            let mut session = self.model.session()?;
            session.append_ids(&ids, &[before, own].concat(), &self.limits)?;
            let scores = session.score(&comparison.candidates, &self.limits)?;
            comparison.add(&scores, self.task.per_token);
        }
        Ok(self.best(number, comparison))
    }

    fn generate(&mut self, shots: usize, number: usize) -> Result<Found> {
        let order = self.orders(shots, number)?.into_iter().next().unwrap_or_default();
        let Prompt { ids, before, own } = self.prompt(shots, number, &order, false)?;
        let mut session = self.model.session()?;
        session.append_ids(&ids, &[before, own].concat(), &self.limits)?;
        let answer = session.generate(&self.generation(), &mut |_| {})?;
        let given = self.task.postprocessed(&answer.text);
        Ok(Found { examples: order, given, likelihoods: Vec::new() })
    }

    fn generation(&self) -> GenerateOptions {
        let beams =
            BeamOptions { n_beams: self.task.beams, length_penalty: 0.0, stop_early: false };
        let max_new_tokens = self.task.max_new_tokens;
        GenerateOptions { max_new_tokens, beams, ..GenerateOptions::default() }
    }

    /// The most likely candidate.
    fn best(&self, number: usize, comparison: Comparison) -> Found {
        let Comparison { orders, sums, .. } = comparison;
        let n_orders = orders.len().max(1) as f64;
        let likelihoods: Vec<f64> = sums.iter().map(|sum| (sum / n_orders).max(f64::MIN)).collect();
        let candidates = self.task.candidates(self.queries[number]);
        let best =
            likelihoods.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
        let given = best.and_then(|(place, _)| candidates.get(place)).cloned().unwrap_or_default();
        Found { examples: orders.into_iter().next().unwrap_or_default(), given, likelihoods }
    }

    fn answer(&self, shots: usize, query: usize, ms: f64, found: Result<Found>) -> Answer {
        let task = self.task.name.clone();
        match found {
            Ok(Found { examples, given, likelihoods }) => {
                Answer { task, shots, query, examples, given, likelihoods, ms, bad: None }
            }
            Err(error) => {
                let text = format!("{error:#}");
                let reason = text.split("\n\n").next().unwrap_or_default().to_owned();
                let (given, bad) = (String::new(), Some(reason));
                let (examples, likelihoods) = (Vec::new(), Vec::new());
                Answer { task, shots, query, examples, given, likelihoods, ms, bad }
            }
        }
    }
}

/// Questions that are asked in one go.
const TOGETHER: usize = 32;
/// Pictures that are encoded in one call, whose buffers are as many times larger.
const ENCODED_TOGETHER: usize = 8;

/// Log-probabilities: question, continuation, token.
type Scores = Vec<Vec<Vec<f64>>>;

/// What an answer is made of.
struct Found {
    examples: Vec<usize>,
    given: String,
    likelihoods: Vec<f64>,
}

/// Candidates of a question, with what each order of the examples gave them.
struct Comparison {
    orders: Vec<Vec<usize>>,
    candidates: Vec<Vec<u32>>,
    sums: Vec<f64>,
}

impl Comparison {
    /// Adds log-probabilities of the candidates' tokens after one order.
    fn add(&mut self, scores: &[Vec<f64>], per_token: bool) {
        for (sum, tokens) in self.sums.iter_mut().zip(scores) {
            let whole: f64 = tokens.iter().sum();
            *sum += if per_token { whole / tokens.len().max(1) as f64 } else { whole };
        }
    }
}

fn place_of(own: &Prefix, prefixes: &[Prefix]) -> Option<usize> {
    prefixes.iter().position(|other| std::ptr::eq(own, other))
}

/// Up to `n` rows, drawn by the seed, in their order.
fn sample<'a>(rows: &'a [Row], n: usize, seed: u64, purpose: &str) -> Vec<&'a Row> {
    let mut places: Vec<usize> = (0..rows.len()).collect();
    places.shuffle(&mut stream(seed, &format!("in-context/{purpose}")));
    places.truncate(n);
    places.sort_unstable();
    places.into_iter().map(|place| &rows[place]).collect()
}

fn candidate_ids(model: &Model, task: &Task, candidate: &str) -> Result<Vec<u32>> {
    let text = task.template.answer_text(candidate);
    let ids = model.tokenizer()?.encode_fast(text.as_str(), false);
    let ids = ids.map_err(|error| anyhow::anyhow!("candidate `{candidate}`: {error}"))?;
    let ids = ids.get_ids().to_vec();
    let image = model.manifest().config.tokens.image;
    ensure!(!ids.is_empty(), "candidate `{candidate}`: no tokens");
    ensure!(!ids.contains(&image), "candidate `{candidate}`: an image token");
    Ok(ids)
}
