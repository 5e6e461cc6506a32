//! The decoder graph: new tokens, keys and values of media and of past tokens → logits.

use flamingo_ir::op::{
    Activate, Add, CrossAttention, Gather, LayerNorm, Mul, RmsNorm, SelfAttention, Tanh,
};
use flamingo_ir::{DType, Dim, Fact, Graph, GraphError, Tensor, ValueId};

use super::language::{BlockWeights, LanguageWeights};
use super::media::rms_epsilon;
use super::{GatedKey, KeyMap, linear, reshaped};
use crate::config::{Family, ModelConfig, Normalisation, PositionConfig};
use crate::source::Binder;

/// Builds the decoder graph, for one sequence.
///
/// Inputs: `input_ids` i64 [text_len]; `positions` i64 [text_len]; `key_positions` i64
/// [past_len + text_len]; `media_time` i64 [text_len] (0: no medium, t: the t-th); `media_index`
/// i64 [n_media] (1, 2, …); `logit_rows` i64 [n_logits], the tokens whose logits are wanted;
/// `media_k.{i}`, `media_v.{i}` f32 [n_media, n_latents, inner] of the i-th gated block;
/// `past_k.{l}`, `past_v.{l}` f32 [n_kv_heads, past_len, head_dim] of layer l.
/// Outputs: `logits` f32 [n_logits, vocabulary], `present_k.{l}`, `present_v.{l}`.
pub(crate) fn build_decoder(
    binder: &mut Binder,
    keys: &dyn KeyMap,
    config: &ModelConfig,
) -> Result<Graph, GraphError> {
    let mut graph = Graph::new("decoder");
    let inputs = Inputs::declare(&mut graph, config);
    let weights = LanguageWeights::bind(&mut graph, binder, keys, config)?;
    let mut decoder = Decoder { graph: &mut graph, binder, keys, config, inputs };
    let mut x = decoder.embed(&weights)?;
    let mut presents = Vec::with_capacity(config.language.n_layers);
    for layer in 0..=weights.blocks.len() {
        if let Some(index) = config.cross_attention.layers.iter().position(|l| *l == layer) {
            x = decoder.gated_attention(index, layer, x)?;
            x = decoder.gated_feed_forward(index, layer, x)?;
        }
        let Some(block) = weights.blocks.get(layer) else { continue };
        let present;
        (x, present) = decoder.block(layer, block, x)?;
        presents.push(present);
    }
    let x = decoder.norm("decoder.norm", x, &weights.final_norm)?;
    let rows = decoder.graph.add("decoder.logit_rows", Gather, &[x, decoder.inputs.logit_rows])?;
    let logits = linear(decoder.graph, "decoder.head", rows, weights.head, None)?;
    graph.output("logits", logits);
    for (layer, [k, v]) in presents.into_iter().enumerate() {
        graph.output(&format!("present_k.{layer}"), k);
        graph.output(&format!("present_v.{layer}"), v);
    }
    Ok(graph)
}

struct Inputs {
    input_ids: ValueId,
    positions: ValueId,
    key_positions: ValueId,
    media_time: ValueId,
    media_index: ValueId,
    logit_rows: ValueId,
    media: Vec<[ValueId; 2]>,
    past: Vec<[ValueId; 2]>,
}

