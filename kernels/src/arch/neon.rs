//! NEON vectors of aarch64: four f32 lanes, 32 registers.
//!
//! The standard library's intrinsics for `sdot` and `smmla` are not stable yet, so these are written as assembly.

use std::{
    arch::{aarch64::*, asm, is_aarch64_feature_detected},
    hint::black_box,
};

use super::{Dot, DotI8, DotI8Task, Simd, Task};
use crate::math::Unary;

const LANES: usize = 4;

/// Proof that the processor has NEON.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon {
    has_dotprod: bool,
    has_i8mm: bool,
}

/// Proof that the processor has `sdot` too.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sdot(Neon);

/// Proof that the processor has `smmla` too.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Smmla(Sdot);

impl Neon {
    /// The token, if the processor has the instructions.
    pub(crate) fn new() -> Option<Neon> {
        let has_dotprod = is_aarch64_feature_detected!("dotprod");
        let has_i8mm = is_aarch64_feature_detected!("i8mm");
        is_aarch64_feature_detected!("neon").then_some(Neon { has_dotprod, has_i8mm })
    }

    /// Sums of four products of bytes in one instruction, if the processor has it.
    pub(crate) fn sdot(self) -> Option<Sdot> {
        self.has_dotprod.then_some(Sdot(self))
    }

    /// Products of two rows with two rows in one instruction, if the processor has it.
    pub(crate) fn smmla(self) -> Option<Smmla> {
        self.sdot().filter(|_| self.has_i8mm).map(Smmla)
    }

    /// Runs `n_rounds` of independent dot products in registers; returns the multiply-adds of a round, none where the
    /// processor has no instruction for them that kernels use.
    pub(super) fn dot_rounds(self, dot: Dot, n_rounds: usize) -> Option<usize> {
        match dot {
            Dot::Bf16 => None,
            // SAFETY: the token proves the instructions.
            Dot::Int8 => self.sdot().map(|sdot| unsafe { sdot_rounds(sdot, n_rounds) }),
        }
    }
}

/// Chains of [`Neon::dot_rounds`]: more than latency times pipes, few enough for 32 registers.
const N_CHAINS: usize = 24;

#[target_feature(enable = "neon,dotprod")]
fn sdot_rounds(sdot: Sdot, n_rounds: usize) -> usize {
    let (a, b) = (vdupq_n_s8(black_box(1)), vdupq_n_s8(black_box(1)));
    let mut chains = [vdupq_n_s32(0); N_CHAINS];
    for _ in 0..n_rounds {
        for chain in &mut chains {
            *chain = sdot.dot_four(*chain, a, b);
        }
    }
    black_box(chains);
    N_CHAINS * LANES * 4
}

/// Evaluates register-only intrinsics.
macro_rules! proven {
    ($($intrinsic:tt)*) => {{
        // SAFETY: `self` is a token of this module, whose only constructor found the instructions on this processor;
        // the intrinsics work on registers and touch no memory.
        unsafe { $($intrinsic)* }
    }};
}

#[target_feature(enable = "neon")]
fn run<T: Task>(simd: Neon, task: T) -> T::Output {
    task.run(simd)
}

#[target_feature(enable = "neon")]
fn run_i8<T: DotI8Task>(simd: Neon, task: T) {
    task.run(Bytes(simd));
}

#[target_feature(enable = "neon,dotprod")]
fn run_i8_sdot<T: DotI8Task>(sdot: Sdot, task: T) {
    task.run(Bytes(sdot));
}

#[target_feature(enable = "neon,dotprod,i8mm")]
fn run_i8_smmla<T: DotI8Task>(smmla: Smmla, task: T) {
    task.run(Bytes(smmla));
}

/// Sixteen bytes for each of four rows of a panel.
type Line = [int8x16_t; 4];

/// Sixty-four bytes.
#[inline(always)]
fn load_line(_: Neon, from: &[u8; 64]) -> Line {
    let quarters = from.as_chunks::<16>().0;
    // SAFETY: the token proves the instruction; each load reads the sixteen bytes of a quarter, unaligned.
    unsafe {
        [
            vreinterpretq_s8_u8(vld1q_u8(quarters[0].as_ptr())),
            vreinterpretq_s8_u8(vld1q_u8(quarters[1].as_ptr())),
            vreinterpretq_s8_u8(vld1q_u8(quarters[2].as_ptr())),
            vreinterpretq_s8_u8(vld1q_u8(quarters[3].as_ptr())),
        ]
    }
}

