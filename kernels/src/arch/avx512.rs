//! AVX-512 vectors: sixteen f32 lanes, 32 registers.

use std::{arch::x86_64::*, hint::black_box};

use super::{Dot, DotBf16, DotBf16Task, DotI8, DotI8Task, Simd, Task, avx2::Avx2};
use crate::math::Unary;

const LANES: usize = 16;

/// Proof that the processor has AVX-512 F, BW, DQ and VL, and all that AVX2's token proves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512 {
    avx2: Avx2,
    has_vnni: bool,
    has_bf16: bool,
}

/// Proof that the processor has AVX-512 VNNI too.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vnni(Avx512);

/// Proof that the processor has AVX-512 BF16 too.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bf16(Avx512);

impl Avx512 {
    /// The token, if the processor has the instructions.
    pub(crate) fn new() -> Option<Avx512> {
        let available = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        Avx2::new().filter(|_| available).map(|avx2| Avx512 {
            avx2,
            has_vnni: is_x86_feature_detected!("avx512vnni"),
            has_bf16: is_x86_feature_detected!("avx512bf16"),
        })
    }

    /// The narrower set, which every such processor has.
    pub(crate) fn avx2(self) -> Avx2 {
        self.avx2
    }

    /// Products of bytes, if the processor has them.
    pub(crate) fn vnni(self) -> Option<Vnni> {
        self.has_vnni.then_some(Vnni(self))
    }

    /// Products of bfloat16, if the processor has them.
    pub(crate) fn bf16(self) -> Option<Bf16> {
        self.has_bf16.then_some(Bf16(self))
    }

