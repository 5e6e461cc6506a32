//! Finds ONNX Runtime's shared library and loads it, once for the process.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ort::environment::Environment;

use super::NAME;
use crate::backend::BackendError;

/// Environment variable with the path of ONNX Runtime's shared library, or of a folder that has
/// it; the option `--ort-lib` wins over it. Default: known places are searched.
pub const LIBRARY_VARIABLE: &str = "ORT_DYLIB_PATH";

const HINT: &str = "get the library with `pip download --no-deps onnxruntime`, unzip the wheel, and pass \
                    `--ort-lib` with the path of onnxruntime/capi/libonnxruntime.so.*";

/// The library in use. Neither a library nor its environment can be had twice in a process.
static LOADED: Mutex<Option<(PathBuf, Environment)>> = Mutex::new(None);

/// Loads the library, or gives the environment of the one that is loaded.
///
/// # Errors
/// If none is found that is new enough, or if another one is loaded already.
pub(super) fn load(explicit: Option<&Path>) -> Result<Environment, BackendError> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((path, environment)) = &*loaded {
        return match explicit.map(resolve) {
            None => Ok(environment.clone()),
            Some(Ok(wanted)) if wanted == *path => Ok(environment.clone()),
            Some(Ok(wanted)) => Err(failed(
                &wanted,
                format!("expected the library that is in use, `{}`", path.display()),
                "a process can use one ONNX Runtime: pass the same `--ort-lib` every time",
            )),
            Some(Err(error)) => Err(error),
        };
    }
    let path = find(explicit)?;
    let environment = ort::init_from(&path)
        .map_err(|error| failed(&path, error.to_string(), HINT))?
        .with_name("flamingo")
        .build()
        .map_err(|error| failed(&path, error.to_string(), HINT))?;
    *loaded = Some((path, environment.clone()));
    Ok(environment)
}

/// The file of the library in use.
pub(super) fn loaded_path() -> Option<PathBuf> {
    let loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    loaded.as_ref().map(|(path, _)| path.clone())
}

/// The folder of the library in use, else of the one that is named, else the first known one that has one.
pub(super) fn folder(explicit: Option<&Path>) -> Option<PathBuf> {
    match loaded_path().or_else(|| named(explicit)) {
        Some(path) if path.is_dir() => Some(path),
        Some(path) => fs::canonicalize(&path).unwrap_or(path).parent().map(Path::to_owned),
        None => known_folders().into_iter().find(|folder| library_in(folder).is_some()),
    }
}

/// The path in an option, else in the variable.
fn named(explicit: Option<&Path>) -> Option<PathBuf> {
    let variable = std::env::var_os(LIBRARY_VARIABLE).filter(|path| !path.is_empty());
    explicit.map(Path::to_owned).or(variable.map(PathBuf::from))
}

fn failed(path: &Path, reason: String, hint: &'static str) -> BackendError {
    BackendError::Engine { engine: NAME, place: path.display().to_string(), reason, hint }
}

/// The library to use: the one that is named by option or variable, or the first usable one of
/// the known places.
fn find(explicit: Option<&Path>) -> Result<PathBuf, BackendError> {
    if let Some(given) = named(explicit) {
        let path = resolve(&given)?;
        return match check(&path) {
            Ok(()) => Ok(path),
            Err(reason) => Err(failed(&path, reason, HINT)),
        };
    }
    let mut report = Vec::new();
    for folder in known_folders() {
        match library_in(&folder).map(|path| check(&path).map(|()| path)) {
            Some(Ok(path)) => return Ok(fs::canonicalize(&path).unwrap_or(path)),
            Some(Err(reason)) => report.push(format!("`{}`: {reason}", folder.display())),
            None => report.push(format!("`{}`: none", folder.display())),
        }
    }
    Err(BackendError::Engine {
        engine: NAME,
        place: "ONNX Runtime".into(),
        reason: format!(
            "expected `{}` of version 1.{} or newer in `--ort-lib`, in {LIBRARY_VARIABLE}, or in one \
             of these folders, found:\n  {}",
            file_name(),
            ort::MINOR_VERSION,
            report.join("\n  ")
        ),
        hint: HINT,
    })
}

