//! Pictures that later runs find, and videos through a program that stands for ffmpeg.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use flamingo_runtime::image;
use serde_json::{Value, json};

use super::{Demo, at, parse, picture};

/// Runs a prompt with environment variables; exit status and streams.
fn run(demo: &Demo, prompt: &Path, arguments: &[&str], variables: &[(&str, &Path)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flamingoc"));
    command.arg("run").arg(demo.path()).arg("--prompt-file").arg(prompt).arg("--json");
    command.args(arguments).env_remove("FLAMINGO_CACHE_DIR");
    command.envs(variables.iter().copied()).output().unwrap()
}

/// Text, and the counts of the cache.
#[track_caller]
fn answer(output: &Output) -> (Value, Value) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let answer = parse(&String::from_utf8_lossy(&output.stdout));
    (at(&answer, "/tokens").clone(), at(&answer, "/cache").clone())
}

fn write_prompt(folder: &Path, segments: &Value) -> PathBuf {
    let path = folder.join("prompt.json");
    let prompt = json!({ "segments": segments, "max_new_tokens": 3 });
    fs::write(&path, prompt.to_string()).unwrap();
    path
}

fn counts(hits: u32, misses: u32, disk_hits: u32) -> Value {
    json!({
        "visual_hits": hits, "visual_misses": misses, "visual_disk_hits": disk_hits,
        "prefix_tokens_reused": 0,
    })
}

#[test]
fn pictures_are_found_by_later_runs() {
    let (demo, folder) = (Demo::new(), tempfile::tempdir().unwrap());
    let image = json!({ "image": picture("single-141.png") });
    let prompt = write_prompt(folder.path(), &json!([image, { "text": "what color ?" }, image]));
    let dir = folder.path().join("cache");
    let flags = ["--cache-dir", dir.to_str().unwrap(), "--cache-limit", "1MB"];
    let (tokens, cache) = answer(&run(&demo, &prompt, &flags, &[]));
    assert_eq!(cache, counts(1, 1, 0));
    assert_eq!(answer(&run(&demo, &prompt, &flags, &[])), (tokens.clone(), counts(2, 0, 1)));

    let variable = [("FLAMINGO_CACHE_DIR", dir.as_path())];
    let by_variable = answer(&run(&demo, &prompt, &[], &variable));
    assert_eq!(by_variable, (tokens.clone(), counts(2, 0, 1)));
    let without = answer(&run(&demo, &prompt, &["--no-cache"], &variable));
    assert_eq!(without, (tokens.clone(), counts(0, 2, 0)));

    let unusable = run(&demo, &prompt, &["--cache-dir", "/dev/null/cache"], &[]);
    assert_eq!(answer(&unusable), (tokens, counts(1, 1, 0)));
    let words = String::from_utf8_lossy(&unusable.stderr).into_owned();
    assert_eq!(words.matches("warning: /dev/null/cache: ").count(), 1, "{words}");
    let wrong = run(&demo, &prompt, &["--cache-limit", "much"], &[]);
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn a_video_is_its_frames() {
    let (demo, folder) = (Demo::new(), tempfile::tempdir().unwrap());
    let frames: Vec<String> = (0..3).map(|n| picture(&format!("video-000-f{n}.png"))).collect();
    let question = json!({ "text": "how many times ?" });
    let dir = folder.path().join("cache");
    let flags = ["--cache-dir", dir.to_str().unwrap()];
    let prompt = write_prompt(folder.path(), &json!([{ "video": frames }, question]));
    let (tokens, _) = answer(&run(&demo, &prompt, &flags, &[]));

    let mut stream = Vec::new();
    for frame in &frames {
        let picture = image::open(Path::new(frame)).unwrap();
        let rgb = picture.to_rgb();
        stream.extend(format!("P6\n{} {}\n255\n", rgb.width(), rgb.height()).into_bytes());
        stream.extend(rgb.pixels());
    }
    fs::write(folder.path().join("frames"), stream).unwrap();
    fs::write(folder.path().join("clip.mp4"), b"\0\0\0\x20ftypisom").unwrap();
    let segments = json!([{ "video": "clip.mp4", "fps": 2, "frames": 8 }, question]);
    let prompt = write_prompt(folder.path(), &segments);
    let programs = folder.path().join("programs");
    fs::create_dir(&programs).unwrap();
    let path = [("PATH", programs.as_path())];
    let missing = run(&demo, &prompt, &flags, &path);
    let words = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert_eq!(missing.status.code(), Some(2));
    assert!(words.contains("clip.mp4") && words.contains("apt install ffmpeg"), "{words}");

    let script = format!("#!/bin/sh\nexec /bin/cat {}\n", folder.path().join("frames").display());
    fs::write(programs.join("ffmpeg"), script).unwrap();
    let executable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(programs.join("ffmpeg"), executable).unwrap();
    let found = answer(&run(&demo, &prompt, &flags, &path));
    assert_eq!(found, (tokens, counts(1, 0, 1)), "the same pixels are the same medium");
}
