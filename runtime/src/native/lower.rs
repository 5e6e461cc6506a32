//! From nodes to instructions: which kernel each op becomes.
#![forbid(unsafe_code)]

use flamingo_ir::op::{self, Op, PANEL_ROWS, Rounding, alibi_slopes, rotary_frequencies};
use flamingo_ir::{Constant, DType, Dim, Fact, Node, Tensor, ValueId};
use flamingo_kernels::{Activation, Convolution, PanelFormat, Position, SelfAttention};

use super::plan::{
    Action, Bound, CacheShape, Indices, MediaInput, PanelPlaces, Part, Planner, Refusal, Role,
    View, WeightOperand, product, refuse, rows_and_cols,
};

type Lowered = Result<(), Refusal>;

/// Operands of a node, taken in order.
struct Operands(std::vec::IntoIter<View>);

impl Operands {
    fn next(&mut self) -> Result<View, Refusal> {
        self.0.next().ok_or_else(|| refuse("an operand is missing"))
    }

    fn next_if(&mut self, is_present: bool) -> Result<Option<View>, Refusal> {
        is_present.then(|| self.next()).transpose()
    }
}

impl Planner<'_> {
    /// Appends what `node` becomes: instructions, or a view and nothing.
    pub(super) fn lower(&mut self, node: &Node) -> Lowered {
        match &node.op {
            Op::Linear(op) => self.linear(node, op),
            Op::FeedForward(op) => self.feed_forward(node, op),
            Op::UnpackPanels(op) => self.unpack_panels(node, op),
            Op::PackPanels(_) => Err(refuse("weights are packed when an artifact is made")),
            Op::Activate(op) => self.activate(node, op),
            Op::LayerNorm(op) => self.layer_norm(node, op),
            Op::RmsNorm(op) => self.rms_norm(node, op),
            Op::Attention(op) => self.attention(node, op.n_heads, op.scale),
            Op::ResamplerAttention(op) => self.attention(node, op.n_heads, op.scale),
            Op::SelfAttention(op) => self.self_attention(node, op),
            Op::CrossAttention(op) => self.cross_attention(node, op),
            Op::GatedCrossAttention(op) => self.gated_cross_attention(node, op),
            Op::Patches(op) => self.patches(node, op.patch_size),
            Op::Convolution(op) => self.convolution(node, op),
            Op::MeanPool(op) => self.mean_pool(node, op.window),
            Op::PictureMean(_) => self.picture_mean(node),
            Op::ChannelGate(op) => self.channel_gate(node, op.residual),
            Op::ClassEmbedding(_) => self.class_embedding(node),
            Op::FrameEmbedding(_) => self.frame_embedding(node),
            Op::MergeFrames(_) | Op::Reshape(_) => self.reshape(node),
            Op::ExpandBatch(_) => self.expand_batch(node),
            Op::Gather(_) => self.gather(node),
            Op::Add(_) if self.is_i64(node) => self.shift(node),
            Op::Add(_) => self.broadcast(node, |a, b, repeat| Action::Add { a, b, repeat }),
            Op::Mul(_) => self.broadcast(node, |a, b, _| Action::Mul { a, b }),
            Op::Slice(op) => self.split(node, op.axis, &[(op.start, op.end)]),
            Op::Split(op) => self.split(node, op.axis, &ranges(&op.sizes)),
            Op::Concat(op) => self.concat(node, op.axis),
            Op::MatMul(_)
            | Op::FusedMatMul(_)
            | Op::MatMulIntegerToFloat(_)
            | Op::MatMulNBits(_) => Err(no_kernel("`Linear`")),
            Op::PanelLinear(_) | Op::QuantisedLinear(_) => {
                Err(no_kernel("`UnpackPanels` and `Linear`"))
            }
            Op::QuantizeLinear(_) | Op::DequantizeLinear(_) => {
                Err(no_kernel("`Linear` with `rounding`, and `UnpackPanels`"))
            }
            Op::LayerNormalization(_) => Err(no_kernel("`LayerNorm`")),
            Op::Gelu(_)
            | Op::QuickGelu(_)
            | Op::Erf(_)
            | Op::Sigmoid(_)
            | Op::Tanh(_)
            | Op::Relu(_) => Err(no_kernel("`Activate`")),
            Op::RmsNormalization(_) | Op::SkipNormalization(_) => {
                Err(no_kernel("`LayerNorm` or `RmsNorm`"))
            }
            Op::Softmax(_)
            | Op::MultiHeadAttention(_)
            | Op::BiasedAttention(_)
            | Op::InPlaceSelfAttention(_)
            | Op::ScatterElements(_)
            | Op::TensorScatter(_)
            | Op::RotaryEmbeddingOfRows(_)
            | Op::ScaledDotProductAttention(_)
            | Op::RotaryEmbedding(_)
            | Op::Transpose(_) => {
                Err(no_kernel("`Attention`, `SelfAttention` or `CrossAttention`"))
            }
            Op::Conv(_) => Err(no_kernel("`Convolution`")),
            Op::AveragePool(_) => Err(no_kernel("`MeanPool`")),
            Op::GlobalAveragePool(_) => Err(no_kernel("`PictureMean`")),
            Op::Expand(_) => Err(no_kernel("`ExpandBatch`")),
            Op::Max(_) | Op::Abs(_) | Op::Floor(_) | Op::Round(_) | Op::ReduceMax(_) => {
                Err(no_kernel("`Linear` with `rounding`, or `UnpackPanels`"))
            }
            Op::Sub(_)
            | Op::Div(_)
            | Op::Neg(_)
            | Op::Sqrt(_)
            | Op::Cos(_)
            | Op::Sin(_)
            | Op::ReduceMean(_) => Err(no_kernel("`LayerNorm`, `RmsNorm` or `SelfAttention`")),
            Op::Equal(_) | Op::LessOrEqual(_) | Op::And(_) | Op::Where(_) | Op::Cast(_) => {
                Err(no_kernel("`SelfAttention` or `CrossAttention`"))
            }
        }
    }

    fn operands(&mut self, ids: &[ValueId]) -> Result<Operands, Refusal> {
        let views = ids.iter().map(|id| self.view(*id)).collect::<Result<Vec<View>, Refusal>>()?;
        Ok(Operands(views.into_iter()))
    }

    /// The weight of a linear whose activations are rounded as `rounding` says.
    fn weight(&mut self, id: ValueId, rounding: Rounding) -> Result<WeightOperand, Refusal> {
        let (operand, stored, needed) = match self.bound(id)? {
            Bound::Panels(panels) => {
                let needed = rounding_of(panels.format);
                (WeightOperand::Panels(panels), panels.format.to_string(), needed)
            }
            _ => (WeightOperand::Numbers(self.view(id)?), "f32".to_owned(), Rounding::None),
        };
        match rounding == needed {
            true => Ok(operand),
            false => Err(refuse(format!(
                "a weight of {stored} meets activations with `rounding` {}, not {}",
                needed.name(),
                rounding.name()
            ))),
        }
    }

    /// A weight in panels: no instruction, but an operand of those that read it.
    fn unpack_panels(&mut self, node: &Node, op: &op::UnpackPanels) -> Lowered {
        let format = match op.format {
            op::PanelFormat::F16 => PanelFormat::F16,
            op::PanelFormat::Bf16 => PanelFormat::Bf16,
            op::PanelFormat::Int8 => PanelFormat::Int8,
            op::PanelFormat::Int4 { block } => PanelFormat::Int4 { block },
        };
        if format.data_bytes(op.n, op.k).is_none() {
            return Err(refuse(format!("{format} panels of {} columns", op.k)));
        }
        let places = node.inputs.iter().map(|id| self.stored(*id));
        let places = places.collect::<Result<Vec<usize>, Refusal>>()?;
        let [data, ref scales @ ..] = places[..] else { return Err(refuse("no operands")) };
        let panels = PanelPlaces {
            format,
            n: op.n,
            k: op.k,
            data,
            row_scales: scales.first().copied(),
            block_scales: scales.get(1).copied(),
        };
        self.bind(node.outputs[0], Bound::Panels(panels));
        Ok(())
    }

    fn fact(&self, node: &Node, input: usize) -> Result<Fact, Refusal> {
        let id = node.inputs.get(input).ok_or_else(|| refuse("an operand is missing"))?;
        Ok(self.graph.fact(*id).clone())
    }

    /// Appends the instruction that computes the node's first output.
    fn finish(&mut self, node: &Node, action: Action) -> Lowered {
        let Some(output) = node.outputs.first() else { return Err(refuse("no output")) };
        let fact = self.graph.fact(*output).clone();
        let view = self.emit(&node.name, action, &fact);
        self.bind(*output, Bound::View(view));
        Ok(())
    }

    fn linear(&mut self, node: &Node, op: &op::Linear) -> Lowered {
        let [x, weight, rest @ ..] = &node.inputs[..] else { return Err(refuse("no operands")) };
        let mut operands = self.operands(rest)?;
        let action = Action::Linear {
            x: self.view(*x)?,
            weight: self.weight(*weight, op.rounding)?,
            bias: operands.next_if(op.bias)?,
            activation: op.activation.map(activation),
            residual: operands.next_if(op.residual)?,
            only_seen: false,
        };
        self.finish(node, action)
    }

    fn feed_forward(&mut self, node: &Node, op: &op::FeedForward) -> Lowered {
        let n_up = 2 + usize::from(op.up_bias);
        let [x, up, ..] = node.inputs[..] else { return Err(refuse("no operands")) };
        let Some((down, rest)) = node.inputs[n_up..].split_first() else {
            return Err(refuse("an operand is missing"));
        };
        let (x, up) = (self.view(x)?, self.weight(up, op.rounding)?);
        let up_bias = self.operands(&node.inputs[2..n_up])?.next_if(op.up_bias)?;
        let down = self.weight(*down, op.rounding)?;
        let mut operands = self.operands(rest)?;
        let (down_bias, residual) =
            (operands.next_if(op.down_bias)?, operands.next_if(op.residual)?);
        let activation = activation(op.activation);
        let mut hidden_fact = self.fact(node, 0)?;
        hidden_fact.shape.pop();
        let width = self.fact(node, 1)?.shape.first().and_then(Dim::known);
        let width = width.ok_or_else(|| refuse("the width of the weight is not known"))?;
        hidden_fact.shape.push(Dim::from(if op.gated { width / 2 } else { width }));
        if op.gated && matches!(up, WeightOperand::Panels(_)) && width % (2 * PANEL_ROWS) != 0 {
            return Err(refuse(format!("panels whose halves are not whole: {width} rows")));
        }
        let (weight, bias) = (up, up_bias);
        let first = match op.gated {
            true => Action::GatedLinear { x, weight, bias, activation },
            false => {
                let activation = Some(activation);
                Action::Linear { x, weight, bias, activation, residual: None, only_seen: false }
            }
        };
        let hidden = self.emit(&node.name, first, &hidden_fact);
        let second = Action::Linear {
            x: hidden,
            weight: down,
            bias: down_bias,
            activation: None,
            residual,
            only_seen: false,
        };
        self.finish(node, second)
    }

    fn activate(&mut self, node: &Node, op: &op::Activate) -> Lowered {
        let x = self.operands(&node.inputs)?.next()?;
        self.finish(node, Action::Activate { x, activation: activation(op.activation) })
    }

    fn layer_norm(&mut self, node: &Node, op: &op::LayerNorm) -> Lowered {
        let mut operands = self.operands(&node.inputs)?;
        let action = Action::Norm {
            x: operands.next()?,
            scale: operands.next_if(op.scale)?,
            bias: operands.next_if(op.bias)?,
            epsilon: op.epsilon,
            n_heads: op.n_heads,
            is_centred: true,
            only_seen: false,
        };
        self.finish(node, action)
    }

    fn rms_norm(&mut self, node: &Node, op: &op::RmsNorm) -> Lowered {
        let mut operands = self.operands(&node.inputs)?;
        let action = Action::Norm {
            x: operands.next()?,
            scale: operands.next_if(op.scale)?,
            bias: None,
            epsilon: op.epsilon,
            n_heads: op.n_heads,
            is_centred: false,
            only_seen: false,
        };
        self.finish(node, action)
    }

    /// `Attention` has one segment of keys and values, `ResamplerAttention` two.
    fn attention(&mut self, node: &Node, n_heads: usize, scale: f32) -> Lowered {
        let mut operands = self.operands(&node.inputs)?;
        let q = operands.next()?;
        let mut segments = Vec::new();
        while let Some(k) = operands.0.next() {
            segments.push([k, operands.next()?]);
        }
        let n_groups = self.fact(node, 0)?.shape.first().cloned().unwrap_or_default();
        let n_groups = self.plan.sizes.place(n_groups);
        self.finish(node, Action::Attention { q, segments, n_groups, n_heads, scale })
    }

    fn self_attention(&mut self, node: &Node, op: &op::SelfAttention) -> Lowered {
        let [q, k, v, past_k, past_v, positions, key_positions] = node.inputs[..] else {
            return Err(refuse("an operand is missing"));
        };
        let mut operands = self.operands(&[q, k, v])?;
        let (q, k, v) = (operands.next()?, operands.next()?, operands.next()?);
        let layer = match (self.input(past_k)?.role, self.input(past_v)?.role) {
            (Role::PastK(k_layer), Role::PastV(v_layer)) if k_layer == v_layer => k_layer,
            _ => return Err(refuse("expected inputs `past_k.N` and `past_v.N` of one layer")),
        };
        self.implied_input(positions, "positions")?;
        self.implied_input(key_positions, "key_positions")?;
        let shape = CacheShape { n_kv_heads: op.n_kv_heads, head_dim: op.head_dim };
        self.declare_cache(layer, shape)?;
        let [_, present_k, present_v] = node.outputs[..] else { return Err(refuse("3 outputs")) };
        self.bind(present_k, Bound::PresentK(layer));
        self.bind(present_v, Bound::PresentV(layer));
        let attributes = SelfAttention {
            n_heads: op.n_heads,
            n_kv_heads: op.n_kv_heads,
            head_dim: op.head_dim,
            scale: op.scale,
            position: position(op),
        };
        self.finish(node, Action::SelfAttention { q, k, v, layer, attributes })
    }

    /// Checks that a value is the input `name`, whose contents the contract fixes.
    fn implied_input(&mut self, id: ValueId, name: &str) -> Lowered {
        match self.bound(id)? {
            Bound::Input(place) if self.plan.inputs[place].name == name => Ok(()),
            _ => Err(refuse(format!("expected the input `{name}` itself"))),
        }
    }

    fn media_input(&mut self, id: ValueId) -> Result<MediaInput, Refusal> {
        match self.input(id)?.role {
            Role::Media(media) => Ok(media),
            _ => Err(refuse("expected an input `media_k.N` or `media_v.N`")),
        }
    }

    /// The inputs media k, media v, media time and media index of a cross-attention.
    fn media_inputs(&mut self, ids: &[ValueId]) -> Result<MediaInput, Refusal> {
        let [k, v, media_time, media_index] = ids else {
            return Err(refuse("an operand is missing"));
        };
        let (k, v) = (self.media_input(*k)?, self.media_input(*v)?);
        self.implied_input(*media_time, "media_time")?;
        self.input(*media_time)?;
        self.implied_input(*media_index, "media_index")?;
        match k.is_key && !v.is_key && k.block == v.block && k.width == v.width {
            true => Ok(k),
            false => Err(refuse("expected inputs `media_k.N` and `media_v.N` of one block")),
        }
    }

    fn cross_attention(&mut self, node: &Node, op: &op::CrossAttention) -> Lowered {
        let [q, media @ ..] = &node.inputs[..] else { return Err(refuse("no operands")) };
        let media = self.media_inputs(media)?;
        let q = self.view(*q)?;
        let (n_heads, scale) = (op.n_heads, op.scale);
        self.finish(node, Action::CrossAttention { q, media, n_heads, scale })
    }

    /// Query projection, optional norm, attention, output projection; the projections run over
    /// the rows that see a medium only.
    fn gated_cross_attention(&mut self, node: &Node, op: &op::GatedCrossAttention) -> Lowered {
        let n_query = 2 + usize::from(op.query_bias) + usize::from(op.query_norm.is_some());
        if node.inputs.len() != n_query + 6 {
            return Err(refuse("an operand is missing"));
        }
        let (query, rest) = node.inputs.split_at(n_query);
        let (media, output) = rest.split_at(4);
        let media = self.media_inputs(media)?;
        let mut operands = self.operands(&query[2..])?;
        let (x, weight) = (self.view(query[0])?, self.weight(query[1], op.rounding)?);
        let (output, residual) = (self.weight(output[0], op.rounding)?, self.view(output[1])?);
        let bias = operands.next_if(op.query_bias)?;
        let text_len = self.fact(node, 0)?.shape.first().cloned().unwrap_or_default();
        let fact = Fact::f32([text_len, Dim::from(media.width)]);
        let action =
            Action::Linear { x, weight, bias, activation: None, residual: None, only_seen: true };
        let mut q = self.emit(&node.name, action, &fact);
        if let Some(epsilon) = op.query_norm {
            let action = Action::Norm {
                x: q,
                scale: Some(operands.next()?),
                bias: None,
                epsilon,
                n_heads: op.n_heads,
                is_centred: false,
                only_seen: true,
            };
            q = self.emit(&node.name, action, &fact);
        }
        let action = Action::CrossAttention { q, media, n_heads: op.n_heads, scale: op.scale };
        let mixed = self.emit(&node.name, action, &fact);
        let action = Action::Linear {
            x: mixed,
            weight: output,
            bias: None,
            activation: None,
            residual: Some(residual),
            only_seen: true,
        };
        self.finish(node, action)
    }

    fn patches(&mut self, node: &Node, patch_size: usize) -> Lowered {
        let fact = self.fact(node, 0)?;
        let known = |axis: usize| fact.shape.get(axis).and_then(Dim::known);
        let (Some(channels), Some(height)) = (known(1), known(2)) else {
            return Err(refuse("the size of the pictures is not known"));
        };
        let x = self.view(node.inputs[0])?;
        self.finish(node, Action::Patches { x, channels, height, patch_size })
    }

    /// Height and width of the pictures `[n, H, W, c]` that a node reads.
    fn picture_size(&self, node: &Node) -> Result<[usize; 2], Refusal> {
        let shape = self.fact(node, 0)?.shape;
        match shape.get(1).and_then(Dim::known).zip(shape.get(2).and_then(Dim::known)) {
            Some((height, width)) => Ok([height, width]),
            None => Err(refuse("the size of the pictures is not known")),
        }
    }

    fn convolution(&mut self, node: &Node, op: &op::Convolution) -> Lowered {
        let size = self.picture_size(node)?;
        let mut operands = self.operands(&node.inputs)?;
        let action = Action::Convolution {
            x: operands.next()?,
            weight: operands.next()?,
            bias: operands.next_if(op.bias)?,
            activation: op.activation.map(activation),
            geometry: Convolution::same(size, op.window, op.stride, op.n_groups),
        };
        self.finish(node, action)
    }

    fn mean_pool(&mut self, node: &Node, side: usize) -> Lowered {
        let input = self.picture_size(node)?;
        let x = self.operands(&node.inputs)?.next()?;
        self.finish(node, Action::MeanPool { x, input, side })
    }

    fn picture_mean(&mut self, node: &Node) -> Lowered {
        let n_pixels = self.picture_size(node)?.iter().product();
        let x = self.operands(&node.inputs)?.next()?;
        self.finish(node, Action::PictureMean { x, n_pixels })
    }

    fn channel_gate(&mut self, node: &Node, residual: bool) -> Lowered {
        let n_pixels = self.picture_size(node)?.iter().product();
        let mut operands = self.operands(&node.inputs)?;
        let action = Action::ChannelGate {
            x: operands.next()?,
            gates: operands.next()?,
            gain: operands.next()?,
            residual: operands.next_if(residual)?,
            n_pixels,
        };
        self.finish(node, action)
    }

    /// The class token before each picture's tokens, then the positions added to all.
    fn class_embedding(&mut self, node: &Node) -> Lowered {
        let mut operands = self.operands(&node.inputs)?;
        let (x, class, positions) = (operands.next()?, operands.next()?, operands.next()?);
        let shape = self.fact(node, 0)?.shape;
        let [zero, one] = [0, 1].map(|size| self.plan.sizes.place(Dim::from(size)));
        let n_tokens = self.plan.sizes.place(shape[1].clone());
        let n_blocks = self.plan.sizes.place(shape[0].clone());
        let parts = vec![
            Part { view: class, first: zero, stride: zero, n_rows: one },
            Part { view: x, first: zero, stride: n_tokens, n_rows: n_tokens },
        ];
        let fact = self.graph.fact(node.outputs[0]).clone();
        let tokens = self.emit(&node.name, Action::Copy { n_blocks, parts }, &fact);
        self.finish(node, Action::Add { a: tokens, b: positions, repeat: one })
    }

    /// One mixed row a frame, added to all tokens of that frame.
    fn frame_embedding(&mut self, node: &Node) -> Lowered {
        let mut operands = self.operands(&node.inputs[..3])?;
        let (x, weights, table) = (operands.next()?, operands.next()?, operands.next()?);
        let (x_fact, weights_fact) = (self.fact(node, 0)?, self.fact(node, 1)?);
        let fact = Fact::f32([weights_fact.shape[0].clone(), x_fact.shape[2].clone()]);
        let rows = self.emit(&node.name, Action::Product { a: weights, b: table }, &fact);
        let repeat = self.plan.sizes.place(x_fact.shape[1].clone());
        self.finish(node, Action::Add { a: x, b: rows, repeat })
    }

    fn reshape(&mut self, node: &Node) -> Lowered {
        let x = self.view(node.inputs[0])?;
        let fact = self.graph.fact(node.outputs[0]).clone();
        let (rows, cols) = rows_and_cols(&fact.shape);
        let (rows, cols) = (self.plan.sizes.place(rows), self.plan.sizes.place(cols));
        if cols == x.cols {
            self.bind(node.outputs[0], Bound::View(View { rows, ..x }));
            return Ok(());
        }
        if self.is_dense(x) {
            let view = View { rows, cols, row_stride: cols, ..x };
            self.bind(node.outputs[0], Bound::View(view));
            return Ok(());
        }
        // Columns of a wider matrix cannot be cut differently in place.
        let [zero, one] = [0, 1].map(|size| self.plan.sizes.place(Dim::from(size)));
        let parts = vec![Part { view: x, first: zero, stride: zero, n_rows: x.rows }];
        self.finish(node, Action::Copy { n_blocks: one, parts })
    }

    fn is_dense(&self, view: View) -> bool {
        let is_one_row = self.plan.sizes.dim(view.rows).known().is_some_and(|rows| rows <= 1);
        is_one_row || view.row_stride == view.cols
    }

    fn expand_batch(&mut self, node: &Node) -> Lowered {
        let view = self.view(node.inputs[0])?;
        let n_blocks = self.fact(node, 1)?.shape.first().cloned().unwrap_or_default();
        let n_blocks = self.plan.sizes.place(n_blocks);
        let zero = self.plan.sizes.place(Dim::from(0));
        let parts = vec![Part { view, first: zero, stride: zero, n_rows: view.rows }];
        self.finish(node, Action::Copy { n_blocks, parts })
    }

    fn gather(&mut self, node: &Node) -> Lowered {
        let [table, indices] = node.inputs[..] else { return Err(refuse("two operands")) };
        if self.graph.fact(table).rank() != 2 {
            return Err(refuse("only rows of a table of rank 2 can be picked"));
        }
        let (table, n_rows) = match self.bound(table)? {
            Bound::Panels(panels) => {
                (WeightOperand::Panels(panels), self.plan.sizes.place(Dim::from(panels.n)))
            }
            _ => {
                let view = self.view(table)?;
                (WeightOperand::Numbers(view), view.rows)
            }
        };
        let indices = self.indices(indices)?;
        self.plan.inputs[indices.input].is_read = true;
        self.plan.limits.push((indices, n_rows));
        self.finish(node, Action::Gather { table, indices })
    }

    fn is_i64(&self, node: &Node) -> bool {
        node.outputs.first().is_some_and(|output| self.graph.fact(*output).dtype == DType::I64)
    }

    /// An index input plus a number: how learnt positions skip the first rows of their table.
    fn shift(&mut self, node: &Node) -> Lowered {
        let [left, right] = node.inputs[..] else { return Err(refuse("two operands")) };
        let number = |id: ValueId| match &self.graph.value(id).constant {
            Some(Constant::Literal(Tensor::I64(array))) if array.len() == 1 => {
                array.first().copied()
            }
            _ => None,
        };
        let (indices, number) = match (number(left), number(right)) {
            (None, Some(number)) => (left, number),
            (Some(number), None) => (right, number),
            _ => return Err(refuse("expected an i64 input plus one number")),
        };
        let indices = self.indices(indices)?;
        let offset = indices.offset.checked_add(number);
        let offset = offset.ok_or_else(|| refuse("the offset overflows"))?;
        self.bind(node.outputs[0], Bound::Shifted(Indices { offset, ..indices }));
        Ok(())
    }

    /// Sum or product where one operand has the shape of the result and the other is that shape
    /// or a trailing part of it.
    fn broadcast(
        &mut self,
        node: &Node,
        action: impl Fn(View, View, super::size::Size) -> Action,
    ) -> Lowered {
        let out = self.graph.fact(node.outputs[0]).clone();
        let (left, right) = (self.fact(node, 0)?, self.fact(node, 1)?);
        let mut operands = self.operands(&node.inputs)?;
        let (left_view, right_view) = (operands.next()?, operands.next()?);
        let (a, mut b) = match (left == out, right == out) {
            (true, _) if repeats(&right, &out) => (left_view, right_view),
            (_, true) if repeats(&left, &out) => (right_view, left_view),
            _ => return Err(refuse(format!("{left} and {right} do not repeat by whole rows"))),
        };
        let b_fact = if a == left_view { &right } else { &left };
        b.rows = self.plan.sizes.place(rows_and_cols(&b_fact.shape).0);
        let one = self.plan.sizes.place(Dim::from(1));
        self.finish(node, action(a, b, one))
    }

    /// Binds each output to positions `start..end` of an axis.
    fn split(&mut self, node: &Node, axis: usize, parts: &[(usize, usize)]) -> Lowered {
        let x = self.view(node.inputs[0])?;
        let shape = self.fact(node, 0)?.shape;
        for (output, (start, end)) in node.outputs.iter().zip(parts) {
            let view = match axis {
                _ if axis + 1 == shape.len() => self.columns(x, *start, *end),
                0 => self.leading_rows(x, &shape, *start, *end),
                _ => self.middle_rows(node, x, &shape, axis, (*start, *end), *output),
            };
            self.bind(*output, Bound::View(view));
        }
        Ok(())
    }

    fn columns(&mut self, x: View, start: usize, end: usize) -> View {
        let offset = self.plan.sizes.dim(x.offset).clone() + Dim::from(start);
        let (offset, cols) =
            (self.plan.sizes.place(offset), self.plan.sizes.place(Dim::from(end - start)));
        View { offset, cols, ..x }
    }

    fn leading_rows(&mut self, x: View, shape: &[Dim], start: usize, end: usize) -> View {
        let rows_each = product(&shape[1..shape.len() - 1]);
        let row_stride = self.plan.sizes.dim(x.row_stride).clone();
        let skipped = rows_each.clone() * row_stride * Dim::from(start);
        let offset = self.plan.sizes.dim(x.offset).clone() + skipped;
        let offset = self.plan.sizes.place(offset);
        View { offset, rows: self.plan.sizes.place(rows_each * Dim::from(end - start)), ..x }
    }

    /// A copy: rows that are apart by two strides are not a view.
    fn middle_rows(
        &mut self,
        node: &Node,
        x: View,
        shape: &[Dim],
        axis: usize,
        (start, end): (usize, usize),
        output: ValueId,
    ) -> View {
        let inner = product(&shape[axis + 1..shape.len() - 1]);
        let mut rows = |n: Dim| self.plan.sizes.place(n * inner.clone());
        let part = Part {
            view: x,
            first: rows(Dim::from(start)),
            stride: rows(shape[axis].clone()),
            n_rows: rows(Dim::from(end - start)),
        };
        let n_blocks = self.plan.sizes.place(product(&shape[..axis]));
        let fact = self.graph.fact(output).clone();
        self.emit(&node.name, Action::Copy { n_blocks, parts: vec![part] }, &fact)
    }

    fn concat(&mut self, node: &Node, axis: usize) -> Lowered {
        let views = self.operands(&node.inputs)?.0;
        let zero = self.plan.sizes.place(Dim::from(0));
        let mut parts = Vec::new();
        for (index, view) in views.enumerate() {
            let shape = self.fact(node, index)?.shape;
            let is_last = axis + 1 == shape.len();
            let n_rows =
                if is_last { Dim::from(1) } else { product(&shape[axis..shape.len() - 1]) };
            let n_rows = self.plan.sizes.place(n_rows);
            parts.push(Part { view, first: zero, stride: n_rows, n_rows });
        }
        let shape = self.fact(node, 0)?.shape;
        let n_blocks = self.plan.sizes.place(product(&shape[..axis]));
        self.finish(node, Action::Copy { n_blocks, parts })
    }
}

