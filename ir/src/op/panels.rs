//! Weights in panels: `PackPanels` makes them when an artifact is written, `UnpackPanels` says what
//! they mean.
//!
//! A panel interleaves 16 rows of a weight `[n, k]`; rows and columns beyond the weight's are zeros.
//! Data and scales of the formats, with p = ⌈n / 16⌉ panels:
//!
//! | format | data | row scales | block scales |
//! |---|---|---|---|
//! | `f16` | f16 [p, k, 16] | | |
//! | `bf16` | bf16 [p, ⌈k/2⌉, 16, 2] | | |
//! | `int8` | i8 [p, ⌈k/4⌉, 16, 4] | f32 [p, 16] | |
//! | `int4/b` | u8 [p, ⌈k/b⌉ b / 8, 16, 4] | f32 [p, 16] | u8 [p, ⌈k/b⌉, 16] |
//!
//! Byte (i, row, j) of int4 holds columns 8 i + j in its low and 8 i + 4 + j in its high half, each
//! 8 more than its value; a value counts times its block's scale, times its row's.

mod inputs;
mod pack;
mod threads;

use std::fmt;

pub use inputs::Inputs;
pub use pack::{Fit, output_sqnr_db, sqnr_db};

use super::{
    Add, Attribute, Attributes, Cast, Concat, Expand, Flavour, Floor, Mul, OnnxForm, OpError,
    Operator, Reshape, Rounding, Slice, Split, Sub, Transpose, expect_inputs, input_error,
};
use crate::graph::{Graph, GraphError, ValueId};
use crate::{DType, Dim, Fact, Tensor};

/// Rows of a weight in one panel.
pub const PANEL_ROWS: usize = 16;

/// Most columns that may share a scale.
const MAX_BLOCK: usize = 1 << 12;

/// How the numbers of a weight in panels are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PanelFormat {
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Signed bytes within ±127, one scale a row.
    Int8,
    /// −8 to 7, one scale a row and a byte that scales each block of a row.
    Int4 {
        /// Columns that share a scale: a multiple of 8.
        block: usize,
    },
}

impl PanelFormat {
    /// The format called `name`: `f16`, `bf16`, `int8`, `int4/32`.
    pub fn from_name(name: &str) -> Option<PanelFormat> {
        match name {
            "f16" => Some(PanelFormat::F16),
            "bf16" => Some(PanelFormat::Bf16),
            "int8" => Some(PanelFormat::Int8),
            _ => {
                let block: usize = name.strip_prefix("int4/")?.parse().ok()?;
                let fits = block.is_multiple_of(8) && (8..=MAX_BLOCK).contains(&block);
                // One spelling only: no sign, no leading zeros.
                let format = PanelFormat::Int4 { block };
                (fits && format.to_string() == name).then_some(format)
            }
        }
    }

    /// How activations that meet such a weight are rounded.
    pub fn rounding(self) -> Rounding {
        match self {
            PanelFormat::F16 => Rounding::None,
            PanelFormat::Bf16 => Rounding::Bf16,
            PanelFormat::Int8 | PanelFormat::Int4 { .. } => Rounding::Int8,
        }
    }

    /// Element types and shapes of the data and the scales of an `[n, k]` weight.
    pub fn facts(self, n: usize, k: usize) -> Vec<Fact> {
        let panels = n.div_ceil(PANEL_ROWS);
        let row_scales = Fact::f32([panels, PANEL_ROWS]);
        match self {
            PanelFormat::F16 => vec![Fact::new(DType::F16, [panels, k, PANEL_ROWS])],
            PanelFormat::Bf16 => {
                vec![Fact::new(DType::BF16, [panels, k.div_ceil(2), PANEL_ROWS, 2])]
            }
            PanelFormat::Int8 => {
                let data = Fact::new(DType::I8, [panels, k.div_ceil(4), PANEL_ROWS, 4]);
                vec![data, row_scales]
            }
            PanelFormat::Int4 { block } => {
                let n_blocks = k.div_ceil(block);
                let data = Fact::new(DType::U8, [panels, n_blocks * block / 8, PANEL_ROWS, 4]);
                vec![data, row_scales, Fact::new(DType::U8, [panels, n_blocks, PANEL_ROWS])]
            }
        }
    }