impl Simd for Neon {
    type Lanes = [f32; LANES];
    type F = float32x4_t;
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
        // SAFETY: the token proves the instruction; `from` is four readable f32, and the load is unaligned.
        unsafe { vld1q_f32(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, value: Self::F, to: &mut Self::Lanes) {
        // SAFETY: the token proves the instruction; `to` is four writable f32, and the store is unaligned.
        unsafe { vst1q_f32(to.as_mut_ptr(), value) }
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
        proven!(vdupq_n_f32(value))
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        proven!(vaddq_f32(a, b))
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        proven!(vsubq_f32(a, b))
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        proven!(vmulq_f32(a, b))
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        proven!(vdivq_f32(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        proven!(vfmaq_f32(c, a, b))
    }

    /// A comparison and a selection: NEON's own maximum has another rule for NaN.
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        proven!(vbslq_f32(vcgtq_f32(a, b), a, b))
    }

    /// As [`Simd::max`].
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        proven!(vbslq_f32(vcltq_f32(a, b), a, b))
    }

    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        proven!(vabsq_f32(a))
    }

    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        proven!(vrndnq_f32(a))
    }

    #[inline(always)]
    fn scale_pow2(self, a: Self::F, n: Self::F) -> Self::F {
        proven! {
            let n = vcvtq_s32_f32(n);
            let (half, bias) = (vshrq_n_s32::<1>(n), vdupq_n_s32(127));
            let first = vshlq_n_s32::<23>(vaddq_s32(half, bias));
            let second = vshlq_n_s32::<23>(vaddq_s32(vsubq_s32(n, half), bias));
            vmulq_f32(vmulq_f32(a, vreinterpretq_f32_s32(first)), vreinterpretq_f32_s32(second))
        }
    }

    #[inline(always)]
    fn reduce_add_4(self, [a, b, c, d]: [Self::F; 4]) -> [f32; 4] {
        let mut sums = [0.0; 4];
        self.store(proven!(vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))), &mut sums);
        sums
    }

    #[inline(always)]
    fn reduce_add(self, vector: Self::F) -> f32 {
        let [sum, ..] = self.reduce_add_4([vector; 4]);
        sum
    }

    #[inline(always)]
    fn reduce_max(self, vector: Self::F) -> f32 {
        proven!(vmaxnmvq_f32(vector))
    }

    /// The processor's own prefetching is all there is: the standard library has no stable intrinsic for it.
    #[inline(always)]
    fn prefetch(self, _: &f32) {}

    type Wide = [float32x4_t; 4];
    const IS_WIDE: bool = false;

    #[inline(always)]
    fn wide_splat(self, value: f32) -> Self::Wide {
        [self.splat(value); 4]
    }

    #[inline(always)]
    fn wide_load(self, from: &[f32; 16]) -> Self::Wide {
        let quarters = from.as_chunks::<4>().0;
        let quarter = |i: usize| self.load(&quarters[i]);
        [quarter(0), quarter(1), quarter(2), quarter(3)]
    }

    #[inline(always)]
    fn wide_from_f16(self, from: &[u16; 16]) -> Self::Wide {
        // SAFETY: the token proves the instructions; each load reads half of the 32 bytes, unaligned.
        unsafe {
            let a = vreinterpretq_f16_u16(vld1q_u16(from.as_ptr()));
            let b = vreinterpretq_f16_u16(vld1q_u16(from[8..].as_ptr()));
            [
                vcvt_f32_f16(vget_low_f16(a)),
                vcvt_high_f32_f16(a),
                vcvt_f32_f16(vget_low_f16(b)),
                vcvt_high_f32_f16(b),
            ]
        }
    }

    #[inline(always)]
    fn wide_from_i8(self, from: &[i8; 16]) -> Self::Wide {
        // SAFETY: the token proves the instructions; the load reads the sixteen bytes.
        unsafe {
            let bytes = vld1q_s8(from.as_ptr());
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_high_s16(high)),
            ]
        }
    }

    #[inline(always)]
    fn wide_from_bf16_pairs(self, from: &[u8; 64]) -> [Self::Wide; 2] {
        let [a, b, c, d] = load_line(self, from);
        proven! {
            let first = |pairs| vreinterpretq_f32_u32(vshlq_n_u32::<16>(vreinterpretq_u32_s8(pairs)));
            let mask = vdupq_n_u32(0xFFFF_0000);
            let second = |pairs| vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_s8(pairs), mask));
            [[first(a), first(b), first(c), first(d)], [second(a), second(b), second(c), second(d)]]
        }
    }

    #[inline(always)]
    fn wide_mul_add(self, a: Self::Wide, b: Self::Wide, c: Self::Wide) -> Self::Wide {
        let quarter = |i: usize| self.mul_add(a[i], b[i], c[i]);
        [quarter(0), quarter(1), quarter(2), quarter(3)]
    }

    #[inline(always)]
    fn wide_add(self, a: Self::Wide, b: Self::Wide) -> Self::Wide {
        let quarter = |i: usize| self.add(a[i], b[i]);
        [quarter(0), quarter(1), quarter(2), quarter(3)]
    }

    #[inline(always)]
    fn wide_mul(self, a: Self::Wide, b: Self::Wide) -> Self::Wide {
        let quarter = |i: usize| self.mul(a[i], b[i]);
        [quarter(0), quarter(1), quarter(2), quarter(3)]
    }

    #[inline(always)]
    fn wide_map(self, a: Self::Wide, f: &impl Unary) -> Self::Wide {
        [f.apply(self, a[0]), f.apply(self, a[1]), f.apply(self, a[2]), f.apply(self, a[3])]
    }

    #[inline(always)]
    fn wide_store(self, value: Self::Wide, to: &mut [f32; 16]) {
        for (quarter, to) in value.into_iter().zip(to.as_chunks_mut().0) {
            self.store(quarter, to);
        }
    }
}

