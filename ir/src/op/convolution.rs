//! Convolutions of pictures: ONNX's `Conv` (<https://onnx.ai/onnx/operators/onnx__Conv.html>), and the function
//! `Convolution` with channels last and the padding called SAME.

use ndarray::IxDyn;

use super::{
    Activation, Attributes, Flavour, OnnxForm, OpError, Operator, Reshape, Transpose, expect_fact,
    expect_inputs, input_error,
};
use crate::graph::{Graph, GraphError};
use crate::{DType, Dim, Fact, Tensor};

/// ONNX's convolution: x `[n, c_in, H, W]`, weight `[c_out, c_in / groups, h, w]`, bias `[c_out]` if given.
#[derive(Debug, Clone, PartialEq)]
pub struct Conv {
    /// Pixels from one window to the next, down and across.
    pub strides: [usize; 2],
    /// Rows and columns of zeros around x: above, left, below, right.
    pub pads: [usize; 4],
    /// Channels are cut into as many groups, each with weights of its own.
    pub n_groups: usize,
}

/// act(convolution(x) + bias) with ⌈size / stride⌉ windows on each axis, the zeros around x halved, the odd one behind.
/// Inputs: x `[n, H, W, c_in]`, weight `[c_out, h · w · c_in / groups]`, its columns by row, column and channel; bias
/// `[c_out]` if `bias`. Output: `[n, ⌈H / stride⌉, ⌈W / stride⌉, c_out]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Convolution {
    /// Pixels that one output pixel sees, down and across.
    pub window: [usize; 2],
    /// Pixels from one window to the next, in both directions.
    pub stride: usize,
    /// Channels are cut into as many groups, each with weights of its own.
    pub n_groups: usize,
    /// Applied after the bias.
    pub activation: Option<Activation>,
    /// Whether a bias input follows.
    pub bias: bool,
}

/// The two sizes of an attribute.
fn pair(attributes: &Attributes, name: &str) -> Result<[usize; 2], OpError> {
    let sizes = attributes.sizes(name)?;
    match sizes[..] {
        [down, across] if down > 0 && across > 0 => Ok([down, across]),
        _ => Err(OpError::Attribute {
            name: name.into(),
            expected: "two sizes above 0".into(),
            found: format!("{sizes:?}"),
        }),
    }
}

/// Known sizes of a fact's axes; none if one is a symbol.
pub(super) fn known<const N: usize>(fact: &Fact, first: usize) -> Option<[usize; N]> {
    let sizes = fact.shape.get(first..first + N)?.iter().map(Dim::known);
    sizes.collect::<Option<Vec<usize>>>()?.try_into().ok()
}

/// Windows on an axis, and the zeros before and behind it.
fn same(size: usize, window: usize, stride: usize) -> [usize; 3] {
    let n_windows = size.div_ceil(stride);
    let reach = n_windows.saturating_sub(1).saturating_mul(stride).saturating_add(window);
    let padding = reach.saturating_sub(size);
    [n_windows, padding / 2, padding - padding / 2]
}

impl Conv {
    pub(crate) fn parse(attributes: &Attributes) -> Result<Conv, OpError> {
        attributes.expect_only(&["strides", "pads", "group"])?;
        let pads = attributes.sizes("pads")?;
        let n_pads = pads.len();
        Ok(Conv {
            strides: pair(attributes, "strides")?,
            pads: pads.try_into().map_err(|_| OpError::Attribute {
                name: "pads".into(),
                expected: "four sizes".into(),
                found: format!("{n_pads}"),
            })?,
            n_groups: attributes.positive("group")?,
        })
    }

    /// Output pixels, down and across, for a picture and a window of these sizes.
    fn output(&self, picture: [usize; 2], window: [usize; 2]) -> Option<[usize; 2]> {
        let size = |axis: usize| {
            let padded = picture[axis].checked_add(self.pads[axis])?;
            let padded = padded.checked_add(self.pads[axis + 2])?;
            Some(padded.checked_sub(window[axis])? / self.strides[axis] + 1)
        };
        Some([size(0)?, size(1)?])
    }

    /// One output pixel of one channel: the sum over the window, in f64.
    fn pixel(
        &self,
        x: &ndarray::ArrayViewD<'_, f32>,
        weight: &ndarray::ArrayViewD<'_, f32>,
        [picture, channel, down, across]: [usize; 4],
    ) -> f64 {
        let (x_shape, shape) = (x.shape(), weight.shape());
        let group = channel / (shape[0] / self.n_groups);
        let first = [down * self.strides[0], across * self.strides[1]];
        let mut sum = 0.0;
        for (row, col) in (0..shape[2]).flat_map(|row| (0..shape[3]).map(move |col| (row, col))) {
            let inside = |at: usize, axis: usize| {
                at.checked_sub(self.pads[axis]).filter(|at| *at < x_shape[axis + 2])
            };
            let places = inside(first[0] + row, 0).zip(inside(first[1] + col, 1));
            let Some((y, z)) = places else { continue };
            for input in 0..shape[1] {
                let pixel = f64::from(x[[picture, group * shape[1] + input, y, z]]);
                sum += pixel * f64::from(weight[[channel, input, row, col]]);
            }
        }
        sum
    }
}

