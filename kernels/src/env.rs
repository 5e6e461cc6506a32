//! The environment variables this crate reads. Nothing else in the crate touches the environment.

/// Forces an instruction set: `scalar`, `avx2`, `avx512` or `neon`. Unset: the best one the processor has.
pub const FLAMINGO_ISA: &str = "FLAMINGO_ISA";

/// Value of [`FLAMINGO_ISA`], if set and not empty; bytes that are not Unicode are replaced and so rejected later.
pub(crate) fn isa() -> Option<String> {
    let value = std::env::var_os(FLAMINGO_ISA)?;
    (!value.is_empty()).then(|| value.to_string_lossy().into_owned())
}

/// `1` binds each worker thread to a physical core of its own; the calling thread stays where the system puts it. Unset
/// or `0`: none is bound. Only Linux.
pub const FLAMINGO_PIN: &str = "FLAMINGO_PIN";

/// Whether [`FLAMINGO_PIN`] asks for bound threads.
pub(crate) fn pins_threads() -> bool {
    std::env::var_os(FLAMINGO_PIN).is_some_and(|value| !value.is_empty() && value != "0")
}
