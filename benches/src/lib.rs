//! Measurements: kernels (`benches/kernels.rs`, criterion), stages of an artifact
//! (`native-stages`), and peers on the same shapes (`peers/`).
#![forbid(unsafe_code)]