    /// Runs `n_rounds` of independent dot products in registers; returns the multiply-adds of a round, none if the
    /// processor lacks the instruction.
    pub(super) fn dot_rounds(self, dot: Dot, n_rounds: usize) -> Option<usize> {
        match dot {
            Dot::Bf16 => self.has_bf16.then(|| {
                // SAFETY: the token proves the instructions.
                unsafe { bf16_rounds(n_rounds) }
            }),
            Dot::Int8 => self.has_vnni.then(|| {
                // SAFETY: the token proves the instructions.
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
        // SAFETY: `self` is a token of this module, whose only constructor found the instructions on this processor;
        // the intrinsic works on registers and touches no memory.
        unsafe { $($intrinsic)* }
    }};
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn run<T: Task>(simd: Avx512, task: T) -> T::Output {
    task.run(simd)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn run_i8<T: DotI8Task>(dot: Vnni, task: T) {
    task.run(dot);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
fn run_bf16<T: DotBf16Task>(dot: Bf16, task: T) {
    task.run(dot);
}

/// Sixty-four bytes.
#[inline(always)]
fn load_line(_: Avx512, from: &[u8; 64]) -> __m512i {
    // SAFETY: the token proves the instruction; the load reads the 64 bytes, unaligned.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
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

    #[inline(always)]
    fn prefetch(self, element: &f32) {
        // SAFETY: the token proves SSE; a prefetch does not access memory, and the address is that of an element.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(element).cast()) }
    }

    type Wide = __m512;
    const IS_WIDE: bool = true;

    #[inline(always)]
    fn wide_splat(self, value: f32) -> Self::Wide {
        self.splat(value)
    }

    #[inline(always)]
    fn wide_load(self, from: &[f32; 16]) -> Self::Wide {
        self.load(from)
    }

    #[inline(always)]
    fn wide_from_i8(self, from: &[i8; 16]) -> Self::Wide {
        // SAFETY: the token proves the instructions; the load reads the 16 bytes, unaligned.
        unsafe {
            let bytes = _mm_loadu_si128(from.as_ptr().cast());
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
        }
    }

    #[inline(always)]
    fn wide_from_f16(self, from: &[u16; 16]) -> Self::Wide {
        // SAFETY: the token proves the instructions; the load reads the 32 bytes, unaligned.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())) }
    }

    #[inline(always)]
    fn wide_from_bf16_pairs(self, from: &[u8; 64]) -> [Self::Wide; 2] {
        let pairs = load_line(self, from);
        proven! {
            let mask = _mm512_set1_epi32(0xFFFF_0000_u32.cast_signed());
            [
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)),
                _mm512_castsi512_ps(_mm512_and_si512(pairs, mask)),
            ]
        }
    }

    #[inline(always)]
    fn wide_mul_add(self, a: Self::Wide, b: Self::Wide, c: Self::Wide) -> Self::Wide {
        self.mul_add(a, b, c)
    }

    #[inline(always)]
    fn wide_add(self, a: Self::Wide, b: Self::Wide) -> Self::Wide {
        self.add(a, b)
    }

    #[inline(always)]
    fn wide_mul(self, a: Self::Wide, b: Self::Wide) -> Self::Wide {
        self.mul(a, b)
    }

    #[inline(always)]
    fn wide_map(self, a: Self::Wide, f: &impl Unary) -> Self::Wide {
        f.apply(self, a)
    }

    #[inline(always)]
    fn wide_store(self, value: Self::Wide, to: &mut [f32; 16]) {
        self.store(value, to);
    }
}

impl DotI8 for Vnni {
    type S = Avx512;
    type Sums = __m512i;
    type W = __m512i;
    type X = __m512i;
    /// `vpdpbusd` takes unsigned weights.
    const OFFSET: i32 = 128;

    #[inline(always)]
    fn simd(self) -> Avx512 {
        self.0
    }

    #[inline(always)]
    fn run<T: DotI8Task>(self, task: T) {
        // SAFETY: the token proves that the processor has every feature `run_i8` is compiled for.
        unsafe { run_i8(self, task) }
    }

    #[inline(always)]
    fn start(self, value: i32) -> Self::Sums {
        proven!(_mm512_set1_epi32(value))
    }

    #[inline(always)]
    fn weights(self, from: &[u8; 64]) -> Self::W {
        let line = load_line(self.0, from);
        proven!(_mm512_xor_si512(line, _mm512_set1_epi8(i8::MIN)))
    }

    #[inline(always)]
    fn nibbles(self, from: &[u8; 64]) -> [Self::W; 2] {
        let line = load_line(self.0, from);
        proven! {
            let mask = _mm512_set1_epi8(15);
            [
                _mm512_and_si512(line, mask),
                _mm512_and_si512(_mm512_srli_epi16::<4>(line), mask),
            ]
        }
    }

    #[inline(always)]
    fn broadcast(self, x: u32) -> Self::X {
        proven!(_mm512_set1_epi32(x.cast_signed()))
    }

    #[inline(always)]
    fn dot(self, sums: Self::Sums, w: Self::W, x: Self::X) -> Self::Sums {
        proven!(_mm512_dpbusd_epi32(sums, w, x))
    }

    #[inline(always)]
    fn dot_nibbles(self, sums: Self::Sums, w: Self::W, x: Self::X) -> Self::Sums {
        self.dot(sums, w, x)
    }

    #[inline(always)]
    fn add_scaled(self, total: Self::Sums, sums: Self::Sums, scales: &[u8; 16]) -> Self::Sums {
        // SAFETY: the token proves the instructions; the load reads the sixteen bytes of `scales`.
        unsafe {
            let scales = _mm512_cvtepu8_epi32(_mm_loadu_si128(scales.as_ptr().cast()));
            _mm512_add_epi32(total, _mm512_mullo_epi32(sums, scales))
        }
    }

    #[inline(always)]
    fn to_f32(self, sums: Self::Sums) -> __m512 {
        proven!(_mm512_cvtepi32_ps(sums))
    }
}

impl Bf16 {
    /// Runs a task inside a function compiled for this set.
    #[inline(always)]
    pub(crate) fn run<T: DotBf16Task>(self, task: T) {
        // SAFETY: the token proves that the processor has every feature `run_bf16` is compiled for.
        unsafe { run_bf16(self, task) }
    }
}

impl DotBf16 for Bf16 {
    type S = Avx512;
    type Sums = __m512;
    type W = __m512i;
    type X = __m512i;

    #[inline(always)]
    fn simd(self) -> Avx512 {
        self.0
    }

    #[inline(always)]
    fn zero(self) -> Self::Sums {
        self.0.splat(0.0)
    }

    #[inline(always)]
    fn weights(self, from: &[u8; 64]) -> Self::W {
        load_line(self.0, from)
    }

    #[inline(always)]
    fn broadcast(self, x: u32) -> Self::X {
        proven!(_mm512_set1_epi32(x.cast_signed()))
    }

    #[inline(always)]
    fn dot(self, sums: Self::Sums, w: Self::W, x: Self::X) -> Self::Sums {
        // SAFETY: the token proves the instruction; the conversions keep all 512 bits.
        unsafe {
            let pairs = |bits: __m512i| std::mem::transmute::<__m512i, __m512bh>(bits);
            _mm512_dpbf16_ps(sums, pairs(w), pairs(x))
        }
    }

    #[inline(always)]
    fn to_f32(self, sums: Self::Sums) -> __m512 {
        sums
    }
}
