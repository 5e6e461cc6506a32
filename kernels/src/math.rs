//! Vector exponential and complementary error function, and slice loops shared by the element-wise kernels.

use crate::arch::Simd;

/// ln 2 in two parts: the high one has few bits, so that its product with a small integer is exact.
const LN_2_HIGH: f32 = 355.0 / 512.0;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// e^x. Within 2 units in the last place where the result is normal; 0 below -104, infinity above 89, NaN for NaN.
///
/// Cody-Waite reduction by ln 2 and the degree-6 polynomial of Cephes `expf`.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.min(s.splat(89.0), s.max(s.splat(-104.0), x));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.mul_add(n, s.splat(-LN_2_HIGH), x);
    let r = s.mul_add(n, s.splat(-LN_2_LOW), r);
    let mut p = s.splat(1.987_569_2e-4);
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.mul_add(p, r, s.splat(coefficient));
    }
    let p = s.add(s.mul_add(s.mul(r, r), p, r), s.splat(1.0));
    s.scale_pow2(p, n)
}

/// erfc(a / √2) for `a >= 0`: Abramowitz and Stegun 7.1.26, absolute error below 1e-6 with f32 rounding.
#[inline(always)]
pub(crate) fn erfc_of_scaled<S: Simd>(s: S, a: S::F) -> S::F {
    let z = s.mul(a, s.splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = s.div(s.splat(1.0), s.mul_add(z, s.splat(0.327_591_1), s.splat(1.0)));
    let mut p = s.splat(1.061_405_4);
    for coefficient in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        p = s.mul_add(p, t, s.splat(coefficient));
    }
    let minus_square = s.mul(s.mul(a, a), s.splat(-0.5));
    s.mul(s.mul(p, t), exp(s, minus_square))
}

/// A function of one vector that [`map_in_place`] applies.
pub(crate) trait Unary {
    /// The function.
    fn apply<S: Simd>(&self, s: S, x: S::F) -> S::F;
}

/// `data[i] = f(data[i])`
#[inline(always)]
pub(crate) fn map_in_place<S: Simd>(s: S, data: &mut [f32], f: &impl Unary) {
    let (lanes, rest) = s.split_mut(data);
    for lane in lanes {
        s.store(f.apply(s, s.load(lane)), lane);
    }
    if !rest.is_empty() {
        s.store_partial(f.apply(s, s.load_partial(rest)), rest);
    }
}

/// `data[i] += other[i]`
#[inline(always)]
pub(crate) fn add_in_place<S: Simd>(s: S, data: &mut [f32], other: &[f32]) {
    let ((lanes, rest), (others, other_rest)) = (s.split_mut(data), s.split(other));
    for (lane, other) in lanes.iter_mut().zip(others) {
        s.store(s.add(s.load(lane), s.load(other)), lane);
    }
    if !rest.is_empty() {
        s.store_partial(s.add(s.load_partial(rest), s.load_partial(other_rest)), rest);
    }
}

/// `data[i] *= other[i]`
#[inline(always)]
pub(crate) fn multiply_in_place<S: Simd>(s: S, data: &mut [f32], other: &[f32]) {
    let ((lanes, rest), (others, other_rest)) = (s.split_mut(data), s.split(other));
    for (lane, other) in lanes.iter_mut().zip(others) {
        s.store(s.mul(s.load(lane), s.load(other)), lane);
    }
    if !rest.is_empty() {
        s.store_partial(s.mul(s.load_partial(rest), s.load_partial(other_rest)), rest);
    }
}

/// `data[i] *= factor`
#[inline(always)]
pub(crate) fn scale_in_place<S: Simd>(s: S, data: &mut [f32], factor: f32) {
    struct Scale(f32);
    impl Unary for Scale {
        #[inline(always)]
        fn apply<S: Simd>(&self, s: S, x: S::F) -> S::F {
            s.mul(x, s.splat(self.0))
        }
    }
    map_in_place(s, data, &Scale(factor));
}

/// `data[i] += constant`
#[inline(always)]
pub(crate) fn add_constant<S: Simd>(s: S, data: &mut [f32], constant: f32) {
    struct Add(f32);
    impl Unary for Add {
        #[inline(always)]
        fn apply<S: Simd>(&self, s: S, x: S::F) -> S::F {
            s.add(x, s.splat(self.0))
        }
    }
    map_in_place(s, data, &Add(constant));
}

/// Sum of all elements: four accumulators by lanes, then a tree.
#[inline(always)]
pub(crate) fn sum<S: Simd>(s: S, data: &[f32]) -> f32 {
    let (lanes, rest) = s.split(data);
    let mut sums = [s.splat(0.0); 4];
    for (p, lane) in lanes.iter().enumerate() {
        sums[p % 4] = s.add(sums[p % 4], s.load(lane));
    }
    sums[0] = s.add(sums[0], s.load_partial(rest));
    let [a, b, c, d] = s.reduce_add_4(sums);
    (a + b) + (c + d)
}

/// Sum of the squares of all elements: four accumulators by lanes, then a tree.
#[inline(always)]
pub(crate) fn sum_of_squares<S: Simd>(s: S, data: &[f32]) -> f32 {
    let (lanes, rest) = s.split(data);
    let mut sums = [s.splat(0.0); 4];
    for (p, lane) in lanes.iter().enumerate() {
        let value = s.load(lane);
        sums[p % 4] = s.mul_add(value, value, sums[p % 4]);
    }
    let value = s.load_partial(rest);
    sums[0] = s.mul_add(value, value, sums[0]);
    let [a, b, c, d] = s.reduce_add_4(sums);
    (a + b) + (c + d)
}

