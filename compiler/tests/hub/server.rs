//! A server that answers as the hub does: the list of a repository, small files by themselves, large ones by a redirect
//! to another place, pieces of files; and that misbehaves where a test asks it to.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The one commit of every repository.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server has, how it behaves, and what it was asked.
#[derive(Default)]
pub(crate) struct State {
    /// Files by repository and name.
    pub(crate) repositories: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    /// Requests without this token are refused.
    pub(crate) token: Option<String>,
    /// Bytes of a large file after which a connection is closed.
    pub(crate) cut_after: Option<usize>,
    /// Large files come with a wrong byte.
    pub(crate) corrupts: bool,
    /// Pretended instead of the hash.
    pub(crate) etag: Option<String>,
    /// Requests for large files: the name, and the first byte asked for. Those for one byte are left out.
    pub(crate) pieces: Vec<(String, usize)>,
    /// All requests.
    pub(crate) n_requests: usize,
}

/// A running server, which ends with the test's process.
pub(crate) struct Server {
    pub(crate) endpoint: String,
    pub(crate) state: Arc<Mutex<State>>,
}

impl Server {
    pub(crate) fn start() -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State::default()));
        let (shared, own) = (Arc::clone(&state), endpoint.clone());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (state, endpoint) = (Arc::clone(&shared), own.clone());
                thread::spawn(move || answer(stream, &state, &endpoint));
            }
        });
        Server { endpoint, state }
    }

    pub(crate) fn add(&self, repository: &str, name: &str, bytes: Vec<u8>) {
        let mut state = self.state.lock().unwrap();
        state.repositories.entry(repository.into()).or_default().insert(name.into(), bytes);
    }

    /// Adds the files of a folder.
    pub(crate) fn add_folder(&self, repository: &str, folder: &Path) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            self.add(repository, &name, fs::read(path).unwrap());
        }
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }
}

fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".pt")
}

/// One request a connection.
fn answer(stream: TcpStream, state: &Mutex<State>, endpoint: &str) {
    let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
    let request = lines.next().unwrap_or_default();
    let headers: BTreeMap<String, String> = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_once(": ").map(|(k, v)| (k.to_ascii_lowercase(), v.into())))
        .collect();
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut state = state.lock().unwrap();
    state.n_requests += 1;
    let (head, body) = respond(&mut state, &path, &headers, endpoint);
    drop(state);
    // The client may have seen enough.
    let _ = (&stream).write_all(head.as_bytes()).and_then(|()| (&stream).write_all(&body));
}

fn respond(
    state: &mut State,
    path: &str,
    headers: &BTreeMap<String, String>,
    endpoint: &str,
) -> (String, Vec<u8>) {
    let refused = state
        .token
        .as_ref()
        .is_some_and(|token| headers.get("authorization") != Some(&format!("Bearer {token}")));
    let pieces: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    match pieces[..] {
        _ if refused => status("401 Unauthorized"),
        ["api", "models", owner, name, "revision", "main" | COMMIT] => {
            match state.repositories.get(&format!("{owner}/{name}")) {
                None => status("404 Not Found"),
                Some(files) => {
                    let list: Vec<_> =
                        files.keys().map(|name| json!({"rfilename": name})).collect();
                    whole("", json!({"sha": COMMIT, "siblings": list}).to_string().into_bytes())
                }
            }
        }
        [owner, name, "resolve", COMMIT, file] | ["cdn", owner, name, file] => {
            let files = state.repositories.get(&format!("{owner}/{name}"));
            let Some(bytes) = files.and_then(|files| files.get(file)).cloned() else {
                return status("404 Not Found");
            };
            let etag = state.etag.clone().unwrap_or_else(|| hash(file, &bytes));
            if pieces[0] != "cdn" && is_large(file) {
                let location = format!("{endpoint}/cdn/{owner}/{name}/{file}");
                let head = format!(
                    "HTTP/1.1 302 Found\r\nLocation: {location}\r\nX-Linked-Etag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\n\
                     Content-Length: 0\r\nConnection: close\r\n\r\n"
                );
                return (head, Vec::new());
            }
            let first_and_last =
                headers.get("range").and_then(|range| range.strip_prefix("bytes="));
            let (first, last) =
                first_and_last.and_then(|range| range.split_once('-')).unwrap_or(("0", ""));
            piece(state, file, bytes, &etag, first.parse().unwrap(), last.parse().ok())
        }
        _ => status("404 Not Found"),
    }
}

/// Bytes of a file from `first` on.
fn piece(
    state: &mut State,
    file: &str,
    mut bytes: Vec<u8>,
    etag: &str,
    first: usize,
    last: Option<usize>,
) -> (String, Vec<u8>) {
    let size = bytes.len();
    if first >= size {
        return status("416 Range Not Satisfiable");
    }
    if state.corrupts && is_large(file) {
        bytes[size / 2] ^= 1;
    }
    let last = last.map_or(size - 1, |last| last.min(size - 1));
    let mut body = bytes[first..=last].to_vec();
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\nETag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes \
         {first}-{last}/{size}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    if is_large(file) && body.len() > 1 {
        state.pieces.push((file.to_owned(), first));
        body.truncate(state.cut_after.unwrap_or(usize::MAX));
    }
    (head, body)
}

fn status(line: &str) -> (String, Vec<u8>) {
    (format!("HTTP/1.1 {line}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"), Vec::new())
}

fn whole(more: &str, body: Vec<u8>) -> (String, Vec<u8>) {
    let len = body.len();
    (format!("HTTP/1.1 200 OK\r\n{more}Content-Length: {len}\r\nConnection: close\r\n\r\n"), body)
}

/// Large files are named by SHA-256, small ones as git does.
fn hash(name: &str, bytes: &[u8]) -> String {
    let hex = |digest: &[u8]| digest.iter().map(|byte| format!("{byte:02x}")).collect();
    match is_large(name) {
        true => hex(&Sha256::digest(bytes)),
        false => {
            let mut hasher = Sha1::new();
            hasher.update(format!("blob {}\0", bytes.len()));
            hasher.update(bytes);
            hex(&hasher.finalize())
        }
    }
}
