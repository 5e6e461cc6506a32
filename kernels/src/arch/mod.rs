//! The only place with unsafe code: instruction-set tokens, the writable matrix view that tasks share, and the thread
//! pool. Everything it exports is safe to call; kernels are written once, generic over [`Simd`].

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod matrix_mut;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pool;
mod scalar;

pub use matrix_mut::MatrixMut;
pub(crate) use pool::Pool;

use crate::{isa::Isa, math::Unary};

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

    /// Asks for the cache line of an element that is going to be written or read; changes nothing.
    fn prefetch(self, element: &f32);

    /// Sixteen f32 in registers, one for each row of a panel of weights.
    type Wide: Copy;
    /// Whether a register holds all sixteen, so that there are registers for many.
    const IS_WIDE: bool;
    /// All sixteen equal to `value`.
    fn wide_splat(self, value: f32) -> Self::Wide;
    /// Reads sixteen.
    fn wide_load(self, from: &[f32; 16]) -> Self::Wide;
    /// Reads sixteen IEEE halves.
    fn wide_from_f16(self, from: &[u16; 16]) -> Self::Wide;
    /// Reads sixteen signed bytes.
    fn wide_from_i8(self, from: &[i8; 16]) -> Self::Wide;
    /// Reads sixteen pairs of bfloat16, little-endian: the first of each pair, and the second.
    fn wide_from_bf16_pairs(self, from: &[u8; 64]) -> [Self::Wide; 2];
    /// `a * b + c`, as [`Simd::mul_add`].
    fn wide_mul_add(self, a: Self::Wide, b: Self::Wide, c: Self::Wide) -> Self::Wide;
    /// `a + b`
    fn wide_add(self, a: Self::Wide, b: Self::Wide) -> Self::Wide;
    /// `a * b`
    fn wide_mul(self, a: Self::Wide, b: Self::Wide) -> Self::Wide;
    /// A function of each.
    fn wide_map(self, a: Self::Wide, f: &impl Unary) -> Self::Wide;
    /// Writes sixteen.
    fn wide_store(self, value: Self::Wide, to: &mut [f32; 16]);
}

/// Work on panels of bytes, as [`Task`] for a set's byte products.
pub(crate) trait DotI8Task {
    /// Does the work with the products of `D`.
    fn run<D: DotI8>(self, dot: D);
}

/// Products of signed bytes: four columns of sixteen rows at once. A value is a token, as of [`Simd`].
///
/// All sums are exact, so they do not depend on the instruction set.
pub(crate) trait DotI8: Copy + Send + Sync {
    /// The vectors beside it.
    type S: Simd;
    /// Sixteen i32, one for each row.
    type Sums: Copy;
    /// Four columns of sixteen rows.
    type W: Copy;
    /// Four columns of one row of x, for all rows of the weight.
    type X: Copy;
    /// What [`DotI8::weights`] adds to each weight: sums must start at minus that times the sum of x.
    const OFFSET: i32;

    /// The vectors beside it.
    fn simd(self) -> Self::S;
    /// Runs a task inside a function compiled for this set.
    fn run<T: DotI8Task>(self, task: T);
    /// All sums equal to `value`.
    fn start(self, value: i32) -> Self::Sums;
    /// Reads weights `[16, 4]` within ±127.
    fn weights(self, from: &[u8; 64]) -> Self::W;
    /// Reads weights of 0..=15: the low nibbles, and the high ones.
    fn nibbles(self, from: &[u8; 64]) -> [Self::W; 2];
    /// Four signed bytes within ±127, little-endian.
    fn broadcast(self, x: u32) -> Self::X;
    /// `sums + w x` for weights of [`DotI8::weights`].
    fn dot(self, sums: Self::Sums, w: Self::W, x: Self::X) -> Self::Sums;
    /// `sums + w x` for weights of [`DotI8::nibbles`].
    fn dot_nibbles(self, sums: Self::Sums, w: Self::W, x: Self::X) -> Self::Sums;
    /// Products of `M` rows of x, `[groups, M]`, with the lines of a panel, as sums of [`DotI8::dot`] that start at 0, by an
    /// instruction for two rows of both; none where there is no such instruction, or `M` is odd.
    #[inline(always)]
    fn products_by_pairs<const M: usize>(
        self,
        _x: &[[u32; M]],
        _panel: &[[u8; 64]],
    ) -> Option<[Self::Sums; M]> {
        None
    }
    /// `total + sums * scales`, each row with its own scale; wraps on overflow.
    fn add_scaled(self, total: Self::Sums, sums: Self::Sums, scales: &[u8; 16]) -> Self::Sums;
    /// The sums as f32, rounded to nearest.
    fn to_f32(self, sums: Self::Sums) -> <Self::S as Simd>::Wide;
}

/// Work on panels of bfloat16, as [`Task`] for a set's products of pairs.
pub(crate) trait DotBf16Task {
    /// Does the work with the products of `D`.
    fn run<D: DotBf16>(self, dot: D);
}

/// Products of bfloat16: two columns of sixteen rows at once. A value is a token, as of [`Simd`].
pub(crate) trait DotBf16: Copy + Send + Sync {
    /// The vectors beside it.
    type S: Simd;
    /// Sixteen f32, one for each row.
    type Sums: Copy;
    /// Two columns of sixteen rows.
    type W: Copy;
    /// Two columns of one row of x, for all rows of the weight.
    type X: Copy;

