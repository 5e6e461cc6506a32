//! Files as PyTorch writes them, forged files, and files with random damage.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs,
    io::{Cursor, Read, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use flamingo_ir::DType;
use tempfile::TempDir;

use super::{Checkpoint, CheckpointError, PickleError, pickle};

/// One tensor of the reference reader.
type Expected = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Opens a fixture that must be refused, and gives the message.
fn refusal(name: &str) -> (CheckpointError, String) {
    let error = Checkpoint::open(&fixture(name)).unwrap_err();
    let message = error.to_string();
    (error, message)
}

/// What PyTorch says the fixture holds.
fn expected(name: &str) -> Expected {
    let bytes = fs::read(fixture(&format!("{name}.expected.safetensors"))).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let entry = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let dtype = format!("{:?}", view.dtype()).to_lowercase();
        (name, (dtype, view.shape().to_vec(), view.data().to_vec()))
    };
    file.tensors().into_iter().map(entry).collect()
}

fn check(name: &str) -> Checkpoint {
    let checkpoint = Checkpoint::open(&fixture(&format!("{name}.pt"))).unwrap();
    let read = |info: &super::TensorInfo| {
        let bytes = checkpoint.bytes(&info.name).unwrap().into_owned();
        (info.name.clone(), (info.dtype.to_string(), info.shape.clone(), bytes))
    };
    let found: Expected = checkpoint.infos().map(read).collect();
    assert_eq!(found, expected(name), "{name}");
    checkpoint
}

fn is_borrowed(checkpoint: &Checkpoint, name: &str) -> bool {
    matches!(checkpoint.bytes(name).unwrap(), Cow::Borrowed(_))
}

#[test]
fn reads_what_pytorch_wrote() {
    for name in ["dtypes", "parameters", "module_state", "protocol4", "training"] {
        let checkpoint = check(name);
        let names: Vec<_> = checkpoint.infos().map(|info| info.name.clone()).collect();
        assert!(names.is_sorted() && !names.is_empty());
        assert!(names.iter().all(|tensor| is_borrowed(&checkpoint, tensor)), "{name}");
    }
}

#[test]
fn reads_torchscript_attributes() {
    let checkpoint = check("torchscript");
    assert!(checkpoint.get("visual.layers.1.bias").is_some());
    assert!(!is_borrowed(&checkpoint, "projection"));
}

#[test]
fn copies_only_what_is_not_contiguous() {
    let checkpoint = check("views");
    for (name, borrowed) in [
        ("tied.a", true),
        ("rows", true),
        ("single", true),
        ("transposed", false),
        ("expanded", false),
    ] {
        assert_eq!(is_borrowed(&checkpoint, name), borrowed, "{name}");
    }
    let (a, b) = (checkpoint.bytes("tied.a").unwrap(), checkpoint.bytes("tied.b").unwrap());
    assert_eq!(a.as_ptr(), b.as_ptr());
}

#[test]
fn decompresses_entries() {
    let checkpoint = check("deflated");
    assert!(!is_borrowed(&checkpoint, "tied.a"));
}

#[test]
fn refuses_huge_expansions_only_when_asked_for() {
    let checkpoint = Checkpoint::open(&fixture("huge_expansion.pt")).unwrap();
    assert_eq!(checkpoint.get("zero").unwrap().shape, [1 << 20, 1 << 20]);
    assert_eq!(*checkpoint.bytes("one").unwrap(), 1f32.to_le_bytes());
    let error = checkpoint.bytes("zero").unwrap_err();
    assert!(matches!(error, CheckpointError::Expanded { size, .. } if size == 4 << 40), "{error}");
}

#[test]
fn names_the_code_a_pickle_would_run() {
    let (error, message) = refusal("malicious.pt");
    let CheckpointError::Pickle { error: PickleError::Global { name }, offset, .. } = error else {
        panic!("{message}");
    };
    assert_eq!(name, "posix.system");
    let bytes = pickle_of("malicious.pt");
    assert!(bytes[offset..].starts_with(b"cposix\nsystem\n"));
    assert!(message.contains("hint:") && message.contains("malicious.pt"), "{message}");
}

