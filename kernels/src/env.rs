//! The environment variables this crate reads. Nothing else in the crate touches the environment.

/// Forces an instruction set: `scalar`, `avx2`, `avx512` or `neon`. Unset: the best one the processor has.
pub const FLAMINGO_ISA: &str = "FLAMINGO_ISA";

/// Value of [`FLAMINGO_ISA`], if set and not empty; bytes that are not Unicode are replaced and so rejected later.
pub(crate) fn isa() -> Option<String> {
    let value = std::env::var_os(FLAMINGO_ISA)?;
    (!value.is_empty()).then(|| value.to_string_lossy().into_owned())
}
