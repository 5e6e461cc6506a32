//! Frames of MP4, MOV, WebM, MKV and AVI files, decoded by the program `ffmpeg`.
//!
//! The content of a file decides what it is, and ffmpeg is told: a playlist that calls itself a video
//! is not opened, nor anything that a file refers to. Frames come over a pipe as PPM pictures,
//! each checked before memory is taken for it, and one at a time.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::image::{MAX_BYTES, MAX_SIDE, Mode, Picture};

/// How long a file may take.
const TIME_LIMIT: Duration = Duration::from_secs(120);

/// Most bytes of ffmpeg's words that are read.
const MAX_WORDS: u64 = 4096;

/// Most bytes of a number in the header of a frame.
const MAX_WORD_LEN: u64 = 16;

/// A kind of file, by the name that ffmpeg has for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// MP4, MOV.
    Mov,
    /// WebM, MKV.
    Matroska,
    /// AVI.
    Avi,
}

/// Why a video could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VideoError {
    /// There is no ffmpeg.
    #[error(
        "video `{path}`: expected the program `{program}`, which decodes such files, found none\n\n\
         hint: install it (`apt install ffmpeg`), or give an animated GIF, WebP or PNG, or the frames as \
         picture files"
    )]
    NoProgram {
        /// The file.
        path: PathBuf,
        /// The program.
        program: String,
    },
    /// ffmpeg, or the pipe to it, failed.
    #[error("video `{path}`: {reason}\n\nhint: try `ffmpeg -i` on the file, or re-encode it")]
    Broken {
        /// The file.
        path: PathBuf,
        /// What ffmpeg says, or what came instead of a frame.
        reason: String,
    },
    /// It took too long.
    #[error(
        "video `{path}`: expected its frames within {limit_s} s, found more work\n\n\
         hint: cut the part that matters out of it"
    )]
    TooSlow {
        /// The file.
        path: PathBuf,
        /// The limit in seconds.
        limit_s: u64,
    },
    /// Frames are too large.
    #[error(
        "video `{path}`: expected frames of at most {MAX_SIDE} pixels a side and {MAX_BYTES} bytes, \
         found {width} x {height} pixels\n\nhint: scale the video down"
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
    },
}

/// Which frames of a file are wanted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Frames a second, above 0: those shown at 0, 1 / fps, 2 / fps, … seconds.
    pub fps: f32,
    /// Most frames.
    pub max_frames: usize,
}

/// The container of a file, by its first bytes; `None` if it is none that is known.
///
/// # Errors
/// If the file cannot be read.
pub fn container(path: &Path) -> io::Result<Option<Container>> {
    let mut start = Vec::new();
    File::open(path)?.take(12).read_to_end(&mut start)?;
    Ok(match start.as_slice() {
        // Still pictures use the container of MP4 too.
        [_, _, _, _, b'f', b't', b'y', b'p', brand @ ..]
            if [&b"avif"[..], b"heic", b"heix", b"mif1"].contains(&brand) =>
        {
            None
        }
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => Some(Container::Mov),
        [0x1a, 0x45, 0xdf, 0xa3, ..] => Some(Container::Matroska),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'A', b'V', b'I', b' '] => Some(Container::Avi),
        _ => None,
    })
}

/// The program that decodes videos.
#[derive(Clone, Debug)]
pub struct Decoder {
    program: OsString,
    time_limit: Duration,
}

impl Default for Decoder {
    fn default() -> Decoder {
        Decoder::new("ffmpeg", TIME_LIMIT)
    }
}

impl Decoder {
    /// A program that takes ffmpeg's arguments, and how long it may take for a file.
    pub fn new(program: impl Into<OsString>, time_limit: Duration) -> Decoder {
        Decoder { program: program.into(), time_limit }
    }

    /// Gives frames to `on_frame`, in the order of the video; their number.
    ///
    /// # Errors
    /// [`VideoError`], or the first error of `on_frame`.
    pub fn frames<E: From<VideoError>>(
        &self,
        path: &Path,
        container: Container,
        sampling: Sampling,
        on_frame: &mut dyn FnMut(Picture) -> Result<(), E>,
    ) -> Result<usize, E> {
        let mut child = self.start(path, container, sampling)?;
        let (frames, words) = (child.stdout.take(), child.stderr.take());
        let child = Mutex::new(child);
        let (running, ended) = mpsc::channel::<()>();
        let broken = |reason| VideoError::Broken { path: path.to_owned(), reason };
        std::thread::scope(|scope| {
            let watch = scope.spawn(|| self.kill_when_late(&child, ended));
            let listen = scope.spawn(|| words.map(said).unwrap_or_default());
            let frames = frames.ok_or_else(|| broken("no pipe".into()));
            let result = frames.map_err(E::from).and_then(|frames| {
                read_frames(path, BufReader::new(frames), sampling.max_frames, on_frame)
            });
            if !matches!(result, Ok(n_frames) if n_frames < sampling.max_frames) {
                // Nothing more is read; a program that has ended cannot be killed, which is no trouble.
                let _ = lock(&child).kill();
            }
            let is_success = wait(&child);
            drop(running);
            let is_late = watch.join().unwrap_or(false);
            let words = listen.join().unwrap_or_default();
            let limit_s = self.time_limit.as_secs();
            match result {
                _ if is_late => Err(VideoError::TooSlow { path: path.to_owned(), limit_s }.into()),
                Ok(n_frames) if n_frames < sampling.max_frames && !is_success => {
                    let program = self.program.display();
                    Err(broken(format!("`{program}` failed: {}", words.trim())).into())
                }
                result => result,
            }
        })
    }

