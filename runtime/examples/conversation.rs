//! A conversation through the library: turns, forks, marks, a deadline, memory.
//!
//! ```sh
//! cargo run --release -p flamingo-runtime --example conversation -- demo.flamingo a.png "what color ?" "what shape ?"
//! ```

use std::error::Error;
use std::time::{Duration, Instant};

use flamingo_runtime::{GenerateOptions, Limits, Model, OpenOptions, PromptFile};

#[expect(clippy::print_stdout, reason = "an example shows what it gets")]
fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let usage = "conversation ARTIFACT PICTURE QUESTION [QUESTION …]";
    let (artifact, picture) = arguments.next().zip(arguments.next()).ok_or(usage)?;

    // Clones of a model are the same model; threads may share it.
    let model = Model::open(artifact.as_ref(), &OpenOptions::default())?;
    let limits =
        Limits { deadline: Some(Instant::now() + Duration::from_secs(60)), ..Limits::default() };
    let options = GenerateOptions { max_new_tokens: 8, limits, ..GenerateOptions::default() };

    // The picture is read once.
    let mut session = model.session()?;
    session.append(&PromptFile::from_text("<image>", &[picture.into()])?, &options.limits)?;
    for question in arguments {
        // A fork shares what was read, and goes its own way.
        let mut branch = session.fork();
        branch.append(&PromptFile::from_text(&question, &[])?, &options.limits)?;
        let mut answer = String::new();
        for piece in branch.pieces(&options)? {
            answer.push_str(&piece?.text);
        }
        println!("{question} → {answer}");
        println!("  {:?}", branch.memory());
    }
    Ok(())
}
