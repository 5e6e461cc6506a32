//! Repositories of the hub in the cache that is shared with Python, downloaded where they are not there yet.
//!
//! Files of a repository come from one commit, so they fit each other whatever happens to its branches meanwhile. What
//! was downloaded is hashed before anything reads it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use flamingo_models::checkpoint::{CheckpointError, WEIGHT_FILES, shard_names};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::{Download, HubId, Settings};

/// How often a broken connection is made again.
const RETRIES: u32 = 4;
/// The wait before the first of them; it doubles each time.
const FIRST_WAIT: Duration = Duration::from_millis(200);
/// Files beside config and weights that the importers read, where there are any.
const BESIDE: [&str; 2] = ["tokenizer.json", "added_tokens.json"];

/// Why a file of the hub is not here.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The cache is all there is, and it has not enough.
    #[error(
        "`{repository}`: {why}, and the cache `{}` lacks {what}\n\nhint: {hint}", .cache.display()
    )]
    NotCached {
        /// `owner/name`, with its revision unless that is `main`.
        repository: String,
        /// Why nothing was downloaded.
        why: String,
        /// The file, or the whole repository.
        what: String,
        /// Folder of the cache.
        cache: PathBuf,
        /// What the user can do.
        hint: &'static str,
    },
    /// The server wants to know who asks.
    #[error(
        "`{repository}`: {endpoint} answers {status}: it needs permission, or there is no such repository\n\nhint: \
         check the name; if the model's page asks for consent, give it there, and pass a token in `HF_TOKEN`"
    )]
    Refused {
        /// The repository.
        repository: String,
        /// The server.
        endpoint: String,
        /// 401 or 403.
        status: u16,
    },
    /// The server knows no such repository or revision.
    #[error(
        "`{repository}`: {endpoint} has no such repository or revision\n\nhint: check the name, and what follows `@`"
    )]
    NoRepository {
        /// The repository.
        repository: String,
        /// The server.
        endpoint: String,
    },
    /// The repository has no such file.
    #[error(
        "`{repository}`: has no {file}\n\nhint: expected are `config.json` and weights beside it, or a model of the built-in table"
    )]
    NoFile {
        /// The repository.
        repository: String,
        /// What was looked for.
        file: String,
    },
    /// What came is not what the server promised.
    #[error(
        "`{repository}`: `{file}` came with the hash {found}, expected {expected}; it was deleted\n\nhint: try again; if \
         it happens again, something between the server and here changes files"
    )]
    Hash {
        /// The repository.
        repository: String,
        /// The file.
        file: String,
        /// Hash that the server names.
        expected: String,
        /// Hash of what came.
        found: String,
    },
    /// The server said something that no hub says.
    #[error("`{repository}`: unexpected answer of {endpoint}: {what}")]
    Protocol {
        /// The repository.
        repository: String,
        /// The server.
        endpoint: String,
        /// What it was.
        what: String,
    },
    /// The connection broke, again and again.
    #[error(
        "`{repository}`: `{file}` could not be downloaded: {reason}\n\nhint: run the command again, it goes on where it stopped"
    )]
    Broken {
        /// The repository.
        repository: String,
        /// The file.
        file: String,
        /// The last reason.
        reason: String,
    },
    /// The cache could not be written or read.
    #[error("`{}`: {source}", .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// An index of shards is broken.
    #[error(transparent)]
    Index(#[from] CheckpointError),
}

/// A repository at a commit: what the cache has of it, and what can be downloaded.
pub(super) struct Snapshot<'s> {
    settings: &'s Settings,
    id: HubId,
    commit: String,
    /// `snapshots/COMMIT` of the cache.
    folder: PathBuf,
    reach: Reach,
}

/// Where files that the cache lacks come from.
enum Reach {
    Server { server: Box<Server>, files: BTreeSet<String> },
    Nowhere(Absent),
}

/// A server, and the repository at one commit there.
struct Server {
    api: Api,
    repo: ApiRepo,
}

/// Why there is no server, and what can be done.
#[derive(Clone)]
struct Absent {
    why: String,
    hint: &'static str,
}

