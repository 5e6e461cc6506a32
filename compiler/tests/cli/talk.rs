//! `chat`, `score`, and answers by beam search.

use std::ffi::OsStr;
use std::io::Write as _;
use std::process::{Command, Stdio};

use super::common::Ran;
use super::{Demo, at, flamingoc, parse, picture};

const QUESTION: &str = "<image>what color ?";

/// Says lines to `chat`; stdout and stderr.
#[track_caller]
fn chat(demo: &Demo, arguments: &[&str], lines: &str) -> (String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flamingoc"));
    command.arg("chat").arg(demo.path()).args(arguments).env_remove("FLAMINGO_CACHE_DIR");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let [stdout, stderr] =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(output.status.success(), "{stderr}");
    (stdout, stderr)
}

/// An error that names all of `expected`.
#[track_caller]
fn refused(ran: Ran, expected: &[&str]) {
    assert_eq!(ran.status, Some(2), "{}", ran.stderr);
    for expected in expected {
        assert!(ran.stderr.contains(expected), "{}", ran.stderr);
    }
}

#[test]
fn a_conversation_encodes_a_picture_once_and_can_be_undone() {
    let demo = Demo::new();
    let image = picture("single-188.png");
    let lines = format!(
        "/image {image}\nwhat color ?\n/undo\n/undo\n/image {image}\nwhat color ?\n/reset\n\
         /image {image}\nwhat color ?\n/image nothing.png\n/nothing\n/quit\nnever read\n"
    );
    let flags = ["--template", "plain", "--max-new-tokens", "4"];
    let (stdout, stderr) = chat(&demo, &flags, &lines);
    assert_eq!(stdout, "orange\norange\norange\n");
    assert_eq!(stderr.matches("1 encoded").count(), 1, "{stderr}");
    assert_eq!(stderr.matches("0 encoded, 1 found").count(), 2, "{stderr}");
    for expected in ["there is no turn to undo", "nothing.png: no such file", "/nothing: no such"] {
        assert!(stderr.contains(expected), "{stderr}");
    }

    let flags = ["--template", "plain", "--json", "--max-new-tokens", "4"];
    let lines = format!("/image {image}\nwhat color ?\nwhat size ?\n");
    let (stdout, _) = chat(&demo, &flags, &lines);
    let answers: Vec<_> = stdout.lines().map(parse).collect();
    let n_tokens = |turn: usize| at(&answers[turn], "/n_prompt_tokens").as_u64().unwrap();
    assert_eq!((answers.len(), at(&answers[0], "/text").as_str()), (2, Some("orange")));
    // The second turn has the first, its answer without the token that ended it, and three words.
    assert_eq!(n_tokens(1), n_tokens(0) + 1 + 3);
}

#[test]
fn turns_are_written_as_families_do() {
    let demo = Demo::new();
    let n_tokens = |template: &str| {
        let flags = ["--template", template, "--json", "--max-new-tokens", "1"];
        let (stdout, _) = chat(&demo, &flags, "what color ?\n");
        at(&parse(stdout.lines().next().unwrap()), "/n_prompt_tokens").as_u64().unwrap()
    };
    let plain = n_tokens("plain");
    for template in ["flamingo", "idefics", "otter"] {
        assert!(n_tokens(template) > plain, "{template}");
    }
}

