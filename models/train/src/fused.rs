//! Norms, activations, rotary positions and masked softmax, each in one pass forward and one pass back: as
//! chains of burn's own operations they took half of a step.

use std::fmt::Debug;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Tensor, TensorData};

const EPSILON: f32 = 1e-5;

/// LayerNorm over the last axis of `[.., width]`, with a scale and a shift of `[1, width]`.
pub fn layer_norm<const D: usize>(x: Tensor<D>, scale: Tensor<2>, shift: Tensor<2>) -> Tensor<D> {
    let [x, scale, shift] = [x.into_dispatch(), scale.into_dispatch(), shift.into_dispatch()];
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_layer_norm(x, scale, shift))
}

/// RMSNorm over the last axis of `[.., width]`, with a scale of `[1, width]`.
pub fn rms_norm<const D: usize>(x: Tensor<D>, scale: Tensor<2>) -> Tensor<D> {
    let [x, scale] = [x.into_dispatch(), scale.into_dispatch()];
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_rms_norm(x, scale))
}

/// x σ(1.702 x), the activation of OpenAI's CLIP.
pub fn quick_gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_quick_gelu(x.into_dispatch()))
}

/// x Φ(x) with the normal distribution itself, not the tanh that comes near it.
pub fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_gelu(x.into_dispatch()))
}

/// gate σ(gate) up, of equal shapes.
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    let [gate, up] = [gate.into_dispatch(), up.into_dispatch()];
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_swiglu(gate, up))
}

/// softmax(scale × scores + mask) over the last axis. `scores` are `[batch, heads, queries, keys]`, the mask
/// `[batch or 1, 1, queries or 1, keys]`; it gets no gradient.
pub fn masked_softmax(scores: Tensor<4>, mask: Tensor<4>, scale: f32) -> Tensor<4> {
    let [scores, mask] = [scores.into_dispatch(), mask.into_dispatch()];
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_masked_softmax(scores, mask, scale))
}

/// Turns the two halves of each head of `[batch, tokens, heads × dim]` by the angles of `[tokens, dim]`: their
/// cosines, then their sines.
pub fn rotate(x: Tensor<3>, angles: Tensor<2>) -> Tensor<3> {
    let [x, angles] = [x.into_dispatch(), angles.into_dispatch()];
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_rotate(x, angles))
}