    fn parse(attributes: &Attributes) -> Result<PanelFormat, OpError> {
        let name = attributes.text("format")?;
        PanelFormat::from_name(name).ok_or_else(|| OpError::Attribute {
            name: "format".into(),
            expected: format!(
                "f16, bf16, int8 or int4/BLOCK, BLOCK a multiple of 8 up to {MAX_BLOCK}"
            ),
            found: name.into(),
        })
    }

    fn attribute(self) -> Attribute {
        Attribute::Text(self.to_string())
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

/// A weight f32 [n, k] → data and scales, rounded to nearest. Done when an artifact is written;
/// no file has this op.
#[derive(Debug, Clone, PartialEq)]
pub struct PackPanels {
    /// How the numbers are stored.
    pub format: PanelFormat,
}

/// Data and scales → the weight f32 [n, k] that they stand for. A backend with kernels for panels
/// does not execute it, but hands the panels to the op that reads the weight.
#[derive(Debug, Clone, PartialEq)]
pub struct UnpackPanels {
    /// How the numbers are stored.
    pub format: PanelFormat,
    /// Rows of the weight.
    pub n: usize,
    /// Columns of the weight.
    pub k: usize,
}

impl PackPanels {
    /// The weight rounded so that its products with the rows that calibration saw stay near: scales by what
    /// errors cost, and the error of each column made up for in the columns after it. Without such rows, to nearest.
    ///
    /// # Errors
    /// A weight that cannot be stored so, or inputs of other columns.
    pub fn pack_for(&self, weight: &Tensor, fit: Fit<'_>) -> Result<Vec<Tensor>, OpError> {
        pack::pack(self.format, weight, fit)
    }

    pub(crate) fn parse(attributes: &Attributes) -> Result<PackPanels, OpError> {
        attributes.expect_only(&["format"])?;
        Ok(PackPanels { format: PanelFormat::parse(attributes)? })
    }
}

impl UnpackPanels {
    pub(crate) fn parse(attributes: &Attributes) -> Result<UnpackPanels, OpError> {
        attributes.expect_only(&["format", "n", "k"])?;
        let (n, k) = (attributes.positive("n")?, attributes.positive("k")?);
        Ok(UnpackPanels { format: PanelFormat::parse(attributes)?, n, k })
    }

    fn n_panels(&self) -> usize {
        self.n.div_ceil(PANEL_ROWS)
    }

    fn definition(&self, inputs: &[Fact]) -> Result<Graph, GraphError> {
        let mut graph = Graph::new("UnpackPanels");
        let mut body = self.body_in(&mut graph);
        let roles = ["data", "row_scales", "block_scales"];
        let ids: Vec<ValueId> = roles
            .iter()
            .zip(inputs)
            .map(|(role, fact)| body.graph.input(role, fact.clone()))
            .collect();
        let rows = self.n_panels() * PANEL_ROWS;
        let (padded, cols) = match (self.format, ids.as_slice()) {
            (PanelFormat::F16, [data]) => {
                let data = body.numbers("numbers", *data)?;
                let y = body.turned("by_row", data, &[0, 2, 1])?;
                (body.shaped("rows", y, &[rows, self.k])?, self.k)
            }
            (PanelFormat::Bf16, [data]) => {
                let cols = self.k.next_multiple_of(2);
                (body.grouped_rows(*data, cols)?, cols)
            }
            (PanelFormat::Int8, [data, row_scales]) => {
                let cols = self.k.next_multiple_of(4);
                let values = body.grouped_rows(*data, cols)?;
                let scales = body.shaped("scale_column", *row_scales, &[rows, 1])?;
                (body.graph.add("scaled", Mul, &[values, scales])?, cols)
            }
            (PanelFormat::Int4 { block }, [data, row_scales, block_scales]) => {
                let cols = self.k.next_multiple_of(block);
                let values = body.nibbles(*data, block, cols)?;
                let values = body.scaled_blocks(values, *block_scales, *row_scales)?;
                (body.shaped("rows", values, &[rows, cols])?, cols)
            }
            (_, inputs) => {
                return Err(body.graph.broken(format!("{} inputs", inputs.len())));
            }
        };
        let y = body.cut(padded, (rows, self.n), (cols, self.k))?;
        graph.output("weight", y);
        Ok(graph)
    }

    fn body_in<'g>(&self, graph: &'g mut Graph) -> Body<'g> {
        Body { graph, n_panels: self.n_panels() }
    }