fn no_kernel(fused: &str) -> Refusal {
    refuse(format!("no kernel; fuse it into {fused}"))
}

/// What the kernels do to activations that meet a weight of this format.
fn rounding_of(format: PanelFormat) -> Rounding {
    match format {
        PanelFormat::F16 => Rounding::None,
        PanelFormat::Bf16 => Rounding::Bf16,
        PanelFormat::Int8 | PanelFormat::Int4 { .. } => Rounding::Int8,
    }
}

/// Consecutive ranges of the given sizes.
fn ranges(sizes: &[usize]) -> Vec<(usize, usize)> {
    let mut end = 0;
    let range = |size: &usize| {
        end += size;
        (end - size, end)
    };
    sizes.iter().map(range).collect()
}

/// Whether `part` without leading ones is a trailing part of `whole` that has its last axis.
fn repeats(part: &Fact, whole: &Fact) -> bool {
    let one = Dim::from(1);
    let n_ones = part.shape.iter().take_while(|dim| **dim == one).count();
    let trailing = &part.shape[n_ones.min(part.rank().saturating_sub(1))..];
    part == whole || (!trailing.is_empty() && whole.shape.ends_with(trailing))
}

fn activation(activation: op::Activation) -> Activation {
    match activation {
        op::Activation::Gelu => Activation::Gelu,
        op::Activation::GeluTanh => Activation::GeluTanh,
        op::Activation::QuickGelu => Activation::QuickGelu,
        op::Activation::Relu => Activation::Relu,
        op::Activation::SquaredRelu => Activation::SquaredRelu,
        op::Activation::Silu => Activation::Silu,
    }
}

fn position(op: &op::SelfAttention) -> Position {
    match op.position {
        op::Position::None => Position::None,
        op::Position::Alibi { bias_max } => {
            Position::Alibi { slopes: alibi_slopes(op.n_heads, bias_max) }
        }
        op::Position::Rotary { n_dims, theta } => {
            Position::Rotary { n_dims, inverse_frequencies: rotary_frequencies(n_dims, theta) }
        }
    }
}
