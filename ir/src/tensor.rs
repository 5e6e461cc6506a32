//! Values of the reference evaluator, and literals in graphs.

use half::{bf16, f16};
use ndarray::{ArcArray, Array, IxDyn};

use crate::{DType, Fact};

/// A dense tensor, row-major, shared on clone.
#[derive(Clone, Debug, PartialEq)]
pub enum Tensor {
    /// 32-bit floats.
    F32(ArcArray<f32, IxDyn>),
    /// 64-bit integers.
    I64(ArcArray<i64, IxDyn>),
    /// Truth values.
    Bool(ArcArray<bool, IxDyn>),
}

/// Bytes that do not make the tensor they claim to be.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum TensorError {
    /// Byte count against dtype and shape.
    #[error("tensor of {dtype} {shape:?} needs {expected} bytes, got {found}")]
    Size {
        /// Element type.
        dtype: DType,
        /// Shape.
        shape: Vec<usize>,
        /// Bytes that dtype and shape need; `usize::MAX` where that overflows.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
}

impl Tensor {
    /// An f32 tensor; `None` if `data` does not fill `shape`.
    pub fn f32(shape: &[usize], data: Vec<f32>) -> Option<Tensor> {
        Array::from_shape_vec(IxDyn(shape), data).ok().map(|array| Tensor::F32(array.into_shared()))
    }

    /// An i64 tensor; `None` if `data` does not fill `shape`.
    pub fn i64(shape: &[usize], data: Vec<i64>) -> Option<Tensor> {
        Array::from_shape_vec(IxDyn(shape), data).ok().map(|array| Tensor::I64(array.into_shared()))
    }

    /// A rank-0 f32 tensor.
    pub fn scalar(value: f32) -> Tensor {
        Tensor::F32(ndarray::arr0(value).into_dyn().into_shared())
    }

    /// A rank-0 i64 tensor.
    pub fn scalar_i64(value: i64) -> Tensor {
        Tensor::I64(ndarray::arr0(value).into_dyn().into_shared())
    }

    /// A rank-1 f32 tensor.
    pub fn vector(data: Vec<f32>) -> Tensor {
        Tensor::F32(Array::from_vec(data).into_dyn().into_shared())
    }

    /// Reads little-endian bytes of any element type; floats become f32, integers i64.
    /// Both conversions are exact but for f64, which is rounded to nearest.
    pub fn from_le_bytes(
        dtype: DType,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<Tensor, TensorError> {
        let n_elements = shape.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim));
        let expected = n_elements.and_then(|n| n.checked_mul(dtype.size())).unwrap_or(usize::MAX);
        let wrong_size =
            || TensorError::Size { dtype, shape: shape.to_vec(), expected, found: bytes.len() };
        if expected != bytes.len() {
            return Err(wrong_size());
        }
        let tensor = match dtype {
            DType::F64 => Tensor::f32(shape, read(bytes, |b| f64::from_le_bytes(b) as f32)),
            DType::F32 => Tensor::f32(shape, read(bytes, f32::from_le_bytes)),
            DType::F16 => Tensor::f32(shape, read(bytes, |b| f16::from_le_bytes(b).to_f32())),
            DType::BF16 => Tensor::f32(shape, read(bytes, |b| bf16::from_le_bytes(b).to_f32())),
            DType::I64 => Tensor::i64(shape, read(bytes, i64::from_le_bytes)),
            DType::I32 => Tensor::i64(shape, read(bytes, |b| i32::from_le_bytes(b).into())),
            DType::I16 => Tensor::i64(shape, read(bytes, |b| i16::from_le_bytes(b).into())),
            DType::I8 => Tensor::i64(shape, read(bytes, |b| i8::from_le_bytes(b).into())),
            DType::U8 => Tensor::i64(shape, read(bytes, |b| u8::from_le_bytes(b).into())),
            DType::Bool => {
                let data = bytes.iter().map(|byte| *byte != 0).collect();
                let array = Array::from_shape_vec(IxDyn(shape), data).ok();
                array.map(|array| Tensor::Bool(array.into_shared()))
            }
        };
        tensor.ok_or_else(wrong_size)
    }

    /// Little-endian bytes, row-major.
    pub fn to_le_bytes(&self) -> Vec<u8> {
        match self {
            Tensor::F32(array) => array.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Tensor::I64(array) => array.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Tensor::Bool(array) => array.iter().map(|value| u8::from(*value)).collect(),
        }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        match self {
            Tensor::F32(_) => DType::F32,
            Tensor::I64(_) => DType::I64,
            Tensor::Bool(_) => DType::Bool,
        }
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        match self {
            Tensor::F32(array) => array.shape(),
            Tensor::I64(array) => array.shape(),
            Tensor::Bool(array) => array.shape(),
        }
    }

    /// Number of elements.
    pub fn n_elements(&self) -> usize {
        self.shape().iter().product()
    }

    /// Element type and shape as a fact.
    pub fn fact(&self) -> Fact {
        Fact::new(self.dtype(), self.shape().iter().copied())
    }

    /// The array, if of f32.
    pub fn as_f32(&self) -> Option<&ArcArray<f32, IxDyn>> {
        match self {
            Tensor::F32(array) => Some(array),
            Tensor::I64(_) | Tensor::Bool(_) => None,
        }
    }

    /// The array, if of i64.
    pub fn as_i64(&self) -> Option<&ArcArray<i64, IxDyn>> {
        match self {
            Tensor::I64(array) => Some(array),
            Tensor::F32(_) | Tensor::Bool(_) => None,
        }
    }

    /// All elements in row-major order, if of f32.
    pub fn to_f32_vec(&self) -> Option<Vec<f32>> {
        self.as_f32().map(|array| array.iter().copied().collect())
    }
}

fn read<const N: usize, T>(bytes: &[u8], convert: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|chunk| convert(*chunk)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip() {
        let tensor = Tensor::f32(&[2, 2], vec![1.0, -2.5, 0.0, f32::MAX]).unwrap();
        let back = Tensor::from_le_bytes(DType::F32, &[2, 2], &tensor.to_le_bytes()).unwrap();
        assert_eq!(back, tensor);
    }

    #[test]
    fn halves_widen_exactly() {
        let bytes = f16::from_f32(0.1).to_le_bytes();
        let tensor = Tensor::from_le_bytes(DType::F16, &[1], &bytes).unwrap();
        assert_eq!(tensor.to_f32_vec().unwrap(), [f16::from_f32(0.1).to_f32()]);
    }

    #[test]
    fn wrong_sizes_are_errors() {
        assert!(Tensor::from_le_bytes(DType::F32, &[2], &[0; 7]).is_err());
        assert!(Tensor::from_le_bytes(DType::F32, &[usize::MAX, 2], &[0; 8]).is_err());
    }
}