    fn start(
        &self,
        path: &Path,
        container: Container,
        sampling: Sampling,
    ) -> Result<Child, VideoError> {
        let demuxer = match container {
            Container::Mov => "mov",
            Container::Matroska => "matroska",
            Container::Avi => "avi",
        };
        // With the protocol named, no path is an option or an address.
        let mut input = OsString::from("file:");
        input.push(path);
        // A frame is taken when it is the one on show at that time.
        let filter = format!("fps={}:round=up", sampling.fps);
        let mut command = Command::new(&self.program);
        command.args(["-nostdin", "-hide_banner", "-loglevel", "error"]);
        command.args(["-protocol_whitelist", "file", "-f", demuxer, "-i"]).arg(input);
        command.args(["-map", "0:v:0", "-vf", &filter]);
        command.args(["-frames:v", &sampling.max_frames.to_string()]);
        command.args(["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "pipe:1"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => VideoError::NoProgram {
                path: path.to_owned(),
                program: self.program.display().to_string(),
            },
            _ => VideoError::Broken { path: path.to_owned(), reason: error.to_string() },
        })
    }

    /// Waits for the end of work; kills the program, and says so, if that does not come in time.
    fn kill_when_late(&self, child: &Mutex<Child>, ended: mpsc::Receiver<()>) -> bool {
        let is_late = ended.recv_timeout(self.time_limit) == Err(RecvTimeoutError::Timeout);
        if is_late {
            let _ = lock(child).kill();
        }
        is_late
    }
}

fn lock(child: &Mutex<Child>) -> std::sync::MutexGuard<'_, Child> {
    child.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for the end of the program, while others may kill it; whether it succeeded.
fn wait(child: &Mutex<Child>) -> bool {
    loop {
        let status = lock(child).try_wait();
        match status {
            Ok(None) => std::thread::sleep(Duration::from_millis(2)),
            Ok(Some(status)) => return status.success(),
            Err(_) => return false,
        }
    }
}

/// What the program says; all of it is read, so that it never waits, but only the start is kept.
fn said(mut words: impl Read) -> String {
    let mut start = Vec::new();
    let _ = words.by_ref().take(MAX_WORDS).read_to_end(&mut start);
    let _ = io::copy(&mut words, &mut io::sink());
    String::from_utf8_lossy(&start).into_owned()
}

/// Reads PPM pictures one after the other, at most `max_frames`; their number.
fn read_frames<E: From<VideoError>>(
    path: &Path,
    mut pipe: impl BufRead,
    max_frames: usize,
    on_frame: &mut dyn FnMut(Picture) -> Result<(), E>,
) -> Result<usize, E> {
    let broken = |reason: String| VideoError::Broken { path: path.to_owned(), reason };
    for n_frames in 0..max_frames {
        match pipe.fill_buf() {
            Ok([]) => return Ok(n_frames),
            Ok(_) => {}
            Err(error) => return Err(broken(error.to_string()).into()),
        }
        let header = [(); 4].map(|()| word(&mut pipe));
        let [magic, width, height, maximum] = header.each_ref().map(String::as_str);
        let (Ok(width), Ok(height), ("P6", "255")) =
            (width.parse::<usize>(), height.parse::<usize>(), (magic, maximum))
        else {
            return Err(broken(format!("expected frame {n_frames} as PPM, got {header:?}")).into());
        };
        let n_bytes = width.checked_mul(height).and_then(|n| n.checked_mul(3));
        let n_bytes = n_bytes.filter(|n| width.max(height) <= MAX_SIDE && *n <= MAX_BYTES);
        let Some(n_bytes) = n_bytes else {
            return Err(VideoError::TooLarge { path: path.to_owned(), width, height }.into());
        };
        let mut pixels = Vec::new();
        let read = pipe.by_ref().take(n_bytes as u64).read_to_end(&mut pixels);
        read.map_err(|error| broken(error.to_string()))?;
        let picture = Picture::new(width, height, Mode::Rgb, pixels);
        on_frame(picture.map_err(|error| broken(format!("frame {n_frames}: {error}")))?)?;
    }
    Ok(max_frames)
}

/// The bytes up to a white space, which is taken too; empty if there are too many.
fn word(pipe: &mut impl BufRead) -> String {
    let mut word = String::new();
    for byte in pipe.by_ref().take(MAX_WORD_LEN).bytes() {
        match byte {
            Ok(byte) if byte.is_ascii_whitespace() => return word,
            Ok(byte) => word.push(char::from(byte)),
            Err(_) => break,
        }
    }
    String::new()
}
