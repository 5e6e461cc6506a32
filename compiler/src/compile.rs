//! The compiler's pipeline: source → graphs → passes → weights and graphs of an artifact.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use flamingo_ir::op::{Flavour, Op};
use flamingo_ir::{Graph, Verified};
use flamingo_models::manifest::{Limits, Manifest, Provenance, SCHEMA_VERSION, WEIGHT_LAYOUT};
use flamingo_models::{Source, tokenizer_json};
use flamingo_runtime::{Model, OpenOptions};
use serde::{Deserialize, Serialize};

use crate::calibrate::{self, Calibration};
use crate::emit::{
    Calibrated, LayerStorage, Staging, WeightPlan, WrittenWeights, hash_file, write_file,
    write_graph,
};
use crate::passes::{PassRecord, optimise, packed_names};
use crate::scheme::{LayerGroup, Precision, Scheme};

/// What to compile, and how.
#[derive(Debug, Clone)]
pub struct CompileOptions {
    /// Recipe, folder with a recipe, or Hugging Face folder.
    pub source: PathBuf,
    /// The artifact's folder.
    pub output: PathBuf,
    /// Whether an artifact at `output` may be replaced.
    pub overwrite: bool,
    /// Most tokens of a sequence; default: what the language model was made for.
    pub max_context: Option<usize>,
    /// Most media of a prompt.
    pub max_images: usize,
    /// How weights are stored.
    pub scheme: Scheme,
    /// What int8 and int4 are calibrated on; ignored for other precisions.
    pub calibrate: CalibrateOn,
    /// Where to write the graphs' text after which pass.
    pub dump: Option<(String, PathBuf)>,
}

/// What the rounding of weights is fitted to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum CalibrateOn {
    /// Nothing: weights are rounded to nearest.
    #[default]
    Nothing,
    /// Prompts that the program makes.
    Bundled,
    /// A file of prompts, one in JSON a line.
    File(PathBuf),
}

/// What the compiler did, `report.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// `pass` or `fail`.
    pub verdict: String,
    /// Runtime ops after each pass, by stage.
    pub passes: BTreeMap<String, Vec<PassRecord>>,
    /// Parity with the source: filled in by `flamingoc check`.
    pub parity: serde_json::Value,
    /// Bytes and scheme of the weights.
    pub quantisation: Quantisation,
    /// Weights with values that are not finite, and how many.
    pub not_finite: BTreeMap<String, usize>,
    /// What a user should know.
    pub notes: Vec<String>,
}

/// How weights are stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Quantisation {
    /// Bytes of the weights in f32.
    pub bytes_f32: u64,
    /// Bytes of the weights as stored.
    pub bytes: u64,
    /// Mean KL divergence of next tokens from the source, in nats; 0 for f32, none before
    /// `flamingoc check`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean_kl: Option<f64>,
    /// Share of equal next tokens; 1 for f32, none before `flamingoc check`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top1_agreement: Option<f64>,
    /// Every weight matrix; empty for f32, where all are alike.
    pub layers: Vec<LayerStorage>,
}

/// How far a compilation is.
pub enum Progress<'a> {
    /// A stage begins.
    Stage(&'a str),
    /// Weight bytes written, of how many.
    Bytes(u64, u64),
}

/// The flavours of an artifact for the CPU.
pub const CPU_FLAVOURS: [Flavour; 2] = [Flavour::Portable, Flavour::OrtCpu];

