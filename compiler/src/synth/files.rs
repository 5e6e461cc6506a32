//! The two file formats: PyTorch's zip archives and safetensors folders, written as a stream.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

use serde_json::{Map, Value, json};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, DateTime, ZipWriter};

use super::SynthError;
use super::pickle;
use super::random::{Generator, Storage};
use super::tensor::{Fill, TensorList, TensorSpec};

/// PyTorch aligns tensors in its archives to this many bytes.
const PT_ALIGNMENT: u16 = 64;
/// Above this size a safetensors folder is cut into shards, as Hugging Face does.
const MAX_SHARD_BYTES: u64 = 5_000_000_000;
/// Value of gates, and of all tensors in archives, where there are shapes only: a closed gate would drop its block.
const OUTLINE_VALUE: f32 = 0.5;
const BUFFER_BYTES: usize = 1 << 20;

/// Writes tensors as `torch.save` writes a state dict: a zip archive, nothing compressed.
pub(super) fn write_pt(
    path: &Path,
    part: &str,
    tensors: &TensorList,
    generator: &mut Generator<'_>,
) -> Result<(), SynthError> {
    let mut write = || -> io::Result<()> {
        let file = File::create(path)?;
        let mut zip = ZipWriter::new(BufWriter::with_capacity(BUFFER_BYTES, file));
        start(&mut zip, "data.pkl", 0)?;
        zip.write_all(&pickle::state_dict(tensors.specs()))?;
        start(&mut zip, "byteorder", 0)?;
        zip.write_all(b"little")?;
        for (idx, spec) in tensors.specs().iter().enumerate() {
            start(&mut zip, &format!("data/{idx}"), tensor_bytes(spec, Storage::F32))?;
            generator.write(part, spec, Storage::F32, &mut zip)?;
        }
        start(&mut zip, "version", 0)?;
        zip.write_all(b"3\n")?;
        finish(zip.finish()?)
    };
    write().map_err(SynthError::io(path))
}

/// Writes an archive of tensors without values, as [`pickle::outline`] has them.
pub(super) fn outline_pt(path: &Path, tensors: &TensorList) -> Result<(), SynthError> {
    let write = || -> io::Result<()> {
        let mut zip = ZipWriter::new(BufWriter::new(File::create(path)?));
        let entries: [(&str, &[u8]); 4] = [
            ("data.pkl", &pickle::outline(tensors.specs())),
            ("byteorder", b"little"),
            ("data/0", &OUTLINE_VALUE.to_le_bytes()),
            ("version", b"3\n"),
        ];
        for (name, bytes) in entries {
            start(&mut zip, name, 0)?;
            zip.write_all(bytes)?;
        }
        finish(zip.finish()?)
    };
    write().map_err(SynthError::io(path))
}

fn start<W: Write + io::Seek>(zip: &mut ZipWriter<W>, name: &str, n_bytes: u64) -> io::Result<()> {
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .last_modified_time(DateTime::default())
        .large_file(n_bytes > u64::from(u32::MAX))
        .with_alignment(PT_ALIGNMENT);
    Ok(zip.start_file(format!("archive/{name}"), options)?)
}

/// Writes `model.safetensors` into `folder`, or shards and their index.
pub(super) fn write_safetensors(
    folder: &Path,
    part: &str,
    tensors: TensorList,
    storage: Storage,
    generator: &mut Generator<'_>,
) -> Result<(), SynthError> {
    write_shards(folder, tensors, storage, &mut |path, shard| {
        write_shard(path, part, shard, storage, generator)
    })
}

/// The same files with zeros for all values but those of gates, which take no room on the disk.
pub(super) fn outline_safetensors(
    folder: &Path,
    tensors: TensorList,
    storage: Storage,
) -> Result<(), SynthError> {
    write_shards(folder, tensors, storage, &mut |path, shard| outline_shard(path, shard, storage))
}

