//! Lists of tensors to be made: name, shape, and what kind of weight it is.

/// What a tensor is for, hence how its values are spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fill {
    /// Matrix or convolution, output first; spread by its fan-in.
    Linear,
    /// Matrix whose rows write the outliers into the residual stream, if there are any; else as `Linear`.
    OutlierWriter {
        /// Whether it reads a gated feed-forward's hidden channels, whose mean is 0.
        is_gated: bool,
    },
    /// Lookup table.
    Embedding,
    /// Scale of a norm, around 1.
    NormScale,
    /// Scale of a norm that reads the residual stream after outliers were written.
    OutlierReader,
    /// Scale of the norm before the head; with outliers it makes tokens as unlike as in trained models.
    FinalNormScale {
        /// Whether the head is the embedding.
        is_tied: bool,
    },
    /// Added vector, around 0.
    Bias,
    /// Gate of a cross-attention block, before its `tanh`.
    Gate,
    /// Learnt queries of the resampler.
    Latents,
}

/// How widely each kind of weight is spread. A forward pass stays finite with either, and no
/// norm, bias or gate is so close to 1 or 0 that leaving it out would go unnoticed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    /// Standard deviation of a linear weight × √fan-in.
    pub(super) linear_gain: f32,
    /// Standard deviation of an embedding.
    pub(super) embedding: f32,
    /// Mean and standard deviation of a gate.
    pub(super) gate: (f32, f32),
    /// Whether a few channels of the residual stream are far larger than the others.
    pub(super) outliers: bool,
}

impl Spread {
    /// For models of a few layers: every part moves the logits.
    pub(super) const TINY: Spread =
        Spread { linear_gain: 1.3, embedding: 0.15, gate: (0.6, 0.3), outliers: false };
    /// For full sizes: what initialisation gives (about 0.02 at width 2048).
    pub(super) const LARGE: Spread =
        Spread { linear_gain: 0.9, embedding: 0.02, gate: (0.3, 0.15), outliers: false };
}

/// One tensor to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TensorSpec {
    /// Key in the checkpoint.
    pub(super) name: String,
    /// The tensor whose values this one has: itself, or the one it is tied to.
    pub(super) values_of: String,
    /// Row-major shape.
    pub(super) shape: Vec<usize>,
    /// What it is for.
    pub(super) fill: Fill,
}

impl TensorSpec {
    /// Number of values.
    pub(super) fn n_values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Mean and standard deviation of the values.
    pub(super) fn mean_and_deviation(&self, spread: &Spread) -> (f32, f32) {
        match self.fill {
            Fill::Linear | Fill::OutlierWriter { .. } => {
                let fan_in: usize = self.shape.iter().skip(1).product();
                (0.0, spread.linear_gain / (fan_in as f32).sqrt())
            }
            Fill::Embedding => (0.0, spread.embedding),
            Fill::NormScale | Fill::OutlierReader | Fill::FinalNormScale { .. } => (1.0, 0.1),
            Fill::Bias => (0.0, 0.05),
            Fill::Gate => spread.gate,
            Fill::Latents => (0.0, 1.0),
        }
    }
}

/// Tensors in the order in which they are written.
#[derive(Clone, Debug, Default)]
pub(super) struct TensorList(Vec<TensorSpec>);

impl TensorList {
    /// Adds one tensor.
    pub(super) fn add(&mut self, name: impl Into<String>, shape: &[usize], fill: Fill) {
        let name = name.into();
        self.0.push(TensorSpec { values_of: name.clone(), name, shape: shape.to_vec(), fill });
    }

    /// Adds a copy of the values of an earlier tensor, as tied weights are saved.
    pub(super) fn add_tied(&mut self, name: impl Into<String>, earlier: &str) {
        let found = self.0.iter().find(|spec| spec.name == earlier).cloned();
        self.0.extend(found.map(|spec| TensorSpec { name: name.into(), ..spec }));
    }

    /// `{name}.weight`, `[outputs, inputs]`.
    pub(super) fn linear(&mut self, name: &str, outputs: usize, inputs: usize) {
        self.add(format!("{name}.weight"), &[outputs, inputs], Fill::Linear);
    }

