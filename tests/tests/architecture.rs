//! What ARCHITECTURE.md and README.md say must be so, held by reading the repository: arrows
//! between crates, places of unsafe code and of globals, words that no source has, what the
//! decoder graph never computes, files and verbs that the pages name.
//!
//! Each rule is a function from text to the problems it finds, and each is shown to find one.

#[path = "architecture/rust_text.rs"]
mod rust_text;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use flamingo_ir::{Fact, Graph, op::Linear};
use flamingo_models::Source;
use flamingo_tests::golden_folders;
use flamingoc::passes::optimise;
use flamingoc::scheme::Scheme;

use rust_text::{code_of, has_word, is_word, without_space};

/// Crates by folder: package, and the packages of this workspace that it may use.
const ARROWS: [(&str, &str, &[&str]); 12] = [
    ("ir", "flamingo-ir", &[]),
    ("kernels", "flamingo-kernels", &[]),
    ("models", "flamingo-models", &["flamingo-ir"]),
    ("models/scenes", "flamingo-scenes", &[]),
    ("models/data", "flamingo-data", &[]),
    ("models/train", "flamingo-train", &["flamingo-data", "flamingo-scenes"]),
    ("runtime", "flamingo-runtime", &["flamingo-ir", "flamingo-kernels", "flamingo-models"]),
    ("runtime/capi", "flamingo-capi", &["flamingo-runtime"]),
    (
        "compiler",
        "flamingoc",
        &["flamingo-ir", "flamingo-models", "flamingo-scenes", "flamingo-runtime"],
    ),
    ("tests", "flamingo-tests", ALL),
    ("benches", "flamingo-benches", ALL),
    ("xtask", "xtask", &[]),
];

const ALL: &[&str] = &[
    "flamingo-ir",
    "flamingo-kernels",
    "flamingo-models",
    "flamingo-scenes",
    "flamingo-data",
    "flamingo-train",
    "flamingo-runtime",
    "flamingo-capi",
    "flamingoc",
];

/// Where unsafe code may stand: files, and folders ending in `/`.
const UNSAFE: [&str; 4] = [
    "kernels/src/arch/",
    "models/src/map.rs",
    "runtime/capi/src/ffi.rs",
    "runtime/src/ort/placement.rs",
];

/// Files that may lift the ban on unsafe code for a part of themselves.
const LIFTS_BAN: [&str; 4] = [
    "kernels/src/lib.rs",
    "models/src/map.rs",
    "runtime/capi/src/lib.rs",
    "runtime/src/ort/placement.rs",
];

/// Crate roots with the ban on unsafe code they carry.
const BANS: [(&str, &str); 10] = [
    ("ir/src/lib.rs", "#![forbid(unsafe_code)]"),
    ("kernels/src/lib.rs", "#![deny(unsafe_code)]"),
    ("models/src/lib.rs", "#![deny(unsafe_code)]"),
    ("models/scenes/src/lib.rs", "#![forbid(unsafe_code)]"),
    ("models/data/src/lib.rs", "#![forbid(unsafe_code)]"),
    ("models/train/src/lib.rs", "#![forbid(unsafe_code)]"),
    ("runtime/src/lib.rs", "#![deny(unsafe_code)]"),
    ("runtime/capi/src/lib.rs", "#![deny(unsafe_code)]"),
    ("compiler/src/lib.rs", "#![forbid(unsafe_code)]"),
    ("tests/src/lib.rs", "#![forbid(unsafe_code)]"),
];

/// The globals of the crates: a process can load one ONNX Runtime, and a program has one allocator. Tests may share
/// what is costly to make.
const GLOBALS: [&str; 2] = ["runtime/src/ort/library.rs", "models/train/src/main.rs"];

/// Code that no source has, without white space: unfinished work, skipped tests, silenced lints.
const FORBIDDEN: [&str; 5] = ["todo!(", "unimplemented!(", "#[ignore", "#[allow(", "#![allow("];

/// Ops of the decoder that may read keys and values of media.
const MEDIA_READERS: [&str; 2] = ["CrossAttention", "GatedCrossAttention"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").into()
}

fn read(path: &str) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Rust files of all crates: path from the root, and text.
fn sources() -> Vec<(String, String)> {
    let mut paths = Vec::new();
    for (folder, _, _) in ARROWS {
        collect_sources(&root().join(folder), &mut paths);
    }
    paths.sort();
    paths.dedup();
    let name = |path: &PathBuf| {
        let path = path.strip_prefix(root()).expect("a path below the root");
        path.components().map(|c| c.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/")
    };
    let files: Vec<String> = paths.iter().map(name).collect();
    assert!(files.len() > 100, "sources are missing: {files:?}");
    files.into_iter().map(|file| (file.clone(), read(&file))).collect()
}

fn collect_sources(folder: &Path, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder of the workspace") {
        let path = entry.expect("an entry of the folder").path();
        match path.is_dir() {
            true if path.ends_with("target") => {}
            true => collect_sources(&path, paths),
            false if path.extension().is_some_and(|extension| extension == "rs") => {
                paths.push(path);
            }
            false => {}
        }
    }
}

