//! Tensors of the frozen language models: one table a key layout, one form for the builder.

use flamingo_ir::op::{Concat, Reshape, Slice};
use flamingo_ir::{Dim, Graph, GraphError, Tensor, ValueId};

use super::{KeyMap, rows};
use crate::config::{Architecture, Family, LanguageConfig, ModelConfig, PositionConfig};
use crate::source::Binder;

/// A weight [n, k] with its bias [n], if it has one.
pub(super) type Affine = (ValueId, Option<ValueId>);

/// Tensors of one decoder layer.
pub(super) struct BlockWeights {
    /// Scale, and bias where the model has one.
    pub(super) attention_norm: Vec<ValueId>,
    pub(super) qkv: [Affine; 3],
    /// Scales of the full-width q and k norms (MPT-1B).
    pub(super) qk_norm: Option<[ValueId; 2]>,
    pub(super) output: Affine,
    /// Scale, and bias where the model has one.
    pub(super) mlp_norm: Vec<ValueId>,
    pub(super) gate: Option<Affine>,
    pub(super) up: Affine,
    pub(super) down: Affine,
}

/// Tensors of a language model.
pub(super) struct LanguageWeights {
    /// [vocabulary, width].
    pub(super) embedding: ValueId,
    /// Learnt positions [rows, width].
    pub(super) positions: Option<ValueId>,
    pub(super) blocks: Vec<BlockWeights>,
    pub(super) final_norm: Vec<ValueId>,
    /// [vocabulary, width].
    pub(super) head: ValueId,
}

impl LanguageWeights {
    pub(super) fn bind(
        graph: &mut Graph,
        binder: &mut Binder,
        keys: &dyn KeyMap,
        config: &ModelConfig,
    ) -> Result<LanguageWeights, GraphError> {
        let mut language = Language { graph, binder, keys, config: &config.language };
        let block = |language: &mut Language, layer: usize| match config.language.architecture {
            Architecture::MosaicGpt => language.mosaic_gpt(layer),
            Architecture::Mpt => language.mpt(layer),
            Architecture::GptNeox => language.gpt_neox(layer),
            Architecture::Llama => Ok(language.llama(layer)),
            Architecture::Opt => Ok(language.opt(layer)),
            Architecture::Palm => language.palm(layer),
        };
        let blocks: Result<Vec<BlockWeights>, GraphError> =
            (0..config.language.n_layers).map(|layer| block(&mut language, layer)).collect();
        let table = language.top();
        let embedding = language.vocabulary_rows(table.embedding, config.family)?;
        let head = match config.language.tied_head {
            true => {
                language.alias(table.head);
                embedding
            }
            false => language.vocabulary_rows(table.head, config.family)?,
        };
        let positions = language.position_table(table.positions);
        let final_norm = language.norm(table.final_norm);
        Ok(LanguageWeights { embedding, positions, blocks: blocks?, final_norm, head })
    }
}

/// Names of the tensors outside the layers.
struct Top {
    embedding: &'static str,
    head: &'static str,
    positions: &'static str,
    final_norm: &'static str,
}

struct Language<'g, 'b, 'p> {
    graph: &'g mut Graph,
    binder: &'b mut Binder<'p>,
    keys: &'b dyn KeyMap,
    config: &'b LanguageConfig,
}

