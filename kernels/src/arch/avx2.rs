//! AVX2 vectors with FMA: eight f32 lanes, 16 registers.

use std::{arch::x86_64::*, hint::black_box};

use super::{Dot, DotI8, DotI8Task, Simd, Task};
use crate::math::Unary;

const LANES: usize = 8;

/// Proof that the processor has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The token, if the processor has the instructions.
    pub(crate) fn new() -> Option<Avx2> {
        let available = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        available.then_some(Avx2(()))
    }

    /// Runs `n_rounds` of independent dot products in registers; returns the multiply-adds of a round, none where the
    /// set has no instructions for them.
    pub(super) fn dot_rounds(self, dot: Dot, n_rounds: usize) -> Option<usize> {
        match dot {
            Dot::Bf16 => None,
            // SAFETY: the token proves the instructions.
            Dot::Int8 => Some(unsafe { int8_rounds(n_rounds) }),
        }
    }
}

/// Chains of [`Avx2::dot_rounds`]: as many as 16 registers leave room for.
const N_CHAINS: usize = 12;

/// Bytes are multiplied and added in pairs, and the pairs in pairs; each chain is an operand of its own first product, so
/// that no product can be taken out of the loop.
#[target_feature(enable = "avx2")]
fn int8_rounds(n_rounds: usize) -> usize {
    let (bytes, ones) = (_mm256_set1_epi8(black_box(1)), _mm256_set1_epi16(black_box(1)));
    let mut chains = [_mm256_setzero_si256(); N_CHAINS];
    for _ in 0..n_rounds {
        for chain in &mut chains {
            let pairs = _mm256_maddubs_epi16(*chain, bytes);
            *chain = _mm256_add_epi32(*chain, _mm256_madd_epi16(pairs, ones));
        }
    }
    black_box(chains);
    N_CHAINS * LANES * 4
}

/// Evaluates register-only intrinsics.
macro_rules! proven {
    ($($intrinsic:tt)*) => {{
        // SAFETY: `self` is an `Avx2`, whose only constructor found the instructions on this processor; the
        // intrinsics work on registers and touch no memory.
        unsafe { $($intrinsic)* }
    }};
}

#[target_feature(enable = "avx2,fma,f16c")]
fn run<T: Task>(simd: Avx2, task: T) -> T::Output {
    task.run(simd)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn run_i8<T: DotI8Task>(simd: Avx2, task: T) {
    task.run(simd);
}

/// Sum of the two halves, `[f32; 4]`.
#[inline(always)]
fn fold_halves(_: Avx2, a: __m256) -> __m128 {
    proven!(_mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a)))
}

impl Simd for Avx2 {
    type Lanes = [f32; LANES];
    type F = __m256;
    const LANES: usize = LANES;
    const X_ROWS: usize = 3;

    #[inline(always)]
    fn run<T: Task>(self, task: T) -> T::Output {
        // SAFETY: the token proves that the processor has every feature `run` is compiled for.
        unsafe { run(self, task) }
    }

    #[inline(always)]
    fn split(self, data: &[f32]) -> (&[Self::Lanes], &[f32]) {
        data.as_chunks()
    }

    #[inline(always)]
    fn split_mut(self, data: &mut [f32]) -> (&mut [Self::Lanes], &mut [f32]) {
        data.as_chunks_mut()
    }

