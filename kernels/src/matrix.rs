//! Read-only view of a row-major matrix, the operand of every kernel. The writable view is in `arch`.

use std::ops::Range;

/// Row-major matrix view, `[rows, cols]`, f32, with a row stride in elements.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A dense matrix: `data` holds exactly `rows * cols` elements.
    ///
    /// # Panics
    /// If the length differs.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        let n_elements = rows.checked_mul(cols);
        assert_eq!(
            Some(data.len()),
            n_elements,
            "matrix [{rows}, {cols}] over {} elements",
            data.len()
        );
        Matrix { data, rows, cols, row_stride: cols }
    }

    /// A matrix whose row `i` starts at element `i * row_stride`; the last row may end with the data.
    ///
    /// # Panics
    /// If rows overlap (`row_stride < cols`, more than one row) or `data` is too short.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        let needed = strided_len(rows, cols, row_stride);
        assert!(
            needed.is_some_and(|needed| needed <= data.len()),
            "matrix [{rows}, {cols}] of row stride {row_stride} over {} elements",
            data.len()
        );
        Matrix { data, rows, cols, row_stride }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row `i`, `[cols]`.
    ///
    /// # Panics
    /// If `i` is not below `rows`.
    #[inline(always)]
    pub fn row(&self, i: usize) -> &'a [f32] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        &self.data[i * self.row_stride..][..self.cols]
    }

    /// The same rows, columns `range` only.
    ///
    /// # Panics
    /// If the range does not lie in the columns.
    pub fn columns(&self, range: Range<usize>) -> Matrix<'a> {
        assert!(
            range.start <= range.end && range.end <= self.cols,
            "columns {range:?} of {}",
            self.cols
        );
        let data = if self.rows == 0 { self.data } else { &self.data[range.start..] };
        Matrix { data, rows: self.rows, cols: range.len(), row_stride: self.row_stride }
    }

    /// The same columns, rows `range` only.
    ///
    /// # Panics
    /// If the range does not lie in the rows.
    pub fn row_range(&self, range: Range<usize>) -> Matrix<'a> {
        assert!(
            range.start <= range.end && range.end <= self.rows,
            "rows {range:?} of {}",
            self.rows
        );
        let data = if range.is_empty() { &[] } else { &self.data[range.start * self.row_stride..] };
        Matrix { data, rows: range.len(), cols: self.cols, row_stride: self.row_stride }
    }
}

/// Elements spanned by a strided matrix; none if rows would overlap or the product overflows.
pub(crate) fn strided_len(rows: usize, cols: usize, row_stride: usize) -> Option<usize> {
    match rows {
        0 => Some(0),
        1 => Some(cols),
        _ if row_stride < cols => None,
        _ => (rows - 1).checked_mul(row_stride)?.checked_add(cols),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_select_rows_and_columns() {
        let data: Vec<f32> = (0..11).map(|i| i as f32).collect();
        let matrix = Matrix::strided(&data, 3, 3, 4);
        assert_eq!(matrix.row(2), [8.0, 9.0, 10.0]);
        let inner = matrix.columns(1..3).row_range(1..3);
        assert_eq!((inner.rows(), inner.cols()), (2, 2));
        assert_eq!(inner.row(1), [9.0, 10.0]);
        assert_eq!(matrix.columns(3..3).row(2), [0.0; 0]);
        assert_eq!(matrix.row_range(3..3).columns(0..2).rows(), 0);
        assert_eq!(Matrix::new(&[], 0, 5).columns(2..5).cols(), 3);
    }

    #[test]
    #[should_panic(expected = "row stride 2")]
    fn overlapping_rows_are_rejected() {
        Matrix::strided(&[0.0; 9], 2, 3, 2);
    }

    #[test]
    #[should_panic(expected = "over 10 elements")]
    fn short_data_is_rejected() {
        Matrix::strided(&[0.0; 10], 3, 3, 4);
    }
}