/// The library at a path that is a file, or a folder that has one.
fn resolve(path: &Path) -> Result<PathBuf, BackendError> {
    let file = match path.is_dir() {
        true => library_in(path),
        false => Some(path.to_owned()),
    };
    let file = file.ok_or_else(|| {
        failed(path, format!("expected `{}` in this folder, found none", file_name()), HINT)
    })?;
    fs::canonicalize(&file).map_err(|error| failed(path, error.to_string(), HINT))
}

/// Why a library cannot be used, if it cannot. The library is not yet chosen by this.
fn check(path: &Path) -> Result<(), String> {
    match ort::util::probe(path) {
        Some(minor) if minor >= ort::MINOR_VERSION => Ok(()),
        Some(minor) => {
            Err(format!("expected version 1.{} or newer, found 1.{minor}", ort::MINOR_VERSION))
        }
        None => Err(
            "expected an ONNX Runtime 1.x library for this machine, found another file, or one \
                     that cannot be loaded"
                .into(),
        ),
    }
}

fn file_name() -> String {
    let (prefix, suffix) = (std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    format!("{prefix}onnxruntime{suffix}")
}

/// The library of a folder: `libonnxruntime.so`, else the newest `libonnxruntime.so.1.2.3`.
fn library_in(folder: &Path) -> Option<PathBuf> {
    let plain = folder.join(file_name());
    if plain.is_file() {
        return Some(plain);
    }
    let version = |name: &str| -> Option<Vec<u32>> {
        let version = name.strip_prefix(&file_name())?.strip_prefix('.')?;
        version.split('.').map(|part| part.parse().ok()).collect()
    };
    let entries = fs::read_dir(folder).ok()?.filter_map(Result::ok);
    let versions = entries.filter_map(|entry| {
        Some((version(entry.file_name().to_str()?)?, entry.path()))
            .filter(|(_, path)| path.is_file())
    });
    versions.max().map(|(_, path)| path)
}

/// Where libraries are looked for, in order.
fn known_folders() -> Vec<PathBuf> {
    let program = std::env::current_exe().ok();
    let beside = program.as_deref().and_then(Path::parent).map(Path::to_owned);
    let system = ["/usr/lib", "/usr/local/lib"].map(PathBuf::from);
    let multiarch = format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH);
    let tests = ["target", "test-deps", "onnxruntime"].iter().collect();
    beside.into_iter().chain([tests]).chain(system).chain([multiarch.into()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_library_of_a_folder_is_found() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(library_in(folder.path()), None);
        let name = file_name();
        for file in [".1.9.0", ".1.24.0", ".1.24.0.bak", "_providers_shared.so"] {
            fs::write(folder.path().join(format!("{name}{file}")), "").unwrap();
        }
        let newest = folder.path().join(format!("{name}.1.24.0"));
        assert_eq!(library_in(folder.path()), Some(newest));
        fs::write(folder.path().join(&name), "").unwrap();
        assert_eq!(library_in(folder.path()), Some(folder.path().join(name)));
    }

    #[test]
    fn a_library_that_is_none_is_refused_with_a_hint() {
        let folder = tempfile::tempdir().unwrap();
        let message = |path: &Path| find(Some(path)).unwrap_err().to_string();
        let empty = message(folder.path());
        assert!(empty.contains("in this folder, found none"), "{empty}");
        let file = folder.path().join(file_name());
        fs::write(&file, "not a library").unwrap();
        for text in [message(&file), message(folder.path())] {
            assert!(text.contains("expected an ONNX Runtime 1.x library"), "{text}");
            assert!(text.contains("pip download --no-deps onnxruntime"), "{text}");
        }
        let missing = message(&folder.path().join("missing.so"));
        assert!(missing.contains("missing.so: ") && missing.contains("hint: "), "{missing}");
    }
}
