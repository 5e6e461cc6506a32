//! NFNets of the F family, from pixels to tokens (timm `models/nfnet.py` `NormFreeNet.forward_features` as
//! `dm_nfnet_f0` to `dm_nfnet_f6` configure it). Values are `[n, height, width, channels]`.
//!
//! There is no normalisation of activations: each convolution's filters are standardised, which is arithmetic over weights
//! alone, and blocks scale by what the variance of their input is expected to be.

use flamingo_ir::op::{
    Activate, Activation, Add, ChannelGate, Convolution, LayerNorm, MeanPool, Mul, Patches,
    PictureMean, Reshape, Transpose,
};
use flamingo_ir::{Dim, Graph, GraphError, Tensor, ValueId};

use super::{KeyMap, linear, reshaped};
use crate::config::{NfnetConfig, NfnetStage, VisionConfig};
use crate::source::Binder;

/// Factor of GELU after which normal numbers have the variance 1 again.
const GAMMA: f32 = 1.701_504_3;

/// Factor of a block's branch.
const ALPHA: f64 = 0.2;

/// Factor of squeeze-excite, whose gates are half open on average.
const GATE_GAIN: f64 = 2.0;

/// ε of the standardisation of filters.
const EPSILON: f32 = 1e-5;

/// Pictures [n, 3, S, S] → tokens [n, pixels, width]: the activated output of the last convolution.
pub(super) fn build_nfnet(
    graph: &mut Graph,
    binder: &mut Binder,
    keys: &dyn KeyMap,
    (config, nfnet): (&VisionConfig, &NfnetConfig),
    pictures: ValueId,
) -> Result<ValueId, GraphError> {
    let mut builder = Nfnet { graph, binder, keys };
    let (mut x, mut width) = builder.stem(nfnet, config.image_size, pictures)?;
    let mut variance = 1.0;
    for (index, stage) in nfnet.stages.iter().enumerate() {
        for number in 0..stage.n_blocks {
            let block = Block {
                prefix: format!("stages.{index}.{number}"),
                name: format!("vision.{index}.{number}"),
                stage,
                width,
                stride: if number == 0 { NfnetConfig::stride(index) } else { 1 },
                beta: f64::powf(variance, -0.5),
            };
            x = builder.block(&block, x)?;
            width = stage.width;
            // Shortcuts begin anew with each stage.
            let before = if number == 0 { 1.0 } else { variance };
            variance = before + ALPHA * ALPHA;
        }
    }
    let [weight, bias] = builder.filters("final_conv", [config.width, width, 1])?;
    x = linear(builder.graph, "vision.final", x, weight, Some(bias))?;
    let op = Activate { activation: Activation::Gelu };
    x = builder.graph.add("vision.final_activation", op, &[x])?;
    let n = builder.graph.fact(x).shape[0].clone();
    let n_tokens = config.grid() * config.grid();
    let shape = vec![n, Dim::from(n_tokens), Dim::from(config.width)];
    x = builder.graph.add("vision.tokens", Reshape { shape }, &[x])?;
    let gamma = builder.graph.literal(Tensor::vector(vec![GAMMA; config.width]));
    builder.graph.add("vision.scaled_tokens", Mul, &[x, gamma])
}

struct Nfnet<'g, 'b, 'p> {
    graph: &'g mut Graph,
    binder: &'b mut Binder<'p>,
    keys: &'b dyn KeyMap,
}

/// What a block is.
struct Block<'a> {
    /// Of its tensors.
    prefix: String,
    /// Of its nodes.
    name: String,
    stage: &'a NfnetStage,
    /// Channels of its input.
    width: usize,
    stride: usize,
    /// 1 / the expected standard deviation of its input.
    beta: f64,
}