impl<'s> Snapshot<'s> {
    /// Asks the server for the commit, or the cache where there is no server to ask.
    pub(super) fn open(settings: &'s Settings, id: &HubId) -> Result<Snapshot<'s>, HubError> {
        let absent = match settings.offline {
            true => Absent {
                why: "`HF_HUB_OFFLINE` is set".to_owned(),
                hint: "unset `HF_HUB_OFFLINE`, or fill the cache where there is a network",
            },
            false => match Snapshot::ask(settings, id)? {
                Ok(snapshot) => return Ok(snapshot),
                Err(absent) => absent,
            },
        };
        let kept = kept_commit(settings, id)
            .map(|commit| Snapshot::of(settings, id, commit, Reach::Nowhere(absent.clone())));
        match kept.filter(|snapshot| snapshot.folder.is_dir()) {
            Some(snapshot) => Ok(snapshot),
            None => Err(not_cached(settings, id, &absent, "it")),
        }
    }

    fn of(settings: &'s Settings, id: &HubId, commit: String, reach: Reach) -> Snapshot<'s> {
        let folder = cache_of(settings).repo(at(id, &id.revision)).pointer_path(&commit);
        Snapshot { settings, id: id.clone(), commit, folder, reach }
    }

    /// The server's commit and files; or why there is no server.
    fn ask(settings: &'s Settings, id: &HubId) -> Result<Result<Snapshot<'s>, Absent>, HubError> {
        let builder = ApiBuilder::from_cache(cache_of(settings));
        let builder = builder.with_endpoint(settings.endpoint.clone()).with_progress(false);
        let api = builder.with_token(settings.token.clone()).build();
        let api = api.map_err(|error| protocol(settings, id, error.to_string()))?;
        let info = match api.repo(at(id, &id.revision)).info() {
            Ok(info) => info,
            Err(error) => {
                return match refusal(settings, id, &error) {
                    Some(refusal) => Err(refusal),
                    None => Ok(Err(Absent {
                        why: format!("{} cannot be reached ({error})", settings.endpoint),
                        hint: "check the network, its proxy and `HF_ENDPOINT`",
                    })),
                };
            }
        };
        if !is_hash(&info.sha, 40) {
            return Err(protocol(settings, id, format!("commit `{}`", info.sha)));
        }
        let repo = api.repo(at(id, &info.sha));
        let files = info.siblings.into_iter().map(|file| file.rfilename).collect();
        let server = Box::new(Server { api, repo });
        Ok(Ok(Snapshot::of(settings, id, info.sha, Reach::Server { server, files })))
    }

    /// `owner/name@commit`.
    fn exact_name(&self) -> String {
        format!("{}@{}", self.id.repository(), self.commit)
    }

    /// The same, and why the server was not asked if it was not.
    pub(super) fn place(&self) -> String {
        match &self.reach {
            Reach::Server { .. } => self.exact_name(),
            Reach::Nowhere(absent) => {
                format!("{} as the cache has it ({})", self.exact_name(), absent.why)
            }
        }
    }

    /// Config, weights and tokenizer of a Hugging Face folder, as the importers read one.
    pub(super) fn model_folder(
        &self,
        progress: &mut dyn FnMut(Download),
    ) -> Result<PathBuf, HubError> {
        self.file("config.json", progress)?;
        let weights = WEIGHT_FILES.into_iter().find(|name| self.has(name));
        let weights = weights.ok_or_else(|| self.no_weights())?;
        let path = self.file(weights, progress)?;
        if weights.ends_with(".json") {
            for shard in shard_names(&path)? {
                self.file(&shard, progress)?;
            }
        }
        for name in BESIDE.into_iter().filter(|name| self.has(name)) {
            self.file(name, progress)?;
        }
        Ok(self.folder.clone())
    }

    /// The path of a file, which is downloaded if the cache lacks it.
    pub(super) fn file(
        &self,
        name: &str,
        progress: &mut dyn FnMut(Download),
    ) -> Result<PathBuf, HubError> {
        let path = self.folder.join(name);
        if path.is_file() {
            return Ok(path);
        }
        let server = match &self.reach {
            Reach::Server { files, .. } if !files.contains(name) => {
                return Err(self.no_file(&format!("`{name}`")));
            }
            Reach::Server { server, .. } => server,
            Reach::Nowhere(absent) => {
                return Err(not_cached(self.settings, &self.id, absent, &format!("`{name}`")));
            }
        };
        self.download(server, name, progress)?;
        self.remember_revision()?;
        Ok(path)
    }

    /// Whether there is such a file, here or on the server.
    fn has(&self, name: &str) -> bool {
        let listed = match &self.reach {
            Reach::Server { files, .. } => files.contains(name),
            Reach::Nowhere(_) => false,
        };
        listed || self.folder.join(name).is_file()
    }

    fn download(
        &self,
        server: &Server,
        name: &str,
        progress: &mut dyn FnMut(Download),
    ) -> Result<(), HubError> {
        let mut wait = FIRST_WAIT;
        let mut tries = 0;
        loop {
            match self.try_download(server, name, progress) {
                Ok(promised) => return self.verify(name, &promised, progress),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Broken(reason)) if tries == RETRIES => {
                    let (repository, file) = (self.id.to_string(), name.to_owned());
                    return Err(HubError::Broken { repository, file, reason });
                }
                Err(Failure::Broken(_)) => {
                    sleep(wait);
                    wait *= 2;
                    tries += 1;
                }
            }
        }
    }

    /// Downloads the rest of a file, and gives the hash that the server promised.
    fn try_download(
        &self,
        server: &Server,
        name: &str,
        progress: &mut dyn FnMut(Download),
    ) -> Result<String, Failure> {
        let Server { api, repo } = server;
        let metadata = api.metadata(&repo.url(name)).map_err(|error| self.failure(error))?;
        let etag = metadata.etag();
        let promised = etag.strip_prefix("W/").unwrap_or(etag);
        // Both become parts of paths in the cache.
        if !(is_hash(promised, 40) || is_hash(promised, 64))
            || metadata.commit_hash() != self.commit
        {
            let what = format!("`{name}` with ETag `{etag}` at `{}`", metadata.commit_hash());
            return Err(Failure::Final(protocol(self.settings, &self.id, what)));
        }
        let part = cache_of(self.settings).repo(at(&self.id, &self.commit)).blob_path(etag);
        discard_overlong(&part.with_extension("part"), metadata.size());
        let meter = Meter { name, done: 0, total: 0, progress };
        let downloaded = repo.download_with_progress(name, meter);
        downloaded.map_err(|error| self.failure(error))?;
        Ok(promised.to_owned())
    }

    /// Hashes what came, and deletes what is not what was promised.
    fn verify(
        &self,
        name: &str,
        promised: &str,
        progress: &mut dyn FnMut(Download),
    ) -> Result<(), HubError> {
        progress(Download::Checking { file: name });
        let pointer = self.folder.join(name);
        let found = hash(&pointer, promised.len()).map_err(at_path(&pointer))?;
        if found == promised.to_ascii_lowercase() {
            return Ok(());
        }
        let blob = pointer.canonicalize().map_err(at_path(&pointer))?;
        fs::remove_file(&pointer).map_err(at_path(&pointer))?;
        fs::remove_file(&blob).map_err(at_path(&blob))?;
        let (repository, file, expected) =
            (self.id.to_string(), name.to_owned(), promised.to_owned());
        Err(HubError::Hash { repository, file, expected, found })
    }

    /// Notes in the cache which commit the revision is, for times without a server.
    fn remember_revision(&self) -> Result<(), HubError> {
        let kept = cache_of(self.settings).repo(at(&self.id, &self.id.revision));
        kept.create_ref(&self.commit).map_err(at_path(&self.settings.cache))
    }

    fn no_weights(&self) -> HubError {
        match &self.reach {
            Reach::Server { .. } => self.no_file("weights, `model.safetensors` or another"),
            Reach::Nowhere(absent) => not_cached(self.settings, &self.id, absent, "its weights"),
        }
    }

    fn no_file(&self, file: &str) -> HubError {
        HubError::NoFile { repository: self.exact_name(), file: file.to_owned() }
    }

    fn failure(&self, error: ApiError) -> Failure {
        if let Some(refusal) = refusal(self.settings, &self.id, &error) {
            return Failure::Final(refusal);
        }
        match error {
            ApiError::IoError(source) if is_about_files(source.kind()) => {
                let path = self.settings.cache.clone();
                Failure::Final(HubError::Io { path, source })
            }
            ApiError::RequestError(_) | ApiError::IoError(_) => Failure::Broken(error.to_string()),
            ApiError::LockAcquisition(path) => {
                Failure::Broken(format!("another program holds `{}`", path.display()))
            }
            other => Failure::Final(protocol(self.settings, &self.id, other.to_string())),
        }
    }
}

/// Why a try failed.
enum Failure {
    /// Another try may do.
    Broken(String),
    /// It may not.
    Final(HubError),
}

/// Tells how far a download is; hf-hub begins a file twice, and a broken one again.
struct Meter<'a, 'p> {
    name: &'a str,
    done: u64,
    total: u64,
    progress: &'a mut (dyn FnMut(Download) + 'p),
}

impl Meter<'_, '_> {
    fn tell(&mut self) {
        let Meter { name, done, total, .. } = *self;
        (self.progress)(Download::Bytes { file: name, done, total });
    }
}

impl hf_hub::api::Progress for Meter<'_, '_> {
    fn init(&mut self, size: usize, _: &str) {
        (self.done, self.total) = (0, u64::try_from(size).unwrap_or(u64::MAX));
        self.tell();
    }