/// Sums of four products of signed bytes, and what runs work made of them.
pub(crate) trait DotFour: Copy + Send + Sync {
    /// The vectors beside it.
    fn neon(self) -> Neon;
    /// Runs a task inside a function compiled for this set.
    fn run<T: DotI8Task>(self, task: T);
    /// `sums + Σ w[4 i + j] x[4 i + j]` in lane `i`.
    fn dot_four(self, sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t;
    /// `sums + Σ w[8 i + c] x[8 j + c]` in lane `2 i + j`, if there is an instruction for it.
    #[inline(always)]
    fn dot_pairs(self) -> Option<impl Fn(int32x4_t, int8x16_t, int8x16_t) -> int32x4_t> {
        None::<fn(int32x4_t, int8x16_t, int8x16_t) -> int32x4_t>
    }
}

impl DotFour for Neon {
    #[inline(always)]
    fn neon(self) -> Neon {
        self
    }

    #[inline(always)]
    fn run<T: DotI8Task>(self, task: T) {
        // SAFETY: the token proves that the processor has every feature `run_i8` is compiled for.
        unsafe { run_i8(self, task) }
    }

    #[inline(always)]
    fn dot_four(self, sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        proven! {
            let low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
            let high = vpaddlq_s16(vmull_high_s8(w, x));
            vaddq_s32(sums, vpaddq_s32(low, high))
        }
    }
}

impl DotFour for Sdot {
    #[inline(always)]
    fn neon(self) -> Neon {
        self.0
    }

    #[inline(always)]
    fn run<T: DotI8Task>(self, task: T) {
        // SAFETY: the token proves that the processor has every feature `run_i8_sdot` is compiled for.
        unsafe { run_i8_sdot(self, task) }
    }

