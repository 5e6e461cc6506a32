//! VQA accuracy (Antol et al. 2015), with the normalisation of the official suite.
//!
//! As in the copy of it that OpenFlamingo's suite uses, answers of people are normalised as fully as the model's, and
//! always: the official one leaves out digits and articles there, and all of it where people agree.

/// How many of the people asked gave this answer: of the others three or more are 1, averaged over leaving out each.
pub fn vqa_accuracy(answer: &str, people: &[String]) -> f64 {
    let answer = normal_answer(answer);
    let people: Vec<String> = people.iter().map(|other| normal_answer(other)).collect();
    let n_equal = people.iter().filter(|other| **other == answer).count();
    let accuracy = |other: &String| {
        let others = n_equal - usize::from(*other == answer);
        (others as f64 / 3.0).min(1.0)
    };
    people.iter().map(accuracy).sum::<f64>() / people.len().max(1) as f64
}

/// An answer without punctuation, articles and number words, with the apostrophes of contractions.
pub fn normal_answer(answer: &str) -> String {
    let answer = answer.replace(['\n', '\t'], " ");
    let without = without_punctuation(answer.trim()).to_lowercase();
    let words = without.split_whitespace().map(|word| known(&NUMBERS, word));
    let words = words.filter(|word| !ARTICLES.contains(word));
    words.map(|word| known(&CONTRACTIONS, word)).collect::<Vec<&str>>().join(" ")
}

fn known<'a>(table: &[(&'a str, &'a str)], word: &'a str) -> &'a str {
    table.iter().find(|(from, _)| *from == word).map_or(word, |(_, to)| to)
}

/// Each mark goes where it stands beside a space, or where digits stand around a comma; else it becomes a space. Of
/// points, the first 32 that no digit follows go.
fn without_punctuation(text: &str) -> String {
    let letters: Vec<char> = text.chars().collect();
    let digit = |letter: char| letter.is_numeric();
    let has_thousands =
        letters.windows(3).any(|three| digit(three[0]) && three[1] == ',' && digit(three[2]));
    let mut out = text.to_owned();
    for mark in MARKS.chars() {
        let beside_space = letters.windows(2).any(|two| two == [mark, ' '] || two == [' ', mark]);
        out = out.replace(mark, if beside_space || has_thousands { "" } else { " " });
    }
    let (mut kept, mut removed) = (String::new(), 0);
    let mut letters = out.chars().peekable();
    while let Some(letter) = letters.next() {
        let goes = letter == '.' && removed < 32 && !letters.peek().copied().is_some_and(digit);
        removed += usize::from(goes);
        if !goes {
            kept.push(letter);
        }
    }
    kept
}

const MARKS: &str = ";/[]\"{}()=+\\_-><@`,?!";

const ARTICLES: [&str; 3] = ["a", "an", "the"];

const NUMBERS: [(&str, &str); 12] = [
    ("none", "0"),
    ("zero", "0"),
    ("one", "1"),
    ("two", "2"),
    ("three", "3"),
    ("four", "4"),
    ("five", "5"),
    ("six", "6"),
    ("seven", "7"),
    ("eight", "8"),
    ("nine", "9"),
    ("ten", "10"),
];

/// Those of the official table that a word in small letters can meet.
const CONTRACTIONS: [(&str, &str); 114] = [
    ("'ow'sat", "'ow's'at"),
    ("'ows'at", "'ow's'at"),
    ("aint", "ain't"),
    ("arent", "aren't"),
    ("cant", "can't"),
    ("couldn'tve", "couldn't've"),
    ("couldnt", "couldn't"),
    ("couldnt've", "couldn't've"),
    ("couldve", "could've"),
    ("didnt", "didn't"),
    ("doesnt", "doesn't"),
    ("dont", "don't"),
    ("hadn'tve", "hadn't've"),
    ("hadnt", "hadn't"),
    ("hadnt've", "hadn't've"),
    ("hasnt", "hasn't"),
    ("havent", "haven't"),
    ("he'dve", "he'd've"),
    ("hed", "he'd"),
    ("hed've", "he'd've"),
    ("hes", "he's"),
    ("howd", "how'd"),
    ("howll", "how'll"),
    ("hows", "how's"),
    ("isnt", "isn't"),
    ("it'dve", "it'd've"),
    ("itd", "it'd"),
    ("itd've", "it'd've"),
    ("itll", "it'll"),
    ("maam", "ma'am"),
    ("mightn'tve", "mightn't've"),
    ("mightnt", "mightn't"),
    ("mightnt've", "mightn't've"),
    ("mightve", "might've"),
    ("mustnt", "mustn't"),
    ("mustve", "must've"),
    ("neednt", "needn't"),
    ("notve", "not've"),
    ("oclock", "o'clock"),
    ("oughtnt", "oughtn't"),
    ("ow's'at", "'ow's'at"),
    ("shant", "shan't"),
    ("she'dve", "she'd've"),
    ("shed've", "she'd've"),
    ("shouldn'tve", "shouldn't've"),
    ("shouldnt", "shouldn't"),
    ("shouldnt've", "shouldn't've"),
    ("shouldve", "should've"),
    ("somebody'd", "somebodyd"),
    ("somebody'dve", "somebody'd've"),
    ("somebodyd've", "somebody'd've"),
    ("somebodyll", "somebody'll"),
    ("somebodys", "somebody's"),
    ("someone'dve", "someone'd've"),
    ("someoned", "someone'd"),
    ("someoned've", "someone'd've"),
    ("someonell", "someone'll"),
    ("someones", "someone's"),
    ("something'dve", "something'd've"),
    ("somethingd", "something'd"),
    ("somethingd've", "something'd've"),
    ("somethingll", "something'll"),
    ("thats", "that's"),
    ("there'dve", "there'd've"),
    ("thered", "there'd"),
    ("thered've", "there'd've"),
    ("therere", "there're"),
    ("theres", "there's"),
    ("they'dve", "they'd've"),
    ("theyd", "they'd"),
    ("theyd've", "they'd've"),
    ("theyll", "they'll"),
    ("theyre", "they're"),
    ("theyve", "they've"),
    ("twas", "'twas"),
    ("wasnt", "wasn't"),
    ("we'dve", "we'd've"),
    ("wed've", "we'd've"),
    ("werent", "weren't"),
    ("weve", "we've"),
    ("whatll", "what'll"),
    ("whatre", "what're"),
    ("whats", "what's"),
    ("whatve", "what've"),
    ("whens", "when's"),
    ("whered", "where'd"),
    ("wheres", "where's"),
    ("whereve", "where've"),
    ("who'dve", "who'd've"),
    ("whod", "who'd"),
    ("whod've", "who'd've"),
    ("wholl", "who'll"),
    ("whos", "who's"),
    ("whove", "who've"),
    ("whyll", "why'll"),
    ("whyre", "why're"),
    ("whys", "why's"),
    ("wont", "won't"),
    ("wouldn'tve", "wouldn't've"),
    ("wouldnt", "wouldn't"),
    ("wouldnt've", "wouldn't've"),
    ("wouldve", "would've"),
    ("y'all'dve", "y'all'd've"),
    ("y'alld've", "y'all'd've"),
    ("y'allll", "y'all'll"),
    ("yall", "y'all"),
    ("yall'd've", "y'all'd've"),
    ("yall'll", "y'all'll"),
    ("you'dve", "you'd've"),
    ("youd", "you'd"),
    ("youd've", "you'd've"),
    ("youll", "you'll"),
    ("youre", "you're"),
    ("youve", "you've"),
];