fn write_shards(
    folder: &Path,
    tensors: TensorList,
    storage: Storage,
    write: &mut dyn FnMut(&Path, &[TensorSpec]) -> io::Result<()>,
) -> Result<(), SynthError> {
    let tensors = tensors.sorted();
    let shards = shards(tensors.specs(), storage, MAX_SHARD_BYTES);
    let mut weight_map = Map::new();
    for (idx, shard) in shards.iter().enumerate() {
        let name = shard_name(idx, shards.len());
        let path = folder.join(&name);
        write(&path, shard).map_err(SynthError::io(&path))?;
        let entries = shard.iter().map(|spec| (spec.name.clone(), Value::from(name.as_str())));
        weight_map.extend(entries);
    }
    if shards.len() > 1 {
        let total_size: u64 = tensors.n_values() * storage.value_bytes() as u64;
        let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
        write_json(&folder.join("model.safetensors.index.json"), &index)?;
    }
    Ok(())
}

fn shard_name(idx: usize, n_shards: usize) -> String {
    match n_shards {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{n_shards:05}.safetensors", idx + 1),
    }
}

/// Cuts where the next tensor would not fit any more.
fn shards(specs: &[TensorSpec], storage: Storage, max_bytes: u64) -> Vec<&[TensorSpec]> {
    let mut shards = Vec::new();
    let (mut first, mut n_bytes) = (0, 0);
    for (idx, spec) in specs.iter().enumerate() {
        let next_bytes = tensor_bytes(spec, storage);
        if n_bytes + next_bytes > max_bytes && idx > first {
            shards.push(&specs[first..idx]);
            (first, n_bytes) = (idx, 0);
        }
        n_bytes += next_bytes;
    }
    shards.push(&specs[first..]);
    shards
}

fn write_shard(
    path: &Path,
    part: &str,
    specs: &[TensorSpec],
    storage: Storage,
    generator: &mut Generator<'_>,
) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, File::create(path)?);
    out.write_all(&header(specs, storage)?)?;
    for spec in specs {
        generator.write(part, spec, storage, &mut out)?;
    }
    finish(out)
}

fn outline_shard(path: &Path, specs: &[TensorSpec], storage: Storage) -> io::Result<()> {
    let mut file = File::create(path)?;
    let header = header(specs, storage)?;
    file.write_all(&header)?;
    let mut offset = header.len() as u64;
    for spec in specs {
        if spec.fill == Fill::Gate {
            file.seek(SeekFrom::Start(offset))?;
            let value = storage.bytes_of(OUTLINE_VALUE);
            file.write_all(&value.repeat(spec.n_values()))?;
        }
        offset += tensor_bytes(spec, storage);
    }
    file.set_len(offset)
}

/// Length and text of a file's header.
fn header(specs: &[TensorSpec], storage: Storage) -> io::Result<Vec<u8>> {
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    let mut offset = 0;
    for spec in specs {
        let end = offset + tensor_bytes(spec, storage);
        let entry = json!({"dtype": storage.safetensors_name(), "shape": spec.shape, "data_offsets": [offset, end]});
        header.insert(spec.name.clone(), entry);
        offset = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok([&(header.len() as u64).to_le_bytes(), header.as_slice()].concat())
}

/// Writes indented JSON with a final line break.
pub(super) fn write_json(path: &Path, value: &Value) -> Result<(), SynthError> {
    write_text(path, &format!("{value:#}\n"))
}

/// Writes a small text file.
pub(super) fn write_text(path: &Path, text: &str) -> Result<(), SynthError> {
    fs::write(path, text).map_err(SynthError::io(path))
}

fn tensor_bytes(spec: &TensorSpec, storage: Storage) -> u64 {
    (spec.n_values() * storage.value_bytes()) as u64
}

fn finish(out: BufWriter<File>) -> io::Result<()> {
    out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_hold_every_tensor_once_and_stay_under_the_limit() {
        let mut list = TensorList::default();
        for (idx, n_values) in [3, 4, 9, 1, 1, 5].into_iter().enumerate() {
            list.add(format!("t{idx}"), &[n_values], Fill::Bias);
        }
        let cut = shards(list.specs(), Storage::Bf16, 14);
        let names: Vec<Vec<&str>> =
            cut.iter().map(|s| s.iter().map(|spec| spec.name.as_str()).collect()).collect();
        // t2 alone is larger than the limit: a shard of its own.
        assert_eq!(names, [vec!["t0", "t1"], vec!["t2"], vec!["t3", "t4", "t5"]]);
        assert_eq!(shard_name(1, 3), "model-00002-of-00003.safetensors");
    }
}
