//! Writable view of a row-major matrix that can be cut into disjoint tiles, so that several threads write one output.

use std::{marker::PhantomData, ptr::NonNull, slice};

use crate::matrix::{Matrix, strided_len};

/// Writable row-major matrix view, `[rows, cols]`, f32, with a row stride in elements.
///
/// Holds a pointer, not a slice, because two tiles of one matrix interleave in memory: a slice of either would overlap
/// the other. Invariant: for the lifetime `'a`, the elements `i * row_stride + j` with `i < rows` and `j < cols` after
/// `start` are valid and reached through this value alone.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    start: NonNull<f32>,
    rows: usize,
    cols: usize,
    row_stride: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `MatrixMut` is an exclusive borrow of its elements, as `&mut [f32]` is, and that is `Send`.
unsafe impl Send for MatrixMut<'_> {}
// SAFETY: through a shared `MatrixMut` its elements can only be read, as through `&&mut [f32]`, and that is `Sync`.
unsafe impl Sync for MatrixMut<'_> {}

impl<'a> MatrixMut<'a> {
    /// A dense matrix: `data` holds exactly `rows * cols` elements.
    ///
    /// # Panics
    /// If the length differs.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        let n_elements = rows.checked_mul(cols);
        assert_eq!(
            Some(data.len()),
            n_elements,
            "matrix [{rows}, {cols}] over {} elements",
            data.len()
        );
        MatrixMut::strided(data, rows, cols, cols)
    }

    /// A matrix whose row `i` starts at element `i * row_stride`; the last row may end with the data.
    ///
    /// # Panics
    /// If rows overlap (`row_stride < cols`, more than one row) or `data` is too short.
    pub fn strided(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        let needed = strided_len(rows, cols, row_stride);
        assert!(
            needed.is_some_and(|needed| needed <= data.len()),
            "matrix [{rows}, {cols}] of row stride {row_stride} over {} elements",
            data.len()
        );
        let start = NonNull::from(data).cast();
        MatrixMut { start, rows, cols, row_stride, borrow: PhantomData }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row `i`, `[cols]`, to read.
    ///
    /// # Panics
    /// If `i` is not below `rows`.
    #[inline(always)]
    pub fn row(&self, i: usize) -> &[f32] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: `i < rows`, so by the invariant these elements are valid and only this value reaches them; the shared
        // borrow of `self` keeps `row_mut` away.
        unsafe { slice::from_raw_parts(self.start.as_ptr().add(i * self.row_stride), self.cols) }
    }

    /// Row `i`, `[cols]`, to write.
    ///
    /// # Panics
    /// If `i` is not below `rows`.
    #[inline(always)]
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: `i < rows`, so by the invariant these elements are valid and only this value reaches them; the
        // exclusive borrow of `self` keeps every other row away.
        unsafe {
            slice::from_raw_parts_mut(self.start.as_ptr().add(i * self.row_stride), self.cols)
        }
    }

    /// The same matrix for a shorter time.
    pub fn reborrow(&mut self) -> MatrixMut<'_> {
        MatrixMut { borrow: PhantomData, ..*self }
    }

    /// Copies `from`, of equal shape, into this matrix.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn copy_from(&mut self, from: Matrix<'_>) {
        assert_eq!((self.rows, self.cols), (from.rows(), from.cols()));
        for i in 0..self.rows {
            self.row_mut(i).copy_from_slice(from.row(i));
        }
    }
}

/// A matrix cut into a grid of tiles, handed out by number.
pub(super) struct Tiles<'a> {
    matrix: MatrixMut<'a>,
    row_starts: &'a [usize],
    tile_cols: usize,
}

impl<'a> Tiles<'a> {
    /// Cuts a matrix into bands of rows that start at `row_starts`, and these into tiles of `tile_cols`.
    ///
    /// # Panics
    /// If `row_starts` does not rise strictly inside the rows, or `tile_cols` is 0.
    pub(super) fn new(matrix: MatrixMut<'a>, row_starts: &'a [usize], tile_cols: usize) -> Self {
        assert!(row_starts.is_sorted_by(|a, b| a < b), "tiles start at rising rows");
        assert!(
            row_starts.last().is_none_or(|&last| last < matrix.rows),
            "tiles start inside the matrix"
        );
        assert!(tile_cols > 0, "tiles have columns");
        Tiles { matrix, row_starts, tile_cols }
    }

    /// Number of tiles.
    pub(super) fn len(&self) -> usize {
        self.row_starts.len() * self.n_across()
    }

    fn n_across(&self) -> usize {
        self.matrix.cols.div_ceil(self.tile_cols)
    }

    /// Band, first column and view of tile `idx`, counted along bands.
    ///
    /// # Safety
    /// No tile may be asked for twice during the lifetime `'a`.
    pub(super) unsafe fn tile(&self, idx: usize) -> (usize, usize, MatrixMut<'a>) {
        assert!(idx < self.len());
        let (band, col) = (idx / self.n_across(), idx % self.n_across() * self.tile_cols);
        let row = self.row_starts[band];
        let end = self.row_starts.get(band + 1).map_or(self.matrix.rows, |&end| end);
        // SAFETY: `row < rows` and `col < cols`, so the sum is the offset of an element of the matrix.
        let start = unsafe { self.matrix.start.add(row * self.matrix.row_stride + col) };
        let tile = MatrixMut {
            start,
            rows: end - row,
            cols: self.tile_cols.min(self.matrix.cols - col),
            row_stride: self.matrix.row_stride,
            borrow: PhantomData,
        };
        (band, col, tile)
    }
}
