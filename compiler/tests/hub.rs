//! Models of the hub, from a server on this machine that speaks as the hub does: they compile to what a folder compiles
//! to, from then on without a network; what breaks goes on, and what is wrong is said.

#[path = "hub/server.rs"]
mod server;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use flamingo_models::Source;
use flamingo_models::checkpoint::Checkpoint;
use flamingo_models::manifest::Manifest;
use flamingo_runtime::{Model, OpenOptions};
use flamingoc::compile::{CalibrateOn, CompileOptions, compile_source};
use flamingoc::hub::{Catalogue, Hub, HubId, Settings};
use flamingoc::origin::{GivenParts, Origin};
use flamingoc::parity::check;
use flamingoc::scheme::Scheme;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

use server::{COMMIT, Server};

const IDEFICS: &str = "HuggingFaceM4/tiny-random-idefics";
const OTTER: &str = "luodian/OTTER-Image-MPT7B";

/// A user's machine: a home of the hub, and a place for artifacts.
struct Machine {
    scratch: TempDir,
    environment: BTreeMap<&'static str, String>,
}

struct Ran {
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Machine {
    fn new(server: &Server) -> Machine {
        let scratch = tempfile::tempdir().unwrap();
        let home = scratch.path().join("home").display().to_string();
        let environment =
            BTreeMap::from([("HF_HOME", home), ("HF_ENDPOINT", server.endpoint.clone())]);
        Machine { scratch, environment }
    }

    fn with(&self, name: &'static str, value: &str) -> Machine {
        let mut environment = self.environment.clone();
        environment.insert(name, value.to_owned());
        Machine { scratch: tempfile::tempdir().unwrap(), environment }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flamingoc"));
        for name in
            ["HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "ALL_PROXY"]
        {
            command.env_remove(name);
        }
        command.current_dir(self.scratch.path()).args(arguments).envs(&self.environment);
        let output = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ran {
            status: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }

    #[track_caller]
    fn ok(&self, arguments: &[&str]) -> Ran {
        let ran = self.run(arguments);
        assert_eq!(ran.status, Some(0), "{}{}", ran.stdout, ran.stderr);
        ran
    }

    /// Runs what must fail with these words.
    #[track_caller]
    fn fails(&self, arguments: &[&str], words: &[&str]) {
        let ran = self.run(arguments);
        assert_eq!(ran.status, Some(2), "{}{}", ran.stdout, ran.stderr);
        for word in words {
            assert!(ran.stderr.contains(word), "no `{word}` in {}", ran.stderr);
        }
        assert!(ran.stderr.contains("hint: "), "{}", ran.stderr);
    }
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// Hashes of what an artifact computes with.
fn computed(artifact: &Path) -> BTreeMap<String, String> {
    let manifest = fs::read_to_string(artifact.join("manifest.json")).unwrap();
    let manifest: Manifest = serde_json::from_str(&manifest).unwrap();
    let files = manifest.files.into_iter().filter(|file| !file.path.starts_with("report"));
    let files: BTreeMap<String, String> = files.map(|file| (file.path, file.blake3)).collect();
    assert!(files.len() >= 5, "{files:?}");
    files
}

fn len_of(server: &Server, repository: &str, file: &str) -> usize {
    server.state.lock().unwrap().repositories[repository][file].len()
}

/// Files of the cache that are not of these endings.
fn blobs(machine: &Machine, repository: &str) -> Vec<String> {
    let folder = format!("home/hub/models--{}/blobs", repository.replace('/', "--"));
    let entries = fs::read_dir(machine.path(&folder)).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| !name.ends_with(".lock")).collect()
}

/// A tiny IDEFICS with a tokenizer, on a server and in a folder.
fn idefics() -> (Server, Machine, PathBuf) {
    let server = Server::start();
    let machine = Machine::new(&server);
    let folder = machine.path("folder");
    machine.ok(&["synth", "tiny-idefics", "-o", "folder"]);
    server.add_folder(IDEFICS, &folder);
    server.add(IDEFICS, "pytorch_model.bin", b"not needed".to_vec());
    (server, machine, folder)
}

#[test]
fn a_model_of_the_hub_answers_as_that_of_a_folder_and_then_without_a_network() {
    let (server, machine, _) = idefics();
    let picture =
        repository("runtime/tests/image_golden/sources/grey_61x83.png").display().to_string();
    let answer = |artifact: &str| {
        let prompt = ["run", artifact, "--prompt", "a<image>b", "--image", &picture];
        let ran = machine.ok(&[&prompt[..], &["--max-new-tokens", "6", "--json"]].concat());
        let answer: Value = serde_json::from_str(&ran.stdout).unwrap();
        (answer["tokens"].clone(), answer["text"].clone())
    };
    let compiled = machine.ok(&["compile", IDEFICS, "-o", "hub.flamingo", "--json"]);
    assert!(compiled.stderr.contains("downloading model.safetensors"), "{}", compiled.stderr);
    let report: Value = serde_json::from_str(&compiled.stdout).unwrap();
    let notes = report["report"]["notes"].to_string();
    assert!(notes.contains(&format!("{IDEFICS}@{COMMIT}")), "{notes}");
    machine.ok(&["compile", "folder", "-o", "folder.flamingo"]);
    let by_path = |name: &str| computed(&machine.path(name));
    assert_eq!(by_path("hub.flamingo"), by_path("folder.flamingo"));
    assert_eq!(answer("hub.flamingo"), answer("folder.flamingo"));
    assert!(
        !machine
            .path("home/hub")
            .join("models--HuggingFaceM4--tiny-random-idefics/snapshots")
            .join(COMMIT)
            .join("pytorch_model.bin")
            .exists(),
        "one form of the weights is enough"
    );

    let before = server.state.lock().unwrap().pieces.len();
    machine.ok(&["compile", IDEFICS]);
    assert_eq!(by_path("tiny-random-idefics.flamingo"), by_path("folder.flamingo"));
    assert_eq!(server.state.lock().unwrap().pieces.len(), before, "it is in the cache");

    let offline = machine.with("HF_HUB_OFFLINE", "1");
    let n_requests = server.state.lock().unwrap().n_requests;
    let output = offline.path("a").display().to_string();
    offline.ok(&["compile", IDEFICS, "-o", &output]);
    offline.ok(&["check", &output, "--against", IDEFICS]);
    assert_eq!(server.state.lock().unwrap().n_requests, n_requests);
    let words = ["HF_HUB_OFFLINE", "lacks it", OTTER, "home/hub"];
    offline.fails(&["compile", OTTER, "-o", "b"], &words);

    let unplugged = machine.with("HF_ENDPOINT", "http://127.0.0.1:9");
    unplugged.ok(&["compile", &format!("{IDEFICS}@{COMMIT}"), "-o", "c"]);
    unplugged.fails(
        &["compile", OTTER, "-o", "d"],
        &["127.0.0.1:9 cannot be reached", "check the network"],
    );
    let elsewhere = machine.with("HF_HUB_CACHE", &machine.path("home/hub").display().to_string());
    elsewhere
        .with("HF_HOME", "/nowhere")
        .with("HF_HUB_OFFLINE", "ON")
        .ok(&["compile", IDEFICS, "-o", "e"]);
}

#[test]
fn shards_come_as_their_index_says() {
    let server = Server::start();
    let machine = Machine::new(&server);
    let folder = repository("tests/golden/otter-image");
    server.add_folder(OTTER, &folder);
    machine.ok(&["compile", OTTER, "-o", "hub.flamingo"]);
    machine.ok(&["compile", folder.to_str().unwrap(), "-o", "folder.flamingo"]);
    let by_path = |name: &str| computed(&machine.path(name));
    assert_eq!(by_path("hub.flamingo"), by_path("folder.flamingo"));
    let pieces = server.state.lock().unwrap().pieces.clone();
    assert_eq!(pieces.len(), 2, "the golden tensors are none of ours: {pieces:?}");
}

#[test]
fn a_download_that_broke_goes_on_where_it_stopped() {
    let (server, machine, folder) = idefics();
    let len = len_of(&server, IDEFICS, "model.safetensors");
    let step = len.div_ceil(8);
    server.change(|state| state.cut_after = Some(step));
    let words = ["`model.safetensors` could not be downloaded", "goes on where it stopped"];
    machine.fails(&["compile", IDEFICS, "-o", "a"], &words);
    let asked = |server: &Server| -> Vec<usize> {
        server.state.lock().unwrap().pieces.iter().map(|(_, first)| *first).collect()
    };
    assert_eq!(asked(&server), (0..5).map(|index| index * step).collect::<Vec<_>>());
    assert!(blobs(&machine, IDEFICS).iter().any(|name| name.ends_with(".part")));

    machine.ok(&["compile", IDEFICS, "-o", "a"]);
    assert_eq!(asked(&server), (0..8).map(|index| index * step).collect::<Vec<_>>());
    machine.ok(&["compile", folder.to_str().unwrap(), "-o", "b"]);
    assert_eq!(computed(&machine.path("a")), computed(&machine.path("b")));
    assert!(!blobs(&machine, IDEFICS).iter().any(|name| name.ends_with(".part")));
}

#[test]
fn a_part_that_is_whole_already_does_not_stop_a_download() {
    let (server, machine, folder) = idefics();
    server.change(|state| state.cut_after = Some(1000));
    machine.run(&["compile", IDEFICS, "-o", "a"]);
    let part = blobs(&machine, IDEFICS).into_iter().find(|name| name.ends_with(".part")).unwrap();
    let blobs = "home/hub/models--HuggingFaceM4--tiny-random-idefics/blobs";
    fs::copy(folder.join("model.safetensors"), machine.path(blobs).join(part)).unwrap();
    server.change(|state| state.cut_after = None);
    machine.ok(&["compile", IDEFICS, "-o", "a"]);
}

#[test]
fn a_file_with_another_hash_is_refused_and_leaves_nothing() {
    let (server, machine, _) = idefics();
    server.change(|state| state.corrupts = true);
    let words = ["`model.safetensors` came with the hash", "expected", "it was deleted"];
    machine.fails(&["compile", IDEFICS, "-o", "a"], &words);
    assert!(!machine.path("a").exists());
    let offline = machine.with("HF_HUB_OFFLINE", "1");
    offline.fails(&["compile", IDEFICS, "-o", "b"], &["lacks its weights"]);
    server.change(|state| state.corrupts = false);
    machine.ok(&["compile", IDEFICS, "-o", "a"]);
}

#[test]
fn what_the_server_refuses_is_said_with_what_to_do() {
    let (server, machine, _) = idefics();
    machine.fails(
        &["compile", "no-one/nothing", "-o", "a"],
        &["no-one/nothing", "no such repository"],
    );
    let unknown = format!("{IDEFICS}@v9");
    machine.fails(&["compile", &unknown, "-o", "a"], &[&unknown, "no such repository or revision"]);
    server.add("no-one/pictures", "a.png", Vec::new());
    machine.fails(&["compile", "no-one/pictures", "-o", "a"], &["has no `config.json`"]);

    server.change(|state| state.token = Some("secret".to_owned()));
    machine.fails(&["compile", IDEFICS, "-o", "a"], &["answers 401", "`HF_TOKEN`"]);
    machine.with("HF_TOKEN", "wrong").fails(&["compile", IDEFICS, "-o", "a"], &["401"]);
    fs::create_dir_all(machine.path("home")).unwrap();
    fs::write(machine.path("home/token"), "secret\n").unwrap();
    machine.ok(&["compile", IDEFICS, "-o", "a"]);
    let other = Machine::new(&server).with("HF_TOKEN", "secret");
    let other = other.with("HF_HOME", &machine.path("another").display().to_string());
    other.ok(&["compile", IDEFICS, "-o", "a"]);
}

#[test]
fn a_server_cannot_write_outside_of_the_cache() {
    let (server, machine, _) = idefics();
    for etag in ["../../../../out", "/tmp/out", "", "zz23456789abcdef0123456789abcdef01234567"] {
        server.change(|state| state.etag = Some(etag.to_owned()));
        let ran = machine.run(&["compile", IDEFICS, "-o", "a"]);
        assert_eq!(ran.status, Some(2));
        assert!(ran.stderr.contains("unexpected answer"), "{etag}: {}", ran.stderr);
    }
    assert!(!machine.path("home/hub/models--HuggingFaceM4--tiny-random-idefics/blobs").exists());
}

#[test]
fn what_is_neither_a_path_nor_a_name_is_told_both() {
    let machine = Machine::new(&Server::start());
    for source in ["nothing", "./a/b", "of-3b/recipe.toml", "../a/b", "a/b/c"] {
        let words = [source, "no such file or folder", "owner/name@revision"];
        machine.fails(&["compile", source, "-o", "a"], &words);
        machine.fails(&["inspect", source], &words);
    }
}

#[test]
fn a_language_model_that_was_never_distributed_is_asked_for() {
    let server = Server::start();
    let machine = Machine::new(&server);
    let words = ["LLaMA-7B", "`--language-model`"];
    machine.fails(&["compile", "openflamingo/OpenFlamingo-9B", "-o", "a"], &words);
    assert_eq!(server.state.lock().unwrap().n_requests, 0);
    let folder = repository("tests/golden/openflamingo-mpt1b");
    let folder = folder.to_str().unwrap();
    let words = ["--vision-encoder", "leave the option out"];
    machine.fails(&["compile", folder, "-o", "a", "--vision-encoder", folder], &words);
}

/// The parts of an OpenFlamingo as they lie on the hub: the vision encoder under transformers' names, with the text
/// tower, which nobody reads.
fn open_flamingo(server: &Server) -> Hub {
    let golden = repository("tests/golden/openflamingo-mpt1b");
    server.add("o/flamingo", "checkpoint.pt", fs::read(golden.join("checkpoint.pt")).unwrap());
    server.add_folder("o/language", &golden.join("lang_encoder"));
    let config = json!({"model_type": "clip", "vision_config": {
        "num_attention_heads": 4, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}});
    server.add("o/clip", "config.json", config.to_string().into_bytes());
    server.add(
        "o/clip",
        "model.safetensors",
        in_transformers_names(&golden.join("clip_visual.pt")),
    );
    let catalogue = "[[model]]\nrepository = \"o/flamingo\"\ncheckpoint = \"checkpoint.pt\"\n\
                     language_model = \"o/language\"\nvision_encoder = \"o/clip\"\n\
                     tokens = { end_of_chunk = 96, image = 97, pad = 98 }\n";
    Hub {
        settings: Settings {
            endpoint: server.endpoint.clone(),
            cache: PathBuf::new(),
            token: None,
            offline: false,
        },
        catalogue: toml::from_str::<Catalogue>(catalogue).unwrap(),
    }
}

/// open_clip's visual tower as transformers' `CLIPModel` has it.
fn in_transformers_names(clip: &Path) -> Vec<u8> {
    let clip = Checkpoint::open(clip).unwrap();
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for info in clip.infos() {
        let bytes = clip.bytes(&info.name).unwrap().into_owned();
        if info.name == "proj" {
            continue;
        }
        let name = info
            .name
            .replace("transformer.resblocks", "encoder.layers")
            .replace("ln_pre", "pre_layrnorm")
            .replace("ln_post", "post_layernorm")
            .replace("ln_1", "layer_norm1")
            .replace("ln_2", "layer_norm2")
            .replace("mlp.c_fc", "mlp.fc1")
            .replace("mlp.c_proj", "mlp.fc2")
            .replace("attn.out_proj", "self_attn.out_proj")
            .replace("conv1.weight", "embeddings.patch_embedding.weight")
            .replace("class_embedding", "embeddings.class_embedding")
            .replace("positional_embedding", "embeddings.position_embedding.weight");
        match name.split_once(".attn.in_proj_") {
            None => {
                drop(tensors.insert(format!("vision_model.{name}"), (info.shape.clone(), bytes)))
            }
            Some((layer, part)) => {
                let mut shape = info.shape.clone();
                shape[0] /= 3;
                for (projection, bytes) in ["q", "k", "v"].iter().zip(bytes.chunks(bytes.len() / 3))
                {
                    let name = format!("vision_model.{layer}.self_attn.{projection}_proj.{part}");
                    tensors.insert(name, (shape.clone(), bytes.to_vec()));
                }
            }
        }
    }
    for unused in [
        "logit_scale",
        "text_projection.weight",
        "visual_projection.weight",
        "text_model.final_layer_norm.bias",
    ] {
        tensors.insert(unused.to_owned(), (vec![1], vec![0; 4]));
    }
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

#[test]
fn an_open_flamingo_of_three_repositories_is_that_of_a_recipe() {
    let server = Server::start();
    let scratch = tempfile::tempdir().unwrap();
    let mut hub = open_flamingo(&server);
    hub.settings.cache = scratch.path().join("cache");
    let id: HubId = "o/flamingo".parse().unwrap();
    let source = hub.open(&id, &GivenParts::default(), &mut |_| {}).unwrap();
    let notes = source.notes.join("\n");
    for part in ["o/flamingo", "o/language", "o/clip"] {
        assert!(notes.contains(&format!("{part}@{COMMIT}")), "{notes}");
    }
    let options = CompileOptions {
        flavours: Vec::new(),
        source: id.to_string().into(),
        output: scratch.path().join("a.flamingo"),
        overwrite: false,
        max_context: None,
        max_images: 4,
        scheme: Scheme::default(),
        calibrate: CalibrateOn::Nothing,
        calibration_cache: None,
        observer: None,
        gate: None,
        dump: None,
    };
    compile_source(&source, &options, &mut |_| {}).unwrap();
    let folder = Source::open(&repository("tests/golden/openflamingo-mpt1b")).unwrap();
    assert_eq!(source.config, folder.config);
    let model = Model::open(&options.output, &OpenOptions::default()).unwrap();
    let parity = check(&model, &folder, 0, None).unwrap();
    assert!(parity.pass() && parity.comparisons.iter().all(|c| c.different_tokens == 0));

    // Another vision encoder can stand for that of the hub, and nothing is asked for again.
    let own = scratch.path().join("own-clip");
    fs::create_dir(&own).unwrap();
    for (name, bytes) in &server.state.lock().unwrap().repositories["o/clip"] {
        fs::write(own.join(name), bytes).unwrap();
    }
    let given = GivenParts { vision_encoder: Some(Origin::Path(own)), ..GivenParts::default() };
    hub.settings.offline = true;
    let source = hub.open(&id, &given, &mut |_| {}).unwrap();
    assert_eq!(source.config, folder.config);
    assert!(!source.notes.join("").contains("o/clip"));
    let error =
        hub.open(&"o/other".parse().unwrap(), &given, &mut |_| {}).err().unwrap().to_string();
    assert!(error.contains("whole Hugging Face folder"), "{error}");
}