    /// The vectors beside it.
    fn simd(self) -> Self::S;
    /// All zero.
    fn zero(self) -> Self::Sums;
    /// Reads weights `[16, 2]`.
    fn weights(self, from: &[u8; 64]) -> Self::W;
    /// Two bfloat16, little-endian.
    fn broadcast(self, x: u32) -> Self::X;
    /// `sums + w x`
    fn dot(self, sums: Self::Sums, w: Self::W, x: Self::X) -> Self::Sums;
    /// The sums.
    fn to_f32(self, sums: Self::Sums) -> <Self::S as Simd>::Wide;
}

/// Products of bfloat16 on sets that only widen them to f32: second of each pair first, as `vdpbf16ps` does.
#[derive(Clone, Copy)]
pub(crate) struct WidenedBf16<S>(S);

impl<S: Simd> DotBf16 for WidenedBf16<S> {
    type S = S;
    type Sums = S::Wide;
    type W = [S::Wide; 2];
    type X = [S::Wide; 2];

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }

    #[inline(always)]
    fn zero(self) -> S::Wide {
        self.0.wide_splat(0.0)
    }

    #[inline(always)]
    fn weights(self, from: &[u8; 64]) -> Self::W {
        self.0.wide_from_bf16_pairs(from)
    }

    #[inline(always)]
    fn broadcast(self, x: u32) -> Self::X {
        let splat = |bits| self.0.wide_splat(f32::from_bits(bits));
        [splat(x << 16), splat(x & 0xFFFF_0000)]
    }

    #[inline(always)]
    fn dot(self, sums: S::Wide, w: Self::W, x: Self::X) -> S::Wide {
        let sums = self.0.wide_mul_add(w[1], x[1], sums);
        self.0.wide_mul_add(w[0], x[0], sums)
    }

    #[inline(always)]
    fn to_f32(self, sums: S::Wide) -> S::Wide {
        sums
    }
}

/// A task over bfloat16 as a task over plain vectors.
struct Widened<T>(T);

impl<T: DotBf16Task> Task for Widened<T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.0.run(WidenedBf16(simd));
    }
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
    #[cfg(target_arch = "aarch64")]
    Neon(neon::Neon),
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
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::Neon::new().map(Token::Neon),
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon => None,
        }
    }

    /// Runs a task with the byte products of the token's instruction set.
    pub(crate) fn run_i8<T: DotI8Task>(self, task: T) {
        match self {
            Token::Scalar(simd) => DotI8::run(simd, task),
            #[cfg(target_arch = "x86_64")]
            Token::Avx2(simd) => DotI8::run(simd, task),
            #[cfg(target_arch = "x86_64")]
            Token::Avx512(simd) => match simd.vnni() {
                Some(vnni) => vnni.run(task),
                None => DotI8::run(simd.avx2(), task),
            },
            #[cfg(target_arch = "aarch64")]
            Token::Neon(simd) => match (simd.smmla(), simd.sdot()) {
                (Some(smmla), _) => DotI8::run(neon::Bytes(smmla), task),
                (None, Some(sdot)) => DotI8::run(neon::Bytes(sdot), task),
                (None, None) => DotI8::run(neon::Bytes(simd), task),
            },
        }
    }

    /// Runs a task with the bfloat16 products of the token's instruction set.
    pub(crate) fn run_bf16<T: DotBf16Task>(self, task: T) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Token::Avx512(simd) => match simd.bf16() {
                Some(bf16) => bf16.run(task),
                None => simd.run(Widened(task)),
            },
            _ => self.run(Widened(task)),
        }
    }

    /// Runs a task with the vectors of the token's instruction set.
    pub(crate) fn run<T: Task>(self, task: T) -> T::Output {
        match self {
            Token::Scalar(simd) => Simd::run(simd, task),
            #[cfg(target_arch = "x86_64")]
            Token::Avx2(simd) => Simd::run(simd, task),
            #[cfg(target_arch = "x86_64")]
            Token::Avx512(simd) => simd.run(task),
            #[cfg(target_arch = "aarch64")]
            Token::Neon(simd) => simd.run(task),
        }
    }

    /// Names of the instructions beyond its set that the token found and kernels use.
    #[cfg(test)]
    pub(crate) fn extensions(self) -> Vec<&'static str> {
        let found: &[(bool, &str)] = match self {
            Token::Scalar(_) => &[],
            #[cfg(target_arch = "x86_64")]
            Token::Avx2(_) => &[],
            #[cfg(target_arch = "x86_64")]
            Token::Avx512(simd) => {
                &[(simd.vnni().is_some(), "vnni"), (simd.bf16().is_some(), "bf16")]
            }
            #[cfg(target_arch = "aarch64")]
            Token::Neon(simd) => {
                &[(simd.sdot().is_some(), "dotprod"), (simd.smmla().is_some(), "i8mm")]
            }
        };
        found.iter().filter(|(found, _)| *found).map(|(_, name)| *name).collect()
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
            #[cfg(target_arch = "aarch64")]
            Token::Neon(simd) => simd.dot_rounds(dot, n_rounds),
        }
    }
}
