//! Products with weights in panels: the register tile, and `x` in the order in which the tile reads it.
//!
//! One vector of weights holds a group of columns of sixteen rows; it meets the same group of one row of `x`, broadcast.
//! So a sum never crosses lanes, runs along the columns in order, and has the same bits in a tile of any size.
#![expect(
    clippy::needless_range_loop,
    reason = "register tiles: several arrays walk by one index, and constant bounds unroll"
)]

use std::ops::Range;

use smallvec::SmallVec;

use crate::{
    Kernels,
    arch::{DotBf16, DotBf16Task, DotI8, DotI8Task, MatrixMut, Simd, Task, Token},
    linear::Epilogue,
    math,
    matrix::Matrix,
    weight::{PANEL_ROWS, PanelFormat, Panels},
};

/// Rows of `x` in one register tile, largest first: what the tiles of [`row_tiles`] are made of.
const TILE_ROWS: [usize; 6] = [12, 8, 6, 4, 2, 1];

/// Rows up to which tiles span many panels, to read several streams from main memory at once.
const FEW_ROWS: usize = 8;

/// Rows of such a tile: further rows meet the panels in the second-level cache.
const FEW_TILE_ROWS: usize = 4;

/// Rows of `x` rounded as a format asks for, in tiles: `[groups, tile rows]` for each tile, a group being the columns
/// of one broadcast.
#[derive(Clone, Copy)]
pub(crate) struct PackedX<'a> {
    groups: &'a [u32],
    n_groups: usize,
    /// `[m, 2]`: scale of the row, and the sum of its bytes (bits of an i32).
    rows: &'a [[u32; 2]],
    /// Int4: sums of the bytes of each block (bits of an i32), in the order of `groups`, `[blocks, tile rows]`.
    block_sums: &'a [u32],
    n_blocks: usize,
}

/// Cuts `m` rows into tiles, largest first.
fn row_tiles(m: usize, largest: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let fits = |rows: &&usize| **rows <= largest && start + **rows <= m;
        let rows = *TILE_ROWS.iter().find(fits)?;
        start += rows;
        Some(start - rows..start)
    })
}

/// Columns of one broadcast.
fn group_cols(format: PanelFormat) -> usize {
    match format {
        PanelFormat::F16 => 1,
        PanelFormat::Bf16 => 2,
        PanelFormat::Int8 | PanelFormat::Int4 { .. } => 4,
    }
}

impl Kernels {
    /// Calls `body` with `x` rounded and ordered for products with weights of `format`.
    pub(crate) fn with_panel_x(
        &self,
        x: Matrix<'_>,
        format: PanelFormat,
        body: impl FnOnce(PackedX<'_>),
    ) {
        let (m, k) = (x.rows(), x.cols());
        let n_blocks = format.n_blocks(k).unwrap_or(0);
        let n_groups = match format {
            PanelFormat::Int4 { block } => n_blocks * block / 4,
            _ => k.div_ceil(group_cols(format)),
        };
        let lens = [m * n_groups, 2 * m, m * n_blocks];
        self.words.with(lens.iter().sum(), |words| {
            let (groups, rest) = words.split_at_mut(lens[0]);
            let (rows, block_sums) = rest.split_at_mut(lens[1]);
            let largest = largest_tile(self.token, format, m);
            let tiles: SmallVec<[Range<usize>; 1]> = row_tiles(m, largest).collect();
            self.pack_tiles(x, format, &tiles, [&mut *groups, &mut *rows, &mut *block_sums]);
            let rows = rows.as_chunks().0;
            body(PackedX { groups, n_groups, rows, block_sums, n_blocks });
        });
    }

    fn pack_tiles(
        &self,
        x: Matrix<'_>,
        format: PanelFormat,
        tiles: &[Range<usize>],
        [mut groups, mut rows, mut block_sums]: [&mut [u32]; 3],
    ) {
        let m = x.rows().max(1);
        let (n_groups, n_blocks) = (groups.len() / m, block_sums.len() / m);
        let mut jobs = SmallVec::<[_; 1]>::with_capacity(tiles.len());
        for tile in tiles {
            let n = tile.len();
            let x = x.row_range(tile.clone());
            jobs.push(std::sync::Mutex::new(PackTile {
                x,
                format,
                groups: groups.split_off_mut(..n * n_groups).unwrap_or_default(),
                rows: rows.split_off_mut(..2 * n).unwrap_or_default(),
                block_sums: block_sums.split_off_mut(..n * n_blocks).unwrap_or_default(),
            }));
        }
        self.pool.run(jobs.len(), &|idx| {
            let mut tile = jobs[idx].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            self.words.with(x.cols().div_ceil(4).max(1), |bytes| {
                self.token.run(PackRows { tile: &mut tile, bytes });
            });
        });
    }
}

/// Largest tile of the instruction set for `m` rows and a format.
fn largest_tile(token: Token, format: PanelFormat, m: usize) -> usize {
    struct IsWide;
    impl Task for IsWide {
        type Output = bool;

        #[inline(always)]
        fn run<S: Simd>(self, _: S) -> bool {
            S::IS_WIDE
        }
    }
    largest_rows(token.run(IsWide), format, m)
}

/// Rows of the largest tile whose sums fit the registers; blocks of nibbles need two sums each.
#[inline(always)]
fn largest_rows(is_wide: bool, format: PanelFormat, m: usize) -> usize {
    match (is_wide, format) {
        (false, _) => 4,
        (true, _) if m <= FEW_ROWS => FEW_TILE_ROWS,
        (true, PanelFormat::Int4 { .. }) => 6,
        (true, PanelFormat::F16 | PanelFormat::Bf16 | PanelFormat::Int8) => 12,
    }
}

/// One tile of rows to pack.
struct PackTile<'a> {
    x: Matrix<'a>,
    format: PanelFormat,
    groups: &'a mut [u32],
    rows: &'a mut [u32],
    block_sums: &'a mut [u32],
}