    /// Appends the levels i8 [n, k] of a weight of bytes, and the scales [n] of its rows.
    pub(super) fn rows_of_levels(
        &self,
        graph: &mut Graph,
        data: ValueId,
        row_scales: ValueId,
    ) -> Result<(ValueId, ValueId), GraphError> {
        let (rows, cols) = (self.n_panels() * PANEL_ROWS, self.k.next_multiple_of(4));
        let mut body = self.body_in(graph);
        let levels = body.turned("by_row", data, &[0, 2, 1, 3])?;
        let levels = body.shaped("rows", levels, &[rows, cols])?;
        let levels = body.cut(levels, (rows, self.n), (cols, self.k))?;
        let scales = body.shaped("row_scale_list", row_scales, &[rows])?;
        Ok((levels, body.cut_rows("whole_row_scales", scales, (rows, self.n))?))
    }

    /// Appends the transposed levels [k, n] of a weight of bytes, f32, and the scales [n] of its rows.
    pub(super) fn columns_of_levels(
        &self,
        graph: &mut Graph,
        data: ValueId,
        row_scales: ValueId,
    ) -> Result<(ValueId, ValueId), GraphError> {
        let (rows, cols) = (self.n_panels() * PANEL_ROWS, self.k.next_multiple_of(4));
        let mut body = self.body_in(graph);
        let levels = body.grouped_rows(data, cols)?;
        let levels = body.cut(levels, (rows, self.n), (cols, self.k))?;
        let columns = body.turned("columns", levels, &[1, 0])?;
        let scales = body.shaped("row_scale_list", row_scales, &[rows])?;
        Ok((columns, body.cut_rows("whole_row_scales", scales, (rows, self.n))?))
    }

    /// Appends the bytes u8 [n, blocks, block] of a weight of int8, 128 more than its levels, and the scales f32
    /// [n · blocks] of its blocks, alike in a row.
    pub(super) fn blocks_of_bytes(
        &self,
        graph: &mut Graph,
        data: ValueId,
        row_scales: ValueId,
        block: usize,
    ) -> Result<(ValueId, ValueId), GraphError> {
        let (rows, cols) = (self.n_panels() * PANEL_ROWS, self.k.next_multiple_of(4));
        let n_blocks = self.k.div_ceil(block);
        let mut body = self.body_in(graph);
        let levels = body.grouped_rows(data, cols)?;
        let mut levels = body.cut(levels, (rows, self.n), (cols, self.k))?;
        let n_missing = n_blocks * block - self.k;
        if n_missing > 0 {
            let zero = body.graph.literal(Tensor::scalar(0.0));
            let shape = vec![Dim::from(self.n), Dim::from(n_missing)];
            let padding = body.graph.add("padding", Expand { shape }, &[zero])?;
            levels = body.graph.add("whole_blocks", Concat { axis: 1 }, &[levels, padding])?;
        }
        let middle = body.graph.literal(Tensor::scalar(128.0));
        let bytes = body.graph.add("shifted", Add, &[levels, middle])?;
        let bytes = body.graph.add("weight_bytes", Cast { dtype: DType::U8 }, &[bytes])?;
        let bytes = body.shaped("byte_blocks", bytes, &[self.n, n_blocks, block])?;
        let scales = body.shaped("row_scale_column", row_scales, &[rows, 1])?;
        let scales = body.cut_rows("whole_row_scales", scales, (rows, self.n))?;
        let shape = vec![Dim::from(self.n), Dim::from(n_blocks)];
        let scales = body.graph.add("block_scales", Expand { shape }, &[scales])?;
        Ok((bytes, body.shaped("scale_list", scales, &[self.n * n_blocks])?))
    }

