//! What calibration knows of the rows that meet a weight, and how rounding makes up for its errors with it.

use std::borrow::Cow;

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, Slice};

use super::threads::map_in_order;

/// Columns whose products are kept: all pairs within a block of so many.
const BLOCK: usize = 128;
/// Share of the mean power that is added to every column's: columns that were never seen stay bounded.
const DAMPING: f64 = 0.01;

/// Sums over calibration rows x `[k]`: Σ x_j², and Σ x_i x_j within blocks of 128 columns.
#[derive(Debug, Clone, PartialEq)]
pub struct Inputs {
    k: usize,
    n_rows: usize,
    /// Σ x_i x_j, `[block][i][j]`; the last block may be smaller.
    products: Vec<f32>,
    /// max |x_j|, `[k]`.
    largest: Vec<f32>,
}

impl Inputs {
    /// Nothing seen yet of rows of `k` columns.
    pub fn new(k: usize) -> Inputs {
        let last = k % BLOCK;
        let n_products = k / BLOCK * BLOCK * BLOCK + last * last;
        Inputs { k, n_rows: 0, products: vec![0.0; n_products], largest: vec![0.0; k] }
    }

    /// Columns.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Rows seen.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// max |x_j| of each column, `[k]`.
    pub fn largest(&self) -> &[f32] {
        &self.largest
    }

    /// Mean of x_j² of each column, `[k]`.
    pub fn power(&self) -> Vec<f32> {
        let mean = 1.0 / self.n_rows.max(1) as f32;
        let of_block = |(start, products): (usize, &[f32])| {
            let width = self.width(start);
            (0..width).map(move |j| products[j * width + j] * mean).collect::<Vec<f32>>()
        };
        self.blocks().flat_map(of_block).collect()
    }

    /// Adds rows `[n, k]`. Rows with numbers that are not finite are left out, and so is what is no whole row.
    pub fn add(&mut self, rows: &[f32]) {
        let rows = finite_rows(rows, self.k);
        let n = rows.len() / self.k.max(1);
        let Ok(x) = ArrayView2::from_shape((n, self.k), &rows) else { return };
        self.n_rows += n;
        for row in x.rows() {
            for (largest, value) in self.largest.iter_mut().zip(row) {
                *largest = largest.max(value.abs());
            }
        }
        let mut products = self.products.as_mut_slice();
        for start in (0..self.k).step_by(BLOCK) {
            let x = x.slice_axis(Axis(1), Slice::from(start..(start + BLOCK).min(self.k)));
            let width = x.ncols();
            let (block, rest) = products.split_at_mut(width * width);
            products = rest;
            if let Ok(mut sums) = ArrayViewMut2::from_shape((width, width), block) {
                general_mat_mul(1.0, &x.t(), &x, 1.0, &mut sums);
            }
        }
    }

    /// The same rows with each column multiplied by its factor.
    pub fn scaled(&self, factors: &[f32]) -> Inputs {
        assert_eq!(self.k, factors.len(), "a factor for each column");
        let mut scaled = self.clone();
        scaled.largest.iter_mut().zip(factors).for_each(|(largest, f)| *largest *= f.abs());
        let mut products = scaled.products.as_mut_slice();
        for f in factors.chunks(BLOCK) {
            let (block, rest) = products.split_at_mut(f.len() * f.len());
            products = rest;
            for (sums, a) in block.chunks_exact_mut(f.len()).zip(f) {
                sums.iter_mut().zip(f).for_each(|(sum, b)| *sum *= a * b);
            }
        }
        scaled
    }

    /// All numbers: max |x_j|, then Σ x_i x_j within blocks. With [`Inputs::from_parts`], for files.
    pub fn parts(&self) -> (&[f32], &[f32]) {
        (&self.largest, &self.products)
    }

    /// What [`Inputs::parts`] gave, of `n_rows` rows; none if the lengths or numbers are none of such.
    pub fn from_parts(n_rows: usize, largest: Vec<f32>, products: Vec<f32>) -> Option<Inputs> {
        let empty = Inputs::new(largest.len());
        let is_sound = |values: &[f32]| values.iter().all(|value| value.is_finite());
        let fits = products.len() == empty.products.len();
        (fits && is_sound(&largest) && is_sound(&products)).then_some(Inputs {
            n_rows,
            products,
            largest,
            ..empty
        })
    }