    #[inline(always)]
    fn load(self, from: &Self::Lanes) -> Self::F {
        // SAFETY: the token proves the instruction; `from` is eight readable f32, and the load is unaligned.
        unsafe { _mm256_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, value: Self::F, to: &mut Self::Lanes) {
        // SAFETY: the token proves the instruction; `to` is eight writable f32, and the store is unaligned.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr(), value) }
    }

    #[inline(always)]
    fn load_partial(self, from: &[f32]) -> Self::F {
        let mut lanes = [0.0; LANES];
        lanes[..from.len()].copy_from_slice(from);
        self.load(&lanes)
    }

    #[inline(always)]
    fn store_partial(self, value: Self::F, to: &mut [f32]) {
        let mut lanes = [0.0; LANES];
        self.store(value, &mut lanes);
        to.copy_from_slice(&lanes[..to.len()]);
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        proven!(_mm256_set1_ps(value))
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        proven!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        proven!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        proven!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        proven!(_mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        proven!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        proven!(_mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        proven!(_mm256_min_ps(a, b))
    }

    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        proven!(_mm256_andnot_ps(_mm256_set1_ps(-0.0), a))
    }

    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        proven!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }

    #[inline(always)]
    fn scale_pow2(self, a: Self::F, n: Self::F) -> Self::F {
        proven! {
            let n = _mm256_cvtps_epi32(n);
            let (half, bias) = (_mm256_srai_epi32::<1>(n), _mm256_set1_epi32(127));
            let first = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
            let second = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias));
            _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second))
        }
    }

    #[inline(always)]
    fn reduce_add_4(self, [a, b, c, d]: [Self::F; 4]) -> [f32; 4] {
        let mut sums = [0.0; 4];
        // SAFETY: the token proves the instructions; the store writes the four elements of `sums`.
        unsafe {
            let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
            let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
            let (low, high) = (_mm256_unpacklo_pd(ab, cd), _mm256_unpackhi_pd(ab, cd));
            let halves = _mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high));
            _mm_storeu_ps(sums.as_mut_ptr(), fold_halves(self, halves));
        }
        sums
    }

    #[inline(always)]
    fn reduce_add(self, vector: Self::F) -> f32 {
        let [sum, ..] = self.reduce_add_4([vector; 4]);
        sum
    }

    #[inline(always)]
    fn reduce_max(self, vector: Self::F) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(vector, &mut lanes);
        lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    fn prefetch(self, element: &f32) {
        // SAFETY: the token proves SSE; a prefetch does not access memory, and the address is that of an element.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(element).cast()) }
    }

    type Wide = [__m256; 2];
    const IS_WIDE: bool = false;

    #[inline(always)]
    fn wide_splat(self, value: f32) -> Self::Wide {
        [self.splat(value); 2]
    }

    #[inline(always)]
    fn wide_load(self, from: &[f32; 16]) -> Self::Wide {
        let halves = from.as_chunks::<8>().0;
        [self.load(&halves[0]), self.load(&halves[1])]
    }

    #[inline(always)]
    fn wide_from_f16(self, from: &[u16; 16]) -> Self::Wide {
        // SAFETY: the token proves the instructions; each load reads half of the 32 bytes, unaligned.
        unsafe {
            let first = _mm_loadu_si128(from.as_ptr().cast());
            let second = _mm_loadu_si128(from[8..].as_ptr().cast());
            [_mm256_cvtph_ps(first), _mm256_cvtph_ps(second)]
        }
    }

    #[inline(always)]
    fn wide_from_i8(self, from: &[i8; 16]) -> Self::Wide {
        // SAFETY: the token proves the instructions; the load reads the 16 bytes, unaligned.
        unsafe {
            let bytes = _mm_loadu_si128(from.as_ptr().cast());
            let second = _mm_srli_si128::<8>(bytes);
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(second)),
            ]
        }
    }

    #[inline(always)]
    fn wide_from_bf16_pairs(self, from: &[u8; 64]) -> [Self::Wide; 2] {
        let [a, b] = load_halves(self, from);
        proven! {
            let first = |pairs| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs));
            let mask = _mm256_set1_epi32(0xFFFF_0000_u32.cast_signed());
            let second = |pairs| _mm256_castsi256_ps(_mm256_and_si256(pairs, mask));
            [[first(a), first(b)], [second(a), second(b)]]
        }
    }

    #[inline(always)]
    fn wide_mul_add(self, a: Self::Wide, b: Self::Wide, c: Self::Wide) -> Self::Wide {
        [self.mul_add(a[0], b[0], c[0]), self.mul_add(a[1], b[1], c[1])]
    }

    #[inline(always)]
    fn wide_add(self, a: Self::Wide, b: Self::Wide) -> Self::Wide {
        [self.add(a[0], b[0]), self.add(a[1], b[1])]
    }

    #[inline(always)]
    fn wide_mul(self, a: Self::Wide, b: Self::Wide) -> Self::Wide {
        [self.mul(a[0], b[0]), self.mul(a[1], b[1])]
    }

    #[inline(always)]
    fn wide_map(self, a: Self::Wide, f: &impl Unary) -> Self::Wide {
        [f.apply(self, a[0]), f.apply(self, a[1])]
    }

    #[inline(always)]
    fn wide_store(self, value: Self::Wide, to: &mut [f32; 16]) {
        let halves = to.as_chunks_mut::<8>().0;
        self.store(value[0], &mut halves[0]);
        self.store(value[1], &mut halves[1]);
    }
}

