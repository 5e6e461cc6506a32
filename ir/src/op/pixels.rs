//! What NFNets do with pixels beside convolutions: means of squares of pixels, means of whole pictures, and gates that
//! all pixels of a channel share (J. Hu et al., Squeeze-and-Excitation Networks, 2018). Channels are last.

use ndarray::IxDyn;

use super::convolution::known;
use super::{
    Add, Attributes, Flavour, Mul, OnnxForm, OpError, Operator, Reshape, Sigmoid, Transpose,
    expect_fact, expect_inputs, expect_rank, input_error,
};
use crate::graph::{Graph, GraphError};
use crate::{DType, Dim, Fact, Tensor};

/// ONNX's mean of squares of pixels that do not overlap, `[n, c, H, W]` →
/// `[n, c, ⌈H / window⌉, ⌈W / window⌉]`; those at the end are of the pixels that they have
/// (<https://onnx.ai/onnx/operators/onnx__AveragePool.html>).
#[derive(Debug, Clone, PartialEq)]
pub struct AveragePool {
    /// Side of a square in pixels.
    pub window: usize,
    /// Rows and columns that the last squares lack.
    pub missing: [usize; 2],
}

/// ONNX's mean of all pixels, `[n, c, H, W]` → `[n, c, 1, 1]`
/// (<https://onnx.ai/onnx/operators/onnx__GlobalAveragePool.html>).
#[derive(Debug, Clone, PartialEq)]
pub struct GlobalAveragePool;

/// Mean of each square of pixels, `[n, H, W, c]` → `[n, ⌈H / window⌉, ⌈W / window⌉, c]`; those at the end are of the
/// pixels that they have.
#[derive(Debug, Clone, PartialEq)]
pub struct MeanPool {
    /// Side of a square in pixels.
    pub window: usize,
}

/// Mean of the pixels of each picture: `[n, H, W, c]` → `[n, c]`.
#[derive(Debug, Clone, PartialEq)]
pub struct PictureMean;

/// x · gain σ(gates) + residual. Inputs: x `[n, H, W, c]`, gates `[n, c]`, gain `[]`, residual `[n, H, W, c]` if
/// `residual`.
#[derive(Debug, Clone, PartialEq)]
pub struct ChannelGate {
    /// Whether a residual input follows.
    pub residual: bool,
}

/// Height, width and channels of pictures, f32 `[n, H, W, c]`.
fn sizes(inputs: &[Fact]) -> Result<[usize; 3], OpError> {
    expect_rank(inputs, 0, "x", 4)?;
    let no_picture = || input_error(0, "x", &"f32 [n, H, W, c] of pictures", &inputs[0]);
    known(&inputs[0], 1).ok_or_else(no_picture)
}

/// What the last of ⌈size / window⌉ pieces lacks.
fn missing(size: usize, window: usize) -> usize {
    (window - size % window) % window
}

impl AveragePool {
    pub(crate) fn parse(attributes: &Attributes) -> Result<AveragePool, OpError> {
        attributes.expect_only(&["window", "missing"])?;
        let (window, missing) = (attributes.positive("window")?, attributes.sizes("missing")?);
        match missing[..] {
            [rows, cols] if rows < window && cols < window => {
                Ok(AveragePool { window, missing: [rows, cols] })
            }
            _ => Err(OpError::Attribute {
                name: "missing".into(),
                expected: format!("two sizes below {window}"),
                found: format!("{missing:?}"),
            }),
        }
    }
}

impl Operator for AveragePool {
    fn name(&self) -> &'static str {
        "AveragePool"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("window", self.window).with("missing", &self.missing[..])
    }

    fn onnx_form(&self) -> OnnxForm {
        let [rows, cols] = self.missing;
        OnnxForm::Node {
            domain: "",
            op_type: "AveragePool",
            attributes: Attributes::none()
                .with("kernel_shape", &[self.window; 2][..])
                .with("strides", &[self.window; 2][..])
                .with("pads", &[0, 0, rows, cols][..]),
            extra_inputs: Vec::new(),
            absent: &[],
        }
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 1)?;
        expect_rank(inputs, 0, "x", 4)?;
        let (window, [rows, cols]) = (self.window, self.missing);
        let ends = |(size, lacks): (usize, usize)| missing(size, window) == lacks;
        match known(&inputs[0], 2) {
            Some([height, width]) if ends((height, rows)) && ends((width, cols)) => {
                let sizes = [height, width].map(|size| Dim::from(size.div_ceil(window)));
                Ok(vec![Fact::f32([&inputs[0].shape[..2], &sizes[..]].concat())])
            }
            _ => {
                let expected = format!("[n, c, a * {window} - {rows}, b * {window} - {cols}]");
                Err(input_error(0, "x", &expected, &inputs[0]))
            }
        }
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let failed = || OpError::Evaluation("AveragePool takes an f32 tensor that fits".into());
        let x = inputs.first().and_then(Tensor::as_f32).ok_or_else(failed)?;
        let shape = self.infer(&[inputs[0].fact()])?[0].known_shape().ok_or_else(failed)?;
        let out = ndarray::ArrayD::from_shape_fn(IxDyn(&shape), |at| {
            let of = |axis: usize| {
                let first = at[axis] * self.window;
                first..x.shape()[axis].min(first + self.window)
            };
            let pixels = of(2).flat_map(|row| of(3).map(move |col| (row, col)));
            let sum: f64 = pixels.map(|(row, col)| f64::from(x[[at[0], at[1], row, col]])).sum();
            (sum / (of(2).len() * of(3).len()) as f64) as f32
        });
        Ok(vec![Tensor::F32(out.into_shared())])
    }
}