    #[inline(always)]
    fn dot_four(self, mut sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: the token proves the instruction, which works on registers; the directive is for the assembler.
        unsafe {
            asm!(
                ".arch_extension dotprod",
                "sdot {sums:v}.4s, {w:v}.16b, {x:v}.16b",
                sums = inout(vreg) sums,
                w = in(vreg) w,
                x = in(vreg) x,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        sums
    }
}

impl DotFour for Smmla {
    #[inline(always)]
    fn neon(self) -> Neon {
        self.0.neon()
    }

    #[inline(always)]
    fn run<T: DotI8Task>(self, task: T) {
        // SAFETY: the token proves that the processor has every feature `run_i8_smmla` is compiled for.
        unsafe { run_i8_smmla(self, task) }
    }

    #[inline(always)]
    fn dot_four(self, sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        self.0.dot_four(sums, w, x)
    }

    #[inline(always)]
    fn dot_pairs(self) -> Option<impl Fn(int32x4_t, int8x16_t, int8x16_t) -> int32x4_t> {
        Some(|mut sums: int32x4_t, w: int8x16_t, x: int8x16_t| {
            // SAFETY: the token proves the instruction, which works on registers; the directive is for the assembler.
            unsafe {
                asm!(
                    ".arch_extension i8mm",
                    "smmla {sums:v}.4s, {w:v}.16b, {x:v}.16b",
                    sums = inout(vreg) sums,
                    w = in(vreg) w,
                    x = in(vreg) x,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            sums
        })
    }
}

/// Products of bytes: four sums of [`DotFour`] for the sixteen rows of a panel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bytes<D>(pub(crate) D);

impl<D: DotFour> DotI8 for Bytes<D> {
    type S = Neon;
    type Sums = [int32x4_t; 4];
    type W = Line;
    type X = int8x16_t;
    const OFFSET: i32 = 0;

    #[inline(always)]
    fn simd(self) -> Neon {
        self.0.neon()
    }

    #[inline(always)]
    fn run<T: DotI8Task>(self, task: T) {
        self.0.run(task);
    }

    #[inline(always)]
    fn start(self, value: i32) -> Self::Sums {
        [proven!(vdupq_n_s32(value)); 4]
    }

    #[inline(always)]
    fn weights(self, from: &[u8; 64]) -> Self::W {
        load_line(self.simd(), from)
    }

    #[inline(always)]
    fn nibbles(self, from: &[u8; 64]) -> [Self::W; 2] {
        let [a, b, c, d] = load_line(self.simd(), from);
        proven! {
            let mask = vdupq_n_s8(15);
            let low = |bytes| vandq_s8(bytes, mask);
            let high = |bytes| vreinterpretq_s8_u8(vshrq_n_u8::<4>(vreinterpretq_u8_s8(bytes)));
            [[low(a), low(b), low(c), low(d)], [high(a), high(b), high(c), high(d)]]
        }
    }

    #[inline(always)]
    fn broadcast(self, x: u32) -> Self::X {
        proven!(vreinterpretq_s8_u32(vdupq_n_u32(x)))
    }

    #[inline(always)]
    fn dot(self, sums: Self::Sums, w: Self::W, x: Self::X) -> Self::Sums {
        let quarter = |i: usize| self.0.dot_four(sums[i], w[i], x);
        [quarter(0), quarter(1), quarter(2), quarter(3)]
    }

    #[inline(always)]
    fn dot_nibbles(self, sums: Self::Sums, w: Self::W, x: Self::X) -> Self::Sums {
        self.dot(sums, w, x)
    }

    #[inline(always)]
    fn products_by_pairs<const M: usize>(
        self,
        x: &[[u32; M]],
        panel: &[[u8; 64]],
    ) -> Option<[Self::Sums; M]> {
        let dot_pairs = self.0.dot_pairs().filter(|_| M.is_multiple_of(2))?;
        let [zero] = self.start(0)[..1] else { return None };
        // Of each pair of rows of x with each pair of the panel's rows; the second half of `M` stays unused.
        let mut sums = [[zero; 8]; M];
        for (x, lines) in x.chunks(2).zip(panel.chunks(2)) {
            let (first, last) = (load_line(self.simd(), &lines[0]), lines.get(1));
            let last = last.map_or([self.broadcast(0); 4], |line| load_line(self.simd(), line));
            let x_last = x.get(1).copied().unwrap_or([0; M]);
            let mut w = [self.broadcast(0); 8];
            for quarter in 0..4 {
                let [a, b] = [first[quarter], last[quarter]]
                    .map(|bytes| proven!(vreinterpretq_s32_s8(bytes)));
                w[2 * quarter] = proven!(vreinterpretq_s8_s32(vzip1q_s32(a, b)));
                w[2 * quarter + 1] = proven!(vreinterpretq_s8_s32(vzip2q_s32(a, b)));
            }
            for (pair, sums) in sums[..M / 2].iter_mut().enumerate() {
                let row = 2 * pair;
                let both = [x[0][row], x_last[row], x[0][row + 1], x_last[row + 1]];
                // SAFETY: the token proves the instruction; the load reads the four numbers of `both`.
                let x = unsafe { vreinterpretq_s8_u32(vld1q_u32(both.as_ptr())) };
                for (sums, w) in sums.iter_mut().zip(w) {
                    *sums = dot_pairs(*sums, w, x);
                }
            }
        }
        let mut rows = [self.start(0); M];
        for (row, out) in rows.iter_mut().enumerate() {
            let sums = &sums[row / 2];
            for (quarter, out) in out.iter_mut().enumerate() {
                let (a, b) = (sums[2 * quarter], sums[2 * quarter + 1]);
                *out = match row % 2 {
                    0 => proven!(vuzp1q_s32(a, b)),
                    _ => proven!(vuzp2q_s32(a, b)),
                };
            }
        }
        Some(rows)
    }

    #[inline(always)]
    fn add_scaled(self, total: Self::Sums, sums: Self::Sums, scales: &[u8; 16]) -> Self::Sums {
        // SAFETY: the token proves the instructions; the load reads the sixteen bytes of `scales`.
        let scales = unsafe {
            let scales = vld1q_u8(scales.as_ptr());
            let (low, high) = (vmovl_u8(vget_low_u8(scales)), vmovl_high_u8(scales));
            [
                vmovl_u16(vget_low_u16(low)),
                vmovl_high_u16(low),
                vmovl_u16(vget_low_u16(high)),
                vmovl_high_u16(high),
            ]
        };
        let quarter =
            |i: usize| proven!(vmlaq_s32(total[i], sums[i], vreinterpretq_s32_u32(scales[i])));
        [quarter(0), quarter(1), quarter(2), quarter(3)]
    }

    #[inline(always)]
    fn to_f32(self, sums: Self::Sums) -> [float32x4_t; 4] {
        let quarter = |i: usize| proven!(vcvtq_f32_s32(sums[i]));
        [quarter(0), quarter(1), quarter(2), quarter(3)]
    }
}