/// What [`Flex`] and its autodiff learn here.
#[backend_extension(Flex, Autodiff)]
pub trait FusedOps: Backend {
    /// See [`layer_norm`].
    fn fused_layer_norm(
        x: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        shift: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
    /// See [`rms_norm`].
    fn fused_rms_norm(x: FloatTensor<Self>, scale: FloatTensor<Self>) -> FloatTensor<Self>;
    /// See [`quick_gelu`].
    fn fused_quick_gelu(x: FloatTensor<Self>) -> FloatTensor<Self>;
    /// See [`gelu`].
    fn fused_gelu(x: FloatTensor<Self>) -> FloatTensor<Self>;
    /// See [`swiglu`].
    fn fused_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;
    /// See [`masked_softmax`].
    fn fused_masked_softmax(
        scores: FloatTensor<Self>,
        mask: FloatTensor<Self>,
        scale: f32,
    ) -> FloatTensor<Self>;
    /// See [`rotate`].
    fn fused_rotate(x: FloatTensor<Self>, angles: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl FusedOps for Flex {
    fn fused_layer_norm(x: FlexTensor, scale: FlexTensor, shift: FlexTensor) -> FlexTensor {
        LayerNorm.forward(&[x, scale, shift])
    }

    fn fused_rms_norm(x: FlexTensor, scale: FlexTensor) -> FlexTensor {
        RmsNorm.forward(&[x, scale])
    }

    fn fused_quick_gelu(x: FlexTensor) -> FlexTensor {
        QuickGelu.forward(&[x])
    }

    fn fused_gelu(x: FlexTensor) -> FlexTensor {
        Gelu.forward(&[x])
    }

    fn fused_swiglu(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
        SwiGlu.forward(&[gate, up])
    }

    fn fused_masked_softmax(scores: FlexTensor, mask: FlexTensor, scale: f32) -> FlexTensor {
        MaskedSoftmax { scale }.forward(&[scores, mask])
    }

    fn fused_rotate(x: FlexTensor, angles: FlexTensor) -> FlexTensor {
        Rotate.forward(&[x, angles])
    }
}

/// What the autodiff of Flex holds.
type Tracked = FloatTensor<Autodiff<Flex>>;

impl<C: CheckpointStrategy> FusedOps for Autodiff<Flex, C> {
    fn fused_layer_norm(x: Tracked, scale: Tracked, shift: Tracked) -> Tracked {
        track::<_, C, 3>(LayerNorm, [x, scale, shift])
    }

    fn fused_rms_norm(x: Tracked, scale: Tracked) -> Tracked {
        track::<_, C, 2>(RmsNorm, [x, scale])
    }

    fn fused_quick_gelu(x: Tracked) -> Tracked {
        track::<_, C, 1>(QuickGelu, [x])
    }

    fn fused_gelu(x: Tracked) -> Tracked {
        track::<_, C, 1>(Gelu, [x])
    }

    fn fused_swiglu(gate: Tracked, up: Tracked) -> Tracked {
        track::<_, C, 2>(SwiGlu, [gate, up])
    }

    fn fused_masked_softmax(scores: Tracked, mask: Tracked, scale: f32) -> Tracked {
        track::<_, C, 2>(MaskedSoftmax { scale }, [scores, mask])
    }

    fn fused_rotate(x: Tracked, angles: Tracked) -> Tracked {
        track::<_, C, 2>(Rotate, [x, angles])
    }
}

/// An operation of N tensors with its gradient written out.
trait Fused<const N: usize>: Clone + Debug + Send + 'static {
    fn forward(&self, inputs: &[FlexTensor; N]) -> FlexTensor;

    /// Gradients of the `wanted` inputs, given the inputs, the output and its gradient.
    fn backward(
        &self,
        inputs: &[FlexTensor; N],
        output: &FlexTensor,
        gradient: &FlexTensor,
        wanted: [bool; N],
    ) -> [Option<FlexTensor>; N];
}

#[derive(Debug)]
struct Step<F>(F);

impl<F: Fused<N>, const N: usize> Backward<Flex, N> for Step<F> {
    type State = ([FlexTensor; N], FlexTensor);

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<Flex>(&ops.node);
        let (inputs, output) = ops.state;
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let gradients = self.0.backward(&inputs, &output, &gradient, wanted);
        for (parent, gradient) in ops.parents.iter().zip(gradients) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<Flex>(parent.id, gradient);
            }
        }
    }
}

fn track<F: Fused<N>, C: CheckpointStrategy, const N: usize>(
    operation: F,
    inputs: [Tracked; N],
) -> Tracked {
    let nodes = inputs.each_ref().map(Tracked::node);
    let inputs = inputs.map(|input| input.into_primitive().to_contiguous());
    let output = operation.forward(&inputs);
    match Step(operation).prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(step) => step.finish((inputs, output.clone()), output),
        OpsKind::UnTracked(step) => step.finish(output),
    }
}

/// The numbers of a tensor in the order of its axes.
fn values(x: &FlexTensor) -> std::borrow::Cow<'_, [f32]> {
    match x.as_slice::<f32>() {
        Some(values) => values.into(),
        None => {
            let contiguous = x.to_contiguous();
            contiguous.as_slice::<f32>().expect("it is contiguous").to_vec().into()
        }
    }
}

fn tensor(values: Vec<f32>, like: &FlexTensor) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, like.layout().shape().clone()))
}

fn width(x: &FlexTensor) -> usize {
    x.layout().shape().last().copied().unwrap_or(1).max(1)
}

/// One pass over tensors of equal shapes.
fn map2(x: &FlexTensor, y: &FlexTensor, f: impl Fn(f32, f32) -> f32) -> FlexTensor {
    tensor(values(x).iter().zip(values(y).iter()).map(|(x, y)| f(*x, *y)).collect(), x)
}

/// A function of each number alone.
trait Activation: Clone + Debug + Send + 'static {
    fn value(x: f32) -> f32;
    fn slope(x: f32) -> f32;
}

impl<A: Activation> Fused<1> for A {
    fn forward(&self, [x]: &[FlexTensor; 1]) -> FlexTensor {
        tensor(values(x).iter().map(|x| A::value(*x)).collect(), x)
    }

