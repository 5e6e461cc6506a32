//! The environment variables that the programs of this crate read; `runtime/src/ort/library.rs` has
//! that of ONNX Runtime. Options of the command line win over them.

use std::path::PathBuf;

/// Folder for visual tokens, as `--cache-dir`. Unset or empty: none are kept on disk.
pub const FLAMINGO_CACHE_DIR: &str = "FLAMINGO_CACHE_DIR";

/// Value of [`FLAMINGO_CACHE_DIR`], if set and not empty.
pub fn cache_dir() -> Option<PathBuf> {
    std::env::var_os(FLAMINGO_CACHE_DIR).filter(|value| !value.is_empty()).map(PathBuf::from)
}