    /// Appends the bytes u8 [n, blocks, block / 2] of a weight of int4, each with two columns that follow each other, the
    /// first in the low half, 8 more than their values; and the scales f32 [n · blocks] of its blocks.
    pub(super) fn blocks_of_nibbles(
        &self,
        graph: &mut Graph,
        data: ValueId,
        row_scales: ValueId,
        block_scales: ValueId,
        block: usize,
    ) -> Result<(ValueId, ValueId), GraphError> {
        let (rows, cols) = (self.n_panels() * PANEL_ROWS, self.k.next_multiple_of(block));
        let n_blocks = cols / block;
        let mut body = self.body_in(graph);
        let levels = body.levels_of_nibbles(data, cols)?;
        let pairs = body.shaped("pairs", levels, &[rows, n_blocks, block / 2, 2])?;
        let halves = Split { axis: 3, sizes: vec![1, 1] };
        let halves = body.graph.add_many("halves", halves, &[pairs])?;
        let sixteen = body.graph.literal(Tensor::scalar(16.0));
        let high = body.graph.add("high_halves", Mul, &[halves[1], sixteen])?;
        let bytes = body.graph.add("joined", Add, &[halves[0], high])?;
        let bytes = body.graph.add("nibble_bytes", Cast { dtype: DType::U8 }, &[bytes])?;
        let bytes = body.shaped("byte_blocks", bytes, &[rows, n_blocks, block / 2])?;
        let bytes = body.cut_rows("whole_blocks", bytes, (rows, self.n))?;
        let scales = body.block_scales_by_row(block_scales)?;
        let by_row =
            body.shaped("row_scale_columns", row_scales, &[self.n_panels(), PANEL_ROWS, 1])?;
        let scales = body.graph.add("scales", Mul, &[scales, by_row])?;
        let scales = body.shaped("scale_rows", scales, &[rows, n_blocks])?;
        let scales = body.cut_rows("whole_scales", scales, (rows, self.n))?;
        Ok((bytes, body.shaped("scale_list", scales, &[self.n * n_blocks])?))
    }
}

/// The definition while it is made.
struct Body<'g> {
    graph: &'g mut Graph,
    n_panels: usize,
}

