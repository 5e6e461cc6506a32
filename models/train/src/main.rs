//! `flamingo-train`: recipes to checkpoints, and the data for them.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};
use flamingo_data::command::DataCommand;
use flamingo_train::recipe::Recipe;
use flamingo_train::run::{FirstStage, Options, train};
use flamingo_train::scenes::ScenesArgs;
use indicatif::ProgressBar;

// Tensors come and go many times a step; the system's allocator gives their pages back each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Train a Flamingo, and make the data for it
#[derive(Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    arg_required_else_help = true,
    after_help = "Examples:\n  flamingo-train models/demo/training.toml -o /tmp/demo\n  \
                  flamingo-train data pages site/ -o shards --tokenizer tokenizer.json"
)]
struct Program {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    training: Option<Training>,
}

#[derive(Subcommand)]
enum Command {
    /// Build training data
    #[command(subcommand)]
    Data(Data),
}

#[derive(Subcommand)]
enum Data {
    /// Make samples of the demo's tasks with generated pictures
    Scenes(ScenesArgs),
    #[command(flatten)]
    World(DataCommand),
}

/// A run goes on where it stopped if the folder holds one of the same recipe.
#[derive(Args)]
struct Training {
    /// The recipe
    #[arg(value_name = "RECIPE.toml")]
    recipe: PathBuf,
    /// Folder for the model, checkpoints, metrics and curves
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Threads [default: all processors]
    #[arg(long)]
    threads: Option<usize>,
    /// Prompts of each task that are answered at the end
    #[arg(long, default_value_t = 200, value_name = "N")]
    measured: usize,
    /// Take the vision encoder and the language model of this run or model, and train the rest
    #[arg(long, value_name = "DIR")]
    frozen_from: Option<PathBuf>,
    /// The first stage that is trained with `--frozen-from`
    #[arg(
        long,
        value_enum,
        value_name = "STAGE",
        default_value = "flamingo",
        requires = "frozen_from"
    )]
    first_stage: FirstStage,
    /// Stop after so many steps; the same command goes on from there
    #[arg(long, value_name = "STEPS")]
    stop_after: Option<usize>,
}

impl Training {
    fn run(self) -> Result<()> {
        let recipe = Recipe::read(&self.recipe)?;
        let processors = || std::thread::available_parallelism().map_or(1, usize::from);
        let options = Options {
            folder: self.output,
            threads: self.threads.unwrap_or_else(processors).max(1),
            measured: self.measured.max(1),
            frozen_from: self.frozen_from.map(|folder| (folder, self.first_stage)),
            stop_after: self.stop_after,
        };
        let result = train(&recipe, &options)?;
        let mut stdout = std::io::stdout();
        match result {
            Some(result) => writeln!(stdout, "{result:#}"),
            None => writeln!(stdout, "stopped; the same command goes on"),
        }
        .context("cannot write to stdout")
    }
}

/// Counts on a progress bar.
struct Bar(ProgressBar);

impl flamingo_data::command::Progress for Bar {
    fn advance(&mut self, n_read: u64, n_samples: u64) {
        self.0.set_message(format!("{n_read} read, {n_samples} samples"));
        self.0.tick();
    }
}

fn run(program: Program) -> Result<()> {
    match (program.command, program.training) {
        (Some(Command::Data(command)), _) => {
            let mut bar = Bar(ProgressBar::new_spinner());
            match command {
                Data::Scenes(args) => args.run(&mut std::io::stdout(), &mut bar),
                Data::World(command) => Ok(command.run(&mut std::io::stdout(), &mut bar)?),
            }
        }
        (None, Some(training)) => training.run(),
        (None, None) => unreachable!("clap asks for one of the two"),
    }
}

/// What libraries read from the environment before `main`: the allocator keeps its pages, and a tensor's work stays on
/// the thread that asked for it, since `--threads` spreads the pieces of a batch.
#[cfg(unix)]
const ENVIRONMENT: [(&str, &str); 2] = [("MIMALLOC_PURGE_DELAY", "-1"), ("RAYON_NUM_THREADS", "1")];

/// Begins anew with what of [`ENVIRONMENT`] is not set yet; comes back if all is, or if that cannot be done.
#[cfg(unix)]
fn set_environment() {
    use std::os::unix::process::CommandExt as _;
    let missing = || ENVIRONMENT.into_iter().filter(|(name, _)| std::env::var_os(name).is_none());
    if let (Ok(program), Some(_)) = (std::env::current_exe(), missing().next()) {
        let arguments = std::env::args_os().skip(1);
        let _ = std::process::Command::new(program).args(arguments).envs(missing()).exec();
    }
}

fn main() -> ExitCode {
    #[cfg(unix)]
    set_environment();
    match run(Program::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::from(2)
        }
    }
}
