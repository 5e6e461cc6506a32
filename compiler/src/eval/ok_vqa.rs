//! Answers stemmed as those of OK-VQA's annotations are: OpenFlamingo's `eval/ok_vqa_utils.py`.
//!
//! The reference asks NLTK three things. Words are split by the same rules; the verb of a form in `-ing` is looked up in
//! WordNet's verbs ([`VERBS`]). Its tagger of parts of speech is a trained model: here a word is a plural if it ends like one
//! and [`NO_PLURALS`] does not have it, so that a verb in `-s` within a sentence is stemmed where the reference leaves it.

/// Verbs of WordNet 3.0, one a line; two words are a form in `-ing` that no rule gives, and its verb.
const VERBS: &str = include_str!("ok_vqa/verbs.txt");

/// A text with the stem of each word, and a space between all.
pub(super) fn stemmed(text: &str) -> String {
    words(text).iter().map(|word| stem(word)).collect::<Vec<String>>().join(" ")
}

fn stem(word: &str) -> String {
    match BY_HAND.iter().find(|(from, _)| *from == word) {
        Some((_, stem)) => (*stem).to_owned(),
        None if word.ends_with("ing") => verb(word),
        None if is_plural(word) => singular(word),
        None => word.to_owned(),
    }
}

/// The shortest verb that a word in `-ing` may be a form of; the word itself if it is of none.
fn verb(word: &str) -> String {
    let stem = word.strip_suffix("ing").unwrap_or(word);
    let listed = |form: &str| VERBS.lines().find_map(|line| verb_of_line(line, form));
    let irregular = listed(word).filter(|verb| *verb != word);
    let regular = || listed(stem).or_else(|| listed(&format!("{stem}e")));
    irregular.or_else(regular).unwrap_or(word).to_owned()
}

/// The verb of a line of [`VERBS`], if the line has this form.
fn verb_of_line<'a>(line: &'a str, form: &str) -> Option<&'a str> {
    match line.split_once(' ') {
        Some((irregular, verb)) => (irregular == form).then_some(verb),
        None => (line == form).then_some(line),
    }
}

/// Words, marks and the second halves of contractions, as NLTK's tokenizer of Penn Treebank's rules splits them.
fn words(text: &str) -> Vec<String> {
    let letters: Vec<char> = text.trim().chars().collect();
    let at = |place: usize| letters.get(place).copied();
    let (mut words, mut word) = (Vec::new(), String::new());
    let mut mark = |mark: Option<char>, word: &mut String| {
        let whole = std::mem::take(word);
        words.extend(contraction(&whole).into_iter().filter(|part| !part.is_empty()));
        words.extend(mark.map(String::from));
    };
    for (place, letter) in letters.iter().copied().enumerate() {
        let next = at(place + 1);
        match letter {
            letter if letter.is_whitespace() => mark(None, &mut word),
            ':' | ',' if next.is_some_and(|next| next.is_ascii_digit()) => word.push(letter),
            '.' if next.is_some() => word.push(letter),
            letter if MARKS.contains(letter) => mark(Some(letter), &mut word),
            letter => word.push(letter),
        }
    }
    mark(None, &mut word);
    words
}

/// Marks that are words of their own; a point only at the end, `,` and `:` not before a digit.
const MARKS: &str = ".,:;@#$%&?!()[]{}<>";

/// A word and the short one that an apostrophe joins to it.
fn contraction(word: &str) -> [String; 2] {
    let small = word.to_ascii_lowercase();
    let short = ["n't", "'s", "'m", "'d", "'ll", "'re", "'ve", "'"];
    let short = short.iter().find(|short| small.ends_with(**short) && small.len() > short.len());
    let end = short.map_or(word.len(), |short| word.len() - short.len());
    match (word.get(..end), word.get(end..)) {
        (Some(long), Some(short)) => [long.to_owned(), short.to_owned()],
        _ => [word.to_owned(), String::new()],
    }
}

fn is_plural(word: &str) -> bool {
    let small = word.to_lowercase();
    let ends =
        small.ends_with('s') && !["ss", "us", "is", "'s"].iter().any(|end| small.ends_with(end));
    let irregular = ["men", "people", "children", "mice"].iter().any(|end| small.ends_with(end));
    (ends || irregular) && small.len() > 2 && !NO_PLURALS.contains(&small.as_str())
}

/// The singular of a plural: the rules of Python's `inflection` 0.5.1.
fn singular(word: &str) -> String {
    let small = word.to_ascii_lowercase();
    if UNCOUNTABLE.contains(&small.as_str()) {
        return word.to_owned();
    }
    let of_rule = |(stems, ends, to): &(&str, &str, &str)| {
        let stem =
            |end| small.strip_suffix(end).filter(|stem| stems.split('|').any(|s| fits(stem, s)));
        let stem = ends.split('|').find_map(stem)?;
        Some(format!("{}{to}", word.get(..stem.len())?))
    };
    SINGULARS.iter().find_map(of_rule).unwrap_or_else(|| word.to_owned())
}