fn is_in(file: &str, places: &[&str]) -> bool {
    places.iter().any(|place| file == *place || (place.ends_with('/') && file.starts_with(place)))
}

/// Fails with all problems, one a line.
fn assert_none(problems: Vec<String>) {
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

fn unsafe_problem(file: &str, source: &str) -> Option<String> {
    let code = code_of(source);
    let lifts = ["allow(unsafe_code", "expect(unsafe_code", "warn(unsafe_code"];
    if lifts.iter().any(|lift| without_space(&code).contains(lift)) && !is_in(file, &LIFTS_BAN) {
        return Some(format!("{file}: lifts the ban on unsafe code"));
    }
    let found = has_word(&code, "unsafe") && !is_in(file, &UNSAFE);
    found.then(|| format!("{file}: unsafe code outside of {UNSAFE:?}"))
}

fn global_problem(file: &str, source: &str) -> Option<String> {
    let code = code_of(source);
    let words = ["static", "thread_local", "lazy_static", "OnceLock", "LazyLock", "OnceCell"];
    let found = words.into_iter().find(|word| has_word(&code, word))?;
    (file.contains("/src/") && !is_in(file, &GLOBALS))
        .then(|| format!("{file}: `{found}`, a global"))
}

fn forbidden_problem(file: &str, source: &str) -> Option<String> {
    let code = without_space(&code_of(source));
    let found = FORBIDDEN.into_iter().find(|forbidden| code.contains(forbidden))?;
    Some(format!("{file}: `{found}`"))
}

fn opening_problem(file: &str, source: &str) -> Option<String> {
    let opening = source.lines().next().unwrap_or_default();
    let says_something = opening.strip_prefix("//! ").is_some_and(|text| !text.trim().is_empty());
    (!says_something).then(|| format!("{file}: does not open with `//!` and what it holds"))
}

fn kernels_problem(file: &str, source: &str) -> Option<String> {
    let found = file.starts_with("compiler/src/") && has_word(&code_of(source), "flamingo_kernels");
    found.then(|| format!("{file}: the compiler runs kernels; that is the runtime's work"))
}

fn check_sources(rule: fn(&str, &str) -> Option<String>) {
    assert_none(sources().iter().filter_map(|(file, source)| rule(file, source)).collect());
}

/// `bad` breaks the rule in an ordinary file, `good` does not.
fn check_rule(rule: fn(&str, &str) -> Option<String>, good: &[&str], bad: &[&str]) {
    let file = "compiler/src/example.rs";
    for source in good {
        assert_eq!(rule(file, source), None, "{source}");
    }
    for source in bad {
        assert!(rule(file, source).is_some(), "{source}");
    }
}

#[test]
fn unsafe_code_stands_only_where_it_may() {
    let good = ["// unsafe\nfn f() { g(\"unsafe\") }", "#![forbid(unsafe_code)]"];
    check_rule(unsafe_problem, &good, &["unsafe fn f() {}", "#[expect(unsafe_code)] mod m;"]);
    assert_eq!(unsafe_problem("kernels/src/arch/avx2.rs", "unsafe fn f() {}"), None);
    check_sources(unsafe_problem);
}

#[test]
fn crate_roots_ban_unsafe_code() {
    let missing = |(file, ban): &(&str, &str)| {
        let found = without_space(&code_of(&read(file))).contains(ban);
        (!found).then(|| format!("{file}: expected `{ban}`"))
    };
    assert!(missing(&("xtask/Cargo.toml", "#![forbid(unsafe_code)]")).is_some());
    assert_none(BANS.iter().filter_map(missing).collect());
}

#[test]
fn there_are_no_globals() {
    let good = ["fn f(x: &'static str) {}", "// static X: u8 = 0;"];
    check_rule(global_problem, &good, &["static X: u8 = 0;", "thread_local! { }"]);
    check_sources(global_problem);
}

#[test]
fn nothing_is_unfinished_skipped_or_silenced() {
    let good = ["// todo!()", "#[expect(dead_code, reason = \"later\")] fn f() {}"];
    let bad = ["fn f() { todo!() }", "# [ignore]\nfn f() {}", "#![allow(dead_code)]"];
    check_rule(forbidden_problem, &good, &bad);
    check_sources(forbidden_problem);
}

#[test]
fn every_file_says_what_it_holds() {
    check_rule(opening_problem, &["//! Rows.\n"], &["", "use std::fs;", "//!\n//! Rows."]);
    check_sources(opening_problem);
}

#[test]
fn the_compiler_leaves_kernels_to_the_runtime() {
    check_rule(kernels_problem, &["// flamingo_kernels"], &["use flamingo_kernels::Kernels;"]);
    check_sources(kernels_problem);
}

/// Packages that a manifest names in any of its dependency tables.
fn packages_used(manifest: &str) -> BTreeSet<String> {
    let manifest: toml::Table = manifest.parse().expect("a manifest is TOML");
    let mut used = BTreeSet::new();
    collect_packages(&manifest, &mut used);
    used
}

fn collect_packages(table: &toml::Table, used: &mut BTreeSet<String>) {
    for (key, value) in table {
        let Some(inner) = value.as_table() else { continue };
        if !key.ends_with("dependencies") {
            collect_packages(inner, used);
            continue;
        }
        for (name, requirement) in inner {
            let package = requirement.get("package").and_then(toml::Value::as_str);
            used.insert(package.unwrap_or(name).to_owned());
        }
    }
}

fn arrow_problems(folder: &str, manifest: &str) -> Vec<String> {
    let Some((_, _, allowed)) = ARROWS.iter().find(|(known, _, _)| *known == folder) else {
        return vec![format!("{folder}: a crate that ARCHITECTURE.md does not know")];
    };
    let ours: BTreeSet<&str> = ARROWS.iter().map(|(_, package, _)| *package).collect();
    let used = packages_used(manifest);
    let wrong = used.iter().filter(|p| ours.contains(p.as_str()) && !allowed.contains(&p.as_str()));
    wrong.map(|package| format!("{folder}: must not use `{package}`")).collect()
}

#[test]
fn crates_use_only_what_they_may() {
    let reversed = "[dev-dependencies]\nflamingoc = { workspace = true }";
    assert_eq!(arrow_problems("runtime", reversed).len(), 1);
    let renamed = "[target.'cfg(unix)'.dependencies]\ngraph = { package = \"flamingo-ir\" }";
    assert_eq!(arrow_problems("kernels", renamed).len(), 1);
    assert_eq!(arrow_problems("models", renamed), Vec::<String>::new());
    assert_eq!(arrow_problems("plugins", "").len(), 1);

    let workspace: toml::Table = read("Cargo.toml").parse().expect("a manifest is TOML");
    let members = workspace["workspace"]["members"].as_array().expect("a list of folders");
    assert_eq!(members.len(), ARROWS.len(), "{members:?}");
    let folders = members.iter().filter_map(toml::Value::as_str);
    assert_none(
        folders.flat_map(|f| arrow_problems(f, &read(&format!("{f}/Cargo.toml")))).collect(),
    );
}

/// The crate that reaches a network belongs to the compiler: what runs on a device has none.
#[test]
fn only_the_compiler_reaches_a_network() {
    let problem = |folder: &str, manifest: &str| {
        let found = packages_used(manifest).iter().any(|p| p == "hf-hub" || p == "ureq");
        (found && folder != "compiler").then(|| format!("{folder}: a crate that reaches a network"))
    };
    assert!(problem("runtime", "[dependencies]\nhf-hub = { workspace = true }").is_some());
    let manifest = |folder: &str| read(&format!("{folder}/Cargo.toml"));
    assert_none(ARROWS.iter().filter_map(|(f, _, _)| problem(f, &manifest(f))).collect());
}

/// Nodes that read what belongs to pictures, and may not.
fn media_problems(graph: &Graph) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, value) in graph.inputs() {
        if name.starts_with("pixel_values") || name.starts_with("visual_tokens") {
            problems.push(format!("input \"{name}\" of graph \"{}\"", graph.name));
        }
        if !name.starts_with("media_k.") && !name.starts_with("media_v.") {
            continue;
        }
        let readers = graph.nodes().iter().filter(|node| node.inputs.contains(value));
        let wrong = readers.filter(|node| !MEDIA_READERS.contains(&node.op.name()));
        problems
            .extend(wrong.map(|n| format!("node \"{}\" ({}) reads {name}", n.name, n.op.name())));
    }
    problems
}