    fn backward(
        &self,
        [x]: &[FlexTensor; 1],
        _: &FlexTensor,
        gradient: &FlexTensor,
        _: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        [Some(map2(x, gradient, |x, g| g * A::slope(x)))]
    }
}

#[derive(Debug, Clone)]
struct QuickGelu;

impl Activation for QuickGelu {
    fn value(x: f32) -> f32 {
        x * sigmoid(1.702 * x)
    }

    fn slope(x: f32) -> f32 {
        let s = sigmoid(1.702 * x);
        s * (1.0 + 1.702 * x * (1.0 - s))
    }
}

#[derive(Debug, Clone)]
struct Gelu;

impl Activation for Gelu {
    fn value(x: f32) -> f32 {
        x * normal(x).0
    }

    fn slope(x: f32) -> f32 {
        let (below, density) = normal(x);
        below + x * density
    }
}

#[derive(Debug, Clone)]
struct SwiGlu;

impl Fused<2> for SwiGlu {
    fn forward(&self, [gate, up]: &[FlexTensor; 2]) -> FlexTensor {
        map2(gate, up, |gate, up| gate * sigmoid(gate) * up)
    }

    fn backward(
        &self,
        [gate, up]: &[FlexTensor; 2],
        _: &FlexTensor,
        gradient: &FlexTensor,
        _: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let (gates, ups, gradient) = (values(gate), values(up), values(gradient));
        let (mut of_gate, mut of_up) = (vec![0.0; gates.len()], vec![0.0; gates.len()]);
        let inputs = gates.iter().zip(ups.iter()).zip(gradient.iter());
        for (((x, up), g), (dx, du)) in inputs.zip(of_gate.iter_mut().zip(&mut of_up)) {
            let s = sigmoid(*x);
            *dx = g * up * s * (1.0 + x * (1.0 - s));
            *du = g * x * s;
        }
        [Some(tensor(of_gate, gate)), Some(tensor(of_up, up))]
    }
}

#[derive(Debug, Clone)]
struct LayerNorm;

impl Fused<3> for LayerNorm {
    fn forward(&self, [x, scale, shift]: &[FlexTensor; 3]) -> FlexTensor {
        let (xs, width) = (values(x), width(x));
        let (scale, shift) = (values(scale), values(shift));
        let mut out = vec![0.0; xs.len()];
        for (row, out) in xs.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let (mean, factor) = spread(row);
            let parameters = scale.iter().zip(shift.iter());
            for ((y, x), (scale, shift)) in out.iter_mut().zip(row).zip(parameters) {
                *y = (x - mean) * factor * scale + shift;
            }
        }
        tensor(out, x)
    }

    fn backward(
        &self,
        [x, scale, shift]: &[FlexTensor; 3],
        _: &FlexTensor,
        gradient: &FlexTensor,
        wanted: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let (xs, gs, width) = (values(x), values(gradient), width(x));
        let scales = values(scale);
        let mut of_x = vec![0.0; if wanted[0] { xs.len() } else { 0 }];
        let (mut of_scale, mut of_shift) = (vec![0.0; width], vec![0.0; width]);
        let (mut unit, mut scaled) = (vec![0.0; width], vec![0.0; width]);
        for (index, (row, g)) in xs.chunks_exact(width).zip(gs.chunks_exact(width)).enumerate() {
            let (mean, factor) = spread(row);
            for (unit, x) in unit.iter_mut().zip(row) {
                *unit = (x - mean) * factor;
            }
            if wanted[1] || wanted[2] {
                for ((scale, shift), (g, unit)) in
                    of_scale.iter_mut().zip(&mut of_shift).zip(g.iter().zip(&unit))
                {
                    *scale += g * unit;
                    *shift += g;
                }
            }
            if wanted[0] {
                for (scaled, (g, scale)) in scaled.iter_mut().zip(g.iter().zip(scales.iter())) {
                    *scaled = g * scale;
                }
                let along = dot(&scaled, &unit) / width as f32;
                let mean = sum(&scaled) / width as f32;
                let out = &mut of_x[index * width..(index + 1) * width];
                for (dx, (g, unit)) in out.iter_mut().zip(scaled.iter().zip(&unit)) {
                    *dx = factor * (g - mean - unit * along);
                }
            }
        }
        [
            wanted[0].then(|| tensor(of_x, x)),
            wanted[1].then(|| tensor(of_scale, scale)),
            wanted[2].then(|| tensor(of_shift, shift)),
        ]
    }
}

