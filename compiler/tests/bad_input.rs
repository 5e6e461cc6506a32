//! Input that is damaged, forged or out of range: the program says what is wrong and what to do,
//! with exit status 2, on stderr only, and neither panics nor allocates what a file merely claims.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::PathBuf;

use common::{Ran, copy, flamingoc, repository};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Asserts that the program refused, and that the message has all the words.
#[track_caller]
fn refused(ran: &Ran, words: &[&str]) {
    let message = &ran.stderr;
    assert_eq!(ran.status, Some(2), "{}{message}", ran.stdout);
    assert_eq!(ran.stdout, "", "the message belongs to stderr");
    assert!(message.starts_with("error: "), "{message}");
    assert!(!message.contains("panicked"), "{message}");
    assert!(!message.contains("RUST_BACKTRACE"), "{message}");
    for word in words {
        assert!(message.contains(word), "expected {word:?} in:\n{message}");
    }
    let hints = message.matches("hint: ").count();
    assert!(hints <= 1, "expected one hint in:\n{message}");
}

/// A damaged copy of a checkpoint, and where its artifact would be.
struct Damaged {
    scratch: TempDir,
}

impl Damaged {
    fn copy_of(source: &str) -> Damaged {
        let scratch = tempfile::tempdir().unwrap();
        copy(&repository(source), &scratch.path().join("source"));
        Damaged { scratch }
    }

    fn idefics() -> Damaged {
        Damaged::copy_of("tests/golden/idefics-plain")
    }

    fn open_flamingo() -> Damaged {
        Damaged::copy_of("tests/golden/openflamingo-llama")
    }

    fn nfnet() -> Damaged {
        Damaged::copy_of("tests/golden/nfnet-paper")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join("source").join(name)
    }

    fn write(self, name: &str, bytes: impl AsRef<[u8]>) -> Damaged {
        fs::write(self.path(name), bytes).unwrap();
        self
    }

    fn edit(self, name: &str, edit: impl FnOnce(&mut Vec<u8>)) -> Damaged {
        let mut bytes = fs::read(self.path(name)).unwrap();
        edit(&mut bytes);
        self.write(name, bytes)
    }

    fn replace(self, name: &str, from: &str, to: &str) -> Damaged {
        let text = fs::read_to_string(self.path(name)).unwrap();
        assert!(text.contains(from), "{name}: no {from}");
        self.write(name, text.replace(from, to))
    }

    fn edit_json(self, name: &str, edit: impl FnOnce(&mut Value)) -> Damaged {
        let mut value = serde_json::from_slice(&fs::read(self.path(name)).unwrap()).unwrap();
        edit(&mut value);
        self.write(name, serde_json::to_vec(&value).unwrap())
    }

    /// Compiles; refusal with these words, and nothing left behind.
    #[track_caller]
    fn refused(self, words: &[&str]) {
        let target = self.scratch.path().join("out.flamingo");
        let ran = flamingoc!("compile", self.path(""), "-o", target);
        refused(&ran, words);
        let left = fs::read_dir(self.scratch.path()).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["source"], "a refused source leaves nothing behind");
    }
}

/// Element type, shape and bytes of a tensor.
type Parts = (Dtype, Vec<usize>, Vec<u8>);

/// Tensors of a safetensors file, to be changed and written again.
type Tensors = BTreeMap<String, Parts>;