/// Packs the rows of a tile; `bytes` has room for one row.
struct PackRows<'a, 'b> {
    tile: &'a mut PackTile<'b>,
    bytes: &'a mut [u32],
}

impl Task for PackRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let PackRows { tile, bytes } = self;
        let n_rows = tile.x.rows();
        for i in 0..n_rows {
            let row = tile.x.row(i);
            let groups = tile.groups.get_mut(i..).unwrap_or_default();
            let places = groups.iter_mut().step_by(n_rows);
            match tile.format {
                PanelFormat::F16 => {
                    for (place, value) in places.zip(row) {
                        *place = value.to_bits();
                    }
                }
                PanelFormat::Bf16 => {
                    let (pairs, rest) = row.as_chunks::<2>();
                    let last = rest.first().map(|value| [*value, 0.0]);
                    for (place, [a, b]) in places.zip(pairs.iter().copied().chain(last)) {
                        *place = bf16_bits(a) | bf16_bits(b) << 16;
                    }
                }
                PanelFormat::Int8 | PanelFormat::Int4 { .. } => {
                    let (scale, sum) = round_row(s, row, bytes);
                    tile.rows[2 * i] = scale.to_bits();
                    tile.rows[2 * i + 1] = sum.cast_unsigned();
                    let padding = std::iter::repeat(0);
                    for (place, group) in places.zip(bytes.iter().copied().chain(padding)) {
                        *place = group;
                    }
                    if let PanelFormat::Int4 { block } = tile.format {
                        let sums = bytes.chunks(block / 4).map(sum_of_bytes);
                        let places = tile.block_sums.get_mut(i..).unwrap_or_default();
                        let places = places.iter_mut().step_by(n_rows);
                        for (place, sum) in places.zip(sums) {
                            *place = sum.cast_unsigned();
                        }
                    }
                }
            }
        }
    }
}

/// bfloat16 nearest to a number, ties to even, in the low half.
#[inline(always)]
fn bf16_bits(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    if value.is_nan() { bits >> 16 | 0x40 } else { rounded }
}

/// Sum of the signed bytes of groups.
#[inline(always)]
fn sum_of_bytes(groups: &[u32]) -> i32 {
    let sum = |group: &u32| -> i32 {
        group.to_le_bytes().into_iter().map(|byte| i32::from(byte.cast_signed())).sum()
    };
    groups.iter().map(sum).sum()
}