impl Body<'_> {
    fn numbers(&mut self, name: &str, x: ValueId) -> Result<ValueId, GraphError> {
        self.graph.add(name, Cast { dtype: DType::F32 }, &[x])
    }

    fn turned(&mut self, name: &str, x: ValueId, axes: &[usize]) -> Result<ValueId, GraphError> {
        self.graph.add(name, Transpose { permutation: axes.to_vec() }, &[x])
    }

    fn shaped(&mut self, name: &str, x: ValueId, shape: &[usize]) -> Result<ValueId, GraphError> {
        let shape = shape.iter().copied().map(Dim::from).collect();
        self.graph.add(name, Reshape { shape }, &[x])
    }

    /// Data [p, groups, 16, columns of a group] as rows of `cols` numbers.
    fn grouped_rows(&mut self, data: ValueId, cols: usize) -> Result<ValueId, GraphError> {
        let data = self.numbers("numbers", data)?;
        let y = self.turned("by_row", data, &[0, 2, 1, 3])?;
        self.shaped("rows", y, &[self.n_panels * PANEL_ROWS, cols])
    }

    /// Bytes [p, groups, 16, 4] as values −8 to 7, [p, 16, blocks, block].
    fn nibbles(&mut self, data: ValueId, block: usize, cols: usize) -> Result<ValueId, GraphError> {
        let zero_point = self.graph.literal(Tensor::scalar(8.0));
        let levels = self.levels_of_nibbles(data, cols)?;
        let values = self.graph.add("values", Sub, &[levels, zero_point])?;
        self.shaped("blocks", values, &[self.n_panels, PANEL_ROWS, cols / block, block])
    }

    /// Bytes [p, groups, 16, 4] as levels 0 to 15, [p, 16, groups, 2, 4]. Floats divide the halves of a byte exactly,
    /// where engines know few operators of bytes.
    fn levels_of_nibbles(&mut self, data: ValueId, cols: usize) -> Result<ValueId, GraphError> {
        let halves = [self.n_panels, cols / 8, PANEL_ROWS, 1, 4];
        let [sixteenth, sixteen] =
            [1.0 / 16.0, 16.0].map(|value| self.graph.literal(Tensor::scalar(value)));
        let bytes = self.numbers("bytes", data)?;
        let high = self.graph.add("byte_parts", Mul, &[bytes, sixteenth])?;
        let high = self.graph.add("high", Floor, &[high])?;
        let shifted = self.graph.add("high_parts", Mul, &[high, sixteen])?;
        let low = self.graph.add("low", Sub, &[bytes, shifted])?;
        let low = self.shaped("low_columns", low, &halves)?;
        let high = self.shaped("high_columns", high, &halves)?;
        let both = self.graph.add("nibbles", Concat { axis: 3 }, &[low, high])?;
        self.turned("by_row", both, &[0, 2, 1, 3, 4])
    }

    /// Values [p, 16, blocks, block] times the scales of their blocks, then of their rows.
    fn scaled_blocks(
        &mut self,
        values: ValueId,
        block_scales: ValueId,
        row_scales: ValueId,
    ) -> Result<ValueId, GraphError> {
        let n_blocks = self.graph.fact(block_scales).shape[1].known().unwrap_or(0);
        let scales = self.block_scales_by_row(block_scales)?;
        let shape = [self.n_panels, PANEL_ROWS, n_blocks, 1];
        let scales = self.shaped("block_scale_columns", scales, &shape)?;
        let y = self.graph.add("block_scaled", Mul, &[values, scales])?;
        let shape = [self.n_panels, PANEL_ROWS, 1, 1];
        let scales = self.shaped("row_scale_columns", row_scales, &shape)?;
        self.graph.add("scaled", Mul, &[y, scales])
    }

    /// Bytes [p, blocks, 16] as numbers [p, 16, blocks].
    fn block_scales_by_row(&mut self, block_scales: ValueId) -> Result<ValueId, GraphError> {
        let scales = self.numbers("block_scale_numbers", block_scales)?;
        self.turned("block_scales_by_row", scales, &[0, 2, 1])
    }

    /// The first rows and columns.
    fn cut(
        &mut self,
        mut x: ValueId,
        (rows, n): (usize, usize),
        (cols, k): (usize, usize),
    ) -> Result<ValueId, GraphError> {
        x = self.cut_rows("whole_rows", x, (rows, n))?;
        if cols != k {
            x = self.graph.add("whole_columns", Slice { axis: 1, start: 0, end: k }, &[x])?;
        }
        Ok(x)
    }

    fn cut_rows(
        &mut self,
        name: &str,
        x: ValueId,
        (rows, n): (usize, usize),
    ) -> Result<ValueId, GraphError> {
        match rows == n {
            true => Ok(x),
            false => self.graph.add(name, Slice { axis: 0, start: 0, end: n }, &[x]),
        }
    }
}

impl Operator for PackPanels {
    fn name(&self) -> &'static str {
        "PackPanels"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("format", self.format.attribute())
    }

    fn onnx_form(&self) -> OnnxForm {
        OnnxForm::BuildTime
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 1)?;
        let wrong = || input_error(0, "weight", &"f32 [n, k] of known sizes above 0", &inputs[0]);
        match inputs[0].known_shape().ok_or_else(wrong)?[..] {
            [n, k] if inputs[0].dtype == DType::F32 && n > 0 && k > 0 => {
                Ok(self.format.facts(n, k))
            }
            _ => Err(wrong()),
        }
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let facts: Vec<Fact> = inputs.iter().map(Tensor::fact).collect();
        let expected = self.infer(&facts)?;
        let packed = pack::pack(self.format, &inputs[0], Fit::default())?;
        match packed.iter().map(Tensor::fact).eq(expected) {
            true => Ok(packed),
            false => Err(OpError::Evaluation("PackPanels gave other shapes".into())),
        }
    }
}