/// Both halves of a line.
#[inline(always)]
fn load_halves(_: Avx2, from: &[u8; 64]) -> [__m256i; 2] {
    // SAFETY: the token proves the instructions; each load reads half of the 64 bytes, unaligned.
    unsafe {
        [_mm256_loadu_si256(from.as_ptr().cast()), _mm256_loadu_si256(from[32..].as_ptr().cast())]
    }
}

/// `sums + w x`, 0 <= w <= 127 unsigned and x signed: no pair of products leaves 16 bits.
#[inline(always)]
fn dot_unsigned(_: Avx2, sums: __m256i, w: __m256i, x: __m256i) -> __m256i {
    proven! {
        let pairs = _mm256_maddubs_epi16(w, x);
        _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
}

impl DotI8 for Avx2 {
    type S = Avx2;
    type Sums = [__m256i; 2];
    type W = [__m256i; 2];
    /// x, and its magnitude.
    type X = (__m256i, __m256i);
    const OFFSET: i32 = 0;

    #[inline(always)]
    fn simd(self) -> Avx2 {
        self
    }

    #[inline(always)]
    fn run<T: DotI8Task>(self, task: T) {
        // SAFETY: the token proves that the processor has every feature `run_i8` is compiled for.
        unsafe { run_i8(self, task) }
    }

    #[inline(always)]
    fn start(self, value: i32) -> Self::Sums {
        [proven!(_mm256_set1_epi32(value)); 2]
    }

    #[inline(always)]
    fn weights(self, from: &[u8; 64]) -> Self::W {
        load_halves(self, from)
    }

    #[inline(always)]
    fn nibbles(self, from: &[u8; 64]) -> [Self::W; 2] {
        let halves = load_halves(self, from);
        proven! {
            let mask = _mm256_set1_epi8(15);
            let low = |bytes| _mm256_and_si256(bytes, mask);
            let high = |bytes| _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask);
            [[low(halves[0]), low(halves[1])], [high(halves[0]), high(halves[1])]]
        }
    }

    #[inline(always)]
    fn broadcast(self, x: u32) -> Self::X {
        proven! {
            let x = _mm256_set1_epi32(x.cast_signed());
            (x, _mm256_abs_epi8(x))
        }
    }

    #[inline(always)]
    fn dot(self, sums: Self::Sums, w: Self::W, (x, magnitude): Self::X) -> Self::Sums {
        let half = |i: usize| {
            let signed = proven!(_mm256_sign_epi8(w[i], x));
            dot_unsigned(self, sums[i], magnitude, signed)
        };
        [half(0), half(1)]
    }

    #[inline(always)]
    fn dot_nibbles(self, sums: Self::Sums, w: Self::W, (x, _): Self::X) -> Self::Sums {
        [dot_unsigned(self, sums[0], w[0], x), dot_unsigned(self, sums[1], w[1], x)]
    }

    #[inline(always)]
    fn add_scaled(self, total: Self::Sums, sums: Self::Sums, scales: &[u8; 16]) -> Self::Sums {
        // SAFETY: the token proves the instructions; the load reads the sixteen bytes of `scales`.
        unsafe {
            let scales = _mm_loadu_si128(scales.as_ptr().cast());
            let first = _mm256_cvtepu8_epi32(scales);
            let second = _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(scales));
            [
                _mm256_add_epi32(total[0], _mm256_mullo_epi32(sums[0], first)),
                _mm256_add_epi32(total[1], _mm256_mullo_epi32(sums[1], second)),
            ]
        }
    }

    #[inline(always)]
    fn to_f32(self, sums: Self::Sums) -> [__m256; 2] {
        proven!([_mm256_cvtepi32_ps(sums[0]), _mm256_cvtepi32_ps(sums[1])])
    }
}
