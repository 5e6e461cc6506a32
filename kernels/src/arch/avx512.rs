//! AVX-512 vectors: sixteen f32 lanes, 32 registers.

use std::{arch::x86_64::*, hint::black_box};

use super::{Dot, Simd, Task};

const LANES: usize = 16;

/// Proof that the processor has AVX-512 F, BW, DQ and VL, and FMA.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// The token, if the processor has the instructions.
    pub(crate) fn new() -> Option<Avx512> {
        let available = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma");
        available.then_some(Avx512(()))
    }

    /// Runs `n_rounds` of independent dot products in registers; returns the multiply-adds of a round, none if the
    /// processor lacks the instruction.
    pub(super) fn dot_rounds(self, dot: Dot, n_rounds: usize) -> Option<usize> {
        match dot {
            Dot::Bf16 => is_x86_feature_detected!("avx512bf16").then(|| {
                // SAFETY: the token and the check prove the instructions.
                unsafe { bf16_rounds(n_rounds) }
            }),
            Dot::Int8 => is_x86_feature_detected!("avx512vnni").then(|| {
                // SAFETY: the token and the check prove the instructions.
                unsafe { int8_rounds(n_rounds) }
            }),
        }
    }
}

/// Chains of [`Avx512::dot_rounds`]: more than latency times ports, few enough for 32 registers.
const N_CHAINS: usize = 24;

#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16_rounds(n_rounds: usize) -> usize {
    let ones = _mm512_set1_ps(black_box(1.0));
    let (a, b) = (_mm512_cvtne2ps_pbh(ones, ones), _mm512_cvtne2ps_pbh(ones, ones));
    let mut chains = [_mm512_setzero_ps(); N_CHAINS];
    for _ in 0..n_rounds {
        for chain in &mut chains {
            *chain = _mm512_dpbf16_ps(*chain, a, b);
        }
    }
    black_box(chains);
    N_CHAINS * LANES * 2
}

#[target_feature(enable = "avx512f,avx512vnni")]
fn int8_rounds(n_rounds: usize) -> usize {
    let (a, b) = (_mm512_set1_epi8(black_box(1)), _mm512_set1_epi8(black_box(1)));
    let mut chains = [_mm512_setzero_si512(); N_CHAINS];
    for _ in 0..n_rounds {
        for chain in &mut chains {
            *chain = _mm512_dpbusd_epi32(*chain, a, b);
        }
    }
    black_box(chains);
    N_CHAINS * LANES * 4
}

/// Evaluates a register-only intrinsic.
macro_rules! proven {
    ($($intrinsic:tt)*) => {{
        // SAFETY: `self` is an `Avx512`, whose only constructor found the instructions on this processor; the
        // intrinsic works on registers and touches no memory.
        unsafe { $($intrinsic)* }
    }};
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn run<T: Task>(simd: Avx512, task: T) -> T::Output {
    task.run(simd)
}

/// Mask of the first `len` lanes, `len` below 16.
#[inline(always)]
fn first(len: usize) -> __mmask16 {
    assert!(len < LANES);
    (1 << len) - 1
}

impl Simd for Avx512 {
    type Lanes = [f32; LANES];
    type F = __m512;
    const LANES: usize = LANES;
    const X_ROWS: usize = 6;

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
        // SAFETY: the token proves the instruction; `from` is sixteen readable f32, and the load is unaligned.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, value: Self::F, to: &mut Self::Lanes) {
        // SAFETY: the token proves the instruction; `to` is sixteen writable f32, and the store is unaligned.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), value) }
    }

    #[inline(always)]
    fn load_partial(self, from: &[f32]) -> Self::F {
        // SAFETY: the token proves the instruction; the mask selects `from.len()` elements, others are not touched.
        unsafe { _mm512_maskz_loadu_ps(first(from.len()), from.as_ptr()) }
    }

    #[inline(always)]
    fn store_partial(self, value: Self::F, to: &mut [f32]) {
        // SAFETY: the token proves the instruction; the mask selects `to.len()` elements, others are not touched.
        unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr(), first(to.len()), value) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        proven!(_mm512_set1_ps(value))
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        proven!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        proven!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        proven!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        proven!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        proven!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        proven!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        proven!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        proven!(_mm512_abs_ps(a))
    }

    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        proven!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }

    #[inline(always)]
    fn scale_pow2(self, a: Self::F, n: Self::F) -> Self::F {
        proven!(_mm512_scalef_ps(a, n))
    }

    #[inline(always)]
    fn reduce_add_4(self, [a, b, c, d]: [Self::F; 4]) -> [f32; 4] {
        let mut sums = [0.0; 4];
        // SAFETY: the token proves the instructions; the store writes the four elements of `sums`.
        unsafe {
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
            let (low, high) = (_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd));
            let quarters = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
            let halves = _mm256_add_ps(
                _mm512_castps512_ps256(quarters),
                _mm512_extractf32x8_ps::<1>(quarters),
            );
            let sum =
                _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
            _mm_storeu_ps(sums.as_mut_ptr(), sum);
        }
        sums
    }

    #[inline(always)]
    fn reduce_add(self, vector: Self::F) -> f32 {
        proven!(_mm512_reduce_add_ps(vector))
    }

    #[inline(always)]
    fn reduce_max(self, vector: Self::F) -> f32 {
        proven!(_mm512_reduce_max_ps(vector))
    }
}
