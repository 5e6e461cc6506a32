//! Four-lane arrays in plain Rust: runs everywhere, and the compiler turns it into the target's baseline vectors.

use super::{Simd, Task};

const LANES: usize = 4;

/// The token of the portable set, always available.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scalar;

/// Fused where the target's baseline has the instruction; a call to the C library otherwise, so not used there.
#[inline(always)]
fn mul_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

#[inline(always)]
fn map(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    [f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])]
}

/// 2^n for `n` in the range of normal exponents.
#[inline(always)]
fn pow2(n: i32) -> f32 {
    f32::from_bits(((n + 127) << 23).cast_unsigned())
}

impl Simd for Scalar {
    type Lanes = [f32; LANES];
    type F = [f32; LANES];
    const LANES: usize = LANES;
    const X_ROWS: usize = if cfg!(target_arch = "aarch64") { 6 } else { 2 };

    #[inline(always)]
    fn run<T: Task>(self, task: T) -> T::Output {
        task.run(self)
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
        *from
    }

    #[inline(always)]
    fn store(self, value: Self::F, to: &mut Self::Lanes) {
        *to = value;
    }

    #[inline(always)]
    fn load_partial(self, from: &[f32]) -> Self::F {
        let mut lanes = [0.0; LANES];
        lanes[..from.len()].copy_from_slice(from);
        lanes
    }

    #[inline(always)]
    fn store_partial(self, value: Self::F, to: &mut [f32]) {
        to.copy_from_slice(&value[..to.len()]);
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        [value; LANES]
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        map(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        map(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        map(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        map(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        [
            mul_add(a[0], b[0], c[0]),
            mul_add(a[1], b[1], c[1]),
            mul_add(a[2], b[2], c[2]),
            mul_add(a[3], b[3], c[3]),
        ]
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        map(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        map(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        map(a, a, |a, _| a.abs())
    }

    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        const INTEGERS_ONLY: f32 = 12_582_912.0; // 1.5 * 2^23: no room for a fraction
        map(a, a, |a, _| (a + INTEGERS_ONLY) - INTEGERS_ONLY)
    }

    #[inline(always)]
    fn scale_pow2(self, a: Self::F, n: Self::F) -> Self::F {
        map(a, n, |a, n| {
            let n = n as i32;
            a * pow2(n >> 1) * pow2(n - (n >> 1))
        })
    }

    #[inline(always)]
    fn reduce_add_4(self, vectors: [Self::F; 4]) -> [f32; 4] {
        vectors.map(|vector| self.reduce_add(vector))
    }

    #[inline(always)]
    fn reduce_add(self, [a, b, c, d]: Self::F) -> f32 {
        (a + c) + (b + d)
    }

    #[inline(always)]
    fn reduce_max(self, [a, b, c, d]: Self::F) -> f32 {
        a.max(b).max(c.max(d))
    }
}