/// Rounds a row to signed bytes, four to a group, and returns the scale and the sum of the bytes.
///
/// The scale is the largest magnitude / 127; zero for a row of zeros, NaN if a number is not finite.
#[inline(always)]
fn round_row<S: Simd>(s: S, row: &[f32], groups: &mut [u32]) -> (f32, i32) {
    let largest = math::largest_magnitude(s, row);
    let scale = largest / 127.0;
    let divisor = if scale > 0.0 { scale } else { 1.0 };
    let byte = |value: f32| u32::from(math::byte_from_f32(value / divisor));
    let (quads, rest) = row.as_chunks::<4>();
    for ([a, b, c, d], group) in quads.iter().zip(groups.iter_mut()) {
        *group = byte(*a) | byte(*b) << 8 | byte(*c) << 16 | byte(*d) << 24;
    }
    if !rest.is_empty() {
        let group = rest.iter().rev().fold(0, |group, value| group << 8 | byte(*value));
        groups[quads.len()] = group;
    }
    (scale, sum_of_bytes(&groups[..row.len().div_ceil(4)]))
}

/// Rows of `out` and panels of the weight that one task computes.
pub(crate) struct PanelTile<'a, 'b> {
    pub(crate) x: PackedX<'a>,
    pub(crate) weight: Panels<'a>,
    /// First panel; as many as the columns of `tile` need.
    pub(crate) first_panel: usize,
    pub(crate) epilogue: Epilogue<'a>,
    pub(crate) tile: MatrixMut<'b>,
}

/// Panels of a task: a register tile's of few rows.
pub(crate) const TASK_PANELS: usize = 4;

impl PanelTile<'_, '_> {
    /// Computes the tile.
    pub(crate) fn run(self, token: Token) {
        match self.weight.format() {
            PanelFormat::F16 => token.run(self),
            PanelFormat::Bf16 => token.run_bf16(self),
            PanelFormat::Int8 | PanelFormat::Int4 { .. } => token.run_i8(self),
        }
    }
}

impl Task for PanelTile<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        multiply(F16(s), self);
    }
}

impl DotBf16Task for PanelTile<'_, '_> {
    #[inline(always)]
    fn run<D: DotBf16>(self, dot: D) {
        multiply(Bf16(dot), self);
    }
}

impl DotI8Task for PanelTile<'_, '_> {
    #[inline(always)]
    fn run<D: DotI8>(self, dot: D) {
        match self.weight.format() {
            PanelFormat::Int4 { block } => multiply(Int4 { dot, block }, self),
            _ => multiply(Int8(dot), self),
        }
    }
}

/// One tile of `x` rows, `[groups, M]`, with what its format knows of them.
#[derive(Clone, Copy)]
struct XTile<'a, const M: usize> {
    groups: &'a [[u32; M]],
    rows: &'a [[u32; 2]],
    block_sums: &'a [[u32; M]],
}

impl<const M: usize> XTile<'_, M> {
    fn sum(&self, i: usize) -> i32 {
        self.rows[i][1].cast_signed()
    }
}

/// Panels that meet a tile of `x`: data and block scales of each.
type Group<'a, const P: usize> = [(&'a [u8], &'a [u8]); P];

/// The arithmetic of a format.
trait Product: Copy {
    type S: Simd;
    type Sums: Copy;

    fn simd(self) -> Self::S;

    /// Products of `M` rows of x with `P` panels.
    fn tile<const M: usize, const P: usize>(
        self,
        x: XTile<'_, M>,
        panels: Group<'_, P>,
    ) -> [[Self::Sums; P]; M];

    /// The sums of sixteen rows as numbers.
    fn finish(self, sums: Self::Sums, x_scale: f32, row_scales: &[f32]) -> <Self::S as Simd>::Wide;
}

#[inline(always)]
fn multiply<D: Product>(d: D, task: PanelTile<'_, '_>) {
    let PanelTile { x, weight, first_panel, epilogue, mut tile } = task;
    let run = Multiply {
        d,
        x,
        weight,
        epilogue,
        first: first_panel,
        n_panels: tile.cols().div_ceil(PANEL_ROWS),
    };
    let largest = largest_rows(D::S::IS_WIDE, weight.format(), x.rows.len());
    if x.rows.len() <= FEW_ROWS {
        for rows in row_tiles(tile.rows(), largest) {
            run.rows_by_many_panels(rows, 0..run.n_panels, &mut tile);
        }
        return;
    }
    // Two panels stay in the second-level cache while all rows meet them.
    for start in (0..run.n_panels).step_by(2) {
        let panels = start..run.n_panels.min(start + 2);
        for rows in row_tiles(tile.rows(), largest) {
            run.rows_by_two_panels(rows, panels.clone(), &mut tile);
        }
    }
}