#[derive(Debug, Clone)]
struct RmsNorm;

impl Fused<2> for RmsNorm {
    fn forward(&self, [x, scale]: &[FlexTensor; 2]) -> FlexTensor {
        let (xs, scale, width) = (values(x), values(scale), width(x));
        let mut out = vec![0.0; xs.len()];
        for (row, out) in xs.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let factor = (dot(row, row) / width as f32 + EPSILON).sqrt().recip();
            for (y, (x, scale)) in out.iter_mut().zip(row.iter().zip(scale.iter())) {
                *y = x * factor * scale;
            }
        }
        tensor(out, x)
    }

    fn backward(
        &self,
        [x, scale]: &[FlexTensor; 2],
        _: &FlexTensor,
        gradient: &FlexTensor,
        wanted: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let (xs, gs, scales, width) = (values(x), values(gradient), values(scale), width(x));
        let mut of_x = vec![0.0; if wanted[0] { xs.len() } else { 0 }];
        let (mut of_scale, mut scaled) = (vec![0.0; width], vec![0.0; width]);
        for (index, (row, g)) in xs.chunks_exact(width).zip(gs.chunks_exact(width)).enumerate() {
            let factor = (dot(row, row) / width as f32 + EPSILON).sqrt().recip();
            if wanted[1] {
                for (scale, (g, x)) in of_scale.iter_mut().zip(g.iter().zip(row)) {
                    *scale += g * x * factor;
                }
            }
            if wanted[0] {
                for (scaled, (g, scale)) in scaled.iter_mut().zip(g.iter().zip(scales.iter())) {
                    *scaled = g * scale;
                }
                let along = dot(&scaled, row) * factor * factor / width as f32;
                let out = &mut of_x[index * width..(index + 1) * width];
                for (dx, (g, x)) in out.iter_mut().zip(scaled.iter().zip(row)) {
                    *dx = factor * (g - x * along);
                }
            }
        }
        [wanted[0].then(|| tensor(of_x, x)), wanted[1].then(|| tensor(of_scale, scale))]
    }
}

#[derive(Debug, Clone)]
struct MaskedSoftmax {
    scale: f32,
}

impl Fused<2> for MaskedSoftmax {
    fn forward(&self, [scores, mask]: &[FlexTensor; 2]) -> FlexTensor {
        let (mut out, masks) = (values(scores).into_owned(), values(mask));
        let (shape, of_mask) = (scores.layout().shape(), mask.layout().shape());
        let (heads, queries, keys) = (shape[1], shape[2], shape[3].max(1));
        for (index, rows) in out.chunks_exact_mut(queries * keys).enumerate() {
            let first = if of_mask[0] == 1 { 0 } else { index / heads * of_mask[2] };
            for (query, row) in rows.chunks_exact_mut(keys).enumerate() {
                let at = first + if of_mask[2] == 1 { 0 } else { query };
                let mask = &masks[at * keys..][..keys];
                for (x, mask) in row.iter_mut().zip(mask) {
                    *x = *x * self.scale + mask;
                }
                let largest = largest(row);
                row.iter_mut().for_each(|x| *x = exp(*x - largest));
                let factor = sum(row).recip();
                row.iter_mut().for_each(|x| *x *= factor);
            }
        }
        tensor(out, scores)
    }

    fn backward(
        &self,
        [scores, _]: &[FlexTensor; 2],
        output: &FlexTensor,
        gradient: &FlexTensor,
        wanted: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        assert!(!wanted[1], "a mask is not trained");
        let (mut out, p) = (values(gradient).into_owned(), values(output));
        let keys = width(scores);
        for (g, p) in out.chunks_exact_mut(keys).zip(p.chunks_exact(keys)) {
            let along = dot(g, p);
            for (g, p) in g.iter_mut().zip(p) {
                *g = self.scale * p * (*g - along);
            }
        }
        [Some(tensor(out, scores)), None]
    }
}

#[derive(Debug, Clone)]
struct Rotate;