impl Inputs {
    fn declare(graph: &mut Graph, config: &ModelConfig) -> Inputs {
        let symbol = Dim::symbol;
        let (language, cross) = (&config.language, &config.cross_attention);
        let total_len = symbol("past_len") + symbol("text_len");
        let n_latents = Dim::from(config.n_latents());
        let inner = Dim::from(cross.n_heads * cross.head_dim);
        let media = Fact::f32([symbol("n_media"), n_latents, inner]);
        let (heads, head_dim) = (Dim::from(language.n_kv_heads), Dim::from(language.head_dim));
        let past = Fact::f32([heads, symbol("past_len"), head_dim]);
        let pair = |graph: &mut Graph, name: &str, index: usize, fact: &Fact| {
            ["k", "v"].map(|side| graph.input(&format!("{name}_{side}.{index}"), fact.clone()))
        };
        Inputs {
            input_ids: graph.input("input_ids", Fact::i64([symbol("text_len")])),
            positions: graph.input("positions", Fact::i64([symbol("text_len")])),
            key_positions: graph.input("key_positions", Fact::i64([total_len])),
            media_time: graph.input("media_time", Fact::i64([symbol("text_len")])),
            media_index: graph.input("media_index", Fact::i64([symbol("n_media")])),
            logit_rows: graph.input("logit_rows", Fact::new(DType::I64, [symbol("n_logits")])),
            media: (0..cross.layers.len()).map(|i| pair(graph, "media", i, &media)).collect(),
            past: (0..language.n_layers).map(|l| pair(graph, "past", l, &past)).collect(),
        }
    }
}

struct Decoder<'g, 'b, 'p> {
    graph: &'g mut Graph,
    binder: &'b mut Binder<'p>,
    keys: &'b dyn KeyMap,
    config: &'b ModelConfig,
    inputs: Inputs,
}