#[test]
fn the_decoder_computes_nothing_about_pictures() {
    let mut graph = Graph::new("decoder");
    let media = graph.input("media_k.0", Fact::f32([3, 2]));
    let weight = graph.input("weight", Fact::f32([4, 2]));
    graph.add("again", Linear::default(), &[media, weight]).unwrap();
    graph.input("visual_tokens", Fact::f32([3, 2]));
    assert_eq!(media_problems(&graph).len(), 2);

    let mut problems = Vec::new();
    for folder in golden_folders() {
        let source = Source::open(&folder).unwrap();
        let decoder = source.graphs().unwrap().decoder;
        problems.extend(media_problems(&decoder));
        let (optimised, _) =
            optimise(decoder, &source.parts, &Scheme::default(), None, &mut |_, _| {}).unwrap();
        problems.extend(media_problems(&optimised));
    }
    assert_none(problems);
}

/// What stands between backticks outside of code blocks.
fn code_spans(page: &str) -> Vec<&str> {
    let mut spans = Vec::new();
    for (index, text) in page.split("```").enumerate() {
        if index % 2 == 0 {
            spans.extend(text.split('`').skip(1).step_by(2));
        }
    }
    spans
}

/// Files and folders that a page names: code spans with a slash and nothing but path characters.
fn paths_named(page: &str) -> BTreeSet<&str> {
    let roots: BTreeSet<&str> = ARROWS.iter().map(|(folder, _, _)| *folder).collect();
    let is_path = |span: &&str| {
        let plain = span.chars().all(|c| is_word(c) || "/.-".contains(c));
        plain && span.split_once('/').is_some_and(|(first, _)| roots.contains(first))
    };
    code_spans(page).into_iter().filter(is_path).collect()
}