impl GlobalAveragePool {
    pub(crate) fn parse(attributes: &Attributes) -> Result<GlobalAveragePool, OpError> {
        attributes.expect_only(&[]).map(|()| GlobalAveragePool)
    }
}

impl Operator for GlobalAveragePool {
    fn name(&self) -> &'static str {
        "GlobalAveragePool"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn onnx_form(&self) -> OnnxForm {
        OnnxForm::Node {
            domain: "",
            op_type: "GlobalAveragePool",
            attributes: Attributes::none(),
            extra_inputs: Vec::new(),
            absent: &[],
        }
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 1)?;
        expect_rank(inputs, 0, "x", 4)?;
        match known(&inputs[0], 2) {
            Some([height, width]) if height > 0 && width > 0 => {
                let ones = [Dim::from(1), Dim::from(1)];
                Ok(vec![Fact::f32([&inputs[0].shape[..2], &ones[..]].concat())])
            }
            _ => Err(input_error(0, "x", &"pictures [n, c, H, W] with pixels", &inputs[0])),
        }
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let failed = || OpError::Evaluation("GlobalAveragePool takes an f32 tensor".into());
        let x = inputs.first().and_then(Tensor::as_f32).ok_or_else(failed)?;
        let shape = self.infer(&[inputs[0].fact()])?[0].known_shape().ok_or_else(failed)?;
        let n_pixels = x.shape()[2] * x.shape()[3];
        let values: Vec<f32> = x.iter().copied().collect();
        let mean = |pixels: &[f32]| {
            let sum: f64 = pixels.iter().copied().map(f64::from).sum();
            (sum / n_pixels as f64) as f32
        };
        let means = values.chunks(n_pixels).map(mean).collect();
        Ok(vec![Tensor::f32(&shape, means).ok_or_else(failed)?])
    }
}

impl MeanPool {
    pub(crate) fn parse(attributes: &Attributes) -> Result<MeanPool, OpError> {
        attributes.expect_only(&["window"])?;
        Ok(MeanPool { window: attributes.positive("window")? })
    }
}

impl Operator for MeanPool {
    fn name(&self) -> &'static str {
        "MeanPool"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("window", self.window)
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 1)?;
        let [height, width, channels] = sizes(inputs)?;
        let [rows, cols] = [height, width].map(|size| size.div_ceil(self.window));
        let sizes = [rows, cols, channels].map(Dim::from);
        Ok(vec![Fact::f32([&inputs[0].shape[..1], &sizes[..]].concat())])
    }

    fn body(&self, inputs: &[Fact], _flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        let build = || {
            let mut graph = Graph::new("MeanPool");
            let x = graph.input("x", inputs[0].clone());
            let [height, width] = known(&inputs[0], 1).unwrap_or_default();
            let missing = [height, width].map(|size| missing(size, self.window));
            let channels_first = Transpose { permutation: vec![0, 3, 1, 2] };
            let pictures = graph.add("channels_first", channels_first, &[x])?;
            let op = AveragePool { window: self.window, missing };
            let means = graph.add("means", op, &[pictures])?;
            let channels_last = Transpose { permutation: vec![0, 2, 3, 1] };
            let y = graph.add("y", channels_last, &[means])?;
            graph.output("y", y);
            Ok(graph)
        };
        Some(build())
    }
}

impl PictureMean {
    pub(crate) fn parse(attributes: &Attributes) -> Result<PictureMean, OpError> {
        attributes.expect_only(&[]).map(|()| PictureMean)
    }
}