#[test]
fn refuses_unfit_archives() {
    let (error, message) = refusal("truncated_storage.pt");
    assert!(matches!(error, CheckpointError::Entry { .. }), "{message}");
    assert!(message.contains("views/data/0") && message.contains("40 bytes"), "{message}");
    let (error, message) = refusal("big_endian.pt");
    assert!(
        matches!(error, CheckpointError::Entry { .. }) && message.contains("`big`"),
        "{message}"
    );
    let (error, message) = refusal("legacy.pt");
    assert!(matches!(error, CheckpointError::LegacyTorch { .. }), "{message}");
    for (file, tensor, dtype) in
        [("complex.pt", "phase", "ComplexFloat"), ("uint16.pt", "codes", "uint16")]
    {
        let (error, message) = refusal(file);
        assert!(
            matches!(&error, CheckpointError::DType { tensor: t, found, .. } if t == tensor && found == dtype),
            "{message}"
        );
    }
}

#[test]
fn unknown_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let open = |name: &str, content: &[u8]| {
        fs::write(folder.path().join(name), content).unwrap();
        Checkpoint::open(&folder.path().join(name)).unwrap_err()
    };
    assert!(matches!(open("weights.pt", b"version https"), CheckpointError::NotZip { .. }));
    assert!(matches!(open("weights.bin", b""), CheckpointError::NotZip { .. }));
    assert!(matches!(open("weights.pth", b"PK\x03\x04"), CheckpointError::Zip { .. }));
    assert!(matches!(open("weights.npz", b""), CheckpointError::Extension { .. }));
    assert!(matches!(
        Checkpoint::open(folder.path()).unwrap_err(),
        CheckpointError::NoWeights { .. }
    ));
    assert!(matches!(
        Checkpoint::open(&folder.path().join("missing.pt")).unwrap_err(),
        CheckpointError::Open { .. }
    ));
    let checkpoint = Checkpoint::open(&fixture("dtypes.pt")).unwrap();
    assert!(matches!(checkpoint.bytes("missing"), Err(CheckpointError::Unknown { .. })));
}

/// A `.safetensors` file with this header and so many bytes of data.
fn forge(header: &str, data_bytes: usize) -> Vec<u8> {
    let length = u64::try_from(header.len()).unwrap();
    [&length.to_le_bytes(), header.as_bytes(), &vec![7; data_bytes]].concat()
}

fn open_forged(bytes: &[u8]) -> Result<Checkpoint, CheckpointError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    fs::write(&path, bytes).unwrap();
    Checkpoint::open(&path)
}

