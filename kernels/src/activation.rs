//! Activation functions, element-wise.

use crate::{
    Kernels,
    arch::{MatrixMut, Simd, Task},
    math::{self, Unary},
    matrix::Matrix,
};

/// An element-wise non-linearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x Φ(x)`, Φ the normal distribution function (exact form, by erf; absolute error of erf below 1e-6).
    Gelu,
    /// `x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2`
    GeluTanh,
    /// `x σ(1.702 x)`
    QuickGelu,
    /// `max(x, 0)`
    Relu,
    /// `max(x, 0)²`
    SquaredRelu,
    /// `x σ(x)`
    Silu,
}

impl Kernels {
    /// `out = activation(x)`; both `[rows, cols]`.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn activate(&self, activation: Activation, x: Matrix<'_>, out: MatrixMut<'_>) {
        assert_eq!((x.rows(), x.cols()), (out.rows(), out.cols()), "activate: shapes of x and out");
        self.for_row_blocks(out, &|row, mut tile| {
            tile.copy_from(x.row_range(row..row + tile.rows()));
            self.token.run(Activate { activation, tile });
        });
    }

    /// `out = a + b`; all `[rows, cols]`.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn add(&self, a: Matrix<'_>, b: Matrix<'_>, out: MatrixMut<'_>) {
        assert_eq!((a.rows(), a.cols()), (out.rows(), out.cols()), "add: shapes of a and out");
        assert_eq!((b.rows(), b.cols()), (out.rows(), out.cols()), "add: shapes of b and out");
        self.for_row_blocks(out, &|row, mut tile| {
            tile.copy_from(a.row_range(row..row + tile.rows()));
            self.token.run(Add { b: b.row_range(row..row + tile.rows()), tile });
        });
    }
}

struct Activate<'a> {
    activation: Activation,
    tile: MatrixMut<'a>,
}

impl Task for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        for i in 0..self.tile.rows() {
            activate_in_place(simd, self.activation, self.tile.row_mut(i));
        }
    }
}

struct Add<'a> {
    b: Matrix<'a>,
    tile: MatrixMut<'a>,
}

impl Task for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        for i in 0..self.tile.rows() {
            math::add_in_place(simd, self.tile.row_mut(i), self.b.row(i));
        }
    }
}

/// `data[i] = activation(data[i])`
#[inline(always)]
pub(crate) fn activate_in_place<S: Simd>(s: S, activation: Activation, data: &mut [f32]) {
    match activation {
        Activation::Gelu => math::map_in_place(s, data, &Gelu),
        Activation::GeluTanh => math::map_in_place(s, data, &GeluTanh),
        Activation::QuickGelu => math::map_in_place(s, data, &Swish(1.702)),
        Activation::Relu => math::map_in_place(s, data, &Relu),
        Activation::SquaredRelu => math::map_in_place(s, data, &SquaredRelu),
        Activation::Silu => math::map_in_place(s, data, &Swish(1.0)),
    }
}

/// The activation of sixteen numbers.
#[inline(always)]
pub(crate) fn activate_wide<S: Simd>(s: S, activation: Activation, a: S::Wide) -> S::Wide {
    match activation {
        Activation::Gelu => s.wide_map(a, &Gelu),
        Activation::GeluTanh => s.wide_map(a, &GeluTanh),
        Activation::QuickGelu => s.wide_map(a, &Swish(1.702)),
        Activation::Relu => s.wide_map(a, &Relu),
        Activation::SquaredRelu => s.wide_map(a, &SquaredRelu),
        Activation::Silu => s.wide_map(a, &Swish(1.0)),
    }
}

struct Gelu;
impl Unary for Gelu {
    /// `max(x, 0) - |x| erfc(|x| / √2) / 2`, equal to `x Φ(x)` and free of cancellation for negative x.
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, x: S::F) -> S::F {
        let a = s.min(s.splat(20.0), s.abs(x)); // erfc is 0 there; keeps infinity out of the product
        let correction = s.mul(s.mul(a, s.splat(0.5)), math::erfc_of_scaled(s, a));
        s.sub(s.max(s.splat(0.0), x), correction)
    }
}

struct GeluTanh;
impl Unary for GeluTanh {
    /// `x σ(2 √(2/π) (x + 0.044715 x³))`, equal to the form with tanh and free of cancellation for negative x.
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, x: S::F) -> S::F {
        let slope = -2.0 * std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2;
        let cubic = s.mul(s.mul(x, x), s.splat(0.044_715 * slope));
        let e = math::exp(s, s.mul(x, s.add(cubic, s.splat(slope))));
        s.div(x, s.add(e, s.splat(1.0)))
    }
}

struct Relu;
impl Unary for Relu {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, x: S::F) -> S::F {
        s.max(s.splat(0.0), x)
    }
}

struct SquaredRelu;
impl Unary for SquaredRelu {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, x: S::F) -> S::F {
        let positive = s.max(s.splat(0.0), x);
        s.mul(positive, positive)
    }
}

/// `x σ(slope x)`
struct Swish(f32);
impl Unary for Swish {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, x: S::F) -> S::F {
        let e = math::exp(s, s.mul(x, s.splat(-self.0)));
        s.div(x, s.add(e, s.splat(1.0)))
    }
}