/// A product under way.
struct Multiply<'a, D> {
    d: D,
    x: PackedX<'a>,
    weight: Panels<'a>,
    epilogue: Epilogue<'a>,
    first: usize,
    n_panels: usize,
}

impl<'a, D: Product> Multiply<'a, D> {
    #[inline(always)]
    fn rows_by_many_panels(
        &self,
        rows: Range<usize>,
        panels: Range<usize>,
        out: &mut MatrixMut<'_>,
    ) {
        match (rows.len(), D::S::IS_WIDE) {
            (1, true) => self.tiles::<1, 4>(rows, panels, out),
            (1, false) => self.tiles::<1, 2>(rows, panels, out),
            (2, true) => self.tiles::<2, 4>(rows, panels, out),
            (2, false) => self.tiles::<2, 2>(rows, panels, out),
            (_, true) => self.tiles::<4, 4>(rows, panels, out),
            (_, false) => self.tiles::<4, 1>(rows, panels, out),
        }
    }

    #[inline(always)]
    fn rows_by_two_panels(
        &self,
        rows: Range<usize>,
        panels: Range<usize>,
        out: &mut MatrixMut<'_>,
    ) {
        // Constant per set, so that narrow sets are not compiled for tiles that they never use.
        if D::S::IS_WIDE {
            match rows.len() {
                1 => self.tiles::<1, 2>(rows, panels, out),
                2 => self.tiles::<2, 2>(rows, panels, out),
                4 => self.tiles::<4, 2>(rows, panels, out),
                6 => self.tiles::<6, 2>(rows, panels, out),
                8 => self.tiles::<8, 2>(rows, panels, out),
                _ => self.tiles::<12, 2>(rows, panels, out),
            }
        } else {
            match rows.len() {
                1 => self.tiles::<1, 2>(rows, panels, out),
                2 => self.tiles::<2, 2>(rows, panels, out),
                _ => self.tiles::<4, 1>(rows, panels, out),
            }
        }
    }

    #[inline(always)]
    fn tiles<const M: usize, const P: usize>(
        &self,
        rows: Range<usize>,
        panels: Range<usize>,
        out: &mut MatrixMut<'_>,
    ) {
        let x = self.x_tile::<M>(rows.clone());
        for start in panels.clone().step_by(P) {
            let last = panels.end - 1;
            let group: Group<'a, P> = std::array::from_fn(|p| {
                let panel = self.first + (start + p).min(last);
                (self.weight.panel_data(panel), self.weight.panel_block_scales(panel))
            });
            self.prefetch(rows.clone(), start * PANEL_ROWS, P * PANEL_ROWS, out);
            let sums = self.d.tile::<M, P>(x, group);
            let n_panels = P.min(panels.end - start);
            for i in 0..M {
                for p in 0..P {
                    if p < n_panels {
                        self.write(rows.start + i, start + p, sums[i][p], x.rows[i][0], out);
                    }
                }
            }
        }
    }

    /// Asks for the lines that a tile is going to write, and for the residual, while it computes: stores that miss the
    /// caches wait for each other.
    #[inline(always)]
    fn prefetch(&self, rows: Range<usize>, col: usize, n_cols: usize, out: &MatrixMut<'_>) {
        /// f32 in a cache line.
        const LINE: usize = 16;
        let s = self.d.simd();
        let cols = col..out.cols().min(col + n_cols);
        for row in rows {
            out.row(row)[cols.clone()].iter().step_by(LINE).for_each(|at| s.prefetch(at));
            if let Some(residual) = self.epilogue.residual {
                let row = &residual.row(row)[cols.clone()];
                row.iter().step_by(LINE).for_each(|at| s.prefetch(at));
            }
        }
    }

    /// Finishes the sums of one row with one panel of the task.
    #[inline(always)]
    fn write(&self, row: usize, panel: usize, sums: D::Sums, scale: u32, out: &mut MatrixMut<'_>) {
        let s = self.d.simd();
        let row_scales = self.weight.panel_row_scales(self.first + panel);
        let values = self.d.finish(sums, f32::from_bits(scale), row_scales);
        let col = panel * PANEL_ROWS;
        let out = &mut out.row_mut(row)[col..];
        match out.first_chunk_mut() {
            Some(out) => s.wide_store(self.epilogue.apply_wide(s, row, col, values), out),
            None => {
                let mut all = [0.0; PANEL_ROWS];
                s.wide_store(values, &mut all);
                let values = &mut all[..out.len()];
                self.epilogue.apply(s, row, col, values);
                out.copy_from_slice(values);
            }
        }
    }

    #[inline(always)]
    fn x_tile<const M: usize>(&self, rows: Range<usize>) -> XTile<'a, M> {
        let PackedX { groups, n_groups, block_sums, n_blocks, .. } = self.x;
        XTile {
            groups: groups[rows.start * n_groups..rows.end * n_groups].as_chunks().0,
            rows: &self.x.rows[rows.clone()],
            block_sums: block_sums[rows.start * n_blocks..rows.end * n_blocks].as_chunks().0,
        }
    }
}

