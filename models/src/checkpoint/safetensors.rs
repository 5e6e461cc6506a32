//! Safetensors files: a JSON header, then the tensors, contiguous and little-endian.

use std::path::Path;

use flamingo_ir::DType;
use safetensors::{Dtype, SafeTensors};

use super::{Entry, Source, Storage, TensorInfo, error::CheckpointError, json, view::View};

/// Bytes before the header: its length.
const LENGTH_BYTES: usize = 8;

/// The tensors of the file content `bytes`; header and offsets are checked by `safetensors`,
/// which demands that the tensors fill the file without gaps or overlaps.
pub(super) fn read(file: &Path, bytes: &[u8]) -> Result<Vec<Entry>, CheckpointError> {
    let broken = |detail: String| CheckpointError::Safetensors { file: file.into(), detail };
    let (header_bytes, metadata) =
        SafeTensors::read_metadata(bytes).map_err(|error| broken(error.to_string()))?;
    let data_start = LENGTH_BYTES + header_bytes;
    check_keys(file, &bytes[LENGTH_BYTES..data_start])?;
    let mut entries = Vec::new();
    for name in metadata.offset_keys() {
        let Some(info) = metadata.info(&name) else { continue };
        let dtype = dtype(file, &name, info.dtype)?;
        let (start, end) = info.data_offsets;
        let outside = || broken(format!("tensor `{name}` lies outside the file"));
        let start = data_start.checked_add(start).ok_or_else(outside)?;
        let end = data_start.checked_add(end).ok_or_else(outside)?;
        bytes.get(start..end).ok_or_else(outside)?;
        let storage = Storage { start, size: end - start, compressed: None };
        let source = Source { file: 0, storage, view: View::contiguous(&info.shape) };
        entries.push(Entry { info: TensorInfo { name, dtype, shape: info.shape.clone() }, source });
    }
    Ok(entries)
}

/// Repeated keys, of which JSON parsers keep the last.
fn check_keys(file: &Path, header: &[u8]) -> Result<(), CheckpointError> {
    match json::repeated_key(header) {
        Ok(None) => Ok(()),
        Ok(Some(tensor)) => Err(CheckpointError::Duplicate { file: file.into(), tensor }),
        Err(error) => {
            Err(CheckpointError::Safetensors { file: file.into(), detail: error.to_string() })
        }
    }
}

fn dtype(file: &Path, tensor: &str, dtype: Dtype) -> Result<DType, CheckpointError> {
    Ok(match dtype {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I64 => DType::I64,
        Dtype::I32 => DType::I32,
        Dtype::I16 => DType::I16,
        Dtype::I8 => DType::I8,
        Dtype::U8 => DType::U8,
        Dtype::BOOL => DType::Bool,
        other => {
            let (file, tensor) = (file.into(), tensor.into());
            return Err(CheckpointError::DType { file, tensor, found: format!("{other:?}") });
        }
    })
}