/// Whether a stem ends as a rule asks: so; if that begins with `^`, in another letter than these; if with `=`, exactly so.
fn fits(stem: &str, rule: &str) -> bool {
    let mut letters = rule.chars();
    match letters.next() {
        Some('^') => stem.chars().last().is_some_and(|last| !letters.as_str().contains(last)),
        Some('=') => stem == letters.as_str(),
        _ => stem.ends_with(rule),
    }
}

/// What a stem ends with, endings of the plural, the ending of the singular; the first that fits counts.
const SINGULARS: [(&str, &str, &str); 41] = [
    ("z", "ombies", "ombie"),
    ("", "kine", "cow"),
    ("m", "oves", "ove"),
    ("s", "exes", "ex"),
    ("c", "hildren", "hild"),
    ("h", "umans", "uman"),
    ("m", "en", "an"),
    ("p", "eople", "erson"),
    ("database", "s", ""),
    ("quiz", "zes", ""),
    ("matr", "ices", "ix"),
    ("vert|ind", "ices", "ex"),
    ("passer", "sby", "by"),
    ("=ox", "en", ""),
    ("alias|status", "es|", ""),
    ("octop|vir", "us|i", "us"),
    ("=a", "xis|xes", "xis"),
    ("cris|test", "is|es", "is"),
    ("shoe", "s", ""),
    ("o", "es", ""),
    ("bus", "es|", ""),
    ("m|l", "ice", "ouse"),
    ("x|ch|ss|sh", "es", ""),
    ("m", "ovies", "ovie"),
    ("s", "eries", "eries"),
    ("^aeiouy|qu", "ies", "y"),
    ("l|r", "ves", "f"),
    ("tive", "s", ""),
    ("hive", "s", ""),
    ("^f", "ves", "fe"),
    ("t", "hesis|heses", "hesis"),
    ("s", "ynopsis|ynopses", "ynopsis"),
    ("p", "rognosis|rognoses", "rognosis"),
    ("p", "arenthesis|arentheses", "arenthesis"),
    ("d", "iagnosis|iagnoses", "iagnosis"),
    ("b", "asis|ases", "asis"),
    ("a", "nalysis|nalyses", "nalysis"),
    ("t|i", "a", "um"),
    ("n", "ews", "ews"),
    ("ss", "", ""),
    ("", "s", ""),
];

const UNCOUNTABLE: [&str; 9] =
    ["equipment", "fish", "information", "jeans", "money", "rice", "series", "sheep", "species"];

/// Words that end like plurals and are none.
const NO_PLURALS: [&str; 56] = [
    "abdomen",
    "across",
    "adidas",
    "alas",
    "alias",
    "always",
    "amen",
    "arkansas",
    "as",
    "asbestos",
    "athens",
    "atlas",
    "backwards",
    "besides",
    "canvas",
    "chaos",
    "charles",
    "cosmos",
    "dallas",
    "does",
    "downwards",
    "forwards",
    "gas",
    "goes",
    "has",
    "hers",
    "his",
    "james",
    "kansas",
    "lens",
    "los",
    "mars",
    "omen",
    "ours",
    "pancreas",
    "perhaps",
    "plus",
    "pus",
    "ramen",
    "regimen",
    "rhinoceros",
    "says",
    "semen",
    "sometimes",
    "specimen",
    "stamen",
    "texas",
    "theirs",
    "this",
    "thus",
    "towards",
    "upwards",
    "vegas",
    "was",
    "yemen",
    "yours",
];