    fn update(&mut self, size: usize) {
        self.done = self.done.saturating_add(u64::try_from(size).unwrap_or(u64::MAX));
        self.tell();
    }

    fn finish(&mut self) {}
}

/// A part as long as the file or longer cannot be gone on with: the server has nothing after its end.
fn discard_overlong(part: &Path, size: usize) {
    let len = fs::metadata(part).map(|metadata| metadata.len()).unwrap_or(0);
    if len > 0 && u64::try_from(size).is_ok_and(|size| len >= size) {
        // If it stays, the download says so.
        let _ = fs::remove_file(part);
    }
}

fn cache_of(settings: &Settings) -> Cache {
    Cache::new(settings.cache.clone())
}

fn at(id: &HubId, revision: &str) -> Repo {
    Repo::with_revision(id.repository(), RepoType::Model, revision.to_owned())
}

/// The commit that the cache has of a revision.
fn kept_commit(settings: &Settings, id: &HubId) -> Option<String> {
    if is_hash(&id.revision, 40) {
        return Some(id.revision.clone());
    }
    let folder = settings.cache.join(at(id, &id.revision).folder_name());
    let commit = fs::read_to_string(folder.join("refs").join(&id.revision)).ok()?;
    Some(commit.trim().to_owned()).filter(|commit| is_hash(commit, 40))
}

/// Whether a text is that many hexadecimal digits.
fn is_hash(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The hash by which the hub names a file: of 64 digits SHA-256, of 40 that of git.
fn hash(path: &Path, len: usize) -> io::Result<String> {
    let mut file = File::open(path)?;
    let hex = |digest: &[u8]| digest.iter().map(|byte| format!("{byte:02x}")).collect();
    if len == 64 {
        let mut hasher = Sha256::new();
        io::copy(&mut file, &mut hasher)?;
        return Ok(hex(&hasher.finalize()));
    }
    let mut hasher = Sha1::new();
    hasher.update(format!("blob {}\0", file.metadata()?.len()));
    io::copy(&mut file, &mut hasher)?;
    Ok(hex(&hasher.finalize()))
}

/// What the server says of the repository itself, which no further try changes.
fn refusal(settings: &Settings, id: &HubId, error: &ApiError) -> Option<HubError> {
    let ApiError::RequestError(error) = error else { return None };
    let ureq::Error::StatusCode(status) = **error else { return None };
    let (repository, endpoint) = (id.to_string(), settings.endpoint.clone());
    match status {
        401 | 403 => Some(HubError::Refused { repository, endpoint, status }),
        404 => Some(HubError::NoRepository { repository, endpoint }),
        _ => None,
    }
}

/// Whether an error is one of the disk and not of the connection.
fn is_about_files(kind: ErrorKind) -> bool {
    use ErrorKind::{
        FileTooLarge, IsADirectory, NotADirectory, NotFound, PermissionDenied, QuotaExceeded,
        ReadOnlyFilesystem, StorageFull,
    };
    matches!(
        kind,
        FileTooLarge
            | IsADirectory
            | NotADirectory
            | NotFound
            | PermissionDenied
            | QuotaExceeded
            | ReadOnlyFilesystem
            | StorageFull
    )
}

fn at_path(path: &Path) -> impl FnOnce(io::Error) -> HubError {
    let path = path.to_owned();
    |source| HubError::Io { path, source }
}

fn protocol(settings: &Settings, id: &HubId, what: String) -> HubError {
    HubError::Protocol { repository: id.to_string(), endpoint: settings.endpoint.clone(), what }
}

fn not_cached(settings: &Settings, id: &HubId, absent: &Absent, what: &str) -> HubError {
    HubError::NotCached {
        repository: id.to_string(),
        why: absent.why.clone(),
        what: what.to_owned(),
        cache: settings.cache.clone(),
        hint: absent.hint,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `printf hello | sha256sum` and `printf hello | git hash-object --stdin`.
    #[test]
    fn files_have_the_hashes_of_sha256sum_and_git() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        fs::write(&path, "hello").unwrap();
        let sha256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
        assert_eq!(hash(&path, 64).unwrap(), sha256);
        assert_eq!(hash(&path, 40).unwrap(), "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0");
        assert!(is_hash(sha256, 64) && !is_hash(sha256, 40) && !is_hash("../x", 4));
    }
}
