//! Runs of `eval --task` that are killed, and go on.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::common::{flamingoc, repository};
use super::parse;

const SIGKILL: i32 = 9;
/// Answers in a whole run: two tasks, two numbers of examples, 40 questions.
const N_ANSWERS: usize = 2 * 2 * 40;

/// Evaluates a generating and a comparing task, with these further arguments.
fn command(artifact: &Path, journal: Option<&Path>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flamingoc"));
    command.arg("eval").arg(artifact).args(["--task", "scenes-caption,scenes-yes-no"]);
    command.args(["--shots", "0,4", "--n", "40", "--seed", "3", "--json", "--items"]);
    if let Some(journal) = journal {
        command.arg("--journal").arg(journal);
    }
    command
}

/// What a run says but for how long it took.
#[track_caller]
fn figures(mut command: Command) -> Value {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut figures = parse(&String::from_utf8(output.stdout).unwrap());
    figures.as_object_mut().unwrap().remove("timings").expect("timings");
    figures
}

fn n_answers(journal: &Path) -> usize {
    let text = fs::read_to_string(journal).unwrap_or_default();
    text.matches('\n').count().saturating_sub(1)
}

/// Starts a run and kills it when the journal has this many answers; gives its whole lines then.
#[track_caller]
fn kill_after(artifact: &Path, journal: &Path, n: usize) -> String {
    let mut run = command(artifact, Some(journal));
    let mut run = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    while n_answers(journal) < n {
        assert!(started.elapsed() < Duration::from_secs(300), "{n} answers never came");
        assert_eq!(run.try_wait().unwrap(), None, "it ended by itself");
        sleep(Duration::from_millis(1));
    }
    run.kill().unwrap();
    assert_eq!(run.wait().unwrap().signal(), Some(SIGKILL));
    let text = fs::read_to_string(journal).unwrap();
    assert!(n_answers(journal) < N_ANSWERS, "nothing was left to ask");
    text[..text.rfind('\n').map_or(0, |end| end + 1)].to_owned()
}

#[test]
fn runs_that_were_killed_end_with_the_same_figures() {
    let scratch = tempfile::tempdir().unwrap();
    let artifact = scratch.path().join("demo.flamingo");
    let quick = ["--no-calibration", "--no-gate"];
    let demo = repository("models/demo");
    flamingoc!("compile", demo, "-o", artifact, "--precision", "f32", quick[0], quick[1]).ok();
    let whole = figures(command(&artifact, None));
    assert_eq!(whole["results"].as_array().unwrap().len(), 4);

    let journal = scratch.path().join("answers.jsonl");
    for n in [3, 57, 100] {
        let before = kill_after(&artifact, &journal, n);
        // What was being written is cut as a crash of the machine would cut it.
        fs::write(&journal, format!("{before}{{\"task\":\"scen")).unwrap();
    }
    let before = fs::read_to_string(&journal).unwrap();
    let before = &before[..=before.rfind('\n').unwrap()];
    assert_eq!(figures(command(&artifact, Some(&journal))), whole);
    assert_eq!(n_answers(&journal), N_ANSWERS, "each question was asked once");
    assert!(fs::read_to_string(&journal).unwrap().starts_with(before), "nothing is asked again");
    assert_eq!(figures(command(&artifact, Some(&journal))), whole, "from the journal alone");
}