fn edit_tensors(bytes: &mut Vec<u8>, edit: impl FnOnce(&mut Tensors)) {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let entry = |(name, view): (String, TensorView<'_>)| {
        (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    let mut tensors: Tensors = file.tensors().into_iter().map(entry).collect();
    edit(&mut tensors);
    *bytes = tensors_file(&tensors);
}

fn tensors_file(tensors: &Tensors) -> Vec<u8> {
    let mut views = Vec::new();
    for (name, (dtype, shape, data)) in tensors {
        views.push((name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    }
    safetensors::serialize(views, None).unwrap()
}

/// A safetensors file with this header and some data.
fn forged_safetensors(header: &str) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend([0; 64]);
    bytes
}

#[test]
fn safetensors_that_are_cut_or_forged() {
    let file = "model.safetensors";
    let refused = |damage: &dyn Fn(&mut Vec<u8>), words: &[&str]| {
        Damaged::idefics().edit(file, damage).refused(&[&[file], words].concat());
    };
    refused(&|bytes| bytes.truncate(bytes.len() / 2), &["hint: "]);
    refused(&|bytes| bytes.truncate(100), &["header"]);
    refused(&|bytes| bytes.truncate(5), &["header"]);
    refused(&|bytes| bytes.clear(), &[]);
    refused(&|bytes| bytes[..8].fill(0xff), &["header"]);
    refused(&|bytes| bytes[8] = b'[', &["header"]);
    for (header, words) in [
        (
            r#"{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,64]}}"#,
            ["a", ""],
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[16],"data_offsets":[0,18446744073709551615]}}"#,
            ["a", ""],
        ),
        (r#"{"a":{"dtype":"F32","shape":[1048576],"data_offsets":[0,4194304]}}"#, ["a", ""]),
        (r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,64]}}"#, ["header", ""]),
        (r#"{"a":{"dtype":"Q3","shape":[16],"data_offsets":[0,64]}}"#, ["a", ""]),
    ] {
        refused(&|bytes| *bytes = forged_safetensors(header), &words);
    }
    let deep = format!("{{\"a\":{}", "[".repeat(100_000));
    refused(&|bytes| *bytes = forged_safetensors(&deep), &["header"]);
}

/// A file as `torch.save` writes it, with this pickle.
fn torch_file(pickle: &[u8]) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let stored =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("archive/data.pkl", pickle), ("archive/version", b"3\n")] {
        archive.start_file(name, stored).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

#[test]
fn pickles_that_would_run_code() {
    let scratch = tempfile::tempdir().unwrap();
    let marker = scratch.path().join("executed");
    for global in ["posix\nsystem", "builtins\neval", "torch\nload", "os\nsystem"] {
        let command = format!("touch {}", marker.display());
        let length = u32::try_from(command.len()).unwrap().to_le_bytes();
        let mut pickle = b"\x80\x02c".to_vec();
        pickle.extend(global.as_bytes());
        pickle.extend(b"\nX");
        pickle.extend(length);
        pickle.extend(command.as_bytes());
        pickle.extend(b"\x85R.");
        let name = format!("`{}`", global.replace('\n', "."));
        let words = ["checkpoint.pt", name.as_str(), "would run code", "hint: "];
        Damaged::open_flamingo().write("checkpoint.pt", torch_file(&pickle)).refused(&words);
    }
    assert!(!marker.exists());
}

#[test]
fn torch_files_that_are_none() {
    let refused = |bytes: &[u8], words: &[&str]| {
        Damaged::open_flamingo()
            .write("checkpoint.pt", bytes)
            .refused(&[&["checkpoint.pt", "hint: "], words].concat());
    };
    refused(b"version https://git-lfs.github.com/spec/v1\n", &["zip archive", "Git LFS"]);
    refused(b"", &["zip archive"]);
    let whole = fs::read(repository("tests/golden/openflamingo-llama/checkpoint.pt")).unwrap();
    refused(&whole[..whole.len() / 2], &["zip archive"]);
    Damaged::open_flamingo()
        .write("checkpoint.pt", torch_file(b"\x80\x02}q"))
        .refused(&["checkpoint.pt", "data.pkl"]);
    Damaged::open_flamingo()
        .write("checkpoint.pt", torch_file(b"\x80\x02]."))
        .refused(&["`checkpoint/perceiver.layers.0.0.to_q.weight`"]);
}

#[test]
fn weights_that_do_not_fit_are_listed_all_at_once() {
    Damaged::idefics()
        .edit("model.safetensors", |bytes| {
            edit_tensors(bytes, |tensors| {
                tensors.remove("model.norm.weight").unwrap();
                tensors.remove("model.layers.0.mlp.up_proj.weight").unwrap();
                let wrong = tensors.get_mut("model.layers.1.input_layernorm.weight").unwrap();
                wrong.1 = vec![4, 8];
                tensors.insert("extra.one".into(), (Dtype::F32, vec![2], vec![0; 8]));
                tensors.insert("extra.two".into(), (Dtype::F32, vec![1], vec![0; 4]));
            });
        })
        .refused(&[
            "5 weights do not fit",
            "missing `checkpoint/model.norm.weight` [32]",
            "missing `checkpoint/model.layers.0.mlp.up_proj.weight` [56, 32]",
            "`checkpoint/model.layers.1.input_layernorm.weight`: expected [32], got [4, 8]",
            "unused `checkpoint/extra.one` [2]",
            "unused `checkpoint/extra.two` [1]",
            "hint: ",
        ]);
}

#[test]
fn weights_that_are_not_numbers_are_named() {
    Damaged::idefics()
        .edit("model.safetensors", |bytes| {
            edit_tensors(bytes, |tensors| {
                let embedding = tensors.get_mut("model.embed_tokens.weight").unwrap();
                embedding.2[..4].copy_from_slice(&f32::NAN.to_le_bytes());
                embedding.2[8..12].copy_from_slice(&f32::INFINITY.to_le_bytes());
                let latents = tensors.get_mut("model.perceiver_resampler.latents").unwrap();
                latents.2[..4].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
            });
        })
        .refused(&[
            "2 weights have values that are NaN or infinite",
            "`checkpoint/model.embed_tokens.weight`: 2 values",
            "`checkpoint/model.perceiver_resampler.latents`: 1 values",
            "hint: ",
        ]);
}

#[test]
fn a_weight_that_is_not_numbers_is_named_though_it_is_folded_into_another() {
    Damaged::idefics()
        .edit("model.safetensors", |bytes| {
            edit_tensors(bytes, |tensors| {
                let norm = tensors.get_mut("model.layers.2.input_layernorm.weight").unwrap();
                norm.2[..4].copy_from_slice(&f32::NAN.to_le_bytes());
            });
        })
        .refused(&[
            "NaN or infinite",
            "`checkpoint/model.layers.2.input_layernorm.weight`: 1",
            "hint: ",
        ]);
}

#[test]
fn integer_weights() {
    Damaged::idefics()
        .edit("model.safetensors", |bytes| {
            edit_tensors(bytes, |tensors| {
                tensors.get_mut("model.norm.weight").unwrap().0 = Dtype::I32;
            });
        })
        .refused(&["model.norm.weight"]);
}

#[test]
fn configs_that_are_wrong() {
    let refused = |edit: &dyn Fn(&mut Value), words: &[&str]| {
        Damaged::idefics()
            .edit_json("config.json", edit)
            .refused(&[&["config.json", "expected"], words].concat());
    };
    let set =
        |key: &'static str, value: Value| move |config: &mut Value| config[key] = value.clone();
    refused(&set("model_type", json!("bert")), &["`model_type`", "\"bert\"", "hint: "]);
    refused(&set("hidden_size", json!(1_u64 << 60)), &["`hidden_size`", "1152921504606846976"]);
    refused(&set("hidden_size", json!(-1)), &["`hidden_size`", "-1"]);
    refused(&set("hidden_size", json!(0)), &["`hidden_size`"]);
    refused(&set("hidden_size", json!("32")), &["`hidden_size`", "\"32\""]);
    refused(&set("hidden_size", Value::Null), &["`hidden_size`"]);
    refused(&set("vocab_size", json!(1e30)), &["`vocab_size`"]);
    refused(&set("rms_norm_eps", json!("small")), &["`rms_norm_eps`"]);
    refused(&set("use_resampler", json!(1)), &["`use_resampler`"]);
    refused(&set("hidden_act", json!("tanh")), &["`hidden_act`", "\"tanh\""]);
    refused(&set("rope_scaling", json!({"factor": 2})), &["`rope_scaling`", "not supported"]);
    let channels = |config: &mut Value| config["vision_config"]["num_channels"] = json!(1);
    refused(&channels, &["`vision_config.num_channels`", "not supported"]);
    let missing = |config: &mut Value| drop(config.as_object_mut().unwrap().remove("vocab_size"));
    refused(&missing, &["`vocab_size`", "got nothing"]);
}

#[test]
fn configs_that_are_no_json() {
    Damaged::idefics().write("config.json", "{").refused(&["config.json"]);
    Damaged::idefics().write("config.json", "[1]").refused(&["config.json", "JSON object"]);
    Damaged::idefics().write("config.json", "[".repeat(1 << 20)).refused(&["config.json"]);
    Damaged::idefics().write("config.json", b"\xff\xfe").refused(&["config.json"]);
    let empty = Damaged { scratch: tempfile::tempdir().unwrap() };
    fs::create_dir(empty.path("")).unwrap();
    empty.refused(&["expected a recipe", "found none", "hint: "]);
    Damaged::open_flamingo()
        .edit_json("lang_encoder/config.json", |config| {
            config["num_hidden_layers"] = json!(1 << 20)
        })
        .refused(&["config.json", "`num_hidden_layers`", "1024 layers", "1048576"]);
}

/// Sizes that a config may claim and no file backs.
#[test]
fn configs_of_absurd_sizes() {
    let absurd = 16_777_215;
    let sizes: [&[&str]; 10] = [
        &["num_hidden_layers"],
        &["vision_config", "num_hidden_layers"],
        &["perceiver_config", "resampler_depth"],
        &["hidden_size"],
        &["intermediate_size"],
        &["vocab_size"],
        &["num_attention_heads"],
        &["vision_config", "image_size"],
        &["vision_config", "num_attention_heads"],
        &["perceiver_config", "resampler_n_latents"],
    ];
    for path in sizes {
        let edit = |config: &mut Value| {
            let place = path.iter().fold(config, |value, key| &mut value[*key]);
            *place = json!(absurd);
        };
        Damaged::idefics().edit_json("config.json", edit).refused(&[]);
    }
}

#[test]
fn configs_whose_sizes_do_not_fit_each_other() {
    let refused = |key: &str, size: usize, words: &[&str]| {
        let edit = |config: &mut Value| config["vision_config"][key] = json!(size);
        Damaged::idefics().edit_json("config.json", edit).refused(words);
    };
    refused("patch_size", 29, &["vision.patches", "of 29 and more", "28, 28"]);
    refused("num_attention_heads", 5, &["vision.0.attention", "multiple of 5", "24]"]);
}

#[test]
fn recipes_that_are_wrong() {
    let refused = |from: &str, to: &str, words: &[&str]| {
        Damaged::open_flamingo()
            .replace("recipe.toml", from, to)
            .refused(&[&["recipe.toml"], words].concat());
    };
    refused(
        "family = \"openflamingo\"",
        "family = \"blip\"",
        &["family", "`openflamingo`", "blip"],
    );
    refused("[vision]", "colour = 3\n[vision]", &["unknown field `colour`"]);
    refused("[vision]", "[vision]\nchannels = 3", &["unknown field `channels`"]);
    refused("heads = 4", "heads = 5", &["`vision.heads`", "divisor", "got 5"]);
    refused("heads = 4", "heads = 0", &["`vision.heads`", "got 0"]);
    refused("heads = 4", "heads = -4", &["heads"]);
    refused("image_size = 28", "image_size = 13", &["`vision.image_size`", "patch size 14", "13"]);
    refused("patch_size = 14", "patch_size = 7", &["`vision.patch_size`", "14", "7"]);
    refused("quick_gelu", "swoosh", &["`vision.activation`", "swoosh", "expected"]);
    refused("[vision]", "[resampler]\nhead_dim = 7\n[vision]", &["`resampler.head_dim`", "7"]);
    refused("checkpoint = ", "checkpoin = ", &["checkpoin"]);
    refused("[vision]", "[vision", &["recipe.toml"]);
    for path in ["../checkpoint.pt", "/etc/passwd", "a/../../b", ""] {
        let words = ["inside the recipe's folder", "hint: "];
        refused("\"checkpoint.pt\"", &format!("\"{path}\""), &words);
    }
    Damaged::open_flamingo()
        .replace("recipe.toml", "\"checkpoint.pt\"", "\"other.pt\"")
        .refused(&["other.pt", "cannot be read"]);
    Damaged::open_flamingo()
        .replace("recipe.toml", "\"lang_encoder\"", "\"lang\"")
        .refused(&["lang"]);
    Damaged::open_flamingo().replace("recipe.toml", "image = 97", "image = 4000000").refused(&[
        "`tokens.image`",
        "vocabulary of 99",
        "4000000",
        "hint: ",
    ]);
    let source = tempfile::tempdir().unwrap();
    let ran = flamingoc!("compile", source.path().join("none.toml"), "-o", source.path().join("x"));
    self::refused(&ran, &["none.toml"]);
}

#[test]
fn recipes_of_siglips_that_are_wrong() {
    let refused = |from: &str, to: &str, words: &[&str]| {
        let words = [&["recipe.toml"], words].concat();
        Damaged::copy_of("tests/golden/siglip-timm")
            .replace("recipe.toml", from, to)
            .refused(&words);
    };
    let words = ["`vision.activation`", "gelu_tanh", "hint: timm"];
    refused("activation = \"gelu\"\n", "", &words);
    refused("heads = 2", "", &["`vision.heads`", "width 18", "got 0"]);
    refused("image_size = 48", "image_size = 13", &["`vision.image_size`", "patch size 14", "13"]);
    let config = |edit: fn(&mut Value), words: &[&str]| {
        Damaged::copy_of("tests/golden/siglip")
            .edit_json("vision_encoder/config.json", edit)
            .refused(words);
    };
    config(
        |config| config["hidden_act"] = json!("swoosh"),
        &["hidden_act", "gelu_pytorch_tanh", "swoosh"],
    );
    config(|config| config["num_attention_heads"] = json!(4), &["`vision.heads`", "18", "got 4"]);
}

#[test]
fn recipes_of_nfnets_that_are_wrong() {
    let refused = |from: &str, to: &str, words: &[&str]| {
        let words = [&["recipe.toml"], words].concat();
        Damaged::nfnet().replace("recipe.toml", from, to).refused(&words);
    };
    refused("image_size = 36", "", &["`vision.image_size`", "any size", "320", "hint: "]);
    refused("image_size = 36", "image_size = 0", &["`vision.image_size`", "1 to 4096", "got 0"]);
    refused("image_size = 36", "image_size = 999999", &["`vision.image_size`", "999999"]);
    refused("[vision]", "[vision]\nheads = 4", &["`vision.heads`", "hint: "]);
    refused("[vision]", "[vision]\nfinal_norm = true", &["`vision.final_norm`", "hint: "]);
    refused("\"nfnet\"", "\"resnet\"", &["resnet", "`clip` or `nfnet`"]);
    refused("\"nfnet\"", "\"clip\"", &["no tensor", "conv1.weight", "hint: "]);
    let other = "[vision]\nvariant = \"f6\"";
    refused("[vision]", other, &["`vision.variant`", "says f6", "none of f0 to f6", "2 x 48"]);
    Damaged::open_flamingo()
        .replace("recipe.toml", "[vision]", "[vision]\nkind = \"nfnet\"")
        .replace("recipe.toml", "patch_size = 14\nheads = 4\nactivation = \"quick_gelu\"\n", "")
        .refused(&["stem.conv1.weight", "dm_nfnet_f0", "hint: "]);
    Damaged::open_flamingo()
        .replace("recipe.toml", "[vision]", other)
        .refused(&["`vision.variant`", "CLIP"]);
}

#[test]
fn a_language_model_of_another_checkpoint() {
    let damaged = Damaged::open_flamingo();
    fs::remove_dir_all(damaged.path("lang_encoder")).unwrap();
    let other = repository("tests/golden/openflamingo-opt/lang_encoder");
    copy(&other, &damaged.path("lang_encoder"));
    damaged.refused(&["gated cross-attention", "hint: "]);
}

/// An artifact of the demo model to damage, and a picture for it.
struct Artifact {
    scratch: TempDir,
}

impl Artifact {
    fn demo() -> Artifact {
        Artifact::of("tests/golden/tiny-scenes/recipe.toml", &[])
    }

    fn of(source: &str, options: &[&str]) -> Artifact {
        let artifact = Artifact { scratch: tempfile::tempdir().unwrap() };
        let (source, target) = (repository(source), artifact.path(""));
        let fixed = ["compile".as_ref(), source.as_os_str(), "-o".as_ref(), target.as_os_str()];
        let options = options.iter().map(std::convert::AsRef::as_ref);
        common::run(&fixed.into_iter().chain(options).collect::<Vec<_>>()).ok();
        artifact
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join("model.flamingo").join(name)
    }

    /// A file beside the artifact.
    fn beside(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.scratch.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn edit(&self, name: &str, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(self.path(name)).unwrap();
        edit(&mut bytes);
        fs::write(self.path(name), bytes).unwrap();
    }

    fn edit_manifest(&self, edit: impl FnOnce(&mut Value)) {
        self.edit("manifest.json", |bytes| {
            let mut manifest = serde_json::from_slice(bytes).unwrap();
            edit(&mut manifest);
            *bytes = serde_json::to_vec(&manifest).unwrap();
        });
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        let path = self.path("");
        let mut all = vec!["run".as_ref(), path.as_os_str()];
        all.extend(arguments.iter().map(std::convert::AsRef::<std::ffi::OsStr>::as_ref));
        common::run(&all)
    }

    /// A run of one picture and a question is refused.
    #[track_caller]
    fn refused(&self, words: &[&str]) {
        let picture = repository("tests/golden/tiny-scenes/images/single-000.png");
        let picture = picture.to_str().unwrap();
        refused(&self.run(&["--prompt", "<image>what color ?", "--image", picture]), words);
        refused(&flamingoc!("inspect", self.path("")), words);
    }
}

#[test]
fn manifests_that_are_wrong() {
    let refused = |edit: &dyn Fn(&mut Value), words: &[&str]| {
        let artifact = Artifact::demo();
        artifact.edit_manifest(edit);
        artifact.refused(words);
    };
    let newer = |manifest: &mut Value| {
        *manifest = json!({"schema_version": 4711, "a key of the future": []});
    };
    refused(&newer, &["manifest.json", "schema version", "got 4711", "hint: ", "newer"]);
    let none =
        |manifest: &mut Value| drop(manifest.as_object_mut().unwrap().remove("schema_version"));
    refused(&none, &["manifest.json", "`schema_version`", "hint: "]);
    let missing = |manifest: &mut Value| drop(manifest.as_object_mut().unwrap().remove("limits"));
    refused(&missing, &["manifest.json", "limits", "hint: "]);
    for path in ["../secret", "/etc/passwd", "graphs/../../secret", ""] {
        let file = |manifest: &mut Value| manifest["files"][0]["path"] = json!(path);
        refused(&file, &["leaves the artifact", "hint: "]);
        let graph = |manifest: &mut Value| {
            for graph in manifest["graphs"].as_array_mut().unwrap() {
                graph["path"] = json!(path);
            }
        };
        refused(&graph, &["manifest.json", "graph", "hint: "]);
    }
    let graphs = |manifest: &mut Value| manifest["graphs"] = json!([]);
    refused(&graphs, &["manifest.json", "media graph", "portable", "found none", "hint: "]);
}

#[test]
fn manifests_that_are_none() {
    let artifact = Artifact::demo();
    for bytes in ["", "{", "[]", "null", "\u{0}"] {
        fs::write(artifact.path("manifest.json"), bytes).unwrap();
        artifact.refused(&["manifest.json", "hint: "]);
    }
    fs::write(artifact.path("manifest.json"), "[".repeat(1 << 20)).unwrap();
    artifact.refused(&["manifest.json", "hint: "]);
    fs::write(artifact.path("manifest.json"), b"\xff\xff").unwrap();
    artifact.refused(&["manifest.json", "hint: "]);
    fs::remove_file(artifact.path("manifest.json")).unwrap();
    refused(
        &artifact.run(&["--prompt", "what"]),
        &["manifest.json", "hint: ", "flamingoc compile"],
    );
}

/// Sizes that a manifest may claim and no graph backs.
#[test]
fn manifests_of_absurd_sizes() {
    let picture = repository("tests/golden/tiny-scenes/images/single-000.png");
    let picture = picture.to_str().unwrap();
    let absurd = [
        ("/config/language/vocabulary", u64::MAX),
        ("/config/language/n_layers", 1 << 40),
        ("/config/language/width", 1 << 40),
        ("/config/vision/image_size", 1 << 40),
        ("/config/vision/width", 1 << 60),
        ("/config/resampler/max_frames", 1 << 60),
        ("/config/resampler/n_latents", 1 << 60),
        ("/config/cross_attention/n_heads", 1 << 40),
        ("/image/size", 1 << 40),
        ("/image/size", 0),
        ("/limits/max_context", u64::MAX),
        ("/limits/max_context", 0),
        ("/limits/max_images", 0),
    ];
    for (place, size) in absurd {
        let artifact = Artifact::demo();
        artifact.edit_manifest(|manifest| *manifest.pointer_mut(place).unwrap() = json!(size));
        let words = ["--prompt", "<image>what color ?", "--image", picture];
        for ran in [
            artifact.run(&[&words[..], &["--max-new-tokens", "1000000000000000"]].concat()),
            flamingoc!("inspect", artifact.path("")),
        ] {
            let fine = ran.status == Some(0) || ran.status == Some(2);
            assert!(fine, "{place} = {size}: {:?}\n{}", ran.status, ran.stderr);
            assert!(!ran.stderr.contains("panicked"), "{place} = {size}:\n{}", ran.stderr);
        }
    }
}

#[test]
fn files_that_differ_from_the_manifest() {
    let artifact = Artifact::demo();
    let size = fs::metadata(artifact.path("graphs/weights.safetensors")).unwrap().len();
    artifact.edit("graphs/weights.safetensors", |bytes| bytes.truncate(4096));
    artifact.edit("tokenizer.json", |bytes| bytes.push(b' '));
    fs::remove_file(artifact.path("graphs/media.ort-cpu.onnx")).unwrap();
    artifact.refused(&[
        "files differ from the manifest",
        &format!("`graphs/weights.safetensors`: expected {size} bytes, got 4096"),
        "`tokenizer.json`: expected 2996 bytes, got 2997",
        "`graphs/media.ort-cpu.onnx`",
        "hint: copy the artifact again",
    ]);
}

#[test]
fn files_outside_the_artifact() {
    let artifact = Artifact::demo();
    let tokenizer = artifact.path("tokenizer.json");
    let outside = artifact.beside("outside.json", fs::read(&tokenizer).unwrap());
    fs::remove_file(&tokenizer).unwrap();
    std::os::unix::fs::symlink(outside, &tokenizer).unwrap();
    artifact.refused(&["`tokenizer.json`: not a regular file", "hint: "]);
}

#[test]
fn a_flipped_bit_is_found_by_verify() {
    for name in ["graphs/weights.safetensors", "graphs/decoder.ort-cpu.onnx", "report.json"] {
        let artifact = Artifact::demo();
        assert_eq!(artifact.run(&["--prompt", "what", "--verify"]).status, Some(0));
        artifact.edit(name, |bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        });
        let place = format!("`{name}`");
        let words = ["files differ", &place, "hash", "hint: copy the artifact again"];
        refused(&artifact.run(&["--prompt", "what", "--verify"]), &words);
    }
}

/// Replaces the text in a file by one of the same length; lengths inside the file stay right.
fn replace_bytes(bytes: &mut [u8], from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let starts = 0..bytes.len() - from.len();
    let places: Vec<usize> =
        starts.filter(|at| bytes[*at..].starts_with(from.as_bytes())).collect();
    assert!(!places.is_empty(), "no {from}");
    for at in places {
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    }
}

/// The largest offset of external data in a graph of the demo.
fn last_offset(artifact: &Artifact, graph: &str) -> String {
    let bytes = fs::read(artifact.path(graph)).unwrap();
    let key: &[u8] = b"\x0a\x06offset\x12";
    let starts = (0..bytes.len() - 64).filter(|at| bytes[*at..].starts_with(key));
    let offset = |at: usize| {
        let length = usize::from(bytes[at + key.len()]);
        let digits = &bytes[at + key.len() + 1..][..length];
        String::from_utf8(digits.to_vec()).unwrap().parse::<u64>().unwrap()
    };
    starts.map(offset).max().unwrap().to_string()
}

#[test]
fn graphs_that_were_altered() {
    let file = "graphs/decoder.portable.onnx";
    let refused = |edit: &dyn Fn(&mut Vec<u8>), words: &[&str]| {
        let artifact = Artifact::demo();
        artifact.edit(file, edit);
        let length = fs::metadata(artifact.path(file)).unwrap().len();
        artifact.edit_manifest(|manifest| {
            for entry in manifest["files"].as_array_mut().unwrap() {
                if entry["path"] == file {
                    entry["bytes"] = json!(length);
                }
            }
        });
        artifact.refused(&[&["decoder.portable.onnx"], words].concat());
    };
    let rename = |from: &'static str, to: &'static str| {
        move |bytes: &mut Vec<u8>| replace_bytes(bytes, from, to)
    };
    refused(&rename("weights.safetensors", "../eights.safetenso"), &["../eights.safetenso"]);
    refused(&rename("weights.safetensors", "/etc/shadow.safeten"), &["/etc/shadow.safeten"]);
    refused(&rename("weights.safetensors", "weights/../../../.."), &["weights/../../../.."]);
    refused(&rename("Softmax", "Softmux"), &["CrossAttention", "altered", "hint: "]);
    refused(&rename("SelfAttention", "SelfDetention"), &["SelfDetention"]);
    refused(&rename("portable", "portably"), &["flavour", "portably"]);
    refused(&|bytes| bytes.truncate(bytes.len() / 2), &[]);
    refused(&|bytes| bytes.clear(), &[]);
    refused(&|bytes| bytes.fill(0xff), &[]);
    refused(&|bytes| *bytes = b"not a graph".to_vec(), &[]);
}

#[test]
fn panels_of_other_formats_and_shapes() {
    let refused = |from: &str, to: &str, words: &[&str]| {
        let options = ["--precision", "int4", "--no-calibration", "--no-gate"];
        let artifact = Artifact::of("tests/golden/tiny-scenes/recipe.toml", &options);
        artifact.edit("graphs/decoder.portable.onnx", |bytes| replace_bytes(bytes, from, to));
        artifact.refused(&[&["decoder.portable.onnx"], words].concat());
    };
    refused("int4/32", "int4/16", &["UnpackPanels", "block scales", "expected u8["]);
    refused("int4/32", "int4/33", &["attribute `format`", "int4/33"]);
    refused("int4/32", "int4/9z", &["attribute `format`", "int4/9z"]);
}

/// Rounding is a part of the meaning: weights of bytes do not meet other activations.
#[test]
fn activations_that_are_rounded_otherwise() {
    let artifact = Artifact::of(
        "tests/golden/tiny-scenes/recipe.toml",
        &["--precision", "bf16", "--no-calibration", "--no-gate"],
    );
    artifact.edit("graphs/decoder.portable.onnx", |bytes| replace_bytes(bytes, "bf16", "int8"));
    artifact.refused(&["decoder.portable.onnx", "hint: "]);
}

#[test]
fn graphs_of_another_signature() {
    let artifact = Artifact::demo();
    artifact.edit("graphs/decoder.portable.onnx", |bytes| {
        replace_bytes(bytes, "input_ids", "input_idz");
    });
    artifact.refused(&["graph \"decoder\": input `input_idz`", "expected", "hint: "]);
}

#[test]
fn external_data_past_the_end_of_its_file() {
    let artifact = Artifact::demo();
    let last = last_offset(&artifact, "graphs/decoder.portable.onnx");
    let past = "9".repeat(last.len());
    artifact.edit("graphs/decoder.portable.onnx", |bytes| replace_bytes(bytes, &last, &past));
    let size = fs::metadata(artifact.path("graphs/weights.safetensors")).unwrap().len();
    artifact.refused(&[
        "weights.safetensors",
        "weight `",
        &past,
        &format!("{size} bytes"),
        "hint: ",
    ]);

    let artifact = Artifact::demo();
    let missing = "weighty.safetensors";
    for graph in ["graphs/decoder.portable.onnx", "graphs/media.portable.onnx"] {
        artifact.edit(graph, |bytes| replace_bytes(bytes, "weights.safetensors", missing));
    }
    artifact.refused(&[missing, "hint: "]);
}

#[test]
fn prompts_that_do_not_fit_their_pictures() {
    let artifact = Artifact::demo();
    let picture = repository("tests/golden/tiny-scenes/images/single-000.png");
    let picture = picture.to_str().unwrap();
    let more = artifact.run(&["--prompt", "<image><image>what ?", "--image", picture]);
    refused(&more, &["2 `<image>`", "1 pictures", "hint: "]);
    let fewer =
        artifact.run(&["--prompt", "<image>what ?", "--image", picture, "--image", picture]);
    refused(&fewer, &["1 `<image>`", "2 pictures", "hint: "]);
    refused(&artifact.run(&["--prompt", "<image>what ?"]), &["0 pictures", "hint: "]);
    refused(&artifact.run(&["--prompt", ""]), &["prompt", "hint: "]);
    refused(&artifact.run(&[]), &["no prompt", "hint: "]);

    let few = Artifact::of("tests/golden/tiny-scenes/recipe.toml", &["--max-images", "1"]);
    let two = ["--prompt", "<image><image>", "--image", picture, "--image", picture];
    refused(&few.run(&two), &["2 pictures", "limited to 1", "hint: ", "--max-images 2"]);
}

#[test]
fn prompts_longer_than_the_context() {
    let artifact = Artifact::demo();
    let long = "red ".repeat(300);
    let words = ["300 tokens", "context of 256", "hint: "];
    let ran = artifact.run(&["--prompt", &long]);
    refused(&ran, &words[1..]);
    let small = Artifact::of("tests/golden/tiny-scenes/recipe.toml", &["--max-context", "8"]);
    let ran = small.run(&["--prompt", &"red ".repeat(9)]);
    refused(&ran, &["context of 8", "--max-context"]);
}

#[test]
fn pictures_that_are_none() {
    let artifact = Artifact::demo();
    let whole = fs::read(repository("tests/golden/tiny-scenes/images/single-000.png")).unwrap();
    // 4 billion pixels a side, in a header with a right checksum.
    let huge = b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x02D\x01\x00;";
    let cases: [(&str, &[u8], &[&str]); 5] = [
        (
            "text.png",
            b"this is a text",
            &["expected a JPEG, PNG, WebP or GIF", "found text", "hint: "],
        ),
        ("empty.png", b"", &["expected"]),
        ("cut.png", &whole[..whole.len() / 2], &["complete PNG", "hint: "]),
        ("cut.jpg", &[0xff, 0xd8, 0xff, 0xe0, 0], &["complete JPEG", "hint: "]),
        ("huge.gif", huge, &["65535", "hint: "]),
    ];
    for (name, bytes, words) in cases {
        let file = artifact.beside(name, bytes);
        let ran = artifact.run(&["--prompt", "<image>", "--image", file.to_str().unwrap()]);
        refused(&ran, &[&[name], words].concat());
    }
    let folder = artifact.path("");
    for file in ["none.png", folder.to_str().unwrap()] {
        refused(&artifact.run(&["--prompt", "<image>", "--image", file]), &[file]);
    }
}

#[test]
fn prompt_files_that_are_wrong() {
    let artifact = Artifact::demo();
    let picture = repository("tests/golden/tiny-scenes/images/single-000.png");
    let text = artifact.beside("text.txt", "text");
    let refused = |prompt: &str, words: &[&str]| {
        let prompt = prompt.replace("PICTURE", picture.to_str().unwrap());
        let file = artifact.beside("prompt.json", prompt.replace("TEXT", text.to_str().unwrap()));
        let ran = artifact.run(&["--prompt-file", file.to_str().unwrap()]);
        refused(&ran, &[words, &["hint: "]].concat());
    };
    refused("", &["prompt.json"]);
    refused("{", &["prompt.json"]);
    refused(&"[".repeat(1 << 20), &["prompt.json"]);
    refused(r#"{"text": "what ?"}"#, &["prompt.json", "unknown field `text`"]);
    refused(r#"{"segments": [], "top_p": 1}"#, &["prompt.json", "unknown field `top_p`"]);
    refused(
        r#"{"segments": [{"picture": "PICTURE"}]}"#,
        &["segment 1", "expected", "`image`", "picture"],
    );
    refused(r#"{"segments": [{"text": ""}, {"image": "", "crop": 1}]}"#, &["segment 2", "crop"]);
    refused(r#"{"segments": []}"#, &["prompt"]);
    refused(r#"{"segments": [{"text": "<image>what ?"}]}"#, &["1 `<image>`", "0 pictures"]);
    refused(r#"{"segments": [{"image": "TEXT"}]}"#, &["text.txt", "found text"]);
    refused(r#"{"segments": [{"video": []}]}"#, &["video", "frames"]);
    refused(r#"{"segments": [{"video": "PICTURE", "frames": 0}]}"#, &["`frames`", "above 0"]);
    refused(r#"{"segments": [{"video": "PICTURE", "fps": 0}]}"#, &["`fps`", "above 0"]);
    refused(r#"{"segments": [{"video": "PICTURE", "fps": -1}]}"#, &["`fps`", "above 0"]);
    refused(r#"{"segments": [{"video": ["PICTURE", "TEXT"]}]}"#, &["text.txt", "found text"]);
}

#[test]
fn prompt_files_out_of_range() {
    let artifact = Artifact::demo();
    let file =
        artifact.beside("prompt.json", r#"{"segments": [{"text": "what ?"}], "temperature": -1}"#);
    let ran = artifact.run(&["--prompt-file", file.to_str().unwrap()]);
    refused(&ran, &["temperature", "-1", "expected"]);
    refused(&artifact.run(&["--prompt-file", "none.json"]), &["none.json", "hint: "]);
}

#[test]
fn artifacts_without_a_tokenizer() {
    let artifact = Artifact::of("tests/golden/idefics-plain", &[]);
    refused(&artifact.run(&["--prompt", "what"]), &["tokenizer.json", "hint: ", "trace"]);
}

fn i64_tensor(values: &[i64]) -> Parts {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    (Dtype::I64, vec![values.len()], bytes)
}

fn f32_tensor(shape: &[usize], value: f32) -> Parts {
    let n: usize = shape.iter().product();
    (Dtype::F32, shape.to_vec(), value.to_le_bytes().repeat(n))
}

#[test]
fn traces_of_tensors_that_do_not_fit() {
    let artifact = Artifact::demo();
    let refused = |tensors: &[(&str, Parts)], words: &[&str]| {
        let tensors: Tensors = tensors.iter().map(|(n, t)| ((*n).to_owned(), t.clone())).collect();
        let inputs = artifact.beside("in.safetensors", tensors_file(&tensors));
        let outputs = artifact.scratch.path().join("out.safetensors");
        let path = artifact.path("");
        let ran =
            flamingoc!("trace", path, "--inputs", inputs, "--outputs", outputs, "--greedy", "2");
        refused(&ran, words);
        assert!(!outputs.exists());
    };
    let pixels = |shape: &[usize]| f32_tensor(shape, 0.5);
    refused(&[("input_ids", i64_tensor(&[1, 72]))], &["72", "expected"]);
    refused(&[("input_ids", i64_tensor(&[1, 4_000_000_000]))], &["4000000000", "expected"]);
    refused(&[("input_ids", i64_tensor(&[1, -1]))], &["`input_ids`", "-1"]);
    refused(&[("input_ids", i64_tensor(&[1, i64::MAX]))], &["`input_ids`", "9223372036854775807"]);
    refused(&[("input_ids", i64_tensor(&[]))], &[]);
    refused(&[("input_ids", f32_tensor(&[2], 1.0))], &["`input_ids`", "i64"]);
    refused(&[], &["`input_ids`"]);
    refused(&[("input_ids", i64_tensor(&[1; 300]))], &["300 tokens", "context of 256", "hint: "]);
    let ids = ("input_ids", i64_tensor(&[1, 2, 5]));
    refused(&[ids.clone(), ("image_grid", i64_tensor(&[1]))], &["image_grid", "hint: "]);
    refused(
        &[ids.clone(), ("pixel_values", pixels(&[1, 3, 32, 32]))],
        &["`pixel_values`", "expected"],
    );
    refused(
        &[ids.clone(), ("pixel_values", pixels(&[1, 1, 3, 16, 64]))],
        &["expected", "3, 32, 32]", "1, 1, 3, 16, 64"],
    );
    refused(&[ids.clone(), ("pixel_values", pixels(&[1, 0, 3, 32, 32]))], &["expected"]);
    refused(&[ids.clone(), ("pixel_values", i64_tensor(&[1]))], &["`pixel_values`"]);
    refused(std::slice::from_ref(&ids), &["media_time", "found 1", "hint: "]);
    let ids = ("input_ids", i64_tensor(&[1, 2, 5, 2, 6]));
    let one = ("pixel_values", pixels(&[1, 1, 3, 32, 32]));
    refused(&[ids, one], &["media_time", "expected 0 to 1, found 2", "hint: "]);
}

#[test]
fn traces_of_no_file() {
    let artifact = Artifact::demo();
    let (path, none) = (artifact.path(""), artifact.scratch.path().join("none.safetensors"));
    refused(&flamingoc!("trace", path, "--inputs", none, "--outputs", "x"), &["none.safetensors"]);
    let text = artifact.beside("text.txt", "text");
    let ran = flamingoc!("trace", path, "--inputs", text, "--outputs", "x");
    refused(&ran, &["text.txt", ".safetensors", "hint: "]);
}

#[test]
fn options_out_of_range() {
    let demo = repository("tests/golden/tiny-scenes/recipe.toml");
    let scratch = tempfile::tempdir().unwrap();
    let target = scratch.path().join("x");
    let compile = |option: &str, value: &str, words: &[&str]| {
        let option = format!("--{option}={value}");
        refused(&flamingoc!("compile", demo, "-o", target, option), words);
        assert!(!target.exists());
    };
    compile("dump-after", "everything", &["`--dump-after everything`", "hint: ", "merge_linears"]);
    compile("int4-block", "32", &["`--int4-block`", "hint: "]);
    compile("int4-block", "48", &["--int4-block", "32 or 128"]);
    compile(
        "observer",
        "mse",
        &["`--observer`", "hint: pass `--precision int8 --target tensorrt`"],
    );
    compile("observer", "median", &["--observer", "entropy"]);
    compile("precision", "f8", &["--precision", "int8"]);
    compile("target", "vulkan", &["--target", "tensorrt"]);
    compile("max-context", "0", &["`--max-context 0`", "hint: "]);
    compile("max-context", "-1", &["--max-context"]);
    compile("max-images", "many", &["--max-images"]);
    let opt = repository("tests/golden/openflamingo-opt/recipe.toml");
    let ran = flamingoc!("compile", opt, "-o", target, "--max-context", "100000");
    refused(&ran, &["`--max-context 100000`", "hint: "]);
    let ran = flamingoc!("synth", "tiny-gpt", "-o", target);
    refused(&ran, &["`tiny-gpt`", "hint: ", "tiny-idefics"]);
}

#[test]
fn sampling_out_of_range() {
    let artifact = Artifact::demo();
    let sampling = |option: &str, value: &str, words: &[&str]| {
        let option = format!("--{option}={value}");
        refused(&artifact.run(&["--prompt", "what", &option]), words);
    };
    sampling("temperature", "-1", &["`--temperature`", "expected", "got -1"]);
    sampling("temperature", "NaN", &["`--temperature`", "expected", "got NaN"]);
    sampling("temperature", "inf", &["`--temperature`", "expected", "got inf"]);
    sampling("top-p", "1.5", &["`--top-p`", "expected", "got 1.5"]);
    sampling("top-p", "-0.5", &["`--top-p`", "expected", "got -0.5"]);
    sampling("repetition-penalty", "0", &["`--repetition-penalty`", "expected", "got 0"]);
    sampling("top-k", "-1", &["--top-k"]);
    sampling("seed", "x", &["--seed"]);
    sampling("threads", "0", &["--threads"]);
    sampling("backend", "gpu", &["--backend", "native"]);
    let both = ["--prompt", "what", "--prompt-file", "p.json"];
    refused(&artifact.run(&both), &["--prompt-file"]);
    refused(&artifact.run(&["--image", "a.png"]), &["--prompt"]);
}

#[test]
fn outputs_that_are_there_stay() {
    let demo = repository("tests/golden/tiny-scenes/recipe.toml");
    let scratch = tempfile::tempdir().unwrap();
    let target = scratch.path().join("photos");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("a.txt"), "precious").unwrap();
    let ran = flamingoc!("compile", demo, "-o", target);
    refused(&ran, &["photos", "exists already", "hint: ", "--overwrite"]);
    let ran = flamingoc!("compile", demo, "-o", target, "--overwrite");
    refused(&ran, &["photos", "not an artifact", "hint: "]);
    let ran = flamingoc!("synth", "tiny-idefics", "-o", target);
    refused(&ran, &["photos", "empty or no folder", "hint: "]);
    assert_eq!(fs::read_to_string(target.join("a.txt")).unwrap(), "precious");
    let file = target.join("a.txt");
    refused(&flamingoc!("compile", demo, "-o", file, "--overwrite"), &["a.txt"]);
    refused(&flamingoc!("compile", demo, "-o", file.join("x")), &["a.txt"]);
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
    assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
}

#[test]
fn a_check_against_another_model() {
    let artifact = Artifact::demo();
    let other = repository("tests/golden/idefics-plain");
    let ran = flamingoc!("check", artifact.path(""), "--against", other);
    refused(&ran, &["another model", "hint: "]);
}