/// Largest element; negative infinity if there is none. NaN may be skipped.
#[inline(always)]
pub(crate) fn largest<S: Simd>(s: S, data: &[f32]) -> f32 {
    let (lanes, rest) = s.split(data);
    let mut largest = s.splat(f32::NEG_INFINITY);
    for lane in lanes {
        largest = s.max(s.load(lane), largest);
    }
    rest.iter().copied().fold(s.reduce_max(largest), f32::max)
}

/// Nearest integer of a number within ±127, ties to even, as the bits of a signed byte.
#[inline(always)]
pub(crate) fn byte_from_f32(value: f32) -> u8 {
    /// 1.5 * 2^23: the sum has no room for a fraction, and its low byte is the integer's.
    const INTEGERS_ONLY: f32 = 12_582_912.0;
    (value + INTEGERS_ONLY).to_bits().to_le_bytes()[0]
}

/// Largest magnitude; zero if there is none, NaN if an element is not finite.
#[inline(always)]
pub(crate) fn largest_magnitude<S: Simd>(s: S, data: &[f32]) -> f32 {
    let zero = s.splat(0.0);
    let (lanes, rest) = s.split(data);
    let (mut largest, mut flaw) = (zero, zero);
    for lane in lanes {
        let value = s.load(lane);
        largest = s.max(s.abs(value), largest);
        flaw = s.mul_add(value, zero, flaw);
    }
    let last = s.load_partial(rest);
    largest = s.max(s.abs(last), largest);
    flaw = s.mul_add(last, zero, flaw);
    s.reduce_max(largest) + s.reduce_add(flaw)
}

/// `data[i] = exp(data[i] - shift)`; returns the sum.
#[inline(always)]
pub(crate) fn exp_and_sum<S: Simd>(s: S, data: &mut [f32], shift: f32) -> f32 {
    let shift = s.splat(shift);
    let (lanes, rest) = s.split_mut(data);
    let mut sum = s.splat(0.0);
    for lane in lanes {
        let value = exp(s, s.sub(s.load(lane), shift));
        s.store(value, lane);
        sum = s.add(sum, value);
    }
    let mut total = s.reduce_add(sum);
    if !rest.is_empty() {
        s.store_partial(exp(s, s.sub(s.load_partial(rest), shift)), rest);
        total += rest.iter().sum::<f32>();
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        arch::{Task, Token},
        isa::Isa,
        reference,
    };

    struct Apply<'a, U>(&'a mut [f32], U);
    impl<U: Unary> Task for Apply<'_, U> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            map_in_place(simd, self.0, &self.1);
        }
    }

    struct Exp;
    impl Unary for Exp {
        #[inline(always)]
        fn apply<S: Simd>(&self, s: S, x: S::F) -> S::F {
            exp(s, x)
        }
    }

    struct Erfc;
    impl Unary for Erfc {
        #[inline(always)]
        fn apply<S: Simd>(&self, s: S, x: S::F) -> S::F {
            erfc_of_scaled(s, x)
        }
    }

    fn tokens() -> impl Iterator<Item = Token> {
        Isa::ALL.into_iter().filter_map(Token::new)
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let inputs: Vec<f32> =
            (0..400_003).map(|i| -87.0 + i as f32 * (175.5 / 400_000.0)).collect();
        for token in tokens() {
            let mut outputs = inputs.clone();
            token.run(Apply(&mut outputs, Exp));
            for (&x, &y) in inputs.iter().zip(&outputs) {
                let exact = f64::from(x).exp();
                let ulp = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
                let error = (f64::from(y) - exact).abs() / ulp;
                assert!(error <= 2.0, "{token:?}: exp({x}) = {y}, exact {exact}, {error:.2} ulp");
            }
        }
    }

    #[test]
    fn exp_saturates_and_keeps_nan() {
        for token in tokens() {
            let mut data =
                [f32::NEG_INFINITY, -1e30, -110.0, -0.0, 0.0, 88.8, 1e30, f32::INFINITY, f32::NAN];
            token.run(Apply(&mut data, Exp));
            assert_eq!(
                data[..8],
                [0.0, 0.0, 0.0, 1.0, 1.0, f32::INFINITY, f32::INFINITY, f32::INFINITY]
            );
            assert!(data[8].is_nan());
        }
    }

    #[test]
    fn exp_reaches_subnormal_results() {
        for token in tokens() {
            let mut data = [-95.0_f32];
            token.run(Apply(&mut data, Exp));
            assert!(
                (f64::from(data[0]) - (-95.0_f64).exp()).abs()
                    <= 2.0 * f64::from(f32::from_bits(1))
            );
        }
    }

    #[test]
    fn erfc_is_within_one_millionth() {
        let inputs: Vec<f32> = (0..100_001).map(|i| i as f32 * 2e-4).collect();
        for token in tokens() {
            let mut outputs = inputs.clone();
            token.run(Apply(&mut outputs, Erfc));
            for (&a, &y) in inputs.iter().zip(&outputs) {
                let exact = reference::erfc(f64::from(a) / 2.0_f64.sqrt());
                let error = (f64::from(y) - exact).abs();
                assert!(
                    error <= 1e-6,
                    "{token:?}: erfc({a}/√2) = {y}, exact {exact}, error {error:e}"
                );
            }
        }
    }
}