impl Operator for Conv {
    fn name(&self) -> &'static str {
        "Conv"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
            .with("strides", &self.strides[..])
            .with("pads", &self.pads[..])
            .with("group", self.n_groups)
    }

    fn onnx_form(&self) -> OnnxForm {
        OnnxForm::Node {
            domain: "",
            op_type: "Conv",
            attributes: self.attributes(),
            extra_inputs: Vec::new(),
            absent: &[],
        }
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, inputs.len().clamp(2, 3))?;
        let [x, weight] = [&inputs[0], &inputs[1]];
        let no_x = || input_error(0, "x", &"f32 [n, c, H, W] of pictures", x);
        let no_weight = || {
            let expected = format!("f32 [c_out, c_in / {}, h, w] that fits x", self.n_groups);
            input_error(1, "weight", &expected, weight)
        };
        if x.dtype != DType::F32 || x.rank() != 4 {
            return Err(no_x());
        }
        if weight.dtype != DType::F32 || weight.rank() != 4 {
            return Err(no_weight());
        }
        let [c_in, height, width] = known(x, 1).ok_or_else(no_x)?;
        let [c_out, c_group, down, across] = known(weight, 0).ok_or_else(no_weight)?;
        let fits = c_group.checked_mul(self.n_groups) == Some(c_in) && c_out % self.n_groups == 0;
        let output = self.output([height, width], [down, across]).filter(|_| fits);
        let [rows, cols] = output.ok_or_else(no_weight)?;
        if inputs.len() == 3 {
            expect_fact(inputs, 2, "bias", &Fact::f32([c_out]))?;
        }
        let sizes = [c_out, rows, cols].map(Dim::from);
        Ok(vec![Fact::f32([&x.shape[..1], &sizes[..]].concat())])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let failed = || OpError::Evaluation("Conv takes f32 tensors that fit".into());
        let facts: Vec<Fact> = inputs.iter().map(Tensor::fact).collect();
        let shape = self.infer(&facts)?[0].known_shape().ok_or_else(failed)?;
        let [x, weight] = [0, 1].map(|index| inputs.get(index).and_then(Tensor::as_f32));
        let (x, weight) = (x.ok_or_else(failed)?.view(), weight.ok_or_else(failed)?.view());
        let bias = inputs.get(2).and_then(Tensor::to_f32_vec);
        let out = ndarray::ArrayD::from_shape_fn(IxDyn(&shape), |at| {
            let at = [at[0], at[1], at[2], at[3]];
            let bias = bias.as_ref().map_or(0.0, |bias| f64::from(bias[at[1]]));
            (self.pixel(&x, &weight, at) + bias) as f32
        });
        Ok(vec![Tensor::F32(out.into_shared())])
    }
}

impl Convolution {
    pub(crate) fn parse(attributes: &Attributes) -> Result<Convolution, OpError> {
        attributes.expect_only(&["window", "stride", "n_groups", "activation", "bias"])?;
        Ok(Convolution {
            window: pair(attributes, "window")?,
            stride: attributes.positive("stride")?,
            n_groups: attributes.positive("n_groups")?,
            activation: Activation::from_attributes(attributes)?,
            bias: attributes.flag("bias")?,
        })
    }

    /// Channels of a group and of the output, for inputs that fit each other.
    fn channels(&self, inputs: &[Fact]) -> Option<[usize; 2]> {
        let [c_in] = known(&inputs[0], 3)?;
        let [c_out, window_len] = known(&inputs[1], 0)?;
        let c_group = c_in / self.n_groups;
        let n_pixels = self.window[0].checked_mul(self.window[1])?;
        let fits = c_group * self.n_groups == c_in
            && c_out % self.n_groups == 0
            && n_pixels.checked_mul(c_group) == Some(window_len);
        fits.then_some([c_group, c_out])
    }