#[test]
fn pages_name_files_that_exist() {
    let example = "`ir/src/op.rs`, `ir/src/gone.rs` and `a/b`\n```\n`ir/src/code.rs`\n```";
    assert_eq!(paths_named(example), BTreeSet::from(["ir/src/op.rs", "ir/src/gone.rs"]));
    for (page, least) in [("ARCHITECTURE.md", 40), ("CONTRIBUTING.md", 5), ("README.md", 1)] {
        let text = read(page);
        let paths = paths_named(&text);
        assert!(paths.len() >= least, "{page}: {paths:?}");
        let gone = paths.into_iter().filter(|path| !root().join(path).exists());
        assert_none(gone.map(|path| format!("{page}: `{path}` does not exist")).collect());
    }
}

/// Verbs of the table below `## Verbs`.
fn readme_verbs(readme: &str) -> BTreeSet<String> {
    let section = readme.split("\n## ").find(|section| section.starts_with("Verbs"));
    let rows = section.unwrap_or_default().lines().filter_map(|line| line.strip_prefix("| `"));
    rows.filter_map(|row| row.split(['`', ' ']).next()).map(str::to_owned).collect()
}

/// Verbs of the command line: variants of `enum Verb`, by their modules.
fn cli_verbs(source: &str) -> BTreeSet<String> {
    let code = code_of(source);
    let variants = code.split_once("enum Verb").and_then(|(_, rest)| rest.split_once('}'));
    let variants = variants.map(|(variants, _)| variants).unwrap_or_default();
    let modules = variants.split(',').filter_map(|variant| variant.split_once('('));
    modules.filter_map(|(_, inner)| inner.split_once("::")).map(|(m, _)| m.to_owned()).collect()
}

/// Verbs in the shell lines of a page.
fn verbs_used(page: &str) -> BTreeMap<String, String> {
    let blocks = page.split("```").skip(1).step_by(2);
    let lines =
        blocks.flat_map(str::lines).filter_map(|line| line.trim().strip_prefix("flamingoc "));
    lines.filter_map(|line| Some((line.split(' ').next()?.to_owned(), line.to_owned()))).collect()
}

#[test]
fn the_readme_lists_the_verbs_that_exist() {
    let example = "# x\n\n## Verbs\n\n| verb | does |\n|---|---|\n| `run ARTIFACT` | … |\n\n## Next\n| `no` |";
    assert_eq!(readme_verbs(example), BTreeSet::from(["run".to_owned()]));
    let example = "enum Verb {\n    /// Runs.\n    Run(run::Run),\n    Tell(tell::Tell),\n}";
    assert_eq!(cli_verbs(example), BTreeSet::from(["run".to_owned(), "tell".to_owned()]));
    assert!(verbs_used("```sh\nflamingoc fly x\n```").contains_key("fly"));

    let (readme, verbs) = (read("README.md"), cli_verbs(&read("compiler/src/cli.rs")));
    assert!(verbs.contains("compile"), "{verbs:?}");
    assert_eq!(readme_verbs(&readme), verbs);
    for (verb, line) in verbs_used(&readme) {
        assert!(verbs.contains(&verb), "README.md: `flamingoc {line}`");
    }
    for verb in verbs {
        let file = root().join(format!("compiler/src/cli/{verb}.rs"));
        assert!(file.is_file(), "{}", file.display());
    }
}