impl Operator for UnpackPanels {
    fn name(&self) -> &'static str {
        "UnpackPanels"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
            .with("format", self.format.attribute())
            .with("n", self.n)
            .with("k", self.k)
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        let expected = self.format.facts(self.n, self.k);
        expect_inputs(inputs, expected.len())?;
        for (index, (expected, role)) in
            expected.iter().zip(["data", "row scales", "block scales"]).enumerate()
        {
            super::expect_fact(inputs, index, role, expected)?;
        }
        Ok(vec![Fact::f32([self.n, self.k])])
    }

    fn body(&self, inputs: &[Fact], _flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        Some(self.definition(inputs))
    }

    /// What is stored are the panels.
    fn is_for_run_time(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMATS: [PanelFormat; 5] = [
        PanelFormat::F16,
        PanelFormat::Bf16,
        PanelFormat::Int8,
        PanelFormat::Int4 { block: 8 },
        PanelFormat::Int4 { block: 32 },
    ];

    fn noise(n: usize, k: usize) -> Tensor {
        let value = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 504.5 - 1.0;
        Tensor::f32(&[n, k], (0..n * k).map(value).collect()).unwrap()
    }

    fn there_and_back(format: PanelFormat, weight: &Tensor) -> Tensor {
        let packed = PackPanels { format }.evaluate(std::slice::from_ref(weight)).unwrap();
        let [n, k] = weight.shape()[..] else { panic!() };
        UnpackPanels { format, n, k }.evaluate(&packed).unwrap().remove(0)
    }

    /// Half a step of each format, of the largest magnitude of the row or block.
    fn half_step(format: PanelFormat) -> f32 {
        match format {
            PanelFormat::F16 => 1.0 / 2048.0,
            PanelFormat::Bf16 => 1.0 / 256.0,
            PanelFormat::Int8 => 0.5 / 127.0,
            // A largest value that becomes 7 of 8 steps is a whole step off; block scales that
            // are bytes add less than 1 in 2 · 127 of the row's largest.
            PanelFormat::Int4 { .. } => 1.0 / 8.0 + 1.0 / 127.0,
        }
    }

    #[test]
    fn unpacked_weights_are_near_at_all_sizes() {
        for format in FORMATS {
            for (n, k) in [(1, 1), (16, 8), (17, 33), (31, 70), (48, 129)] {
                let weight = noise(n, k);
                let back = there_and_back(format, &weight);
                let (a, b) = (weight.to_f32_vec().unwrap(), back.to_f32_vec().unwrap());
                for (row, (a, b)) in a.chunks(k).zip(b.chunks(k)).enumerate() {
                    let largest = a.iter().fold(0.0f32, |max, value| max.max(value.abs()));
                    for (a, b) in a.iter().zip(b) {
                        let bound = half_step(format) * largest * 1.0001;
                        assert!((a - b).abs() <= bound, "{format} {n}x{k} row {row}: {a} {b}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_fits_is_exact() {
        let exact: Vec<f32> = (0..64).map(|i| (i % 16) as f32 - 8.0).collect();
        let weight = Tensor::f32(&[2, 32], exact.clone()).unwrap();
        for format in [PanelFormat::F16, PanelFormat::Bf16, PanelFormat::Int4 { block: 32 }] {
            let back = there_and_back(format, &weight).to_f32_vec().unwrap();
            for (a, b) in back.iter().zip(&exact) {
                assert!((a - b).abs() < 1e-5, "{format}: {a} {b}");
            }
        }
        let bytes: Vec<f32> = (0..255).map(|i| i as f32 - 127.0).collect();
        let weight = Tensor::f32(&[1, 255], bytes.clone()).unwrap();
        assert_eq!(there_and_back(PanelFormat::Int8, &weight).to_f32_vec().unwrap(), bytes);
    }

    #[test]
    fn zeros_stay_zeros() {
        let weight = Tensor::f32(&[3, 40], vec![0.0; 120]).unwrap();
        for format in FORMATS {
            assert_eq!(there_and_back(format, &weight), weight, "{format}");
        }
    }

    /// A weight that lies column by column is packed, and measured, as one that lies row by row.
    #[test]
    fn it_does_not_matter_how_a_weight_lies() {
        for format in FORMATS {
            for (n, k) in [(1, 1), (17, 33), (35, 130)] {
                let Tensor::F32(columns) = noise(k, n) else { panic!() };
                let lying = Tensor::F32(columns.reversed_axes());
                let weight = Tensor::f32(&[n, k], lying.to_f32_vec().unwrap()).unwrap();
                let inputs = calibrated(k);
                for fit in [Fit::default(), fit(&inputs)] {
                    let op = PackPanels { format };
                    let [a, b] = [&weight, &lying].map(|w| op.pack_for(w, fit).unwrap());
                    assert_eq!(a, b, "{format} {n}x{k}");
                }
                let packed = PackPanels { format }.evaluate(std::slice::from_ref(&weight)).unwrap();
                let [a, b] = [&weight, &lying].map(|w| sqnr_db(format, w, &packed).unwrap());
                assert_eq!(a, b, "{format} {n}x{k}");
                let db = |w| output_sqnr_db(format, w, &packed, &inputs).unwrap();
                let (a, b) = (db(&weight), db(&lying));
                assert!(a == b || (a - b).abs() < 1e-3, "{format} {n}x{k}: {a} {b}");
            }
        }
    }

    #[test]
    fn wide_rows_keep_sums_of_bytes_in_32_bits() {
        let format = PanelFormat::Int4 { block: 32 };
        let weight = noise(1, 20_000);
        let packed = PackPanels { format }.evaluate(&[weight]).unwrap();
        let Tensor::U8(scales) = &packed[2] else { panic!() };
        let largest = scales.iter().copied().max().unwrap();
        assert_eq!(largest, 105);
        assert!(i64::from(largest) * 1016 * 20_000 < i64::from(i32::MAX));
    }

    #[test]
    fn half_precision_refuses_what_it_cannot_hold() {
        let weight = Tensor::f32(&[1, 2], vec![1.0, 7e4]).unwrap();
        let error = PackPanels { format: PanelFormat::F16 }.evaluate(&[weight]).unwrap_err();
        assert!(error.to_string().contains("bf16"), "{error}");
    }

    #[test]
    fn the_measured_noise_is_that_of_the_definition() {
        for format in FORMATS {
            let weight = noise(19, 70);
            let packed = PackPanels { format }.evaluate(std::slice::from_ref(&weight)).unwrap();
            let back = there_and_back(format, &weight).to_f32_vec().unwrap();
            let (mut signal, mut error) = (0.0f64, 0.0f64);
            for (a, b) in weight.to_f32_vec().unwrap().iter().zip(back) {
                signal += f64::from(*a).powi(2);
                error += f64::from(a - b).powi(2);
            }
            let expected = 10.0 * (signal / error).log10();
            let found = sqnr_db(format, &weight, &packed).unwrap();
            assert!((found - expected).abs() < 1e-6, "{format}: {found} {expected}");
        }
    }

    /// Rows whose columns lean on each other, some of them large.
    fn calibrated(k: usize) -> Inputs {
        let mut inputs = Inputs::new(k);
        let noise = noise(400, k + 1).to_f32_vec().unwrap();
        for row in noise.chunks(k + 1) {
            let large = |j: usize| if j % 13 == 5 { 8.0 } else { 1.0 };
            let x: Vec<f32> = (0..k).map(|j| large(j) * (row[k] + 0.4 * row[j])).collect();
            inputs.add(&x);
        }
        inputs
    }

    #[test]
    fn calibration_keeps_products_better_than_rounding_to_nearest() {
        for format in [PanelFormat::Int8, PanelFormat::Int4 { block: 32 }] {
            for (n, k) in [(1, 16), (17, 33), (16, 200), (5, 129)] {
                let (weight, inputs) = (noise(n, k), calibrated(k));
                let op = PackPanels { format };
                let packed = op.pack_for(&weight, fit(&inputs)).unwrap();
                assert!(packed.iter().map(Tensor::fact).eq(format.facts(n, k)));
                let nearest = op.evaluate(std::slice::from_ref(&weight)).unwrap();
                let db = |packed| output_sqnr_db(format, &weight, packed, &inputs).unwrap();
                let (with, without) = (db(&packed), db(&nearest));
                assert!(
                    with > without + if k >= 100 { 3.0 } else { 0.0 },
                    "{format} {n}x{k}: {with} {without}"
                );
            }
        }
    }

    fn fit(inputs: &Inputs) -> Fit<'_> {
        Fit { inputs: Some(inputs), reach: None }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        for format in [PanelFormat::Int8, PanelFormat::Int4 { block: 32 }] {
            for (n, k) in [(1, 16), (50, 200), (129, 33)] {
                let (weight, inputs) = (noise(n, k), calibrated(k));
                for fit in [fit(&inputs), Fit::default()] {
                    let on = |n| pack::pack_on(format, &weight, fit, n).unwrap();
                    let alone = on(1);
                    assert!([2, 3, 8].into_iter().all(|n| on(n) == alone), "{format} {n}x{k}");
                }
            }
        }
    }

    #[test]
    fn a_scale_reaches_as_far_as_it_is_told() {
        let weight = Tensor::f32(&[1, 4], vec![1.0, 0.5, -0.25, 0.1]).unwrap();
        for format in [PanelFormat::Int8, PanelFormat::Int4 { block: 32 }] {
            let op = PackPanels { format };
            let packed = op.pack_for(&weight, Fit { inputs: None, reach: Some(0.25) }).unwrap();
            let back = UnpackPanels { format, n: 1, k: 4 }.evaluate(&packed).unwrap().remove(0);
            let back = back.to_f32_vec().unwrap();
            // int4 has 8 levels below zero and 7 above.
            assert!(back[..2].iter().all(|v| (v - 0.25).abs() < 0.04), "{format}: {back:?}");
            assert!((back[2] + 0.25).abs() < 0.05, "{format}: {back:?}");
        }
    }

    #[test]
    fn odd_rows_survive_calibration() {
        let k = 40;
        let mut values = vec![0.0; 4 * k];
        values[k..2 * k].fill(0.25);
        values[2 * k + 3] = 1e4;
        values[2 * k + 5] = 1.0;
        let weight = Tensor::f32(&[4, k], values.clone()).unwrap();
        for format in [PanelFormat::Int8, PanelFormat::Int4 { block: 32 }] {
            let op = PackPanels { format };
            let packed = op.pack_for(&weight, fit(&calibrated(k))).unwrap();
            let back = UnpackPanels { format, n: 4, k }.evaluate(&packed).unwrap().remove(0);
            let back = back.to_f32_vec().unwrap();
            assert!(back.iter().all(|value| value.is_finite()));
            assert!(back[..k].iter().chain(&back[3 * k..]).all(|value| *value == 0.0), "{format}");
            assert!((back[2 * k + 3] - 1e4).abs() < 2e3, "{format}: {}", back[2 * k + 3]);
            let none = op.pack_for(&weight, fit(&Inputs::new(k))).unwrap();
            assert_eq!(none, op.evaluate(std::slice::from_ref(&weight)).unwrap());
            assert!(op.pack_for(&weight, fit(&Inputs::new(k + 1))).is_err());
        }
    }

    #[test]
    fn shapes_are_checked() {
        let op = UnpackPanels { format: PanelFormat::Int8, n: 17, k: 5 };
        let facts = PanelFormat::Int8.facts(17, 5);
        assert!(op.infer(&facts).is_ok());
        assert!(op.infer(&facts[..1]).is_err());
        assert!(op.infer(&[facts[0].clone(), Fact::f32([1, 16])]).is_err());
        assert!(PackPanels { format: PanelFormat::F16 }.infer(&[Fact::f32([0, 4])]).is_err());
        for name in ["int4", "int4/0", "int4/12", "int4/+8", "int4/08", "f32", "int4/8192"] {
            assert_eq!(PanelFormat::from_name(name), None, "{name}");
        }
    }
}
