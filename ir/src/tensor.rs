//! Values of the reference evaluator, and literals in graphs.

use std::borrow::Cow;

use half::slice::HalfFloatSliceExt;
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
    /// Half-precision floats, of packed weights.
    F16(ArcArray<f16, IxDyn>),
    /// bfloat16 floats, of packed weights and rounded activations.
    BF16(ArcArray<bf16, IxDyn>),
    /// Signed bytes, of packed weights.
    I8(ArcArray<i8, IxDyn>),
    /// Unsigned bytes, of packed weights and their scales.
    U8(ArcArray<u8, IxDyn>),
}

/// Applies the same array operation, which gives an `Option` of an owned array, to a tensor of any
/// element type.
macro_rules! on_any {
    ($tensor:expr, $array:ident => $result:expr) => {
        match $tensor {
            Tensor::F32($array) => $result.map(|out| Tensor::F32(out.into_shared())),
            Tensor::I64($array) => $result.map(|out| Tensor::I64(out.into_shared())),
            Tensor::Bool($array) => $result.map(|out| Tensor::Bool(out.into_shared())),
            Tensor::F16($array) => $result.map(|out| Tensor::F16(out.into_shared())),
            Tensor::BF16($array) => $result.map(|out| Tensor::BF16(out.into_shared())),
            Tensor::I8($array) => $result.map(|out| Tensor::I8(out.into_shared())),
            Tensor::U8($array) => $result.map(|out| Tensor::U8(out.into_shared())),
        }
    };
}

pub(crate) use on_any;

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

    /// Reads little-endian bytes of an element type that tensors have, and keeps that type; `None`
    /// for another type, or if the bytes do not fill `shape`.
    pub fn from_stored_bytes(dtype: DType, shape: &[usize], bytes: &[u8]) -> Option<Tensor> {
        fn array<T: Clone>(shape: &[usize], data: Vec<T>) -> Option<ArcArray<T, IxDyn>> {
            Array::from_shape_vec(IxDyn(shape), data).ok().map(Array::into_shared)
        }
        match dtype {
            DType::F16 if bytes.len().is_multiple_of(2) => {
                array(shape, read(bytes, f16::from_le_bytes)).map(Tensor::F16)
            }
            DType::BF16 if bytes.len().is_multiple_of(2) => {
                array(shape, read(bytes, bf16::from_le_bytes)).map(Tensor::BF16)
            }
            DType::I8 => array(shape, read(bytes, i8::from_le_bytes)).map(Tensor::I8),
            DType::U8 => array(shape, bytes.to_vec()).map(Tensor::U8),
            DType::F32 | DType::I64 | DType::Bool => {
                Tensor::from_le_bytes(dtype, shape, bytes).ok()
            }
            DType::F16 | DType::BF16 | DType::F64 | DType::I32 | DType::I16 => None,
        }
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
            DType::F16 => {
                let halves = read(bytes, f16::from_le_bytes);
                let mut data = vec![0.0; halves.len()];
                halves.convert_to_f32_slice(&mut data);
                Tensor::f32(shape, data)
            }
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

    /// Little-endian bytes, row-major; not copied where they lie so in memory.
    pub fn le_bytes(&self) -> Cow<'_, [u8]> {
        match self {
            Tensor::F32(array) => le_bytes(array, f32::to_le_bytes),
            Tensor::I64(array) => le_bytes(array, i64::to_le_bytes),
            Tensor::Bool(array) => array.iter().map(|value| u8::from(*value)).collect(),
            Tensor::F16(array) => le_bytes(array, f16::to_le_bytes),
            Tensor::BF16(array) => le_bytes(array, bf16::to_le_bytes),
            Tensor::I8(array) => le_bytes(array, i8::to_le_bytes),
            Tensor::U8(array) => le_bytes(array, u8::to_le_bytes),
        }
    }

    /// The same, copied.
    pub fn to_le_bytes(&self) -> Vec<u8> {
        self.le_bytes().into_owned()
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        match self {
            Tensor::F32(_) => DType::F32,
            Tensor::I64(_) => DType::I64,
            Tensor::Bool(_) => DType::Bool,
            Tensor::F16(_) => DType::F16,
            Tensor::BF16(_) => DType::BF16,
            Tensor::I8(_) => DType::I8,
            Tensor::U8(_) => DType::U8,
        }
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        match self {
            Tensor::F32(array) => array.shape(),
            Tensor::I64(array) => array.shape(),
            Tensor::Bool(array) => array.shape(),
            Tensor::F16(array) => array.shape(),
            Tensor::BF16(array) => array.shape(),
            Tensor::I8(array) => array.shape(),
            Tensor::U8(array) => array.shape(),
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
        let Tensor::F32(array) = self else { return None };
        Some(array)
    }

    /// The array, if of i64.
    pub fn as_i64(&self) -> Option<&ArcArray<i64, IxDyn>> {
        let Tensor::I64(array) = self else { return None };
        Some(array)
    }

    /// All elements in row-major order, if of f32.
    pub fn to_f32_vec(&self) -> Option<Vec<f32>> {
        self.as_f32().map(|array| array.iter().copied().collect())
    }
}

fn le_bytes<T: bytemuck::NoUninit, const N: usize>(
    array: &ArcArray<T, IxDyn>,
    convert: impl Fn(T) -> [u8; N],
) -> Cow<'_, [u8]> {
    match array.as_slice() {
        Some(values) if cfg!(target_endian = "little") => bytemuck::cast_slice(values).into(),
        _ => array.iter().flat_map(|value| convert(*value)).collect(),
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
    fn bytes_are_row_major_however_they_lie() {
        let turned = |tensor: Tensor| match tensor {
            Tensor::F32(array) => Tensor::F32(array.reversed_axes()),
            other => other,
        };
        let tensor = turned(Tensor::f32(&[2, 2], vec![1.0, 2.0, 3.0, 4.0]).unwrap());
        let expected = [1.0f32, 3.0, 2.0, 4.0].map(f32::to_le_bytes).concat();
        assert_eq!(*tensor.le_bytes(), expected);
    }

    #[test]
    fn halves_widen_exactly() {
        let bytes = f16::from_f32(0.1).to_le_bytes();
        let tensor = Tensor::from_le_bytes(DType::F16, &[1], &bytes).unwrap();
        assert_eq!(tensor.to_f32_vec().unwrap(), [f16::from_f32(0.1).to_f32()]);
    }

    #[test]
    fn stored_bytes_keep_their_type() {
        let bytes = [1, 2, 0x80, 0x7f];
        for (dtype, n) in [(DType::F16, 2), (DType::BF16, 2), (DType::I8, 4), (DType::U8, 4)] {
            let tensor = Tensor::from_stored_bytes(dtype, &[n, 1], &bytes).unwrap();
            assert_eq!((tensor.dtype(), tensor.shape()), (dtype, &[n, 1][..]));
            assert_eq!(tensor.to_le_bytes(), bytes);
            assert_eq!(Tensor::from_stored_bytes(dtype, &[n], &bytes[..3]), None);
        }
        assert_eq!(Tensor::from_stored_bytes(DType::F64, &[0], &[]), None);
    }

    #[test]
    fn wrong_sizes_are_errors() {
        assert!(Tensor::from_le_bytes(DType::F32, &[2], &[0; 7]).is_err());
        assert!(Tensor::from_le_bytes(DType::F32, &[usize::MAX, 2], &[0; 8]).is_err());
    }
}
