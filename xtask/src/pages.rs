//! Every page that flamingoc writes, opened in headless Chromium without a network: nothing in its console, nothing
//! that is loaded from elsewhere, and no wider than a phone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use crate::process::{self, cargo, output, say};

/// Names that browsers of this kind have.
const PROGRAMS: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];
/// Width of the window, in CSS pixels: the least that headless Chromium takes.
const WIDTH: u32 = 500;
/// What loads from a network.
const ELSEWHERE: [&str; 5] = ["src=\"http", "src='http", "url(http", "@import", "<link"];
/// A page whose errors the check must see: a script that fails, and a picture from elsewhere.
const BROKEN: &str = "<!doctype html><title>broken</title><script>no_such_function()</script>\
     <img src=\"http://example.invalid/a.png\"><div style=\"width: 2000px\">wide</div>";

/// The browser.
pub(crate) struct Chromium {
    program: &'static str,
}

impl Chromium {
    /// The browser in `PATH`, or an error that says that it is missing.
    pub(crate) fn find() -> Result<Chromium> {
        let runs = |program: &&str| {
            let mut command = Command::new(program);
            let command = command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        let program = PROGRAMS.into_iter().find(runs);
        let program = program.context(
            "pages: no Chromium\n\nhint: `cargo xtask setup-chromium` installs Debian's, as root",
        )?;
        Ok(Chromium { program })
    }

    /// What is wrong with a page; its width is taken of a copy in `scratch`.
    fn problems(&self, page: &Path, scratch: &Path) -> Result<Vec<String>> {
        let text = fs::read_to_string(page).with_context(|| format!("{}", page.display()))?;
        let from_elsewhere = ELSEWHERE.into_iter().filter(|what| text.contains(what));
        let mut problems: Vec<String> = from_elsewhere
            .map(|what| format!("`{what}`: loads something from elsewhere"))
            .collect();
        let copy = scratch.join("page.html");
        let measure =
            "<script>document.title = 'width ' + document.documentElement.scrollWidth</script>";
        fs::write(&copy, text + measure)?;
        let mut browser = Command::new("timeout");
        browser.args(["60", self.program, "--headless", "--no-sandbox", "--disable-gpu"]);
        browser.args(["--disable-quic", "--no-first-run", "--disable-background-networking"]);
        browser.args(["--disable-component-update", "--disable-sync", "--enable-logging=stderr"]);
        browser.args(["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=3000"]);
        browser.arg(format!("--user-data-dir={}", scratch.join("profile").display()));
        browser.arg(format!("--window-size={WIDTH},900")).arg("--dump-dom");
        browser.arg(format!("file://{}", copy.display()));
        let found = browser.output().context("could not start Chromium")?;
        ensure!(found.status.success(), "Chromium failed on {}: {}", page.display(), found.status);
        let console = String::from_utf8_lossy(&found.stderr).into_owned();
        let lines = console.lines().filter(|line| line.contains("CONSOLE"));
        problems.extend(lines.map(str::to_owned));
        let dom = String::from_utf8_lossy(&found.stdout).into_owned();
        let width = dom.split_once("<title>width ").and_then(|(_, rest)| rest.split_once('<'));
        match width.and_then(|(width, _)| width.parse::<u32>().ok()) {
            Some(width) if width <= WIDTH => {}
            Some(width) => problems.push(format!("{width} pixels wide, expected at most {WIDTH}")),
            None => problems.push("no width: the page did not run to its end".to_owned()),
        }
        Ok(problems)
    }
}

/// Installs Chromium with apt.
pub(crate) fn setup() -> Result<()> {
    if Chromium::find().is_ok() {
        say("Chromium: installed already");
        return Ok(());
    }
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!("no `apt-get`, expected Debian or Ubuntu\n\nhint: put a `chromium` into PATH");
    }
    process::run(Command::new("apt-get").args(["update", "-qq"]))?;
    let mut install = Command::new("apt-get");
    install.args(["install", "-qq", "--yes", "--no-install-recommends", "chromium"]);
    process::run(install.env("DEBIAN_FRONTEND", "noninteractive").stdout(Stdio::null()))?;
    Chromium::find().map(drop)
}

/// Makes all pages with the tests' build and opens them.
pub(crate) fn test(root: &Path, chromium: &Chromium) -> Result<()> {
    let scratch = root.join("target/pages");
    fs::create_dir_all(&scratch).context("cannot make target/pages")?;
    let broken = scratch.join("broken.html");
    fs::write(&broken, BROKEN)?;
    let seen = chromium.problems(&broken, &scratch)?;
    ensure!(seen.len() >= 3, "a broken page shows only {seen:?}: this Chromium cannot be asked");
    let pages = write_pages(root, &scratch)?;
    let mut problems = Vec::new();
    for page in &pages {
        for problem in chromium.problems(page, &scratch)? {
            problems.push(format!("{}: {problem}", page.display()));
        }
    }
    ensure!(problems.is_empty(), "pages:\n  {}", problems.join("\n  "));
    say(&format!("\n{} pages: nothing in the console, at most {WIDTH} pixels wide", pages.len()));
    Ok(())
}

/// One page of each kind, of the demo model.
fn write_pages(root: &Path, scratch: &Path) -> Result<Vec<PathBuf>> {
    let build = ["build", "--locked", "--workspace", "--all-features", "--bin", "flamingoc"];
    process::run(cargo().current_dir(root).args(build))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(root.join("target"), PathBuf::from);
    let flamingoc = || Command::new(target.join("debug/flamingoc"));
    let (artifact, page) = (scratch.join("demo.flamingo"), |name: &str| scratch.join(name));
    let mut compile = flamingoc();
    compile.args([
        "compile",
        "models/demo/recipe.toml",
        "--precision",
        "int8",
        "--overwrite",
        "-o",
    ]);
    output(root, compile.arg(&artifact).args(["--target", "cuda"]))?;
    let [stages, scenarios, coverage, answers] =
        ["stages", "scenarios", "coverage", "answers"].map(|name| page(&format!("{name}.html")));
    let quick = ["--reps", "8", "--budget-s", "0.2", "--html"];
    let sizes =
        ["--images", "1,4", "--context", "16,32", "--prompt-tokens", "16", "--batch", "1,2"];
    output(root, flamingoc().arg("bench").arg(&artifact).args(sizes).args(quick).arg(&stages))?;
    let all = ["--scenario", "caption,chat,camera-stream"];
    output(root, flamingoc().arg("bench").arg(&artifact).args(all).args(quick).arg(&scenarios))?;
    let mut inspect = flamingoc();
    inspect.arg("inspect").arg(&artifact).args(["--coverage", "cuda", "--html"]).arg(&coverage);
    output(root, &mut inspect)?;
    let task = ["--task", "digits-closed", "--shots", "0,2", "--n", "6", "--report"];
    output(root, flamingoc().arg("eval").arg(&artifact).args(task).arg(&answers))?;
    Ok(vec![artifact.join("report.html"), stages, scenarios, coverage, answers])
}