/// What the reference maps by hand.
const BY_HAND: [(&str, &str); 168] = [
    ("adhesives", "adhesive"),
    ("alertness", "alert"),
    ("alpes", "alp"),
    ("apartments", "apart"),
    ("are", "are"),
    ("awning", "awn"),
    ("backpackers", "backpack"),
    ("badness", "bad"),
    ("baldness", "bald"),
    ("bases", "base"),
    ("batter's", "batter"),
    ("belongings", "belong"),
    ("blindness", "blind"),
    ("boy's", "boy"),
    ("braves", "brave"),
    ("brightness", "bright"),
    ("browsing", "brows"),
    ("buildings", "build"),
    ("casings", "case"),
    ("caves", "cave"),
    ("charioteering", "chariot"),
    ("childrens", "children"),
    ("christmas", "christmas"),
    ("circuses", "circus"),
    ("clothes", "cloth"),
    ("clothing", "cloth"),
    ("coding", "code"),
    ("conducter", "conduct"),
    ("conferences", "confer"),
    ("coniferous", "conifer"),
    ("containers", "contain"),
    ("controllers", "control"),
    ("corgie", "corgi"),
    ("couponing", "coupon"),
    ("creame", "cream"),
    ("crepte", "crept"),
    ("cumulis", "cumuli"),
    ("curiousity", "curious"),
    ("dangerous", "danger"),
    ("daughter's", "daughter"),
    ("decorations", "decor"),
    ("designers", "design"),
    ("dining", "dine"),
    ("directions", "direct"),
    ("domino's", "domino"),
    ("doves", "dove"),
    ("drives", "drive"),
    ("drunkenness", "drunken"),
    ("earing", "ear"),
    ("earnings", "earn"),
    ("eatting", "eat"),
    ("electicity", "elect"),
    ("electronics", "electron"),
    ("elevators", "elev"),
    ("emirates", "emir"),
    ("expressions", "express"),
    ("farmer's", "farmer"),
    ("firefighters", "firefight"),
    ("firefighting", "firefight"),
    ("glaced", "glace"),
    ("gloves", "glove"),
    ("gondoliere", "gondolier"),
    ("graves", "grave"),
    ("haircutting", "haircut"),
    ("hamburgers", "hamburg"),
    ("hawke", "hawk"),
    ("hearding", "heard"),
    ("hell's", "hell"),
    ("hornes", "horn"),
    ("illness", "ill"),
    ("jeans", "jean"),
    ("kid's", "kid"),
    ("kindergartener", "kindergarten"),
    ("kiting", "kite"),
    ("las", "las"),
    ("leaves", "leaf"),
    ("lenses", "lens"),
    ("lowes", "low"),
    ("markings", "mark"),
    ("married", "married"),
    ("mating", "mate"),
    ("meetings", "meet"),
    ("men's", "men"),
    ("microwaves", "microwave"),
    ("minerals", "miner"),
    ("mopeds", "mope"),
    ("morning", "morn"),
    ("mountainous", "mountain"),
    ("mustange", "mustang"),
    ("nationals", "nation"),
    ("overseas", "oversea"),
    ("oxygenize", "oxygen"),
    ("paintings", "paint"),
    ("paned", "pane"),
    ("paring", "pare"),
    ("pease", "peas"),
    ("personals", "person"),
    ("pies", "pie"),
    ("piping", "pipe"),
    ("plating", "plate"),
    ("playfulness", "play"),
    ("polarizing", "polar"),
    ("police", "police"),
    ("pooping", "poop"),
    ("porche", "porch"),
    ("potatoe", "potato"),
    ("professionals", "profession"),
    ("projections", "project"),
    ("propellers", "propel"),
    ("protesters", "protest"),
    ("pudding", "pud"),
    ("purring", "pure"),
    ("quantas", "quanta"),
    ("rabbies", "rabbi"),
    ("raines", "rain"),
    ("reflections", "reflect"),
    ("regent's", "regent"),
    ("reminders", "remind"),
    ("reporters", "report"),
    ("revelations", "revel"),
    ("riding", "ride"),
    ("ringe", "ring"),
    ("ripeness", "ripe"),
    ("rodeoing", "rodeo"),
    ("routes", "rout"),
    ("sadness", "sad"),
    ("sautee", "saute"),
    ("scrapbooking", "scrapbook"),
    ("settings", "set"),
    ("shelves", "shelve"),
    ("sickness", "sick"),
    ("skateboarders", "skateboard"),
    ("smugness", "smug"),
    ("socializing", "social"),
    ("sometimes", "sometime"),
    ("staring", "stare"),
    ("stockings", "stock"),
    ("striping", "stripe"),
    ("sunbathing", "sunbath"),
    ("sunblocker", "sunblock"),
    ("suspenders", "suspend"),
    ("swining", "swine"),
    ("teasing", "teas"),
    ("teething", "teeth"),
    ("tenning", "ten"),
    ("tennis", "tennis"),
    ("texting", "text"),
    ("ties", "tie"),
    ("toileting", "toilet"),
    ("tomatoe", "tomato"),
    ("toppings", "top"),
    ("transitions", "transit"),
    ("travelers", "travel"),
    ("travellers", "travel"),
    ("urinating", "urine"),
    ("vacationing", "vacate"),
    ("vandalizers", "vandal"),
    ("vastness", "vast"),
    ("vegas", "vegas"),
    ("veteran's", "veteran"),
    ("wading", "wade"),
    ("walle", "wall"),
    ("waves", "wave"),
    ("weddings", "wed"),
    ("wetness", "wet"),
    ("wilderness", "wilder"),
    ("womens", "women"),
    ("yes", "yes"),
];

#[cfg(test)]
mod tests {
    use super::super::task::Postprocess;
    use super::*;

    /// Cases of the reference with NLTK's words and WordNet, whose tags are written down in the script.
    #[test]
    fn stems_are_those_of_the_reference() {
        let text = include_str!("../../tests/fixtures/metrics/ok_vqa.json");
        let cases: Vec<[String; 2]> = serde_json::from_str(text).unwrap();
        assert!(cases.len() > 100);
        for [text, expected] in cases {
            assert_eq!(Postprocess::OkVqa.of(&text), expected, "{text:?}");
        }
    }

    #[test]
    fn any_text_has_stems() {
        for text in ["", " ", "'", "''s", "ing", "\u{130}'s", "\u{1F3C4}s", ".", "s", "\u{df}ing"] {
            stemmed(text);
        }
    }
}
