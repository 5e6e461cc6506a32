//! What is known of a value before it is computed: element type and shape.

use std::fmt;

use crate::{DType, Dim};

/// Element type and (symbolic) shape of a value.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Fact {
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: Vec<Dim>,
}

impl Fact {
    /// A fact from element type and dimensions.
    pub fn new<D: Into<Dim>>(dtype: DType, shape: impl IntoIterator<Item = D>) -> Fact {
        Fact { dtype, shape: shape.into_iter().map(Into::into).collect() }
    }

    /// An f32 value of the given shape.
    pub fn f32<D: Into<Dim>>(shape: impl IntoIterator<Item = D>) -> Fact {
        Fact::new(DType::F32, shape)
    }

    /// An i64 value of the given shape.
    pub fn i64<D: Into<Dim>>(shape: impl IntoIterator<Item = D>) -> Fact {
        Fact::new(DType::I64, shape)
    }

    /// The same with a batch of one before its axes.
    pub fn batch_of_one(&self) -> Fact {
        Fact { dtype: self.dtype, shape: [&[Dim::from(1)], &self.shape[..]].concat() }
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// The sizes, if no dimension is symbolic.
    pub fn known_shape(&self) -> Option<Vec<usize>> {
        self.shape.iter().map(Dim::known).collect()
    }

    /// Product of the dimensions.
    pub fn n_elements(&self) -> Dim {
        self.shape.iter().fold(Dim::from(1), |product, dim| product * dim.clone())
    }
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> = self.shape.iter().map(Dim::to_string).collect();
        write!(f, "{}[{}]", self.dtype, dims.join(", "))
    }
}