#[test]
fn refuses_forged_safetensors() {
    let entry = |dtype: &str, shape: &str, start: u64, end: u64| {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let one = |entry: String| format!(r#"{{"a":{entry}}}"#);
    let two = |a: &str, b: &str, first: String, second: String| {
        format!(r#"{{"{a}":{first},"{b}":{second}}}"#)
    };
    let f32_at = |start| entry("F32", "[2]", start, start + 8);
    assert_eq!(open_forged(&forge(&one(f32_at(0)), 8)).unwrap().infos().len(), 1);

    let cases = [
        ("no length", vec![1, 2, 3]),
        ("header longer than file", [&u64::MAX.to_le_bytes()[..], b"{}"].concat()),
        ("header slightly longer", [&3u64.to_le_bytes()[..], b"{}"].concat()),
        ("not JSON", forge("{\"a\":", 0)),
        ("past the end", forge(&one(f32_at(0)), 7)),
        ("bytes left over", forge(&one(f32_at(0)), 9)),
        ("overlap", forge(&two("a", "b", f32_at(0), f32_at(4)), 12)),
        ("gap", forge(&two("a", "b", f32_at(0), f32_at(12)), 20)),
        ("reversed", forge(&one(entry("F32", "[2]", 8, 0)), 8)),
        ("too small", forge(&one(entry("F32", "[3]", 0, 8)), 8)),
        ("overflow", forge(&one(entry("F32", "[4611686018427387904,4]", 0, 8)), 8)),
        ("huge offsets", forge(&one(entry("F32", "[2]", u64::MAX - 8, u64::MAX)), 8)),
    ];
    for (name, bytes) in cases {
        let error = open_forged(&bytes).unwrap_err();
        assert!(matches!(error, CheckpointError::Safetensors { .. }), "{name}: {error}");
    }

    let repeated = forge(&two("a", "a", f32_at(0), f32_at(0)), 8);
    let error = open_forged(&repeated).unwrap_err();
    assert!(
        matches!(error, CheckpointError::Duplicate { ref tensor, .. } if tensor == "a"),
        "{error}"
    );
    let error = open_forged(&forge(&one(entry("F8_E4M3", "[2]", 0, 2)), 2)).unwrap_err();
    assert!(matches!(error, CheckpointError::DType { ref tensor, .. } if tensor == "a"), "{error}");
}

/// A folder with two shards, `a` in the first and `b` in the second, and this index.
fn sharded(index: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        let header = format!(r#"{{"{name}":{{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}}}"#);
        fs::write(folder.path().join(format!("{name}.safetensors")), forge(&header, 2)).unwrap();
    }
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    folder
}

#[test]
fn reads_shards_and_keeps_inside_the_folder() {
    let index = |map: &str| format!(r#"{{"metadata":{{}},"weight_map":{map}}}"#);
    let folder = sharded(&index(r#"{"a":"a.safetensors","b":"b.safetensors"}"#));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let names = ["model.safetensors.index.json", "a.safetensors", "b.safetensors"];
    assert_eq!(checkpoint.files(), names.map(|name| folder.path().join(name)));
    assert_eq!(*checkpoint.bytes("b").unwrap(), [7, 7]);

    let open = |map: &str| Checkpoint::open(sharded(&index(map)).path()).unwrap_err();
    let error = open(r#"{"a":"../x"}"#);
    assert!(matches!(&error, CheckpointError::ShardName { shard, .. } if shard == "../x"));
    let error = open(r#"{"a":"/etc/passwd"}"#);
    assert!(matches!(error, CheckpointError::ShardName { .. }));
    let error = open(r#"{"c":"b.safetensors","b":"b.safetensors","d":"b.safetensors"}"#);
    assert!(matches!(&error, CheckpointError::Shard { tensors, .. } if tensors == &["c", "d"]));
    let error = open(r#"{"a":"a.safetensors","a":"a.safetensors"}"#);
    assert!(matches!(error, CheckpointError::Duplicate { .. }));
    let error = open(r#"{"a":"missing.safetensors"}"#);
    assert!(matches!(error, CheckpointError::Open { .. }));
    assert!(matches!(open("[]"), CheckpointError::Index { .. }));
}

#[test]
fn reads_folders_of_pytorch_files() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(fixture("dtypes.pt"), folder.path().join("shard.bin")).unwrap();
    let index = r#"{"weight_map":{"f32":"shard.bin"}}"#;
    fs::write(folder.path().join("pytorch_model.bin.index.json"), index).unwrap();
    assert_eq!(Checkpoint::open(folder.path()).unwrap().infos().len(), expected("dtypes").len());
    fs::copy(fixture("views.pt"), folder.path().join("pytorch_model.bin")).unwrap();
    assert!(Checkpoint::open(folder.path()).unwrap().get("rows").is_some());
}

/// `data.pkl` of a fixture.
fn pickle_of(name: &str) -> Vec<u8> {
    let mut zip = zip::ZipArchive::new(fs::File::open(fixture(name)).unwrap()).unwrap();
    let entry = zip.file_names().find(|entry| entry.ends_with("/data.pkl")).unwrap().to_string();
    let mut bytes = Vec::new();
    zip.by_name(&entry).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

/// An archive of this pickle and one storage `0` of 8 bytes.
fn open_pickle(pickle: &[u8]) -> Result<Checkpoint, CheckpointError> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let stored =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, content) in [("archive/data.pkl", pickle), ("archive/data/0", &[1u8; 8][..])] {
        zip.start_file(name, stored).unwrap();
        zip.write_all(content).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("forged.pt");
    fs::write(&path, zip.finish().unwrap().into_inner()).unwrap();
    Checkpoint::open(&path)
}

fn text(value: &str) -> Vec<u8> {
    let length = u32::try_from(value.len()).unwrap();
    [b"X", &length.to_le_bytes()[..], value.as_bytes()].concat()
}

fn long(value: i64) -> Vec<u8> {
    [&b"\x8a\x08"[..], &value.to_le_bytes()].concat()
}

/// A float tensor of storage `0`, which claims `len` elements.
fn tensor(len: i64, offset: i64, sizes: &[i64], strides: &[i64]) -> Vec<u8> {
    let tuple = |items: &[i64]| {
        let items: Vec<u8> = items.iter().flat_map(|item| long(*item)).collect();
        [b"(", items.as_slice(), b"t"].concat()
    };
    let storage = [
        &b"("[..],
        &text("storage"),
        b"ctorch\nFloatStorage\n",
        &text("0"),
        &text("cpu"),
        &long(len),
    ];
    let view = [long(offset), tuple(sizes), tuple(strides)].concat();
    [b"ctorch._utils\n_rebuild_tensor\n(", &storage.concat()[..], b"tQ", &view, b"tR"].concat()
}

/// A dict of one tensor called `w`.
fn state_dict(tensor: &[u8]) -> Vec<u8> {
    [&b"\x80\x02}"[..], &text("w"), tensor, b"s."].concat()
}

#[test]
fn keeps_views_inside_their_storage() {
    let fits = |tensor: Vec<u8>| open_pickle(&state_dict(&tensor));
    let checkpoint = fits(tensor(2, 1, &[1], &[1])).unwrap();
    assert_eq!(checkpoint.get("w").unwrap().dtype, DType::F32);
    assert_eq!(*checkpoint.bytes("w").unwrap(), [1; 4]);
    assert_eq!(fits(tensor(2, 0, &[2, 2], &[0, 1])).unwrap().bytes("w").unwrap().len(), 16);
    assert!(fits(tensor(2, 9, &[0], &[1])).unwrap().bytes("w").unwrap().is_empty());

    let refused = [
        tensor(2, 1, &[2], &[1]),
        tensor(1, 0, &[2], &[1]),
        tensor(2, 0, &[2], &[2]),
        tensor(2, i64::MAX, &[1], &[1]),
        tensor(2, 0, &[i64::MAX, 2], &[i64::MAX, 1]),
        tensor(2, 0, &[1 << 40, 1 << 40], &[0, 0]),
    ];
    for (case, tensor) in refused.into_iter().enumerate() {
        let error = fits(tensor).unwrap_err();
        assert!(matches!(error, CheckpointError::View { .. }), "{case}: {error}");
    }
    for len in [3, i64::MAX] {
        let error = fits(tensor(len, 0, &[1], &[1])).unwrap_err();
        assert!(matches!(error, CheckpointError::Entry { .. }), "{error}");
    }
    for tensor in [tensor(2, -1, &[1], &[1]), tensor(2, 0, &[2], &[-1]), tensor(2, 0, &[2], &[])] {
        let error = fits(tensor).unwrap_err();
        assert!(
            matches!(error, CheckpointError::Pickle { error: PickleError::Operand { .. }, .. }),
            "{error}"
        );
    }
}

#[test]
fn repeated_names_are_errors() {
    let entry = [text("w"), tensor(2, 0, &[1], &[1]), b"s".to_vec()].concat();
    let error = open_pickle(&[&b"}"[..], &entry, &entry, b"."].concat()).unwrap_err();
    assert!(matches!(error, CheckpointError::Duplicate { .. }), "{error}");
}

#[test]
fn nesting_and_cycles_are_bounded() {
    let cycle = [&b"}q\0"[..], &text("a"), b"h\0s."].concat();
    assert!(matches!(open_pickle(&cycle).unwrap_err(), CheckpointError::Structure { .. }));
    let deep = [&b")"[..], &vec![0x85; 1 << 20], b"."].concat();
    assert!(matches!(open_pickle(&deep).unwrap_err(), CheckpointError::Structure { .. }));
    let wide = [&b"}"[..], &text("a"), &doubled_lists(40), b"s."].concat();
    assert!(matches!(open_pickle(&wide).unwrap_err(), CheckpointError::Structure { .. }));
    assert!(matches!(open_pickle(b"K\x01.").unwrap_err(), CheckpointError::Structure { .. }));
}

/// A tuple of twice the same tuple of twice the same …: `levels` opcodes, `2^levels` paths.
fn doubled_lists(levels: usize) -> Vec<u8> {
    [&b")"[..], &b"2\x86".repeat(levels)].concat()
}

#[test]
fn inert_classes_need_torchscript() {
    let class = [&b"c__torch__\nM\n)\x81}"[..], &text("w"), &tensor(2, 0, &[1], &[1]), b"sb."];
    let error = open_pickle(&class.concat()).unwrap_err();
    assert!(matches!(
        error,
        CheckpointError::Pickle { error: PickleError::Global { ref name }, offset: 0, .. } if name == "__torch__.M"
    ));
}

/// A small generator of reproducible damage (xorshift).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % u64::try_from(limit).unwrap()).unwrap()
    }

    fn damage(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.roll(3) {
            let at = self.roll(bytes.len());
            bytes[at] = u8::try_from(self.roll(256)).unwrap();
        }
        if self.roll(16) == 0 {
            bytes.truncate(self.roll(bytes.len()).max(1));
        }
    }
}

/// Files that open or not, but never panic; reads every tensor of those that open.
#[test]
fn damaged_files_do_not_panic() {
    let folder = tempfile::tempdir().unwrap();
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let names =
        ["dtypes.pt", "views.pt", "deflated.pt", "torchscript.pt", "views.expected.safetensors"];
    let mut n_opened = [0, 0];
    for name in names {
        let intact = fs::read(fixture(name)).unwrap();
        let path = folder.path().join(name);
        let start = Instant::now();
        for _ in 0..400 {
            let mut bytes = intact.clone();
            dice.damage(&mut bytes);
            fs::write(&path, &bytes).unwrap();
            let opened = Checkpoint::open(&path);
            n_opened[usize::from(opened.is_ok())] += 1;
            if let Ok(checkpoint) = opened {
                for info in checkpoint.infos() {
                    drop(checkpoint.bytes(&info.name));
                }
            }
            if start.elapsed() > Duration::from_millis(800) {
                break;
            }
        }
    }
    assert!(n_opened.iter().all(|count| *count > 20), "{n_opened:?}");
}

#[test]
fn damaged_pickles_do_not_panic() {
    let mut dice = Dice(42);
    let mut n_read = [0, 0];
    for (name, dialect) in [
        ("training.pt", pickle::Dialect::Torch),
        ("protocol4.pt", pickle::Dialect::Torch),
        ("torchscript.pt", pickle::Dialect::TorchScript),
    ] {
        let intact = pickle_of(name);
        for _ in 0..5000 {
            let mut bytes = intact.clone();
            dice.damage(&mut bytes);
            let read = pickle::unpickle(&bytes, dialect);
            n_read[usize::from(read.is_ok())] += 1;
            if let Ok(read) = read {
                drop(super::names::collect(&read, dialect));
            }
        }
    }
    assert!(n_read.iter().all(|count| *count > 100), "{n_read:?}");
}
