//! What can go wrong when the kernels start. Once started, kernels do not fail: their shape rules are invariants.

use crate::isa::Isa;

/// Why [`Kernels`](crate::Kernels) could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The environment names an instruction set this crate does not know.
    #[error(
        "environment variable `FLAMINGO_ISA`: unknown instruction set `{found}`\n\nhint: use `scalar`, `avx2`, `avx512` or `neon`, or unset it"
    )]
    UnknownIsa {
        /// The value found.
        found: String,
    },
    /// The named instruction set is not available on this processor.
    #[error(
        "instruction set `{isa}` is not available on this processor (best: `{best}`)\n\nhint: set `FLAMINGO_ISA={best}` or unset it"
    )]
    UnsupportedIsa {
        /// The instruction set asked for.
        isa: Isa,
        /// The best one the processor has.
        best: Isa,
    },
    /// The operating system refused a worker thread.
    #[error("thread pool: cannot start worker {worker} of {n_workers}")]
    Spawn {
        /// Index of the worker that failed.
        worker: usize,
        /// How many were to be started.
        n_workers: usize,
        /// What the system said.
        source: std::io::Error,
    },
}
