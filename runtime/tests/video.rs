//! Videos through a program that stands for ffmpeg: what it is asked, and whatever it may answer.
#![cfg(unix)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use flamingo_runtime::image::Picture;
use flamingo_runtime::video::{Container, Decoder, Sampling, VideoError, container};

const LIMIT: Duration = Duration::from_secs(30);

/// A program that runs `script`, in a folder of its own.
fn program(folder: &Path, script: &str) -> PathBuf {
    let path = folder.join("ffmpeg");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Frames of a file as the program gives them.
fn frames(script: &str, max_frames: usize, limit: Duration) -> Result<Vec<Picture>, VideoError> {
    let folder = tempfile::tempdir().unwrap();
    let decoder = Decoder::new(program(folder.path(), script), limit);
    let mut frames = Vec::new();
    let sampling = Sampling { fps: 0.5, max_frames };
    let n_frames =
        decoder.frames(Path::new("-a b.mp4"), Container::Mov, sampling, &mut |frame| {
            frames.push(frame);
            Ok::<(), VideoError>(())
        })?;
    assert_eq!(n_frames, frames.len());
    Ok(frames)
}

const TWO: &str = r"printf 'P6\n2 1\n255\nabcdefP6\n1 1\n255\n\n \001'";

#[test]
fn frames_come_as_the_program_writes_them() {
    let found = frames(TWO, 8, LIMIT).unwrap();
    assert_eq!(found.iter().map(Picture::pixels).collect::<Vec<_>>(), [&b"abcdef"[..], b"\n \x01"]);
    assert_eq!(frames(TWO, 1, LIMIT).unwrap().len(), 1);
    assert_eq!(frames("exit 0", 8, LIMIT).unwrap().len(), 0);
    let endless = r"while :; do printf 'P6\n1 1\n255\nabc'; done";
    assert_eq!(frames(endless, 5, LIMIT).unwrap().len(), 5, "more than was asked for");
}

#[test]
fn the_program_is_told_to_open_this_file_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let said = folder.path().join("said");
    frames(&format!("printf '%s\\n' \"$@\" > {}", said.display()), 8, LIMIT).unwrap();
    let said = fs::read_to_string(said).unwrap();
    let expected = "-nostdin -hide_banner -loglevel error -protocol_whitelist file -f mov -i file:-a b.mp4 \
                    -map 0:v:0 -vf fps=0.5:round=up -frames:v 8 -f image2pipe -c:v ppm -pix_fmt rgb24 pipe:1";
    assert_eq!(said.trim().replace('\n', " "), expected);
}

#[test]
fn whatever_the_program_does_is_an_error_with_a_hint() {
    let table = [
        ("echo 'moov atom not found' >&2; exit 1", "failed: moov atom not found"),
        (r"printf 'P6\n2 1\n255\nabcdef'; echo cut >&2; exit 1", "failed: cut"),
        ("echo no picture at all", "expected frame 0 as PPM"),
        (r"printf 'P6\n2 1\n255\nabc'", "frame 0: picture of 2 x 1 pixels"),
        (r"printf 'P6\n2 1\n65535\nabcdef'", "expected frame 0 as PPM"),
        (r"printf 'P6\n99999 1\n255\n'", "found 99999 x 1 pixels"),
        (r"printf 'P6\n16384 16384\n255\n'", "found 16384 x 16384 pixels"),
        ("head -c 1000000 /dev/zero", "expected frame 0 as PPM"),
        ("head -c 10000000 /dev/zero >&2; exit 3", "failed: "),
    ];
    for (script, expected) in table {
        let error = frames(script, 8, LIMIT).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("\n\nhint: "), "{script}: {error}");
    }
    let missing = Decoder::new("/nowhere/ffmpeg", LIMIT);
    let sampling = Sampling { fps: 1.0, max_frames: 1 };
    let path = Path::new("a.mkv");
    let none = &mut |_| Ok::<(), VideoError>(());
    let error = missing.frames(path, Container::Matroska, sampling, none).unwrap_err();
    assert!(error.to_string().contains("apt install ffmpeg"), "{error}");
}

#[test]
fn a_program_that_hangs_is_killed() {
    let start = Instant::now();
    let limit = Duration::from_millis(200);
    for script in ["exec sleep 60", "exec >&-; exec sleep 60"] {
        let error = frames(script, 8, limit).unwrap_err();
        assert!(matches!(error, VideoError::TooSlow { .. }), "{script}: {error}");
    }
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn the_content_decides_what_a_file_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file.gif");
    for (content, expected) in [
        (&b"\0\0\0\x20ftypisom\0\0"[..], Some(Container::Mov)),
        (b"\0\0\0\x14ftypqt  ", Some(Container::Mov)),
        (b"\0\0\0\x20ftypavif", None),
        (b"\x1a\x45\xdf\xa3\x01", Some(Container::Matroska)),
        (b"RIFF\0\0\0\0AVI LIST", Some(Container::Avi)),
        (b"RIFF\0\0\0\0WEBPVP8 ", None),
        (b"#EXTM3U\nfile.ts", None),
        (b"", None),
    ] {
        fs::write(&path, content).unwrap();
        assert_eq!(container(&path).unwrap(), expected, "{content:?}");
    }
}
