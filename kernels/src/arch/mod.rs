//! The only place with unsafe code: instruction-set tokens, the writable matrix view that tasks share, and the thread
//! pool. Everything it exports is safe to call; kernels are written once, generic over [`Simd`].

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod matrix_mut;
mod pool;
mod scalar;

pub use matrix_mut::MatrixMut;
pub(crate) use pool::Pool;

use crate::isa::Isa;

/// A piece of work that runs inside a function compiled for one instruction set.
///
/// `run` and every generic function it calls must be `#[inline(always)]`: only what is inlined is compiled for the set.
pub(crate) trait Task {
    /// What the work returns.
    type Output;

    /// Does the work with the vectors of `S`.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Vectors of one instruction set. A value is a token: it exists only if the processor was checked.
pub(crate) trait Simd: Copy + Send + Sync {
    /// One vector in memory, `[f32; LANES]`.
    type Lanes: Copy;
    /// One vector in a register.
    type F: Copy;
    /// Lanes of a vector.
    const LANES: usize;
    /// Rows of `x` that one register tile of a matrix product holds, at most [`MAX_X_ROWS`].
    const X_ROWS: usize;

    /// Runs a task inside a function compiled for this set.
    fn run<T: Task>(self, task: T) -> T::Output;

    /// Whole vectors of a slice, and the rest.
    fn split(self, data: &[f32]) -> (&[Self::Lanes], &[f32]);
    /// Whole vectors of a slice, and the rest, writable.
    fn split_mut(self, data: &mut [f32]) -> (&mut [Self::Lanes], &mut [f32]);
    /// Reads a vector.
    fn load(self, from: &Self::Lanes) -> Self::F;
    /// Writes a vector.
    fn store(self, value: Self::F, to: &mut Self::Lanes);
    /// Reads fewer than `LANES` elements, zeros behind them.
    fn load_partial(self, from: &[f32]) -> Self::F;
    /// Writes the first `to.len()` lanes, fewer than `LANES`.
    fn store_partial(self, value: Self::F, to: &mut [f32]);

    /// All lanes equal to `value`.
    fn splat(self, value: f32) -> Self::F;
    /// `a + b`
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, fused where the set can.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger one; `b` if either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The smaller one; `b` if either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// Absolute value.
    fn abs(self, a: Self::F) -> Self::F;
    /// Nearest integer, ties to even, for magnitudes below 2^22.
    fn round(self, a: Self::F) -> Self::F;
    /// `a * 2^n` for integral `n` in -150..=128; a NaN in `a` stays.
    fn scale_pow2(self, a: Self::F, n: Self::F) -> Self::F;

    /// Sums of the lanes of four vectors. Each sum depends on its own vector only, whatever its place.
    fn reduce_add_4(self, vectors: [Self::F; 4]) -> [f32; 4];
    /// Sum of the lanes.
    fn reduce_add(self, vector: Self::F) -> f32;
    /// Largest lane; NaN lanes may be skipped.
    fn reduce_max(self, vector: Self::F) -> f32;
}

/// Upper bound of [`Simd::X_ROWS`].
pub(crate) const MAX_X_ROWS: usize = 6;

/// A dot product of narrow numbers that some instruction sets have an instruction for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Dot {
    /// Pairs of bfloat16 into f32.
    Bf16,
    /// Fours of unsigned times signed bytes into i32.
    Int8,
}

/// The token in use, chosen once at start-up.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Token {
    Scalar(scalar::Scalar),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
}

impl Token {
    /// The token of an instruction set, if this processor has it.
    pub(crate) fn new(isa: Isa) -> Option<Token> {
        match isa {
            Isa::Scalar => Some(Token::Scalar(scalar::Scalar)),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::Avx2::new().map(Token::Avx2),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::Avx512::new().map(Token::Avx512),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => None,
        }
    }

    /// Runs a task with the vectors of the token's instruction set.
    pub(crate) fn run<T: Task>(self, task: T) -> T::Output {
        match self {
            Token::Scalar(simd) => simd.run(task),
            #[cfg(target_arch = "x86_64")]
            Token::Avx2(simd) => simd.run(task),
            #[cfg(target_arch = "x86_64")]
            Token::Avx512(simd) => simd.run(task),
        }
    }

    /// Runs `n_rounds` of independent dot products in registers; returns the multiply-adds of a round, none if there is
    /// no instruction for them.
    pub(crate) fn dot_rounds(self, dot: Dot, n_rounds: usize) -> Option<usize> {
        match self {
            Token::Scalar(_) => None,
            #[cfg(target_arch = "x86_64")]
            Token::Avx2(simd) => simd.dot_rounds(dot, n_rounds),
            #[cfg(target_arch = "x86_64")]
            Token::Avx512(simd) => simd.dot_rounds(dot, n_rounds),
        }
    }
}
