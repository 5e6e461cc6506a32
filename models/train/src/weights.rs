//! Named weights: the names and shapes of the checkpoint that is written, values as matrices.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use rand::Rng;
use rand_distr::{Distribution as _, StandardNormal};

/// One weight: vectors are kept as matrices of one row, windows `[n, 3, p, p]` as `[n, 3 p p]`.
#[derive(Debug, Clone)]
pub struct Weight {
    /// Shape in the checkpoint.
    pub shape: Vec<usize>,
    /// Value, `[shape[0], rest]`, or `[1, n]` for a vector.
    pub value: Tensor<2>,
}

/// Weights by name.
#[derive(Debug, Clone, Default)]
pub struct Weights {
    by_name: BTreeMap<String, Weight>,
}

/// How a weight begins.
#[derive(Debug, Clone, Copy)]
pub enum Start {
    /// All the same.
    Constant(f32),
    /// Normal numbers of this standard deviation.
    Normal(f32),
}

impl Weights {
    /// Adds a weight that begins as `start` says.
    pub fn add(
        &mut self,
        name: impl Into<String>,
        shape: &[usize],
        start: Start,
        rng: &mut impl Rng,
    ) {
        let count: usize = shape.iter().product();
        let mut value = || match start {
            Start::Constant(value) => value,
            Start::Normal(deviation) => {
                let normal: f32 = StandardNormal.sample(rng);
                deviation * normal
            }
        };
        self.insert(name, shape, (0..count).map(|_| value()).collect());
    }

    /// A weight that multiplies: `[outputs, inputs]`, normal with deviation 1 / √inputs.
    pub fn add_linear(
        &mut self,
        name: impl Into<String>,
        outputs: usize,
        inputs: usize,
        rng: &mut impl Rng,
    ) {
        let deviation = 1.0 / (inputs as f32).sqrt();
        self.add(name, &[outputs, inputs], Start::Normal(deviation), rng);
    }

    /// `NAME.weight` of ones and `NAME.bias` of zeros: a LayerNorm.
    pub fn add_layer_norm(&mut self, name: &str, width: usize) {
        self.insert(format!("{name}.weight"), &[width], vec![1.0; width]);
        self.insert(format!("{name}.bias"), &[width], vec![0.0; width]);
    }

    /// Adds a weight of given values, in the order of rows.
    pub fn insert(&mut self, name: impl Into<String>, shape: &[usize], values: Vec<f32>) {
        let data = TensorData::new(values, as_matrix(shape));
        let value = Tensor::from_data(data, &Device::flex());
        self.by_name.insert(name.into(), Weight { shape: shape.to_vec(), value });
    }

    /// Adds a matrix.
    pub fn insert_value(&mut self, name: impl Into<String>, value: Tensor<2>) {
        let shape = value.dims().to_vec();
        self.by_name.insert(name.into(), Weight { shape, value });
    }

    /// Replaces a value; the shape stays.
    pub fn set(&mut self, name: &str, value: Tensor<2>) {
        let weight = self.by_name.get_mut(name);
        weight.unwrap_or_else(|| panic!("no weight `{name}`")).value = value;
    }

    /// The value of a weight.
    ///
    /// # Panics
    /// If there is none of this name: models ask for the names that they added.
    pub fn get(&self, name: &str) -> Tensor<2> {
        let weight = self.by_name.get(name);
        weight.unwrap_or_else(|| panic!("no weight `{name}`")).value.clone()
    }

    /// Names and weights in the order of names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Weight)> {
        self.by_name.iter().map(|(name, weight)| (name.as_str(), weight))
    }

    /// True if there is a weight of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// Adds all weights of another set.
    pub fn extend(&mut self, other: Weights) {
        self.by_name.extend(other.by_name);
    }

    /// The weights whose names `keep` accepts.
    pub fn filtered(&self, keep: impl Fn(&str) -> bool) -> Weights {
        let kept = self.by_name.iter().filter(|(name, _)| keep(name));
        Weights { by_name: kept.map(|(name, weight)| (name.clone(), weight.clone())).collect() }
    }

    /// The same weights under other names.
    pub fn renamed(self, rename: impl Fn(&str) -> String) -> Weights {
        let renamed = self.by_name.into_iter().map(|(name, weight)| (rename(&name), weight));
        Weights { by_name: renamed.collect() }
    }

    /// How many numbers there are.
    pub fn count(&self) -> usize {
        self.by_name.values().map(|weight| weight.shape.iter().product::<usize>()).sum()
    }

    /// The same weights as leaves of a new graph: those that `trained` accepts get gradients.
    pub fn tracked(&self, trained: impl Fn(&str) -> bool) -> Weights {
        let track = |(name, weight): (&String, &Weight)| {
            let value = Tensor::from_inner(weight.value.clone());
            let value = if trained(name) { value.require_grad() } else { value };
            (name.clone(), Weight { shape: weight.shape.clone(), value })
        };
        Weights { by_name: self.by_name.iter().map(track).collect() }
    }
}

/// Rows and columns of a weight.
fn as_matrix(shape: &[usize]) -> [usize; 2] {
    match shape {
        [n] => [1, *n],
        [rows, rest @ ..] => [*rows, rest.iter().product()],
        [] => [1, 1],
    }
}