    /// Σ (Σ_j e_j x_j)² of errors e `[n, k]`, within blocks, over the rows: what rounding should keep small.
    pub fn error_power(&self, errors: ArrayView2<'_, f32>) -> f64 {
        let of_block = |(start, products): (usize, &[f32])| {
            let width = self.width(start);
            let e = errors.slice_axis(Axis(1), Slice::from(start..start + width));
            let products = ArrayView2::from_shape((width, width), products);
            let dots =
                products.map_or_else(|_| Array2::zeros(e.dim()), |products| e.dot(&products));
            let powers = e.iter().zip(&dots).map(|(e, dot)| f64::from(*e) * f64::from(*dot));
            powers.sum::<f64>()
        };
        self.blocks().map(of_block).sum()
    }

    fn width(&self, start: usize) -> usize {
        BLOCK.min(self.k - start)
    }

    /// First column and products of each block.
    fn blocks(&self) -> impl Iterator<Item = (usize, &[f32])> {
        let mut rest = self.products.as_slice();
        (0..self.k).step_by(BLOCK).map(move |start| {
            let width = self.width(start);
            let (block, later) = rest.split_at(width * width);
            rest = later;
            (start, block)
        })
    }
}

/// The whole rows of `k` finite numbers among `rows`.
fn finite_rows(rows: &[f32], k: usize) -> Cow<'_, [f32]> {
    let is_finite = |row: &[f32]| row.iter().all(|value| value.is_finite());
    let whole = &rows[..rows.len() - rows.len() % k.max(1)];
    match is_finite(whole) {
        true => Cow::Borrowed(whole),
        false => {
            let finite = whole.chunks(k.max(1)).filter(|row| is_finite(row));
            Cow::Owned(finite.flatten().copied().collect())
        }
    }
}

/// Moves the error of each rounded column to the columns after it, so that products with the calibration rows
/// stay (E. Frantar et al., GPTQ, 2022, algorithm 1, with H of blocks of 128 columns).
#[derive(Debug, Clone)]
pub(super) struct Compensation {
    /// Upper factor of the inverse of each block's damped H, `[i][j]` with rows divided by their diagonal.
    blocks: Vec<(usize, Vec<f32>)>,
}

impl Compensation {
    /// For rows like those seen, computed on so many threads.
    pub(super) fn new(inputs: &Inputs, n_threads: usize) -> Compensation {
        let mean: f64 = inputs.power().iter().map(|p| f64::from(*p)).sum::<f64>();
        let damping = DAMPING * mean / inputs.k.max(1) as f64;
        let n_rows = inputs.n_rows.max(1) as f64;
        let of_block = |(start, products): (usize, &[f32])| {
            let width = inputs.width(start);
            let mut h: Vec<f64> = products.iter().map(|p| f64::from(*p) / n_rows).collect();
            for j in 0..width {
                h[j * width + j] += damping.max(f64::MIN_POSITIVE.sqrt());
            }
            (width, upper_of_inverse(&h, width))
        };
        Compensation { blocks: map_in_order(inputs.blocks(), n_threads, of_block) }
    }

    /// Rounds a row in place: `round(column, value)` gives the value that is stored.
    pub(super) fn round(&self, row: &mut [f32], mut round: impl FnMut(usize, f32) -> f32) {
        let mut start = 0;
        for (width, upper) in &self.blocks {
            let block = &mut row[start..start + width];
            for j in 0..*width {
                let stored = round(start + j, block[j]);
                let error = block[j] - stored;
                block[j] = stored;
                let factors = &upper[j * width + j + 1..(j + 1) * width];
                for (later, factor) in block[j + 1..].iter_mut().zip(factors) {
                    *later -= error * factor;
                }
            }
            start += width;
        }
    }
}

