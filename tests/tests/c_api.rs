//! The C example, compiled by the system's compiler, as C and as C++, and run on the demo model.

use std::path::{Path, PathBuf};
use std::process::Command;

use flamingo_tests::{compiled, tiny_scenes};

/// The folder that cargo put the C library into.
fn library_folder() -> PathBuf {
    let program = std::env::current_exe().expect("the path of this test");
    let places = program.ancestors().skip(1).take(2);
    let found = places.map(Path::to_owned).find(|dir| dir.join("libflamingo_capi.so").is_file());
    found.unwrap_or_else(|| panic!("no libflamingo_capi.so beside {}", program.display()))
}

fn capi() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../runtime/capi")
}

/// Compiles the example and runs it; stdout and stderr.
fn run(compiler: &[&str], arguments: &[&str]) -> (bool, String, String) {
    let (scratch, library) = (tempfile::tempdir().unwrap(), library_folder());
    let program = scratch.path().join("answer");
    let mut build = Command::new(compiler[0]);
    build.args(&compiler[1..]).args(["-Wall", "-Werror", "-I"]).arg(capi().join("include"));
    build.arg(capi().join("examples/answer.c")).args(["-x", "none"]).arg("-L").arg(&library);
    build.arg("-lflamingo_capi").arg("-o").arg(&program);
    let built = build.output().unwrap_or_else(|error| panic!("{compiler:?}: {error}"));
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let output = Command::new(&program)
        .args(arguments)
        .env("LD_LIBRARY_PATH", &library)
        .output()
        .expect("the example runs");
    let [stdout, stderr] =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    (output.status.success(), stdout, stderr)
}

#[test]
fn the_c_example_answers() {
    let (_scratch, artifact) = compiled(&tiny_scenes());
    let picture = tiny_scenes().join("images/single-188.png");
    let arguments = [artifact.to_str().unwrap(), picture.to_str().unwrap()];
    let arguments = [&arguments[..], &["what color ?", "what color ?"]].concat();
    for compiler in [&["cc", "-std=c99"][..], &["c++", "-x", "c++"]] {
        let (is_ok, stdout, stderr) = run(compiler, &arguments);
        assert!(is_ok, "{stderr}");
        let lines: Vec<&str> = stdout.lines().collect();
        assert_eq!((lines.len(), lines[0], lines[2]), (4, "orange", "orange"), "{stdout}");
        let answers = [lines[1], lines[3]].map(|line| {
            serde_json::from_str::<serde_json::Value>(line).expect("JSON after the text")
        });
        assert_eq!(answers[0]["cache"]["visual_misses"], 1);
        assert_eq!(answers[1]["cache"]["visual_hits"], 1);
        assert_eq!(answers[0]["n_prompt_tokens"], answers[1]["n_prompt_tokens"], "rewound");
    }
}

#[test]
fn the_c_example_says_what_is_wrong() {
    let (is_ok, _, stderr) = run(&["cc"], &["nothing.flamingo", "a.png", "what color ?"]);
    assert!(!is_ok && stderr.contains("nothing.flamingo"), "{stderr}");
    let (_scratch, artifact) = compiled(&tiny_scenes());
    let artifact = artifact.to_str().unwrap();
    let (is_ok, _, stderr) = run(&["cc"], &[artifact, "nothing.png", "what color ?"]);
    assert!(!is_ok && stderr.contains("nothing.png"), "{stderr}");
    let (is_ok, _, stderr) = run(&["cc"], &[artifact, "a.png", "\"]}"]);
    assert!(!is_ok && stderr.contains("turn: "), "{stderr}");
}
