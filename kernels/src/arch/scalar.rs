//! Four-lane arrays in plain Rust: runs everywhere, and the compiler turns it into the target's baseline vectors.

use super::{DotI8, DotI8Task, Simd, Task};
use crate::math::Unary;

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

    #[inline(always)]
    fn prefetch(self, _: &f32) {}

    type Wide = [f32; 16];
    const IS_WIDE: bool = false;

    #[inline(always)]
    fn wide_splat(self, value: f32) -> Self::Wide {
        [value; 16]
    }

    #[inline(always)]
    fn wide_load(self, from: &[f32; 16]) -> Self::Wide {
        *from
    }

    #[inline(always)]
    fn wide_from_f16(self, from: &[u16; 16]) -> Self::Wide {
        std::array::from_fn(|i| half::f16::from_bits(from[i]).to_f32())
    }

    #[inline(always)]
    fn wide_from_i8(self, from: &[i8; 16]) -> Self::Wide {
        std::array::from_fn(|i| f32::from(from[i]))
    }

    #[inline(always)]
    fn wide_from_bf16_pairs(self, from: &[u8; 64]) -> [Self::Wide; 2] {
        let halves = from.as_chunks().0;
        let widened = |i: usize| half::bf16::from_le_bytes(halves[i]).to_f32();
        [std::array::from_fn(|i| widened(2 * i)), std::array::from_fn(|i| widened(2 * i + 1))]
    }

    #[inline(always)]
    fn wide_mul_add(self, a: Self::Wide, b: Self::Wide, c: Self::Wide) -> Self::Wide {
        std::array::from_fn(|i| mul_add(a[i], b[i], c[i]))
    }

    #[inline(always)]
    fn wide_add(self, a: Self::Wide, b: Self::Wide) -> Self::Wide {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn wide_mul(self, a: Self::Wide, b: Self::Wide) -> Self::Wide {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn wide_map(self, mut a: Self::Wide, f: &impl Unary) -> Self::Wide {
        for lanes in a.as_chunks_mut::<LANES>().0 {
            *lanes = f.apply(self, *lanes);
        }
        a
    }

    #[inline(always)]
    fn wide_store(self, value: Self::Wide, to: &mut [f32; 16]) {
        *to = value;
    }
}

impl DotI8 for Scalar {
    type S = Scalar;
    type Sums = [i32; 16];
    type W = [[i8; 4]; 16];
    type X = [i8; 4];
    const OFFSET: i32 = 0;

    #[inline(always)]
    fn simd(self) -> Scalar {
        self
    }

    #[inline(always)]
    fn run<T: DotI8Task>(self, task: T) {
        task.run(self);
    }

    #[inline(always)]
    fn start(self, value: i32) -> Self::Sums {
        [value; 16]
    }

    #[inline(always)]
    fn weights(self, from: &[u8; 64]) -> Self::W {
        let rows = from.as_chunks::<4>().0;
        std::array::from_fn(|row| rows[row].map(u8::cast_signed))
    }

    #[inline(always)]
    fn nibbles(self, from: &[u8; 64]) -> [Self::W; 2] {
        let low = from.map(|byte| byte & 15);
        let high = from.map(|byte| byte >> 4);
        [self.weights(&low), self.weights(&high)]
    }

    #[inline(always)]
    fn broadcast(self, x: u32) -> Self::X {
        x.to_le_bytes().map(u8::cast_signed)
    }

    #[inline(always)]
    fn dot(self, sums: Self::Sums, w: Self::W, x: Self::X) -> Self::Sums {
        let product = |a: i8, b: i8| i32::from(a) * i32::from(b);
        let row = |w: [i8; 4]| {
            product(w[0], x[0]) + product(w[1], x[1]) + product(w[2], x[2]) + product(w[3], x[3])
        };
        std::array::from_fn(|i| sums[i].wrapping_add(row(w[i])))
    }

    #[inline(always)]
    fn dot_nibbles(self, sums: Self::Sums, w: Self::W, x: Self::X) -> Self::Sums {
        self.dot(sums, w, x)
    }

    #[inline(always)]
    fn add_scaled(self, total: Self::Sums, sums: Self::Sums, scales: &[u8; 16]) -> Self::Sums {
        let scaled = |i: usize| sums[i].wrapping_mul(i32::from(scales[i]));
        std::array::from_fn(|i| total[i].wrapping_add(scaled(i)))
    }

    #[inline(always)]
    fn to_f32(self, sums: Self::Sums) -> [f32; 16] {
        sums.map(|sum| sum as f32)
    }
}