impl Operator for PictureMean {
    fn name(&self) -> &'static str {
        "PictureMean"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 1)?;
        let [height, width, channels] = sizes(inputs)?;
        if height == 0 || width == 0 {
            return Err(input_error(0, "x", &"pictures with pixels", &inputs[0]));
        }
        Ok(vec![Fact::f32([inputs[0].shape[0].clone(), Dim::from(channels)])])
    }

    fn body(&self, inputs: &[Fact], _flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        let build = || {
            let mut graph = Graph::new("PictureMean");
            let x = graph.input("x", inputs[0].clone());
            let channels_first = Transpose { permutation: vec![0, 3, 1, 2] };
            let pictures = graph.add("channels_first", channels_first, &[x])?;
            let means = graph.add("means", GlobalAveragePool, &[pictures])?;
            let shape = [0, 3].map(|axis| inputs[0].shape[axis].clone()).to_vec();
            let y = graph.add("y", Reshape { shape }, &[means])?;
            graph.output("y", y);
            Ok(graph)
        };
        Some(build())
    }
}

impl ChannelGate {
    pub(crate) fn parse(attributes: &Attributes) -> Result<ChannelGate, OpError> {
        attributes.expect_only(&["residual"])?;
        Ok(ChannelGate { residual: attributes.flag("residual")? })
    }
}

impl Operator for ChannelGate {
    fn name(&self) -> &'static str {
        "ChannelGate"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("residual", self.residual)
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 3 + usize::from(self.residual))?;
        let [_, _, channels] = sizes(inputs)?;
        let gates = [inputs[0].shape[0].clone(), Dim::from(channels)];
        expect_fact(inputs, 1, "gates", &Fact::f32(gates))?;
        expect_fact(inputs, 2, "gain", &Fact::new(DType::F32, Vec::<Dim>::new()))?;
        if self.residual {
            expect_fact(inputs, 3, "residual", &inputs[0])?;
        }
        Ok(vec![inputs[0].clone()])
    }

    fn body(&self, inputs: &[Fact], _flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        let build = || {
            let mut graph = Graph::new("ChannelGate");
            let names = ["x", "gates", "gain"];
            let [x, gates, gain] = [0, 1, 2].map(|i| graph.input(names[i], inputs[i].clone()));
            let open = graph.add("open", Sigmoid, &[gates])?;
            let factors = graph.add("factors", Mul, &[open, gain])?;
            let [n, channels] = [0, 3].map(|axis| inputs[0].shape[axis].clone());
            let shape = vec![n, Dim::from(1), Dim::from(1), channels];
            let factors = graph.add("of_pixels", Reshape { shape }, &[factors])?;
            let mut y = graph.add("gated", Mul, &[x, factors])?;
            if self.residual {
                let residual = graph.input("residual", inputs[3].clone());
                y = graph.add("sum", Add, &[y, residual])?;
            }
            graph.output("y", y);
            Ok(graph)
        };
        Some(build())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counting(shape: &[usize]) -> Tensor {
        let n: usize = shape.iter().product();
        Tensor::f32(shape, (1..=n).map(|i| i as f32).collect()).unwrap()
    }

    /// A row of five pixels: (1 + 2) / 2, (3 + 4) / 2, and the last alone.
    #[test]
    fn squares_at_the_end_are_means_of_what_they_have() {
        let y = MeanPool { window: 2 }.evaluate(&[counting(&[1, 1, 5, 1])]).unwrap();
        assert_eq!(y[0].shape(), [1, 1, 3, 1]);
        assert_eq!(y[0].to_f32_vec().unwrap(), [1.5, 3.5, 5.0]);
    }

    #[test]
    fn each_channel_of_each_picture_has_its_mean() {
        let y = PictureMean.evaluate(&[counting(&[2, 1, 2, 2])]).unwrap();
        assert_eq!(y[0].shape(), [2, 2]);
        assert_eq!(y[0].to_f32_vec().unwrap(), [2.0, 3.0, 6.0, 7.0]);
        assert!(PictureMean.infer(&[Fact::f32([1, 0, 2, 2])]).is_err());
    }

    #[test]
    fn gates_of_zero_are_half_open() {
        let gates = Tensor::f32(&[1, 2], vec![0.0, f32::INFINITY]).unwrap();
        let inputs = [counting(&[1, 2, 1, 2]), gates, Tensor::scalar(3.0), counting(&[1, 2, 1, 2])];
        let y = ChannelGate { residual: true }.evaluate(&inputs).unwrap();
        assert_eq!(y[0].to_f32_vec().unwrap(), [2.5, 8.0, 7.5, 16.0]);
    }
}