impl Decoder<'_, '_, '_> {
    fn embed(&mut self, weights: &LanguageWeights) -> Result<ValueId, GraphError> {
        let ids = self.inputs.input_ids;
        let x = self.graph.add("decoder.embedding", Gather, &[weights.embedding, ids])?;
        let (Some(table), PositionConfig::Learnt { offset }) =
            (weights.positions, self.config.language.position)
        else {
            return Ok(x);
        };
        let offset = i64::try_from(offset).expect("a row offset is small");
        let offset = self.graph.literal(Tensor::scalar_i64(offset));
        let rows =
            self.graph.add("decoder.position_rows", Add, &[self.inputs.positions, offset])?;
        let rows = self.graph.add("decoder.position_embedding", Gather, &[table, rows])?;
        self.graph.add("decoder.embedded", Add, &[x, rows])
    }

    /// The language model's norm: scale, and bias where it has one.
    fn norm(&mut self, name: &str, x: ValueId, affine: &[ValueId]) -> Result<ValueId, GraphError> {
        let inputs = [&[x], affine].concat();
        match self.config.language.normalisation {
            Normalisation::Layer { epsilon } => {
                let bias = affine.len() == 2;
                self.graph.add(name, LayerNorm { epsilon, n_heads: 1, scale: true, bias }, &inputs)
            }
            Normalisation::Rms { epsilon } => {
                self.graph.add(name, RmsNorm { epsilon, n_heads: 1, scale: true }, &inputs)
            }
        }
    }

    /// One frozen decoder layer; returns x and the present keys and values.
    fn block(
        &mut self,
        layer: usize,
        block: &BlockWeights,
        x: ValueId,
    ) -> Result<(ValueId, [ValueId; 2]), GraphError> {
        let name = |part: &str| format!("decoder.{layer}.{part}");
        let y = self.norm(&name("attention.norm"), x, &block.attention_norm)?;
        let (attended, present) = self.self_attention(layer, block, y)?;
        let after = self.graph.add(&name("attention.residual"), Add, &[x, attended])?;
        let mlp_input = if self.config.language.parallel_residual { x } else { after };
        let y = self.norm(&name("mlp.norm"), mlp_input, &block.mlp_norm)?;
        let out = self.feed_forward(layer, block, y)?;
        Ok((self.graph.add(&name("mlp.residual"), Add, &[after, out])?, present))
    }

    fn self_attention(
        &mut self,
        layer: usize,
        block: &BlockWeights,
        y: ValueId,
    ) -> Result<(ValueId, [ValueId; 2]), GraphError> {
        let language = &self.config.language;
        let name = |part: &str| format!("decoder.{layer}.attention.{part}");
        let mut project = |part: &str, (weight, bias): (ValueId, Option<ValueId>)| {
            linear(self.graph, &name(part), y, weight, bias)
        };
        let mut q = project("query", block.qkv[0])?;
        let mut k = project("key", block.qkv[1])?;
        let v = project("value", block.qkv[2])?;
        if let Some([q_scale, k_scale]) = block.qk_norm {
            let Normalisation::Layer { epsilon } = language.normalisation else {
                return Err(flamingo_ir::GraphError::Structure {
                    graph: "decoder".into(),
                    reason: "q/k norm needs layer norms".into(),
                });
            };
            let op = LayerNorm { epsilon, n_heads: 1, scale: true, bias: false };
            q = self.graph.add(&name("query_norm"), op.clone(), &[q, q_scale])?;
            k = self.graph.add(&name("key_norm"), op, &[k, k_scale])?;
        }
        let op = SelfAttention {
            n_heads: language.n_heads,
            n_kv_heads: language.n_kv_heads,
            head_dim: language.head_dim,
            scale: language.attention_scale,
            position: language.position.in_attention(),
        };
        let [past_k, past_v] = self.inputs.past[layer];
        let inputs = [q, k, v, past_k, past_v, self.inputs.positions, self.inputs.key_positions];
        let outputs = self.graph.add_many(&name("attention"), op, &inputs)?;
        let (weight, bias) = block.output;
        let out = linear(self.graph, &name("output"), outputs[0], weight, bias)?;
        Ok((out, [outputs[1], outputs[2]]))
    }

    fn feed_forward(
        &mut self,
        layer: usize,
        block: &BlockWeights,
        y: ValueId,
    ) -> Result<ValueId, GraphError> {
        let activation = self.config.language.activation;
        let name = |part: &str| format!("decoder.{layer}.mlp.{part}");
        let (up, up_bias) = block.up;
        let mut hidden = linear(self.graph, &name("up"), y, up, up_bias)?;
        match block.gate {
            None => {
                hidden = self.graph.add(&name("activation"), Activate { activation }, &[hidden])?;
            }
            Some((gate, gate_bias)) => {
                let gate = linear(self.graph, &name("gate"), y, gate, gate_bias)?;
                let gate = self.graph.add(&name("activation"), Activate { activation }, &[gate])?;
                hidden = self.graph.add(&name("gated"), Mul, &[gate, hidden])?;
            }
        }
        let (down, down_bias) = block.down;
        linear(self.graph, &name("down"), hidden, down, down_bias)
    }

    fn gated_weight(&mut self, at: (usize, usize), key: GatedKey, shape: &[usize]) -> ValueId {
        let name = self.keys.gated(at.0, at.1, key);
        self.binder.weight(self.graph, &name, shape)
    }

    /// Norm of a gated block: layer norm in OpenFlamingo, the language model's RMS norm in IDEFICS.
    fn gated_norm(
        &mut self,
        name: &str,
        at: (usize, usize),
        key: impl Fn(&'static str) -> GatedKey,
        x: ValueId,
    ) -> Result<ValueId, GraphError> {
        let width = self.config.language.width;
        let scale = self.gated_weight(at, key("weight"), &[width]);
        match self.config.family {
            Family::Idefics => {
                let epsilon = rms_epsilon(self.config);
                self.graph.add(name, RmsNorm { epsilon, n_heads: 1, scale: true }, &[x, scale])
            }
            Family::OpenFlamingo | Family::Otter | Family::FlamingoPytorch => {
                let bias = self.gated_weight(at, key("bias"), &[width]);
                let op = LayerNorm { epsilon: 1e-5, n_heads: 1, scale: true, bias: true };
                self.graph.add(name, op, &[x, scale, bias])
            }
        }
    }

    /// x + tanh(gate) · y; the gate is one number, or one per feature (IDEFICS `vector`).
    fn gate(
        &mut self,
        name: &str,
        at: (usize, usize),
        key: GatedKey,
        [x, y]: [ValueId; 2],
    ) -> Result<ValueId, GraphError> {
        let width = self.config.language.width;
        let vector = self.binder.shape(&self.keys.gated(at.0, at.1, key)).map(<[usize]>::len);
        let mut gate = match vector {
            Some(3) => self.gated_weight(at, key, &[1, 1, width]),
            _ => self.gated_weight(at, key, &[1]),
        };
        if vector == Some(3) {
            gate = reshaped(self.graph, gate, &[width])?;
        }
        let gate = self.graph.add(&format!("{name}.gate"), Tanh, &[gate])?;
        let gated = self.graph.add(&format!("{name}.gated"), Mul, &[y, gate])?;
        self.graph.add(&format!("{name}.residual"), Add, &[x, gated])
    }

    fn gated_attention(
        &mut self,
        index: usize,
        layer: usize,
        x: ValueId,
    ) -> Result<ValueId, GraphError> {
        let cross = &self.config.cross_attention;
        let (n_heads, head_dim, qk_norm) = (cross.n_heads, cross.head_dim, cross.qk_norm);
        let (inner, width) = (n_heads * head_dim, self.config.language.width);
        let at = (index, layer);
        let block = format!("decoder.{layer}.cross_attention");
        let name = |part: &str| format!("{block}.{part}");
        let y = self.gated_norm(&name("norm"), at, GatedKey::AttentionNorm, x)?;
        let weight = self.gated_weight(at, GatedKey::Query, &[inner, width]);
        let mut q = linear(self.graph, &name("query"), y, weight, None)?;
        if qk_norm {
            let scale = self.gated_weight(at, GatedKey::QueryNorm, &[head_dim]);
            let op = RmsNorm { epsilon: rms_epsilon(self.config), n_heads, scale: true };
            q = self.graph.add(&name("query_norm"), op, &[q, scale])?;
        }
        let [k, v] = self.inputs.media[index];
        let op = CrossAttention { n_heads, scale: 1.0 / (head_dim as f32).sqrt() };
        let inputs = [q, k, v, self.inputs.media_time, self.inputs.media_index];
        let mixed = self.graph.add(&name("attention"), op, &inputs)?;
        let weight = self.gated_weight(at, GatedKey::Output, &[width, inner]);
        let out = linear(self.graph, &name("output"), mixed, weight, None)?;
        self.gate(&block, at, GatedKey::AttentionGate, [x, out])
    }

    fn gated_feed_forward(
        &mut self,
        index: usize,
        layer: usize,
        x: ValueId,
    ) -> Result<ValueId, GraphError> {
        let width = self.config.language.width;
        let at = (index, layer);
        let block = format!("decoder.{layer}.cross_mlp");
        let name = |part: &str| format!("{block}.{part}");
        let y = self.gated_norm(&name("norm"), at, GatedKey::MlpNorm, x)?;
        let swiglu = self.config.family == Family::Idefics;
        let mlp_width = if swiglu { self.config.language.mlp_width } else { 4 * width };
        let up = self.gated_weight(at, GatedKey::Up, &[mlp_width, width]);
        let mut hidden = linear(self.graph, &name("up"), y, up, None)?;
        let activation = match swiglu {
            true => self.config.language.activation,
            false => flamingo_ir::op::Activation::Gelu,
        };
        if swiglu {
            let gate = self.gated_weight(at, GatedKey::Gate, &[mlp_width, width]);
            let gate = linear(self.graph, &name("swiglu_gate"), y, gate, None)?;
            let gate = self.graph.add(&name("activation"), Activate { activation }, &[gate])?;
            hidden = self.graph.add(&name("swiglu"), Mul, &[gate, hidden])?;
        } else {
            hidden = self.graph.add(&name("activation"), Activate { activation }, &[hidden])?;
        }
        let down = self.gated_weight(at, GatedKey::Down, &[width, mlp_width]);
        let out = linear(self.graph, &name("down"), hidden, down, None)?;
        self.gate(&block, at, GatedKey::MlpGate, [x, out])
    }
}
