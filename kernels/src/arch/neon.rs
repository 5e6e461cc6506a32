//! NEON vectors of aarch64: four f32 lanes, 32 registers.

use std::arch::{aarch64::*, is_aarch64_feature_detected};

use super::{Simd, Task};

const LANES: usize = 4;

/// Proof that the processor has NEON, and which of its later instructions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon {
    /// Products of four signed bytes summed in a lane (`sdot`).
    dotprod: bool,
    /// Products of 2×8 by 8×2 signed bytes (`smmla`).
    i8mm: bool,
    /// Arithmetic on half precision.
    fp16: bool,
}

impl Neon {
    /// The token, if the processor has the instructions.
    pub(crate) fn new() -> Option<Neon> {
        is_aarch64_feature_detected!("neon").then(|| Neon {
            dotprod: is_aarch64_feature_detected!("dotprod"),
            i8mm: is_aarch64_feature_detected!("i8mm"),
            fp16: is_aarch64_feature_detected!("fp16"),
        })
    }

    /// Names of the later instructions found.
    pub(crate) fn extensions(self) -> Vec<&'static str> {
        let names = [(self.dotprod, "dotprod"), (self.i8mm, "i8mm"), (self.fp16, "fp16")];
        names.into_iter().filter(|(found, _)| *found).map(|(_, name)| name).collect()
    }
}

/// Evaluates register-only intrinsics.
macro_rules! proven {
    ($($intrinsic:tt)*) => {{
        // SAFETY: `self` is a `Neon`, whose only constructor found the instructions on this processor; the intrinsics
        // work on registers and touch no memory.
        unsafe { $($intrinsic)* }
    }};
}

#[target_feature(enable = "neon")]
fn run<T: Task>(simd: Neon, task: T) -> T::Output {
    task.run(simd)
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
}