impl Rotate {
    /// Turns by the angles, or back with a sign of −1.
    fn turn(x: &FlexTensor, angles: &FlexTensor, sign: f32) -> FlexTensor {
        let (mut out, all) = (values(x).into_owned(), values(angles));
        let (width, dim) = (width(x), width(angles));
        for (index, token) in out.chunks_exact_mut(width).enumerate() {
            let at = index * dim % all.len();
            let (cos, sin) = all[at..at + dim].split_at(dim / 2);
            for head in token.chunks_exact_mut(dim) {
                let (first, second) = head.split_at_mut(dim / 2);
                let halves = first.iter_mut().zip(second);
                for ((x, y), (cos, sin)) in halves.zip(cos.iter().zip(sin)) {
                    let sin = sin * sign;
                    (*x, *y) = (*x * cos - *y * sin, *y * cos + *x * sin);
                }
            }
        }
        tensor(out, x)
    }
}

impl Fused<2> for Rotate {
    fn forward(&self, [x, angles]: &[FlexTensor; 2]) -> FlexTensor {
        Rotate::turn(x, angles, 1.0)
    }

    fn backward(
        &self,
        [_, angles]: &[FlexTensor; 2],
        _: &FlexTensor,
        gradient: &FlexTensor,
        wanted: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        assert!(!wanted[1], "angles are not trained");
        [Some(Rotate::turn(gradient, angles, -1.0)), None]
    }
}

/// Mean and 1 / deviation.
fn spread(row: &[f32]) -> (f32, f32) {
    let mean = sum(row) / row.len() as f32;
    let squares = fold(row, row, |total, x, _| total + (x - mean) * (x - mean));
    (mean, (squares / row.len() as f32 + EPSILON).sqrt().recip())
}

/// Σ over pairs in eight sums side by side, so that the compiler uses vectors.
fn fold(x: &[f32], y: &[f32], f: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let mut sums = [0.0; 8];
    let (xs, ys) = (x.chunks_exact(8), y.chunks_exact(8));
    let rest = xs.remainder().iter().zip(ys.remainder());
    let rest = rest.fold(0.0, |total, (x, y)| f(total, *x, *y));
    for (x, y) in xs.zip(ys) {
        for ((total, x), y) in sums.iter_mut().zip(x).zip(y) {
            *total = f(*total, *x, *y);
        }
    }
    sums.iter().sum::<f32>() + rest
}

fn sum(x: &[f32]) -> f32 {
    fold(x, x, |total, x, _| total + x)
}

fn dot(x: &[f32], y: &[f32]) -> f32 {
    fold(x, y, |total, x, y| total + x * y)
}

fn largest(x: &[f32]) -> f32 {
    let mut best = [f32::NEG_INFINITY; 8];
    let chunks = x.chunks_exact(8);
    let rest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for chunk in chunks {
        for (best, x) in best.iter_mut().zip(chunk) {
            *best = if *x > *best { *x } else { *best };
        }
    }
    best.into_iter().fold(rest, f32::max)
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Φ(x) and φ(x) of the normal distribution; Abramowitz and Stegun 7.1.26, off by at most 1.5 · 10⁻⁷.
fn normal(x: f32) -> (f32, f32) {
    let bell = exp(-0.5 * x * x);
    let t = 1.0 / (1.0 + 0.327_591_1 * x.abs() * std::f32::consts::FRAC_1_SQRT_2);
    let series = [1.061_405_4, -1.453_152_1, 1.421_413_8, -0.284_496_72, 0.254_829_6];
    let tail = 0.5 * polynomial(series, t) * t * bell;
    let below = if x < 0.0 { tail } else { 1.0 - tail };
    (below, bell * 0.398_942_3)
}

/// eˣ without a branch or a call, so that loops over it become vectors: 2 to the nearest whole power, times a
/// polynomial. Off by less than 3 · 10⁻⁷ of the value; 0 below −87.
fn exp(x: f32) -> f32 {
    /// Adding it rounds to whole numbers, which then stand in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let inside = x.clamp(-87.0, 88.0);
    let shifted = inside * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let rest = inside - whole * 0.693_359_4 + whole * 2.121_944_4e-4;
    let series =
        [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let p = polynomial(series, rest) * rest * rest + rest + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { p * power }
}

/// Coefficients of falling powers, Horner's way.
fn polynomial<const N: usize>(coefficients: [f32; N], x: f32) -> f32 {
    coefficients.into_iter().fold(0.0, |sum, coefficient| sum * x + coefficient)
}