    /// `{name}.weight`, `[outputs, inputs]`, and `{name}.bias`, `[outputs]`.
    pub(super) fn linear_with_bias(&mut self, name: &str, outputs: usize, inputs: usize) {
        self.linear(name, outputs, inputs);
        self.add(format!("{name}.bias"), &[outputs], Fill::Bias);
    }

    /// `{name}.weight`, `[rows, width]`.
    pub(super) fn embedding(&mut self, name: &str, rows: usize, width: usize) {
        self.add(format!("{name}.weight"), &[rows, width], Fill::Embedding);
    }

    /// `{name}.weight`, `[width]`.
    pub(super) fn norm_scale(&mut self, name: &str, width: usize) {
        self.add(format!("{name}.weight"), &[width], Fill::NormScale);
    }

    /// `{name}.weight` and `{name}.bias`, both `[width]`.
    pub(super) fn layer_norm(&mut self, name: &str, width: usize) {
        self.norm_scale(name, width);
        self.add(format!("{name}.bias"), &[width], Fill::Bias);
    }

    /// `{name}.weight`, `[width]`, of a norm that reads the language model's residual stream.
    pub(super) fn residual_norm_scale(&mut self, name: &str, width: usize) {
        self.add(format!("{name}.weight"), &[width], Fill::OutlierReader);
    }

    /// `{name}.weight` and `{name}.bias`, both `[width]`, of a norm that reads the language model's residual stream.
    pub(super) fn residual_layer_norm(&mut self, name: &str, width: usize) {
        self.residual_norm_scale(name, width);
        self.add(format!("{name}.bias"), &[width], Fill::Bias);
    }

    /// `{name}.weight`, `[width]`, of the norm before the head.
    pub(super) fn final_norm_scale(&mut self, name: &str, width: usize, is_tied: bool) {
        self.add(format!("{name}.weight"), &[width], Fill::FinalNormScale { is_tied });
    }

    /// `{name}.weight` and `{name}.bias`, both `[width]`, of the norm before the head.
    pub(super) fn final_layer_norm(&mut self, name: &str, width: usize, is_tied: bool) {
        self.final_norm_scale(name, width, is_tied);
        self.add(format!("{name}.bias"), &[width], Fill::Bias);
    }

    /// The norms of `layer` come before outliers are written.
    pub(super) fn before_outliers(&mut self, layer: &str) {
        let layer = format!("{layer}.");
        let own = self.0.iter_mut().filter(|spec| spec.name.starts_with(&layer));
        own.filter(|spec| spec.fill == Fill::OutlierReader)
            .for_each(|spec| spec.fill = Fill::NormScale);
    }

    /// The matrix `{name}.weight` writes the outliers.
    pub(super) fn outlier_writer(&mut self, name: &str, is_gated: bool) {
        let name = format!("{name}.weight");
        let own = self.0.iter_mut().filter(|spec| spec.name == name);
        own.for_each(|spec| spec.fill = Fill::OutlierWriter { is_gated });
    }

    /// Adds the tensors of another list.
    pub(super) fn extend(&mut self, other: TensorList) {
        self.0.extend(other.0);
    }

    /// The tensors under other names.
    pub(super) fn renamed(mut self, rename: &dyn Fn(&str) -> String) -> TensorList {
        for spec in &mut self.0 {
            (spec.name, spec.values_of) = (rename(&spec.name), rename(&spec.values_of));
        }
        self
    }

    /// The tensors.
    pub(super) fn specs(&self) -> &[TensorSpec] {
        &self.0
    }

    /// The tensors, ordered by name as safetensors files have them.
    pub(super) fn sorted(mut self) -> TensorList {
        self.0.sort_by(|a, b| a.name.cmp(&b.name));
        self
    }

    /// Number of values of all tensors.
    pub(super) fn n_values(&self) -> u64 {
        self.0.iter().map(|spec| spec.n_values() as u64).sum()
    }
}
