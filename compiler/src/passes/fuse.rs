//! Fusions: neighbouring nodes become one function that a kernel runs at once.

use flamingo_ir::op::Concat;
use flamingo_ir::op::{
    Activation, ChannelGate, Convolution, FeedForward, GatedCrossAttention, Linear, Op,
    ResamplerAttention, Rounding,
};
use flamingo_ir::{GraphError, Node, Patch, ValueId};

use super::Context;

/// The linear that computes `value`, if `value` has one reader.
fn linear_before(patch: &Patch, value: ValueId) -> Option<(Node, Linear)> {
    if !patch.is_read_once(value) || patch.is_build_time(value) {
        return None;
    }
    let node = patch.producer(value)?;
    match &node.op {
        Op::Linear(linear) => Some((node.clone(), linear.clone())),
        _ => None,
    }
}

/// The node that computes `value`, on the device and for one reader.
fn before(patch: &Patch, value: ValueId) -> Option<Node> {
    let is_free = patch.is_read_once(value) && !patch.is_build_time(value);
    patch.producer(value).filter(|_| is_free)
}

/// The op followed by an activation, if it can do both.
fn activated(op: &Op, activation: Activation) -> Option<Op> {
    let activation = Some(activation);
    match op {
        Op::Linear(op) if op.activation.is_none() && !op.residual => {
            Some(Linear { activation, ..op.clone() }.into())
        }
        Op::Convolution(op) if op.activation.is_none() => {
            Some(Convolution { activation, ..op.clone() }.into())
        }
        _ => None,
    }
}

/// Activate(Linear(x)) → Linear with activation; the same of convolutions.
pub(super) fn activations(patch: &mut Patch, _context: &Context) -> Result<(), GraphError> {
    for node in patch.nodes() {
        let Op::Activate(activate) = &node.op else { continue };
        let Some(before) = before(patch, node.inputs[0]) else { continue };
        let Some(op) = activated(&before.op, activate.activation) else { continue };
        let new = patch.add(&before.name, op, &before.inputs)?;
        patch.replace(node.outputs[0], new)?;
    }
    Ok(())
}

/// The op with a residual, if it can have one.
fn with_residual(op: &Op) -> Option<Op> {
    match op {
        Op::Linear(op) if !op.residual => Some(Linear { residual: true, ..op.clone() }.into()),
        Op::ChannelGate(ChannelGate { residual: false }) => {
            Some(ChannelGate { residual: true }.into())
        }
        _ => None,
    }
}

/// x + Linear(y) → Linear with residual x; the same of gated channels.
pub(super) fn residuals(patch: &mut Patch, _context: &Context) -> Result<(), GraphError> {
    for node in patch.nodes() {
        let (Op::Add(_), &[left, right]) = (&node.op, node.inputs.as_slice()) else { continue };
        for (residual, value) in [(left, right), (right, left)] {
            let Some(before) = before(patch, value) else { continue };
            let same_shape = patch.fact(residual) == patch.fact(value);
            if !same_shape || patch.is_build_time(residual) {
                continue;
            }
            let Some(op) = with_residual(&before.op) else { continue };
            let inputs = [before.inputs.as_slice(), &[residual]].concat();
            let new = patch.add(&before.name, op, &inputs)?;
            patch.replace(node.outputs[0], new)?;
            break;
        }
    }
    Ok(())
}

/// Linear with activation, then Linear → FeedForward; also act(Linear) · Linear, then Linear.
pub(super) fn feed_forwards(patch: &mut Patch, _context: &Context) -> Result<(), GraphError> {
    for node in patch.nodes() {
        let Op::Linear(down) = &node.op else { continue };
        let hidden = node.inputs[0];
        if down.activation.is_some() || !patch.is_read_once(hidden) || patch.is_build_time(hidden) {
            continue;
        }
        let Some(before) = patch.producer(hidden) else { continue };
        let up = match &before.op {
            Op::Linear(up) => plain_up(&before, up),
            Op::Mul(_) => gated_up(patch, &before)?,
            _ => None,
        };
        let Some(up) = up else { continue };
        let op = FeedForward {
            activation: up.activation,
            gated: up.gated,
            up_bias: up.bias.is_some(),
            down_bias: down.bias,
            residual: down.residual,
            rounding: Rounding::None,
        };
        let mut inputs = vec![up.x, up.weight];
        inputs.extend(up.bias);
        inputs.extend(&node.inputs[1..]);
        let name = node.name.strip_suffix(".down").unwrap_or(&node.name);
        let new = patch.add(name, op, &inputs)?;
        patch.replace(node.outputs[0], new)?;
    }
    Ok(())
}

struct Up {
    x: ValueId,
    weight: ValueId,
    bias: Option<ValueId>,
    activation: Activation,
    gated: bool,
}