/// Compiles a source into an artifact. The same source and options give the same bytes.
pub fn compile(
    options: &CompileOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<(Manifest, Report)> {
    progress(Progress::Stage("reading the source"));
    let source = Source::open(&options.source)?;
    let limits = limits(&source, options)?;
    let graphs = source.graphs()?;
    require_tokens_in_vocabulary(&source)?;
    let staging = Staging::begin(&options.output, options.overwrite)?;
    progress(Progress::Stage("optimising the graphs"));
    let (media, media_passes) = optimise_stage(graphs.media, &source, options)?;
    let (decoder, decoder_passes) = optimise_stage(graphs.decoder, &source, options)?;
    let stages = [&media, &decoder];
    let plan = WeightPlan::new(&stages)?;
    let calibration = calibration(options, progress)?;
    let calibrated = match &calibration {
        Some(calibration) => by_packed_name(&source, options, calibration)?,
        None => Calibrated::new(),
    };
    progress(Progress::Stage("writing the weights"));
    let path = staging.path().join("graphs").join(crate::emit::WEIGHTS);
    let total = plan.total_bytes();
    let mut on_bytes = |done| progress(Progress::Bytes(done, total));
    let written = plan.write(&path, &stages, &source.parts, &calibrated, &mut on_bytes)?;
    refuse_not_finite(&written.not_finite)?;
    let passes = BTreeMap::from([
        ("media".to_owned(), media_passes),
        ("decoder".to_owned(), decoder_passes),
    ]);
    let quantisation = quantisation(options, &written, plan.total_bytes_f32());
    let report = report(&source, passes, written.not_finite, quantisation);
    progress(Progress::Stage("writing the graphs"));
    let mut files = vec![written.file];
    let mut entries = Vec::new();
    for (index, (stage, graph)) in [("media", &media), ("decoder", &decoder)].iter().enumerate() {
        for flavour in CPU_FLAVOURS {
            let (entry, file) =
                write_graph(staging.path(), stage, flavour, graph, plan.layout(index))?;
            entries.push(entry);
            files.push(file);
        }
    }
    if let Some(tokenizer) = &source.tokenizer {
        let bytes = tokenizer_json(tokenizer, &source.config.tokens)?;
        files.push(write_file(staging.path(), "tokenizer.json", &bytes)?);
    }
    files.push(write_file(staging.path(), "report.json", &pretty_json(&report)?)?);
    files.sort();
    progress(Progress::Stage("hashing the source"));
    let manifest = Manifest {
        schema_version: SCHEMA_VERSION,
        compiler_version: env!("CARGO_PKG_VERSION").to_owned(),
        config: source.config.clone(),
        image: source.image.clone(),
        limits,
        precision: precision_of_groups(&stages),
        weight_layout: WEIGHT_LAYOUT.to_owned(),
        graphs: entries,
        files,
        provenance: provenance(&source, options)?,
    };
    write_file(staging.path(), "manifest.json", &pretty_json(&manifest)?)?;
    staging.finish()?;
    Ok((manifest, report))
}

/// Runs prompts through the same model in f32, which lies in a temporary folder beside the output meanwhile.
fn calibration(
    options: &CompileOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Option<Calibration>> {
    let is_rounded = matches!(options.scheme.precision, Precision::Int8 | Precision::Int4);
    if !is_rounded || options.calibrate == CalibrateOn::Nothing {
        return Ok(None);
    }
    let parent = options.output.parent().filter(|parent| !parent.as_os_str().is_empty());
    let scratch = tempfile::Builder::new()
        .prefix(".flamingoc-calibration-")
        .tempdir_in(parent.unwrap_or(Path::new(".")))
        .context("cannot make a temporary folder beside the output")?;
    let f32 = CompileOptions {
        output: scratch.path().join("f32.flamingo"),
        scheme: Scheme::default(),
        dump: None,
        ..options.clone()
    };
    progress(Progress::Stage("compiling to f32, to calibrate on"));
    compile(&f32, &mut |_| {})?;
    let model = Model::open(&f32.output, &OpenOptions::default())?;
    let examples = match &options.calibrate {
        CalibrateOn::File(path) => calibrate::from_file(&model, path)?,
        _ => calibrate::bundled(&model, 0, calibrate::N_BUNDLED)?,
    };
    progress(Progress::Stage("calibrating"));
    let total = u64::try_from(examples.len())?;
    let mut on_example =
        |index| progress(Progress::Bytes(u64::try_from(index).unwrap_or(0), total));
    calibrate::calibrate(&model, &examples, &mut on_example).map(Some)
}

/// What met each weight, by the name that it has once it is packed.
fn by_packed_name<'a>(
    source: &Source,
    options: &CompileOptions,
    calibration: &'a Calibration,
) -> Result<Calibrated<'a>> {
    let f32 = CompileOptions { scheme: Scheme::default(), dump: None, ..options.clone() };
    let graphs = source.graphs()?;
    let (media, _) = optimise_stage(graphs.media, source, &f32)?;
    let (decoder, _) = optimise_stage(graphs.decoder, source, &f32)?;
    let stages = [&media, &decoder];
    let plan = WeightPlan::new(&stages)?;
    let mut calibrated = Calibrated::new();
    for (index, stage) in stages.iter().enumerate() {
        let entries = &plan.layout(index).entries;
        for (name, value) in packed_names(stage) {
            let weight = entries.get(&value).map(|entry| entry.name.as_str());
            let inputs = weight.and_then(|weight| calibration.inputs(weight));
            calibrated.extend(inputs.map(|inputs| (name, inputs)));
        }
    }
    Ok(calibrated)
}

fn limits(source: &Source, options: &CompileOptions) -> Result<Limits> {
    let made_for = source.config.language.max_context;
    let max_context = options.max_context.unwrap_or(made_for);
    let learnt = matches!(
        source.config.language.position,
        flamingo_models::config::PositionConfig::Learnt { .. }
    );
    if max_context == 0 || (learnt && max_context > made_for) {
        bail!(
            "`--max-context {max_context}`: the language model has positions for 1 to {made_for} tokens\n\n\
             hint: leave the option out to take {made_for}"
        );
    }
    Ok(Limits { max_context, max_images: options.max_images })
}

