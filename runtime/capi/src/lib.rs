//! The runtime for C and C++: open a model, hold conversations about pictures, stream the text.
//!
//! Pointers that functions return belong to the caller, who gives them back to the matching `_free`, which takes NULL
//! too. A function that can fail takes `error`: where it is not NULL, it is set to a message to be freed with
//! [`flamingo_string_free`], or to NULL. A model may be used from several threads, a session from one at a time. The
//! header is `include/flamingo.h`.
#![deny(unsafe_code)]

#[expect(unsafe_code, reason = "C has pointers and nothing else")]
mod ffi;
mod options;

pub use ffi::*;