/// Products of lines of `N` bytes, one for each group.
macro_rules! line_tile {
    ($x:expr, $panels:expr, $line_bytes:literal, $start:expr, $load:expr, $broadcast:expr, $dot:expr) => {{
        let n_lines = $x.groups.len();
        let lines = $panels.map(|(data, _)| &data.as_chunks::<$line_bytes>().0[..n_lines]);
        let mut sums = $start;
        for (line, x) in $x.groups.iter().enumerate() {
            let mut w = [$load(&lines[0][line]); P];
            for p in 1..P {
                w[p] = $load(&lines[p][line]);
            }
            for i in 0..M {
                let x = $broadcast(x[i]);
                for p in 0..P {
                    sums[i][p] = $dot(sums[i][p], w[p], x);
                }
            }
        }
        sums
    }};
}

/// Little-endian halves.
#[inline(always)]
fn halves(line: &[u8; 32]) -> [u16; 16] {
    let mut halves = [0; 16];
    for (half, bytes) in halves.iter_mut().zip(line.as_chunks().0) {
        *half = u16::from_le_bytes(*bytes);
    }
    halves
}

#[derive(Clone, Copy)]
struct F16<S>(S);

impl<S: Simd> Product for F16<S> {
    type S = S;
    type Sums = S::Wide;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }

    #[inline(always)]
    fn tile<const M: usize, const P: usize>(
        self,
        x: XTile<'_, M>,
        panels: Group<'_, P>,
    ) -> [[S::Wide; P]; M] {
        let s = self.0;
        line_tile!(
            x,
            panels,
            32,
            [[s.wide_splat(0.0); P]; M],
            |line: &[u8; 32]| s.wide_from_f16(&halves(line)),
            |x| s.wide_splat(f32::from_bits(x)),
            |sums, w, x| s.wide_mul_add(w, x, sums)
        )
    }

    #[inline(always)]
    fn finish(self, sums: S::Wide, _: f32, _: &[f32]) -> S::Wide {
        sums
    }
}

#[derive(Clone, Copy)]
struct Bf16<D>(D);

impl<D: DotBf16> Product for Bf16<D> {
    type S = D::S;
    type Sums = D::Sums;

    #[inline(always)]
    fn simd(self) -> D::S {
        self.0.simd()
    }

    #[inline(always)]
    fn tile<const M: usize, const P: usize>(
        self,
        x: XTile<'_, M>,
        panels: Group<'_, P>,
    ) -> [[D::Sums; P]; M] {
        let d = self.0;
        line_tile!(
            x,
            panels,
            64,
            [[d.zero(); P]; M],
            |line| d.weights(line),
            |x| d.broadcast(x),
            |sums, w, x| d.dot(sums, w, x)
        )
    }

    #[inline(always)]
    fn finish(self, sums: D::Sums, _: f32, _: &[f32]) -> <D::S as Simd>::Wide {
        self.0.to_f32(sums)
    }
}

#[derive(Clone, Copy)]
struct Int8<D>(D);

impl<D: DotI8> Product for Int8<D> {
    type S = D::S;
    type Sums = D::Sums;

    #[inline(always)]
    fn simd(self) -> D::S {
        self.0.simd()
    }

    #[inline(always)]
    fn tile<const M: usize, const P: usize>(
        self,
        x: XTile<'_, M>,
        panels: Group<'_, P>,
    ) -> [[D::Sums; P]; M] {
        let d = self.0;
        let mut sums = [[d.start(0); P]; M];
        let by_pairs = panels.map(|(data, _)| {
            d.products_by_pairs::<M>(x.groups, &data.as_chunks().0[..x.groups.len()])
        });
        if by_pairs.iter().all(Option::is_some) {
            for (p, products) in by_pairs.into_iter().flatten().enumerate() {
                for i in 0..M {
                    sums[i][p] = products[i];
                }
            }
            return sums;
        }
        for i in 0..M {
            sums[i] = [d.start(-D::OFFSET * x.sum(i)); P];
        }
        line_tile!(x, panels, 64, sums, |line| d.weights(line), |x| d.broadcast(x), |sums, w, x| d
            .dot(sums, w, x))
    }

