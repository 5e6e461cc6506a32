//! What can be wrong with a checkpoint.

use std::{io, path::PathBuf};

use flamingo_ir::DType;

/// Why a checkpoint, or a tensor of it, cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A file cannot be opened or mapped.
    #[error("`{}`: cannot be read", .file.display())]
    Open {
        /// File or folder.
        file: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// A folder without any of the known weight files.
    #[error(
        "`{}`: expected one of {expected:?} in this folder, found none\n\n\
         hint: pass the folder that holds the weights, or the weight file itself", .folder.display()
    )]
    NoWeights {
        /// Folder.
        folder: PathBuf,
        /// File names looked for, in order.
        expected: &'static [&'static str],
    },
    /// The file name says nothing about its format.
    #[error(
        "`{}`: expected a name ending in .safetensors, .pt, .pth or .bin\n\n\
         hint: rename the file after its format", .file.display()
    )]
    Extension {
        /// File.
        file: PathBuf,
    },
    /// A PyTorch file from before the zip format.
    #[error(
        "`{}`: expected a zip archive, found PyTorch's legacy format\n\n\
         hint: re-save it with torch >= 1.6: torch.save(torch.load(old, weights_only=True), new)",
        .file.display()
    )]
    LegacyTorch {
        /// File.
        file: PathBuf,
    },
    /// A `.pt` or `.bin` file that is no zip archive.
    #[error(
        "`{}`: expected a zip archive as torch.save writes it, found first bytes {found:02x?}\n\n\
         hint: a Git LFS pointer or an interrupted download looks like this", .file.display()
    )]
    NotZip {
        /// File.
        file: PathBuf,
        /// First bytes of the file, at most four.
        found: Vec<u8>,
    },
    /// A zip archive whose directory or entry cannot be read.
    #[error("`{}`: broken zip archive: {detail}\n\nhint: download the file again", .file.display())]
    Zip {
        /// File.
        file: PathBuf,
        /// Cause, with the entry where there is one.
        detail: String,
    },
    /// An entry of a PyTorch archive is missing or unfit.
    #[error("`{}`: entry `{entry}`: expected {expected}, found {found}", .file.display())]
    Entry {
        /// File.
        file: PathBuf,
        /// Name of the entry.
        entry: String,
        /// What a PyTorch archive has there.
        expected: String,
        /// What this one has.
        found: String,
    },
    /// The pickle of a PyTorch archive is broken or not allowed.
    #[error("`{}`: data.pkl, byte {offset}: {error}", .file.display())]
    Pickle {
        /// File.
        file: PathBuf,
        /// Offset of the opcode in `data.pkl`, in bytes.
        offset: usize,
        /// What is wrong there.
        error: PickleError,
    },
    /// The unpickled structure is not a set of named tensors.
    #[error("`{}`: at `{place}`: expected {expected}, found {found}", .file.display())]
    Structure {
        /// File.
        file: PathBuf,
        /// Key path, shortened.
        place: String,
        /// What a checkpoint has there.
        expected: String,
        /// What this one has.
        found: String,
    },
    /// The header of a safetensors file is broken.
    #[error("`{}`: safetensors header: {detail}\n\nhint: download the file again", .file.display())]
    Safetensors {
        /// File.
        file: PathBuf,
        /// Cause.
        detail: String,
    },
    /// An index of shards is broken.
    #[error("`{}`: {detail}", .file.display())]
    Index {
        /// Index file.
        file: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// A shard is not a plain file name.
    #[error("`{}`: expected shards as plain file names, found `{shard}`", .file.display())]
    ShardName {
        /// Index file.
        file: PathBuf,
        /// Name in the index.
        shard: String,
    },
    /// Tensors that the index promises and the shard lacks.
    #[error("`{}`: shard `{shard}` lacks {tensors:?}", .file.display())]
    Shard {
        /// Index file.
        file: PathBuf,
        /// Name of the shard.
        shard: String,
        /// All missing tensors.
        tensors: Vec<String>,
    },
    /// An element type that no Flamingo-family model uses.
    #[error(
        "`{}`: tensor `{tensor}`: expected one of {expected:?}, found {found}\n\n\
         hint: convert the tensor before saving", .file.display(), expected = DType::ALL.map(DType::name)
    )]
    DType {
        /// File.
        file: PathBuf,
        /// Tensor.
        tensor: String,
        /// Element type as the file names it.
        found: String,
    },
    /// A tensor that reaches outside its storage, or whose size overflows.
    #[error("`{}`: tensor `{tensor}`: {detail}", .file.display())]
    View {
        /// File.
        file: PathBuf,
        /// Tensor.
        tensor: String,
        /// Expected and found sizes.
        detail: String,
    },
    /// Two tensors of one name.
    #[error("`{}`: tensor `{tensor}` occurs twice", .file.display())]
    Duplicate {
        /// File that holds the second one.
        file: PathBuf,
        /// Tensor.
        tensor: String,
    },
    /// A tensor that is not in the checkpoint.
    #[error("no tensor `{tensor}` in checkpoint `{}`", .path.display())]
    Unknown {
        /// File or folder that was opened.
        path: PathBuf,
        /// Name asked for.
        tensor: String,
    },
    /// A view so much larger than its storage that it is not worth its memory.
    #[error(
        "`{}`: tensor `{tensor}` expands to {size} bytes, storage has {storage_bytes}, \
         limit is {limit}\n\n\
         hint: save the tensor before it is expanded", .file.display()
    )]
    Expanded {
        /// File.
        file: PathBuf,
        /// Tensor.
        tensor: String,
        /// Bytes of the contiguous tensor.
        size: usize,
        /// Bytes of its storage.
        storage_bytes: usize,
        /// Bytes allowed for a storage of that size.
        limit: usize,
    },
}

/// What is wrong with an opcode of a pickle.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum PickleError {
    /// The stream ends inside an opcode, or before STOP.
    #[error("expected {needed} more bytes, found {left}")]
    Truncated {
        /// Bytes the opcode needs.
        needed: usize,
        /// Bytes left.
        left: usize,
    },
    /// An opcode that `torch.save` does not emit.
    #[error("opcode {opcode:#04x} is not one that torch.save emits")]
    Opcode {
        /// The opcode.
        opcode: u8,
    },
    /// A class or function other than those that hold tensors and containers.
    #[error(
        "global `{name}` is not allowed: unpickling it would run code\n\n\
         hint: trust nothing else in this file; if it is your own, re-save the weights alone: \
         torch.save(model.state_dict(), path)"
    )]
    Global {
        /// Module and name, joined by a dot.
        name: String,
    },
    /// An operand of another kind than the opcode needs.
    #[error("expected {expected}, found {found}")]
    Operand {
        /// What the opcode needs.
        expected: &'static str,
        /// What it got.
        found: &'static str,
    },
    /// A read of a memo slot that was never written.
    #[error("memo slot {slot} is empty")]
    Memo {
        /// Slot.
        slot: u32,
    },
    /// More of something than any checkpoint needs.
    #[error("more than {limit} {what}")]
    Limit {
        /// What is counted.
        what: &'static str,
        /// Largest count allowed.
        limit: usize,
    },
}
