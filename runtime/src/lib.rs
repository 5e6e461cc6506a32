//! Placeholder replaced by its first module.
pub mod image;
