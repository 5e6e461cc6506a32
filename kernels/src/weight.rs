//! Weights as the artifact stores them: row-major f32, or panels of 16 rows in a smaller format.
//!
//! A panel interleaves 16 rows so that one vector of weights meets one broadcast group of `x`: the same layout serves a
//! single row (a stream of whole cache lines, no sums across lanes) and many (no packing). Every output element is
//! summed along `k` in one order, whatever the number of rows, the tile and the thread.

use std::fmt;

use crate::matrix::Matrix;

/// Rows of the weight in one panel.
pub const PANEL_ROWS: usize = 16;

/// Most columns of a weight of signed bytes: sums of products within ±127² then fit 32 bits.
pub const MAX_BYTE_COLS: usize = 1 << 17;

/// How the numbers of a [`Panels`] weight are stored, and what happens to `x` before the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PanelFormat {
    /// IEEE half precision, `[panels, k, 16]`. `x` stays f32.
    F16,
    /// bfloat16, `[panels, ⌈k/2⌉, 16, 2]`. `x` is rounded to bfloat16.
    Bf16,
    /// Signed bytes within ±127, `[panels, ⌈k/4⌉, 16, 4]`, one scale a row. Each row of `x` is rounded to signed bytes
    /// by its own scale, largest magnitude / 127, ties to even.
    Int8,
    /// Nibbles, `[panels, ⌈k/block⌉ * block / 8, 16, 4]` bytes: byte `(i, row, j)` holds columns `8 i + j` (low) and
    /// `8 i + 4 + j` (high), each 8 more than its value. A value counts times its block's scale (a byte,
    /// `[panels, ⌈k/block⌉, 16]`) times its row's scale. `x` as for [`PanelFormat::Int8`].
    Int4 {
        /// Columns that share a scale: a multiple of 8.
        block: usize,
    },
}

impl PanelFormat {
    /// Bytes of the data of an `[n, k]` weight; none on overflow, for more than [`MAX_BYTE_COLS`] columns of bytes or
    /// nibbles, or for a block that is not a positive multiple of 8.
    pub fn data_bytes(self, n: usize, k: usize) -> Option<usize> {
        if self.has_row_scales() && k > MAX_BYTE_COLS {
            return None;
        }
        let panels = n.div_ceil(PANEL_ROWS);
        let panel_bytes = match self {
            PanelFormat::F16 => k.checked_mul(2 * PANEL_ROWS)?,
            PanelFormat::Bf16 => k.div_ceil(2).checked_mul(4 * PANEL_ROWS)?,
            PanelFormat::Int8 => k.div_ceil(4).checked_mul(4 * PANEL_ROWS)?,
            PanelFormat::Int4 { block } => {
                self.n_blocks(k)?.checked_mul(block)?.checked_mul(PANEL_ROWS / 2)?
            }
        };
        panels.checked_mul(panel_bytes)
    }

    /// Blocks of a row that have scales of their own: none but for [`PanelFormat::Int4`].
    pub fn n_blocks(self, k: usize) -> Option<usize> {
        match self {
            PanelFormat::F16 | PanelFormat::Bf16 | PanelFormat::Int8 => Some(0),
            PanelFormat::Int4 { block } => {
                (block > 0 && block.is_multiple_of(8)).then(|| k.div_ceil(block))
            }
        }
    }

    /// Whether rows have scales.
    pub fn has_row_scales(self) -> bool {
        match self {
            PanelFormat::F16 | PanelFormat::Bf16 => false,
            PanelFormat::Int8 | PanelFormat::Int4 { .. } => true,
        }
    }
}

impl fmt::Display for PanelFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PanelFormat::F16 => f.write_str("f16"),
            PanelFormat::Bf16 => f.write_str("bf16"),
            PanelFormat::Int8 => f.write_str("int8"),
            PanelFormat::Int4 { block } => write!(f, "int4/{block}"),
        }
    }
}

/// A weight `[n, k]` in panels of 16 rows; rows beyond `n` are zeros.
#[derive(Clone, Copy, Debug)]
pub struct Panels<'a> {
    format: PanelFormat,
    n: usize,
    k: usize,
    data: &'a [u8],
    row_scales: &'a [f32],
    block_scales: &'a [u8],
}

