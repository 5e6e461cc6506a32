//! CPU kernels of flamingoc: linear layers, normalisation, activations and attention in f32, a thread pool, and the choice
//! of an instruction set. Knows nothing of graphs.
//!
//! Kernels take slices seen as [`Matrix`] and [`MatrixMut`]; shapes are invariants, asserted once at the entry. Results do
//! not depend on the number of threads, and a row's result does not depend on the rows processed with it: a token decoded
//! alone has the same bits as in a prefill. Between instruction sets results differ by rounding.
//!
//! ```
//! use flamingo_kernels::{Kernels, Matrix, MatrixMut};
//!
//! let kernels = Kernels::new(None)?;
//! let (x, weight) = ([1.0, 2.0], [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
//! let mut out = [0.0; 3];
//! kernels.linear(
//!     Matrix::new(&x, 1, 2),
//!     Matrix::new(&weight, 3, 2).into(),
//!     None,
//!     None,
//!     None,
//!     MatrixMut::new(&mut out, 1, 3),
//! );
//! assert_eq!(out, [1.0, 2.0, 3.0]);
//! # Ok::<(), flamingo_kernels::KernelError>(())
//! ```
#![deny(unsafe_code)]

mod activation;
mod convolution;
mod linear;
mod norm;

mod attention;
mod cross_attention;
mod self_attention;

mod dot;
mod kv_cache;
mod math;
mod matrix;
mod packed;
mod packed_kv;
mod panels;
mod rotary;
mod scratch;
mod weight;

#[expect(
    unsafe_code,
    reason = "intrinsics behind tokens, the matrix view that threads share, and the thread pool"
)]
mod arch;
pub mod env;
mod error;
mod isa;

pub mod probe;
pub mod reference;

use std::num::NonZeroUsize;

pub use activation::Activation;
pub use arch::MatrixMut;
pub use convolution::Convolution;
pub use error::KernelError;
pub use isa::Isa;
pub use kv_cache::{KV_BLOCK, KV_SLOTS, KvCache, KvFormat, SharedBlock};
pub use matrix::Matrix;
pub use self_attention::{Position, SelfAttention};
pub use weight::{MAX_BYTE_COLS, PANEL_ROWS, PanelFormat, Panels, Weight};

use arch::{Pool, Token};
use scratch::Scratch;
use smallvec::SmallVec;

/// The kernels: an instruction set and a thread pool. Made once, shared by reference.
pub struct Kernels {
    isa: Isa,
    token: Token,
    pool: Pool,
    scratch: Scratch<f32>,
    words: Scratch<u32>,
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernels")
            .field("isa", &self.isa)
            .field("n_threads", &self.n_threads())
            .finish_non_exhaustive()
    }
}

impl Kernels {
    /// Kernels on `n_threads` threads, by default one for each physical core, with the best instruction set of this
    /// processor or the one named by the environment ([`env::FLAMINGO_ISA`]).
    ///
    /// # Errors
    /// If the environment names an unknown or unavailable instruction set, or a thread cannot be started.
    pub fn new(n_threads: Option<NonZeroUsize>) -> Result<Kernels, KernelError> {
        Kernels::with_isa(Isa::from_environment()?, n_threads)
    }

    /// As [`Kernels::new`] with a given instruction set, whatever the environment says.
    ///
    /// # Errors
    /// If this processor does not have it, or a thread cannot be started.
    pub fn with_isa(isa: Isa, n_threads: Option<NonZeroUsize>) -> Result<Kernels, KernelError> {
        let token = Token::new(isa)
            .ok_or_else(|| KernelError::UnsupportedIsa { isa, best: Isa::best() })?;
        let cores = if env::pins_threads() { probe::hardware_threads() } else { Vec::new() };
        let pool = Pool::new(n_threads.unwrap_or_else(probe::n_physical_cores).get(), &cores)?;
        Ok(Kernels { isa, token, pool, scratch: Scratch::default(), words: Scratch::default() })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads in use, the calling one included.
    pub fn n_threads(&self) -> usize {
        self.pool.n_threads()
    }

    /// Runs `body(first_row, rows)` over blocks of rows of `out`, large enough to be worth a task.
    fn for_row_blocks(&self, out: MatrixMut<'_>, body: &(dyn Fn(usize, MatrixMut<'_>) + Sync)) {
        const TASK_ELEMENTS: usize = 16 * 1024;
        let (rows, cols) = (out.rows(), out.cols());
        if cols == 0 {
            return;
        }
        let starts: SmallVec<[usize; 16]> =
            (0..rows).step_by((TASK_ELEMENTS / cols).max(1)).collect();
        self.pool.run_tiles(out, &starts, cols, &|band, _, tile| body(starts[band], tile));
    }
}

#[cfg(test)]
mod tests;