impl Nfnet<'_, '_, '_> {
    fn weight(&mut self, key: &str, shape: &[usize]) -> ValueId {
        self.binder.weight(self.graph, &self.keys.nfnet(key), shape)
    }

    /// Standardised filters `[c_out, side · side · c_in]`, columns by row, column and channel, and the bias `[c_out]`.
    fn filters(
        &mut self,
        key: &str,
        [c_out, c_in, side]: [usize; 3],
    ) -> Result<[ValueId; 2], GraphError> {
        let weight = self.weight(&format!("{key}.weight"), &[c_out, c_in, side, side]);
        let gain = self.weight(&format!("{key}.gain"), &[c_out, 1, 1, 1]);
        let bias = self.weight(&format!("{key}.bias"), &[c_out]);
        let n_inputs = c_in * side * side;
        let flat = reshaped(self.graph, weight, &[c_out, n_inputs])?;
        let op = LayerNorm { epsilon: EPSILON, n_heads: 1, scale: false, bias: false };
        let standardised = self.graph.add("standardised", op, &[flat])?;
        let gain = reshaped(self.graph, gain, &[c_out, 1])?;
        let fan_in = self.graph.literal(Tensor::scalar((n_inputs as f32).powf(-0.5)));
        let gain = self.graph.add("gain", Mul, &[gain, fan_in])?;
        let filters = self.graph.add("filters", Mul, &[standardised, gain])?;
        if side == 1 {
            return Ok([filters, bias]);
        }
        let filters = reshaped(self.graph, filters, &[c_out, c_in, side, side])?;
        let channels_last = Transpose { permutation: vec![0, 2, 3, 1] };
        let filters = self.graph.add("filters_by_pixel", channels_last, &[filters])?;
        Ok([reshaped(self.graph, filters, &[c_out, n_inputs])?, bias])
    }

    fn pixel_linear(
        &mut self,
        (key, name): (&str, &str),
        [c_out, c_in]: [usize; 2],
        x: ValueId,
    ) -> Result<ValueId, GraphError> {
        let [weight, bias] = self.filters(key, [c_out, c_in, 1])?;
        linear(self.graph, name, x, weight, Some(bias))
    }

    fn convolution(
        &mut self,
        (key, name): (&str, &str),
        [c_out, c_group]: [usize; 2],
        (stride, n_groups): (usize, usize),
        x: ValueId,
    ) -> Result<ValueId, GraphError> {
        let [weight, bias] = self.filters(key, [c_out, c_group, 3])?;
        let op = Convolution { window: [3, 3], stride, n_groups, activation: None, bias: true };
        self.graph.add(name, op, &[x, weight, bias])
    }

    /// γ GELU(x) · factor.
    fn activation(&mut self, name: &str, x: ValueId, factor: f64) -> Result<ValueId, GraphError> {
        let op = Activate { activation: Activation::Gelu };
        let activated = self.graph.add(name, op, &[x])?;
        let factor = self.graph.literal(Tensor::scalar((f64::from(GAMMA) * factor) as f32));
        self.graph.add(&format!("{name}_scaled"), Mul, &[activated, factor])
    }

    /// Pictures → a quarter of the sides, and how many channels.
    fn stem(
        &mut self,
        config: &NfnetConfig,
        image_size: usize,
        pictures: ValueId,
    ) -> Result<(ValueId, usize), GraphError> {
        let pixels = self.graph.add("vision.pixels", Patches { patch_size: 1 }, &[pictures])?;
        let n = self.graph.fact(pixels).shape[0].clone();
        let sizes = [image_size, image_size, 3].map(Dim::from);
        let shape = [&[n], &sizes[..]].concat();
        let mut x = self.graph.add("vision.channels_last", Reshape { shape }, &[pixels])?;
        let mut width = 3;
        for (index, (c_out, stride)) in
            config.stem.iter().zip(NfnetConfig::STEM_STRIDES).enumerate()
        {
            if index > 0 {
                x = self.activation(&format!("vision.stem.activation_{index}"), x, 1.0)?;
            }
            let number = index + 1;
            let (key, name) = (format!("stem.conv{number}"), format!("vision.stem.conv{number}"));
            x = self.convolution((&key, &name), [*c_out, width], (stride, 1), x)?;
            width = *c_out;
        }
        Ok((x, width))
    }

    fn block(&mut self, block: &Block, x: ValueId) -> Result<ValueId, GraphError> {
        let Block { prefix, name, stage, width, stride, beta } = block;
        let NfnetStage { width: out, inner_width: inner, group_width, .. } = **stage;
        let key = |part: &str| format!("{prefix}.{part}");
        let node = |part: &str| format!("{name}.{part}");
        let y = self.activation(&node("activation_1"), x, *beta)?;
        let shortcut = match self.binder.has(&self.keys.nfnet(&key("downsample.conv.weight"))) {
            true => self.shortcut(block, y)?,
            false => x,
        };
        let (first, last) = (key("conv1"), key("conv3"));
        let mut y = self.pixel_linear((&first, &node("reduce")), [inner, *width], y)?;
        let n_groups = inner / group_width.max(1);
        for (number, part, stride) in [(2, "conv2", *stride), (3, "conv2b", 1)] {
            y = self.activation(&node(&format!("activation_{number}")), y, 1.0)?;
            let names = (key(part), node(part));
            let channels = [inner, group_width];
            y = self.convolution((&names.0, &names.1), channels, (stride, n_groups), y)?;
        }
        y = self.activation(&node("activation_4"), y, 1.0)?;
        y = self.pixel_linear((&last, &node("expand")), [out, inner], y)?;
        y = self.squeeze_excite(block, y)?;
        self.graph.add(&node("residual"), Add, &[shortcut, y])
    }

    /// The shortcut where sides or channels change.
    fn shortcut(&mut self, block: &Block, x: ValueId) -> Result<ValueId, GraphError> {
        let x = match block.stride {
            1 => x,
            window => self.graph.add(&format!("{}.pool", block.name), MeanPool { window }, &[x])?,
        };
        let names =
            (format!("{}.downsample.conv", block.prefix), format!("{}.shortcut", block.name));
        self.pixel_linear((&names.0, &names.1), [block.stage.width, block.width], x)
    }

    /// x · σ(excite(relu(squeeze(mean of x)))), times the factors that follow it.
    fn squeeze_excite(&mut self, block: &Block, x: ValueId) -> Result<ValueId, GraphError> {
        let Block { prefix, name, stage, .. } = block;
        let NfnetStage { width, squeezed_width: squeezed, .. } = **stage;
        let mut gates = self.graph.add(&format!("{name}.mean"), PictureMean, &[x])?;
        for (key, part, [c_out, c_in]) in
            [("fc1", "up", [squeezed, width]), ("fc2", "down", [width, squeezed])]
        {
            let key = format!("{prefix}.attn_last.{key}");
            let weight = self.weight(&format!("{key}.weight"), &[c_out, c_in, 1, 1]);
            let weight = reshaped(self.graph, weight, &[c_out, c_in])?;
            let bias = self.weight(&format!("{key}.bias"), &[c_out]);
            let node = format!("{name}.squeeze_excite.{part}");
            gates = linear(self.graph, &node, gates, weight, Some(bias))?;
            if part == "up" {
                let op = Activate { activation: Activation::Relu };
                gates = self.graph.add(&format!("{name}.squeeze_excite.relu"), op, &[gates])?;
            }
        }
        let gain = self.weight(&format!("{prefix}.skipinit_gain"), &[]);
        let factor = self.graph.literal(Tensor::scalar((ALPHA * GATE_GAIN) as f32));
        let gain = self.graph.add("gate_gain", Mul, &[gain, factor])?;
        let op = ChannelGate { residual: false };
        self.graph.add(&format!("{name}.gated"), op, &[x, gates, gain])
    }
}