impl Language<'_, '_, '_> {
    fn top(&self) -> Top {
        match self.config.architecture {
            Architecture::MosaicGpt => Top {
                embedding: "transformer.wte",
                head: "lm_head",
                positions: "transformer.wpe",
                final_norm: "transformer.ln_f",
            },
            Architecture::Mpt => Top {
                embedding: "transformer.wte",
                head: "lm_head",
                positions: "",
                final_norm: "transformer.norm_f",
            },
            Architecture::GptNeox => Top {
                embedding: "gpt_neox.embed_in",
                head: "embed_out",
                positions: "",
                final_norm: "gpt_neox.final_layer_norm",
            },
            Architecture::Llama => Top {
                embedding: "model.embed_tokens",
                head: "lm_head",
                positions: "",
                final_norm: "model.norm",
            },
            Architecture::Opt => Top {
                embedding: "model.decoder.embed_tokens",
                head: "lm_head",
                positions: "model.decoder.embed_positions",
                final_norm: "model.decoder.final_layer_norm",
            },
            Architecture::Palm => Top {
                embedding: "token_emb",
                head: "to_logits.1",
                positions: "",
                final_norm: "to_logits.0",
            },
        }
    }

    fn name(&self, key: &str) -> String {
        self.keys.language(self.binder, key)
    }

    fn weight(&mut self, key: &str, shape: &[usize]) -> ValueId {
        let name = self.name(key);
        self.binder.weight(self.graph, &name, shape)
    }

    fn alias(&mut self, key: &str) {
        let name = self.name(&format!("{key}.weight"));
        self.binder.alias(&name);
    }

    /// Scale, and bias if the file has one.
    fn norm(&mut self, key: &str) -> Vec<ValueId> {
        let width = self.config.width;
        let [scale, bias] = match self.config.architecture {
            Architecture::Palm => ["gamma", "beta"],
            _ => ["weight", "bias"],
        };
        let mut affine = vec![self.weight(&format!("{key}.{scale}"), &[width])];
        let bias = format!("{key}.{bias}");
        if self.binder.has(&self.name(&bias)) {
            affine.push(self.weight(&bias, &[width]));
        }
        affine
    }

    /// Weight [n, k], and bias if the file has one.
    fn affine(&mut self, key: &str, n: usize, k: usize) -> Affine {
        let weight = self.weight(&format!("{key}.weight"), &[n, k]);
        let bias = format!("{key}.bias");
        let bias = self.binder.has(&self.name(&bias)).then(|| self.weight(&bias, &[n]));
        (weight, bias)
    }

    /// The table `key` with as many rows as the vocabulary: rows that another tensor holds
    /// (IDEFICS) are appended, further rows that no file holds are zero (a head that was resized
    /// without being trained), rows beyond the vocabulary are cut.
    fn vocabulary_rows(&mut self, key: &str, family: Family) -> Result<ValueId, GraphError> {
        let LanguageConfig { vocabulary, width, .. } = *self.config;
        let name = self.name(&format!("{key}.weight"));
        let found = self.binder.shape(&name).and_then(|shape| shape.first().copied());
        let n_rows = found.unwrap_or(vocabulary);
        let table = self.binder.weight(self.graph, &name, &[n_rows, width]);
        if n_rows > vocabulary {
            return rows(self.graph, table, 0, vocabulary);
        }
        let missing = vocabulary - n_rows;
        if missing == 0 {
            return Ok(table);
        }
        let additional = match (family, key) {
            (Family::Idefics, "lm_head") => "lm_head.additional_fc.weight",
            (Family::Idefics, _) => "model.embed_tokens.additional_embedding.weight",
            (Family::OpenFlamingo | Family::Otter | Family::FlamingoPytorch, _) => "",
        };
        let rest = match additional {
            "" => {
                let zeros = Tensor::f32(&[missing, width], vec![0.0; missing * width]);
                let zeros = zeros.ok_or_else(|| GraphError::Structure {
                    graph: "decoder".into(),
                    reason: "vocabulary rows".into(),
                })?;
                self.graph.literal(zeros)
            }
            key => self.weight(key, &[missing, width]),
        };
        self.graph.add("vocabulary", Concat { axis: 0 }, &[table, rest])
    }

    fn position_table(&mut self, key: &str) -> Option<ValueId> {
        let PositionConfig::Learnt { offset } = self.config.position else { return None };
        let n_rows = self.config.max_context + offset;
        Some(self.weight(&format!("{key}.weight"), &[n_rows, self.config.width]))
    }

    /// Cuts q, k and v out of a fused weight [q; k; v].
    fn split_qkv(&mut self, (weight, bias): Affine) -> Result<[Affine; 3], GraphError> {
        let LanguageConfig { n_heads, n_kv_heads, head_dim, .. } = *self.config;
        let (q, kv) = (n_heads * head_dim, n_kv_heads * head_dim);
        let bounds = [(0, q), (q, q + kv), (q + kv, q + 2 * kv)];
        let mut parts = Vec::with_capacity(3);
        for (start, end) in bounds {
            let weight = rows(self.graph, weight, start, end)?;
            let bias = bias.map(|bias| rows(self.graph, bias, start, end)).transpose()?;
            parts.push((weight, bias));
        }
        Ok([parts[0], parts[1], parts[2]])
    }

    fn mosaic_gpt(&mut self, layer: usize) -> Result<BlockWeights, GraphError> {
        let LanguageConfig { width: d, mlp_width: f, qk_norm, .. } = *self.config;
        let key = |part: &str| format!("transformer.blocks.{layer}.{part}");
        let fused = self.affine(&key("attn.Wqkv"), 3 * d, d);
        let qkv = self.split_qkv(fused)?;
        let scales = ["q", "k"].map(|side| key(&format!("attn.{side}_ln.weight")));
        Ok(BlockWeights {
            attention_norm: self.norm(&key("ln_1")),
            qkv,
            qk_norm: qk_norm.then(|| scales.map(|scale| self.weight(&scale, &[d]))),
            output: self.affine(&key("attn.out_proj"), d, d),
            mlp_norm: self.norm(&key("ln_2")),
            gate: None,
            up: self.affine(&key("mlp.mlp_up"), f, d),
            down: self.affine(&key("mlp.mlp_down"), d, f),
        })
    }

    fn mpt(&mut self, layer: usize) -> Result<BlockWeights, GraphError> {
        let LanguageConfig { width: d, mlp_width: f, .. } = *self.config;
        let key = |part: &str| format!("transformer.blocks.{layer}.{part}");
        let fused = self.affine(&key("attn.Wqkv"), 3 * d, d);
        Ok(BlockWeights {
            attention_norm: self.norm(&key("norm_1")),
            qkv: self.split_qkv(fused)?,
            qk_norm: None,
            output: self.affine(&key("attn.out_proj"), d, d),
            mlp_norm: self.norm(&key("norm_2")),
            gate: None,
            up: self.affine(&key("ffn.up_proj"), f, d),
            down: self.affine(&key("ffn.down_proj"), d, f),
        })
    }

    fn gpt_neox(&mut self, layer: usize) -> Result<BlockWeights, GraphError> {
        let LanguageConfig { width: d, mlp_width: f, .. } = *self.config;
        let key = |part: &str| format!("gpt_neox.layers.{layer}.{part}");
        let fused = self.affine(&key("attention.query_key_value"), 3 * d, d);
        Ok(BlockWeights {
            attention_norm: self.norm(&key("input_layernorm")),
            qkv: self.split_interleaved(fused)?,
            qk_norm: None,
            output: self.affine(&key("attention.dense"), d, d),
            mlp_norm: self.norm(&key("post_attention_layernorm")),
            gate: None,
            up: self.affine(&key("mlp.dense_h_to_4h"), f, d),
            down: self.affine(&key("mlp.dense_4h_to_h"), d, f),
        })
    }

    /// Cuts q, k and v out of GPT-NeoX's fused weight, whose rows are (head, q|k|v, dim).
    fn split_interleaved(&mut self, (weight, bias): Affine) -> Result<[Affine; 3], GraphError> {
        let LanguageConfig { n_heads, head_dim, .. } = *self.config;
        let mut parts = Vec::with_capacity(3);
        for part in 0..3 {
            let mut cut = |x: ValueId| -> Result<ValueId, GraphError> {
                let tail: Vec<Dim> = self.graph.fact(x).shape[1..].to_vec();
                let [h, d] = [n_heads, head_dim].map(Dim::from);
                let shape = [&[h.clone(), Dim::from(3), d.clone()], tail.as_slice()].concat();
                let split = self.graph.add("heads", Reshape { shape }, &[x])?;
                let slice = Slice { axis: 1, start: part, end: part + 1 };
                let own = self.graph.add("part", slice, &[split])?;
                let shape = [&[h * d], tail.as_slice()].concat();
                self.graph.add("rows", Reshape { shape }, &[own])
            };
            parts.push((cut(weight)?, bias.map(&mut cut).transpose()?));
        }
        Ok([parts[0], parts[1], parts[2]])
    }

    fn llama(&mut self, layer: usize) -> BlockWeights {
        let LanguageConfig { width: d, mlp_width: f, n_heads, n_kv_heads, head_dim, .. } =
            *self.config;
        let key = |part: &str| format!("model.layers.{layer}.{part}");
        let (q, kv) = (n_heads * head_dim, n_kv_heads * head_dim);
        BlockWeights {
            attention_norm: self.norm(&key("input_layernorm")),
            qkv: [
                self.affine(&key("self_attn.q_proj"), q, d),
                self.affine(&key("self_attn.k_proj"), kv, d),
                self.affine(&key("self_attn.v_proj"), kv, d),
            ],
            qk_norm: None,
            output: self.affine(&key("self_attn.o_proj"), d, q),
            mlp_norm: self.norm(&key("post_attention_layernorm")),
            gate: Some(self.affine(&key("mlp.gate_proj"), f, d)),
            up: self.affine(&key("mlp.up_proj"), f, d),
            down: self.affine(&key("mlp.down_proj"), d, f),
        }
    }

    fn opt(&mut self, layer: usize) -> BlockWeights {
        let LanguageConfig { width: d, mlp_width: f, .. } = *self.config;
        let key = |part: &str| format!("model.decoder.layers.{layer}.{part}");
        BlockWeights {
            attention_norm: self.norm(&key("self_attn_layer_norm")),
            qkv: ["q_proj", "k_proj", "v_proj"]
                .map(|part| self.affine(&key(&format!("self_attn.{part}")), d, d)),
            qk_norm: None,
            output: self.affine(&key("self_attn.out_proj"), d, d),
            mlp_norm: self.norm(&key("final_layer_norm")),
            gate: None,
            up: self.affine(&key("fc1"), f, d),
            down: self.affine(&key("fc2"), d, f),
        }
    }

    /// Attention and feed-forward read one norm, and one fused weight [q; k; v; up; gate].
    fn palm(&mut self, layer: usize) -> Result<BlockWeights, GraphError> {
        let LanguageConfig { width: d, mlp_width: f, n_heads, n_kv_heads, head_dim, .. } =
            *self.config;
        let key = |part: &str| format!("layers.{layer}.0.fn.{part}");
        let (q, kv) = (n_heads * head_dim, n_kv_heads * head_dim);
        let up = q + 2 * kv;
        let fused = self.weight(&key("fused_attn_ff_proj.weight"), &[up + 2 * f, d]);
        let norm = self.norm(&key("norm"));
        Ok(BlockWeights {
            attention_norm: norm.clone(),
            qkv: self.split_qkv((fused, None))?,
            qk_norm: None,
            output: self.affine(&key("attn_out"), d, q),
            mlp_norm: norm,
            gate: Some((rows(self.graph, fused, up + f, up + 2 * f)?, None)),
            up: (rows(self.graph, fused, up, up + f)?, None),
            down: self.affine(&key("ff_out.1"), d, f),
        })
    }
}