    #[inline(always)]
    fn finish(self, sums: D::Sums, x_scale: f32, row_scales: &[f32]) -> <D::S as Simd>::Wide {
        scaled(self.0.simd(), self.0.to_f32(sums), x_scale, row_scales)
    }
}

#[inline(always)]
fn scaled<S: Simd>(s: S, values: S::Wide, x_scale: f32, row_scales: &[f32]) -> S::Wide {
    match row_scales.first_chunk() {
        Some(row_scales) => {
            s.wide_mul(values, s.wide_mul(s.wide_splat(x_scale), s.wide_load(row_scales)))
        }
        None => values,
    }
}

#[derive(Clone, Copy)]
struct Int4<D> {
    dot: D,
    block: usize,
}

impl<D: DotI8> Product for Int4<D> {
    type S = D::S;
    type Sums = D::Sums;

    #[inline(always)]
    fn simd(self) -> D::S {
        self.dot.simd()
    }

    #[inline(always)]
    fn tile<const M: usize, const P: usize>(
        self,
        x: XTile<'_, M>,
        panels: Group<'_, P>,
    ) -> [[D::Sums; P]; M] {
        /// What a nibble is more than its value.
        const NIBBLE_OFFSET: i32 = 8;
        let d = self.dot;
        let (n_blocks, n_lines) = (x.block_sums.len(), self.block / 8);
        let lines = panels.map(|(data, _)| &data.as_chunks::<64>().0[..n_blocks * n_lines]);
        let scales = panels.map(|(_, scales)| &scales.as_chunks::<16>().0[..n_blocks]);
        let groups = &x.groups.as_chunks::<2>().0[..n_blocks * n_lines];
        let mut total = [[d.start(0); P]; M];
        for block in 0..n_blocks {
            let block_sums = x.block_sums[block];
            let mut sums = [[d.start(0); P]; M];
            for i in 0..M {
                sums[i] = [d.start(-NIBBLE_OFFSET * block_sums[i].cast_signed()); P];
            }
            for line in block * n_lines..(block + 1) * n_lines {
                let mut w = [d.nibbles(&lines[0][line]); P];
                for p in 1..P {
                    w[p] = d.nibbles(&lines[p][line]);
                }
                for half in 0..2 {
                    for i in 0..M {
                        let x = d.broadcast(groups[line][half][i]);
                        for p in 0..P {
                            sums[i][p] = d.dot_nibbles(sums[i][p], w[p][half], x);
                        }
                    }
                }
            }
            for i in 0..M {
                for p in 0..P {
                    total[i][p] = d.add_scaled(total[i][p], sums[i][p], &scales[p][block]);
                }
            }
        }
        total
    }

    #[inline(always)]
    fn finish(self, sums: D::Sums, x_scale: f32, row_scales: &[f32]) -> <D::S as Simd>::Wide {
        scaled(self.dot.simd(), self.dot.to_f32(sums), x_scale, row_scales)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_the_rows_in_order() {
        for largest in [4, 12] {
            for m in 0..60 {
                let tiles: Vec<_> = row_tiles(m, largest).collect();
                assert!(
                    tiles
                        .iter()
                        .all(|tile| TILE_ROWS.contains(&tile.len()) && tile.len() <= largest)
                );
                assert!(tiles.into_iter().flatten().eq(0..m));
            }
        }
    }

    #[test]
    fn bfloat16_is_rounded_as_by_the_half_crate() {
        let numbers =
            [0.0, -0.0, 1.0, -1.5, 3.389_531_4e38, f32::MAX, f32::INFINITY, f32::NAN, 1e-40];
        let ties = (0..1000_u32).map(|i| f32::from_bits(0x3F80_0000 + i * 0x4000));
        for value in numbers.into_iter().chain(ties) {
            let expected = half::bf16::from_f32(value).to_bits();
            assert_eq!(bf16_bits(value), u32::from(expected), "{value}");
        }
    }
}