    fn definition(&self, inputs: &[Fact], flavour: Flavour) -> Result<Graph, GraphError> {
        let mut graph = Graph::new("Convolution");
        let x = graph.input("x", inputs[0].clone());
        let weight = graph.input("weight", inputs[1].clone());
        let [height, width] = known(&inputs[0], 1).unwrap_or_default();
        let [c_group, c_out] = self.channels(inputs).unwrap_or_default();
        let [down, across] = self.window;
        let shape = [c_out, down, across, c_group].map(Dim::from).to_vec();
        let filters = graph.add("filters", Reshape { shape }, &[weight])?;
        let channels_first = Transpose { permutation: vec![0, 3, 1, 2] };
        let filters = graph.add("filters_by_channel", channels_first.clone(), &[filters])?;
        let pictures = graph.add("channels_first", channels_first, &[x])?;
        let [_, above, below] = same(height, down, self.stride);
        let [_, left, right] = same(width, across, self.stride);
        let op = Conv {
            strides: [self.stride; 2],
            pads: [above, left, below, right],
            n_groups: self.n_groups,
        };
        let mut operands = vec![pictures, filters];
        if self.bias {
            operands.push(graph.input("bias", inputs[2].clone()));
        }
        let sums = graph.add("sums", op, &operands)?;
        let channels_last = Transpose { permutation: vec![0, 2, 3, 1] };
        let mut y = graph.add("channels_last", channels_last, &[sums])?;
        if let Some(activation) = self.activation {
            y = activation.define(&mut graph, y, flavour)?;
        }
        graph.output("y", y);
        Ok(graph)
    }
}

impl Operator for Convolution {
    fn name(&self) -> &'static str {
        "Convolution"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
            .with("window", &self.window[..])
            .with("stride", self.stride)
            .with("n_groups", self.n_groups)
            .with("activation", Activation::attribute(self.activation))
            .with("bias", self.bias)
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 2 + usize::from(self.bias))?;
        super::expect_rank(inputs, 0, "x", 4)?;
        super::expect_rank(inputs, 1, "weight", 2)?;
        let no_x = || input_error(0, "x", &"f32 [n, H, W, c] of pictures", &inputs[0]);
        let [height, width, _] = known(&inputs[0], 1).ok_or_else(no_x)?;
        let [_, c_out] = self.channels(inputs).ok_or_else(|| {
            let Convolution { window: [down, across], n_groups, .. } = self;
            let expected = format!("[c_out, {down} * {across} * c_in / {n_groups}] that fits x");
            input_error(1, "weight", &expected, &inputs[1])
        })?;
        if self.bias {
            expect_fact(inputs, 2, "bias", &Fact::f32([c_out]))?;
        }
        let [rows, cols] = [height, width].map(|size| Dim::from(size.div_ceil(self.stride)));
        Ok(vec![Fact::f32([inputs[0].shape[0].clone(), rows, cols, Dim::from(c_out)])])
    }

    fn body(&self, inputs: &[Fact], flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        Some(self.definition(inputs, flavour))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counting(shape: &[usize]) -> Tensor {
        let n: usize = shape.iter().product();
        Tensor::f32(shape, (1..=n).map(|i| i as f32).collect()).unwrap()
    }

    #[test]
    fn the_odd_row_of_zeros_is_behind() {
        assert_eq!(same(320, 3, 2), [160, 0, 1]);
        assert_eq!(same(319, 3, 2), [160, 1, 1]);
        assert_eq!(same(5, 3, 1), [5, 1, 1]);
        assert_eq!(same(7, 1, 2), [4, 0, 0]);
    }

    /// Pixels 1 to 4 in a row, windows of three ones from pixels 0 and 2 on: 1 + 2 + 3, and 3 + 4 and a zero.
    #[test]
    fn windows_begin_at_the_first_pixel_of_an_even_row() {
        let op =
            Convolution { window: [1, 3], stride: 2, n_groups: 1, activation: None, bias: true };
        let weight = Tensor::f32(&[1, 3], vec![1.0; 3]).unwrap();
        let bias = Tensor::vector(vec![0.5]);
        let y = op.evaluate(&[counting(&[1, 1, 4, 1]), weight, bias]).unwrap();
        assert_eq!(y[0].shape(), [1, 1, 2, 1]);
        assert_eq!(y[0].to_f32_vec().unwrap(), [6.5, 7.5]);
    }

    /// Two pixels of four channels in two groups; the window is the pixel and the one to its right.
    #[test]
    fn columns_of_a_weight_are_by_pixel_and_then_by_channel_of_the_group() {
        let op =
            Convolution { window: [1, 2], stride: 1, n_groups: 2, activation: None, bias: false };
        let weight = Tensor::f32(&[2, 4], vec![1.0, 10.0, 100.0, 1e3, 1.0, 0.0, 0.0, 2.0]);
        let y = op.evaluate(&[counting(&[1, 1, 2, 4]), weight.unwrap()]).unwrap();
        assert_eq!(y[0].to_f32_vec().unwrap(), [6521.0, 19.0, 65.0, 7.0]);
    }

    #[test]
    fn groups_and_windows_that_do_not_fit_are_refused() {
        let op = |n_groups, window| Convolution {
            window: [window; 2],
            stride: 1,
            n_groups,
            activation: None,
            bias: false,
        };
        let facts = [Fact::f32([1, 5, 5, 6]), Fact::f32([6, 27])];
        assert!(op(2, 3).infer(&facts).is_ok());
        for (n_groups, window) in [(1, 3), (4, 3), (2, 2), (2, 1 << 31)] {
            assert!(op(n_groups, window).infer(&facts).is_err(), "{n_groups} {window}");
        }
    }
}