fn plain_up(node: &Node, linear: &Linear) -> Option<Up> {
    let activation = linear.activation.filter(|_| !linear.residual)?;
    let bias = linear.bias.then(|| node.inputs[2]);
    Some(Up { x: node.inputs[0], weight: node.inputs[1], bias, activation, gated: false })
}

/// The two linears of act(x Gᵀ) · x Uᵀ, as one weight [G; U].
fn gated_up(patch: &mut Patch, product: &Node) -> Result<Option<Up>, GraphError> {
    let &[left, right] = product.inputs.as_slice() else { return Ok(None) };
    for (gate, up) in [(left, right), (right, left)] {
        let (Some((gate, gate_op)), Some((up, up_op))) =
            (linear_before(patch, gate), linear_before(patch, up))
        else {
            continue;
        };
        let fits = gate.inputs[0] == up.inputs[0]
            && up_op.activation.is_none()
            && gate_op.bias == up_op.bias
            && !gate_op.residual
            && !up_op.residual;
        let (Some(activation), true) = (gate_op.activation, fits) else { continue };
        let weight =
            patch.add("gate_and_up", Concat { axis: 0 }, &[gate.inputs[1], up.inputs[1]])?;
        let bias = match up_op.bias {
            true => Some(patch.add(
                "gate_and_up_bias",
                Concat { axis: 0 },
                &[gate.inputs[2], up.inputs[2]],
            )?),
            false => None,
        };
        return Ok(Some(Up { x: up.inputs[0], weight, bias, activation, gated: true }));
    }
    Ok(None)
}

/// Attention over concatenated media and latents → ResamplerAttention of the pieces.
pub(super) fn resampler_attention(patch: &mut Patch, _context: &Context) -> Result<(), GraphError> {
    for node in patch.nodes() {
        let Op::Attention(attention) = &node.op else { continue };
        let pieces = |value: ValueId| {
            let before = patch.producer(value).filter(|_| patch.is_read_once(value))?;
            let joined = matches!(&before.op, Op::Concat(concat) if concat.axis == 1);
            (joined && before.inputs.len() == 2).then(|| [before.inputs[0], before.inputs[1]])
        };
        let (Some(k), Some(v)) = (pieces(node.inputs[1]), pieces(node.inputs[2])) else { continue };
        let op = ResamplerAttention { n_heads: attention.n_heads, scale: attention.scale };
        let new = patch.add(&node.name, op, &[node.inputs[0], k[0], v[0], k[1], v[1]])?;
        patch.replace(node.outputs[0], new)?;
    }
    Ok(())
}

/// Query linear (and per-head norm), CrossAttention, output linear with residual →
/// GatedCrossAttention.
pub(super) fn gated_cross_attention(
    patch: &mut Patch,
    _context: &Context,
) -> Result<(), GraphError> {
    for node in patch.nodes() {
        let Op::Linear(output) = &node.op else { continue };
        let plain = output.residual && !output.bias && output.activation.is_none();
        let Some(cross) = patch.producer(node.inputs[0]) else { continue };
        let Op::CrossAttention(attention) = &cross.op else { continue };
        if !plain || !patch.is_read_once(node.inputs[0]) {
            continue;
        }
        let Some(query) = query_of(patch, cross.inputs[0]) else { continue };
        let op = GatedCrossAttention {
            n_heads: attention.n_heads,
            scale: attention.scale,
            query_bias: query.linear.bias,
            query_norm: query.norm.map(|(epsilon, _)| epsilon),
            rounding: Rounding::None,
        };
        let mut inputs = query.inputs;
        inputs.extend(query.norm.map(|(_, scale)| scale));
        inputs.extend(&cross.inputs[1..]);
        inputs.extend(&node.inputs[1..]);
        let name = node.name.strip_suffix(".output").unwrap_or(&node.name);
        let new = patch.add(name, op, &inputs)?;
        patch.replace(node.outputs[0], new)?;
    }
    Ok(())
}

struct Query {
    linear: Linear,
    inputs: Vec<ValueId>,
    /// ε and scale of the per-head RMS norm.
    norm: Option<(f32, ValueId)>,
}

fn query_of(patch: &Patch, value: ValueId) -> Option<Query> {
    let before = patch.producer(value).filter(|_| patch.is_read_once(value))?;
    let (linear_value, norm) = match &before.op {
        Op::RmsNorm(norm) if norm.scale => {
            (before.inputs[0], Some((norm.epsilon, before.inputs[1])))
        }
        _ => (value, None),
    };
    let (node, linear) = linear_before(patch, linear_value)?;
    let plain = linear.activation.is_none() && !linear.residual;
    plain.then_some(Query { linear, inputs: node.inputs, norm })
}