/// U of UᵀU = H⁻¹, upper, its rows divided by their diagonal; H is symmetric and positive, `[n][n]`.
fn upper_of_inverse(h: &[f64], n: usize) -> Vec<f32> {
    let lower = cholesky(h, n);
    // L⁻¹, lower.
    let mut inverse = vec![0.0f64; n * n];
    for column in 0..n {
        for i in column..n {
            let known: f64 = (column..i).map(|j| lower[i * n + j] * inverse[j * n + column]).sum();
            let unit = f64::from(u8::from(i == column));
            inverse[i * n + column] = (unit - known) / lower[i * n + i];
        }
    }
    let mut product = vec![0.0f64; n * n];
    for i in 0..n {
        for j in 0..=i {
            // H⁻¹ = L⁻ᵀ L⁻¹.
            let sum = (i..n).map(|row| inverse[row * n + i] * inverse[row * n + j]).sum();
            product[i * n + j] = sum;
            product[j * n + i] = sum;
        }
    }
    let lower = cholesky(&product, n);
    let mut upper = vec![0.0f32; n * n];
    for i in 0..n {
        for j in i..n {
            upper[i * n + j] = (lower[j * n + i] / lower[i * n + i]) as f32;
        }
    }
    upper
}

/// L of L Lᵀ = A. A pivot that rounding made negative counts as a tiny one.
fn cholesky(a: &[f64], n: usize) -> Vec<f64> {
    let mut lower = vec![0.0f64; n * n];
    for i in 0..n {
        for j in 0..=i {
            let known: f64 = (0..j).map(|c| lower[i * n + c] * lower[j * n + c]).sum();
            let left = a[i * n + j] - known;
            lower[i * n + j] = match i == j {
                true => left.max(f64::EPSILON * a[i * n + i].abs()).max(f64::MIN_POSITIVE).sqrt(),
                false => left / lower[j * n + j],
            };
        }
    }
    lower
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(i: usize) -> f32 {
        ((i * 7919 + 13) % 1009) as f32 / 504.5 - 1.0
    }

    /// Rows whose columns lean on each other.
    fn seen(k: usize, n_rows: usize) -> Inputs {
        let mut inputs = Inputs::new(k);
        for row in 0..n_rows {
            let common = noise(row * 31 + 7);
            let x: Vec<f32> = (0..k).map(|j| common + 0.3 * noise(row * k + j)).collect();
            inputs.add(&x);
        }
        inputs
    }

    #[test]
    fn the_factor_is_that_of_the_inverse() {
        let n = 5;
        let mut h = vec![0.0; n * n];
        for row in 0..9 {
            for i in 0..n {
                for j in 0..n {
                    h[i * n + j] += f64::from(noise(row * n + i) * noise(row * n + j));
                }
            }
        }
        let upper = upper_of_inverse(&h, n);
        // H = L Lᵀ; the last column alone has H⁻¹ = U² there, so its pivot is 1 after division.
        assert!((0..n).all(|i| (upper[i * n + i] - 1.0).abs() < 1e-6));
        // Fixing column 0 with error e moves the others to −H[1.., 1..]⁻¹ H[1.., 0] e: the least squares answer.
        let mut sub = vec![0.0; (n - 1) * (n - 1)];
        for i in 1..n {
            for j in 1..n {
                sub[(i - 1) * (n - 1) + j - 1] = h[i * n + j];
            }
        }
        let lower = cholesky(&sub, n - 1);
        let mut y: Vec<f64> = (1..n).map(|i| h[i * n]).collect();
        for i in 0..n - 1 {
            let known: f64 = (0..i).map(|j| lower[i * (n - 1) + j] * y[j]).sum();
            y[i] = (y[i] - known) / lower[i * (n - 1) + i];
        }
        for i in (0..n - 1).rev() {
            let known: f64 = (i + 1..n - 1).map(|j| lower[j * (n - 1) + i] * y[j]).sum();
            y[i] = (y[i] - known) / lower[i * (n - 1) + i];
        }
        for (i, expected) in y.iter().enumerate() {
            let found = -f64::from(upper[i + 1]);
            assert!(
                (found - expected).abs() < 1e-4 * expected.abs().max(1.0),
                "{found} {expected}"
            );
        }
    }

    #[test]
    fn compensation_keeps_products_better_than_nearest_at_ugly_sizes() {
        for k in [1, 3, 127, 128, 129, 300] {
            let inputs = seen(k, 600);
            let weight: Vec<f32> = (0..k).map(|j| noise(j * 17 + 3)).collect();
            let step = 0.2f32;
            let nearest: Vec<f32> = weight.iter().map(|w| (w / step).round() * step - w).collect();
            let mut rounded = weight.clone();
            Compensation::new(&inputs, 2).round(&mut rounded, |_, w| (w / step).round() * step);
            let error: Vec<f32> = rounded.iter().zip(&weight).map(|(a, b)| a - b).collect();
            let power =
                |error: &[f32]| inputs.error_power(ArrayView2::from_shape((1, k), error).unwrap());
            let (with, without) = (power(&error), power(&nearest));
            assert!(rounded.iter().all(|w| ((w / step).round() * step - w).abs() < 1e-5));
            assert!(with <= without * 1.0001, "{k}: {with} {without}");
            assert!(k < 100 || with < 0.6 * without, "{k}: {with} {without}");
        }
    }

    #[test]
    fn error_power_is_that_of_products_with_the_rows() {
        let k = 130;
        let rows: Vec<Vec<f32>> =
            (0..40).map(|row| (0..k).map(|j| noise(row * k + j)).collect()).collect();
        let mut inputs = Inputs::new(k);
        rows.iter().for_each(|row| inputs.add(row));
        let errors: Vec<f32> = (0..3 * k).map(|i| noise(i * 5 + 1)).collect();
        let mut expected = 0.0;
        for error in errors.chunks(k) {
            for row in &rows {
                for (e, x) in error.chunks(BLOCK).zip(row.chunks(BLOCK)) {
                    let products = e.iter().zip(x).map(|(e, x)| f64::from(*e) * f64::from(*x));
                    expected += products.sum::<f64>().powi(2);
                }
            }
        }
        let found = inputs.error_power(ArrayView2::from_shape((3, k), &errors).unwrap());
        assert!((found - expected).abs() < 1e-4 * expected, "{found} {expected}");
    }

    #[test]
    fn columns_that_were_never_seen_are_rounded_to_nearest() {
        let mut inputs = Inputs::new(4);
        inputs.add(&[1.0, 0.0, 2.0, 0.0]);
        inputs.add(&[f32::NAN, 0.0, 0.0, 0.0]);
        inputs.add(&[1.0, 2.0]);
        assert_eq!(inputs.n_rows(), 1);
        assert_eq!(inputs.power(), [1.0, 0.0, 4.0, 0.0]);
        let mut row = [0.4f32, 0.6, 0.4, 1.4];
        Compensation::new(&inputs, 2).round(&mut row, |_, w| w.round());
        assert_eq!((row[1], row[3]), (1.0, 1.0));
        let mut none = [0.4f32, 0.6];
        Compensation::new(&Inputs::new(2), 2).round(&mut none, |_, w| w.round());
        assert_eq!(none, [0.0, 1.0]);
    }

    #[test]
    fn rows_at_once_are_rows_in_turn() {
        for k in [1, 127, 128, 300] {
            let n = 9;
            let mut rows: Vec<f32> = (0..n * k).map(|i| noise(i * 3 + k)).collect();
            rows[4 * k] = f32::INFINITY;
            let (mut at_once, mut in_turn) = (Inputs::new(k), Inputs::new(k));
            at_once.add(&rows);
            rows.chunks(k).for_each(|row| in_turn.add(row));
            assert_eq!((at_once.n_rows(), in_turn.n_rows()), (n - 1, n - 1));
            assert_eq!(at_once.largest(), in_turn.largest());
            let near = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-4;
            assert!(at_once.products.iter().zip(&in_turn.products).all(near), "{k}");
        }
    }

    #[test]
    fn scaled_columns_are_those_of_scaled_rows() {
        let k = 130;
        let factors: Vec<f32> = (0..k).map(|j| 0.5 + (j % 7) as f32).collect();
        let (mut plain, mut expected) = (Inputs::new(k), Inputs::new(k));
        for row in 0..20 {
            let x: Vec<f32> = (0..k).map(|j| noise(row * k + j)).collect();
            plain.add(&x);
            expected.add(&x.iter().zip(&factors).map(|(x, f)| x * f).collect::<Vec<f32>>());
        }
        let found = plain.scaled(&factors);
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-4 * b.abs().max(1.0);
        assert!(found.parts().0.iter().zip(expected.parts().0).all(near));
        assert!(found.parts().1.iter().zip(expected.parts().1).all(near));
        let (largest, products) = found.parts();
        let (largest, products) = (largest.to_vec(), products.to_vec());
        assert_eq!(Inputs::from_parts(20, largest.clone(), products.clone()), Some(found));
        assert_eq!(Inputs::from_parts(20, largest[1..].to_vec(), products), None);
    }
}