/// Tokens that prompts hold must have a row in the embedding.
fn require_tokens_in_vocabulary(source: &Source) -> Result<()> {
    let (tokens, vocabulary) = (&source.config.tokens, source.config.language.vocabulary);
    let used = [
        ("image", Some(tokens.image)),
        ("end_of_chunk", tokens.end_of_chunk),
        ("around_image", tokens.around_image),
    ];
    let is_outside = |id: u32| usize::try_from(id).is_ok_and(|id| id >= vocabulary);
    for (name, id) in used {
        if let Some(id) = id.filter(|id| is_outside(*id)) {
            bail!(
                "`tokens.{name}`: expected an id below the vocabulary of {vocabulary}, got {id}\n\n\
                 hint: check `[tokens]` of the recipe, or the tokenizer, against the checkpoint's embedding"
            );
        }
    }
    Ok(())
}

fn optimise_stage(
    graph: Graph,
    source: &Source,
    options: &CompileOptions,
) -> Result<(Verified, Vec<PassRecord>)> {
    let stage = graph.name.clone();
    let mut dumped = Ok(());
    let mut observe = |pass: &str, graph: &Graph| {
        if let Some((wanted, folder)) = &options.dump
            && wanted == pass
        {
            let path = folder.join(format!("{stage}.{pass}.txt"));
            dumped = std::fs::create_dir_all(folder)
                .and_then(|()| std::fs::write(&path, graph.to_string()))
                .with_context(|| format!("cannot write `{}`", path.display()));
        }
    };
    let result = optimise(graph, &source.parts, &options.scheme, &mut observe)?;
    dumped?;
    Ok(result)
}

/// NaN and infinite weights make every answer worthless.
fn refuse_not_finite(not_finite: &BTreeMap<String, usize>) -> Result<()> {
    if not_finite.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> =
        not_finite.iter().map(|(name, n)| format!("  `{name}`: {n} values")).collect();
    bail!(
        "{} weights have values that are NaN or infinite:\n{}\n\nhint: the checkpoint is damaged, or was saved \
         from a run that diverged",
        not_finite.len(),
        lines.join("\n")
    )
}

fn report(
    source: &Source,
    passes: BTreeMap<String, Vec<PassRecord>>,
    not_finite: BTreeMap<String, usize>,
    quantisation: Quantisation,
) -> Report {
    Report {
        verdict: "pass".to_owned(),
        passes,
        parity: serde_json::Value::Null,
        quantisation,
        not_finite,
        notes: source.notes.clone(),
    }
}

fn quantisation(
    options: &CompileOptions,
    written: &WrittenWeights,
    bytes_f32: u64,
) -> Quantisation {
    let is_f32 = options.scheme.precision == Precision::F32;
    Quantisation {
        bytes_f32,
        bytes: written.file.bytes,
        mean_kl: is_f32.then_some(0.0),
        top1_agreement: is_f32.then_some(1.0),
        layers: if is_f32 { Vec::new() } else { written.layers.clone() },
    }
}

/// How the weights of each layer group are stored: one format, or several joined by `+`.
fn precision_of_groups(stages: &[&Verified]) -> BTreeMap<String, String> {
    let mut found: BTreeMap<LayerGroup, BTreeSet<String>> = BTreeMap::new();
    for graph in stages {
        let (producers, known) = (graph.producers(), graph.build_time_values());
        for node in graph.nodes() {
            let is_layer = matches!(
                &node.op,
                Op::Linear(_) | Op::FeedForward(_) | Op::GatedCrossAttention(_) | Op::Gather(_)
            );
            let Some(group) = LayerGroup::of(&graph.name, &node.name).filter(|_| is_layer) else {
                continue;
            };
            for input in node.inputs.iter().filter(|input| graph.fact(**input).rank() == 2) {
                let format = match producers.get(input).map(|id| &graph.node(*id).op) {
                    Some(Op::UnpackPanels(op)) => op.format.to_string(),
                    _ if known.contains(input) => "f32".to_owned(),
                    _ => continue,
                };
                found.entry(group).or_default().insert(format);
            }
        }
    }
    let joined = |formats: BTreeSet<String>| formats.into_iter().collect::<Vec<_>>().join("+");
    found.into_iter().map(|(group, formats)| (group.name().to_owned(), joined(formats))).collect()
}

fn provenance(source: &Source, options: &CompileOptions) -> Result<Provenance> {
    let mut sources = Vec::new();
    for file in source.parts.files() {
        sources.push(hash_file(file)?);
    }
    let mut recorded = BTreeMap::from([("max_images".to_owned(), options.max_images.to_string())]);
    if options.scheme != Scheme::default() {
        recorded.insert("precision".to_owned(), options.scheme.to_string());
    }
    if let Some(max_context) = options.max_context {
        recorded.insert("max_context".to_owned(), max_context.to_string());
    }
    Ok(Provenance { sources, options: recorded })
}

fn pretty_json(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// The artifact's folder for a source when none is given: beside the working folder.
pub fn default_output(source: &Path) -> PathBuf {
    let name = match source.extension().is_some_and(|extension| extension == "toml") {
        true => source.parent().and_then(Path::file_name),
        false => source.file_name(),
    };
    let name = name.map_or("model".into(), |name| name.to_string_lossy().into_owned());
    PathBuf::from(format!("{name}.flamingo"))
}