impl<'a> Panels<'a> {
    /// A weight over its bytes. `row_scales` is `[panels * 16]` for formats with row scales, `block_scales`
    /// `[panels, blocks, 16]` for those with blocks, else empty. None if a length differs.
    pub fn new(
        format: PanelFormat,
        n: usize,
        k: usize,
        data: &'a [u8],
        row_scales: &'a [f32],
        block_scales: &'a [u8],
    ) -> Option<Panels<'a>> {
        let padded = n.div_ceil(PANEL_ROWS).checked_mul(PANEL_ROWS)?;
        let n_row_scales = if format.has_row_scales() { padded } else { 0 };
        let n_block_scales = padded.checked_mul(format.n_blocks(k)?)?;
        let fits = format.data_bytes(n, k)? == data.len()
            && n_row_scales == row_scales.len()
            && n_block_scales == block_scales.len();
        fits.then_some(Panels { format, n, k, data, row_scales, block_scales })
    }

    /// How the numbers are stored.
    pub fn format(&self) -> PanelFormat {
        self.format
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.k
    }

    /// Bytes that one product reads: data and scales.
    pub fn bytes(&self) -> usize {
        self.data.len() + size_of_val(self.row_scales) + self.block_scales.len()
    }

    /// Panels of 16 rows.
    pub(crate) fn n_panels(&self) -> usize {
        self.n.div_ceil(PANEL_ROWS)
    }

    /// Bytes of panel `panel`.
    pub(crate) fn panel_data(&self, panel: usize) -> &'a [u8] {
        let len = self.data.len() / self.n_panels();
        &self.data[panel * len..][..len]
    }

    /// Scales of the rows of panel `panel`, `[16]`; empty if rows have none.
    pub(crate) fn panel_row_scales(&self, panel: usize) -> &'a [f32] {
        match self.format.has_row_scales() {
            true => &self.row_scales[panel * PANEL_ROWS..][..PANEL_ROWS],
            false => &[],
        }
    }

    /// Scales of the blocks of panel `panel`, `[blocks, 16]`.
    pub(crate) fn panel_block_scales(&self, panel: usize) -> &'a [u8] {
        let len = self.block_scales.len() / self.n_panels();
        &self.block_scales[panel * len..][..len]
    }

    /// The number at row `row` and column `col`, as its format says.
    ///
    /// # Panics
    /// If there is none.
    pub fn value(&self, row: usize, col: usize) -> f32 {
        assert!(row < self.n && col < self.k, "element [{row}, {col}] of [{}, {}]", self.n, self.k);
        let (panel, lane) = (row / PANEL_ROWS, row % PANEL_ROWS);
        let data = self.panel_data(panel);
        let byte = |group: usize, j: usize| data[(group * PANEL_ROWS + lane) * 4 + j];
        match self.format {
            PanelFormat::F16 => {
                let at = (col * PANEL_ROWS + lane) * 2;
                half::f16::from_le_bytes([data[at], data[at + 1]]).to_f32()
            }
            PanelFormat::Bf16 => {
                let j = col % 2 * 2;
                let bytes = [byte(col / 2, j), byte(col / 2, j + 1)];
                half::bf16::from_le_bytes(bytes).to_f32()
            }
            PanelFormat::Int8 => {
                let value = byte(col / 4, col % 4).cast_signed();
                f32::from(value) * self.row_scales[row]
            }
            PanelFormat::Int4 { block } => {
                let pair = byte(col / 8, col % 4);
                let nibble = if col % 8 < 4 { pair & 15 } else { pair >> 4 };
                let scale = self.panel_block_scales(panel)[col / block * PANEL_ROWS + lane];
                (f32::from(nibble) - 8.0) * f32::from(scale) * self.row_scales[row]
            }
        }
    }
}

/// A weight `[n, k]` of a linear layer.
#[derive(Clone, Copy, Debug)]
pub enum Weight<'a> {
    /// Row-major f32, rows as in the checkpoint.
    F32(Matrix<'a>),
    /// A smaller format.
    Panels(Panels<'a>),
}

impl Weight<'_> {
    /// Output features.
    pub fn rows(&self) -> usize {
        match self {
            Weight::F32(matrix) => matrix.rows(),
            Weight::Panels(panels) => panels.rows(),
        }
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        match self {
            Weight::F32(matrix) => matrix.cols(),
            Weight::Panels(panels) => panels.cols(),
        }
    }

    /// Bytes that one product reads.
    pub fn bytes(&self) -> usize {
        match self {
            Weight::F32(matrix) => matrix.rows() * matrix.cols() * size_of::<f32>(),
            Weight::Panels(panels) => panels.bytes(),
        }
    }
}

impl Weight<'_> {
    /// Writes row `row` as f32, `[k]`: how an embedding table is read.
    ///
    /// # Panics
    /// If there is no such row, or `out` has another length.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols(), "read row: length of out");
        match self {
            Weight::F32(matrix) => out.copy_from_slice(matrix.row(row)),
            Weight::Panels(panels) => {
                out.iter_mut().enumerate().for_each(|(col, out)| *out = panels.value(row, col));
            }
        }
    }
}

impl<'a> From<Matrix<'a>> for Weight<'a> {
    fn from(matrix: Matrix<'a>) -> Weight<'a> {
        Weight::F32(matrix)
    }
}

impl<'a> From<Panels<'a>> for Weight<'a> {
    fn from(panels: Panels<'a>) -> Weight<'a> {
        Weight::Panels(panels)
    }
}