/// What is asked is the prompt that the family's form makes of it: by default that of the artifact.
#[test]
fn questions_are_asked_as_families_do() {
    let scratch = tempfile::tempdir().unwrap();
    let (source, otter) = (scratch.path().join("otter"), scratch.path().join("otter.flamingo"));
    flamingoc!("synth", "tiny-otter", "-o", source).ok();
    flamingoc!("compile", source, "-o", otter, "--no-calibration", "--no-gate").ok();
    let demo = Demo::new();
    let paper = "This is a conversation between a human, User, and an intelligent visual AI, Flamingo. \
                 User sends images, and Flamingo describes them. User: <image>what color ? Flamingo:";
    for (artifact, template, prompt) in [
        (&otter, None, "<image>User: what color ? GPT:<answer>"),
        (&otter, Some("plain"), QUESTION),
        (&demo.path(), None, paper),
        (&demo.path(), Some("otter"), "<image>User: what color ? GPT:<answer>"),
    ] {
        let image = picture("single-188.png");
        let ask = |words: &[&str]| {
            let mut all: Vec<&OsStr> = vec!["run".as_ref(), artifact.as_ref()];
            all.extend(words.iter().map(AsRef::<OsStr>::as_ref));
            all.extend(["--image", &image, "--max-new-tokens", "3", "--json"].map(OsStr::new));
            let answer = parse(&super::common::run(&all).ok());
            [at(&answer, "/tokens").clone(), at(&answer, "/n_prompt_tokens").clone()]
        };
        let name = template.map(|name| vec!["--template", name]).unwrap_or_default();
        let asked = ask(&[vec!["--ask", "what color ?"], name].concat());
        assert_eq!(asked, ask(&["--prompt", prompt]), "{template:?}");
    }
    let both = ["--ask", "a", "--prompt", "b"];
    refused(demo.run(&both), &["--ask", "--prompt"]);
    refused(demo.run(&["--prompt", "b", "--template", "otter"]), &["--template", "--prompt"]);
}

#[test]
fn score_ranks_candidates() {
    let demo = Demo::new();
    let file = demo.scratch.path().join("labels.txt");
    std::fs::write(&file, "red\n\nbig blue\n").unwrap();
    let (artifact, image) = (demo.path(), picture("single-188.png"));
    let arguments = |extra: &[&str]| {
        let mut all = vec!["score", artifact.to_str().unwrap(), "--prompt", QUESTION];
        all.extend(["--image", &image, "--candidate", "orange"]);
        all.extend(["--candidates", file.to_str().unwrap()]);
        all.extend(extra);
        let all: Vec<&OsStr> = all.into_iter().map(AsRef::as_ref).collect();
        super::common::run(&all).ok()
    };
    let table = arguments(&[]);
    let lines: Vec<&str> = table.lines().map(str::trim).collect();
    assert!(lines[0].starts_with("candidate") && lines[1].starts_with("orange"), "{lines:?}");
    let json = parse(&arguments(&["--json", "--per-token"]));
    assert_eq!(at(&json, "/best"), 0);
    assert_eq!(at(&json, "/candidates/2/text"), "big blue");
    assert_eq!(at(&json, "/candidates/2/n_tokens"), 2);
    let number = |pointer: &str| at(&json, pointer).as_f64().unwrap();
    let [sum, mean] = ["/candidates/2/log_likelihood", "/candidates/2/per_token"].map(&number);
    assert!(sum < 0.0 && (sum / 2.0 - mean).abs() < 1e-9);
    let shares: f64 = (0..3).map(|i| number(&format!("/candidates/{i}/share"))).sum();
    assert!((shares - 1.0).abs() < 1e-9);

    let none = flamingoc!("score", &artifact, "--prompt", "red");
    refused(none, &["no candidates", "--candidate"]);
    let picture = flamingoc!("score", &artifact, "--prompt", "red", "--candidate", "<image>");
    refused(picture, &["continuation 1", "an image token"]);
}

#[test]
fn beams_answer_and_stop_texts_cut() {
    let demo = Demo::new();
    let image = picture("single-188.png");
    let run = |flags: &[&str]| {
        let mut all = vec!["--prompt", QUESTION, "--image", &image, "--json"];
        all.extend(flags);
        parse(&demo.run(&all).ok())
    };
    let beams = run(&["--num-beams", "3", "--length-penalty", "0"]);
    assert_eq!(at(&beams, "/text"), "orange");
    assert!(at(&beams, "/stop/token").is_u64());
    let cut = run(&["--stop", "ran"]);
    assert_eq!((at(&cut, "/text"), at(&cut, "/stop/text")), (&"o".into(), &"ran".into()));
    let both = demo.run(&["--prompt", "red", "--num-beams", "2", "--temperature", "1"]);
    refused(both, &["--num-beams", "--temperature"]);
    let slid = demo.run(&["--prompt", "red", "--slide", "--max-new-tokens", "2"]);
    refused(slid, &["cannot slide", "counts positions from the beginning"]);
}
