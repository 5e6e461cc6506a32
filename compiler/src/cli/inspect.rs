//! `flamingoc inspect`.

mod source;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use flamingo_ir::op::Flavour;
use flamingo_models::config::VisionEncoder;
use flamingo_models::manifest::Limits;
use flamingo_runtime::Artifact;
use serde_json::json;

use super::Outcome;
use super::coverage;
use super::device::{DevicePlan, device_parser};
use super::output::{Output, bytes};
use super::source::PartOptions;
use crate::compile::{Quantisation, Report};
use crate::coverage::TARGETS;
use crate::emit::LayerStorage;
use crate::plan::Model;
use crate::plan::devices::Device;

/// Show what is in an artifact, or in a checkpoint before it is compiled
///
/// Of a checkpoint: its parts, those that are missing, numbers by component, and for each
/// precision what it takes in memory and which devices have that much. A name on the hub
/// is downloaded first.
#[derive(Args)]
#[command(after_help = "Examples:
  flamingoc inspect demo.flamingo
  flamingoc inspect demo.flamingo --graph decoder
  flamingoc inspect demo.flamingo --device orin-nano-8
  flamingoc inspect demo.flamingo --coverage tensorrt-10.3
  flamingoc inspect models/demo/recipe.toml
  flamingoc inspect checkpoint.pt")]
pub(super) struct Inspect {
    /// Artifact, recipe, checkpoint folder, weight file, or name on the hub
    path: PathBuf,
    #[command(flatten)]
    parts: PartOptions,
    /// Tokens of a sequence that the memory of a source is counted for [default: what the language model was made for]
    #[arg(long, value_name = "N")]
    max_context: Option<usize>,
    /// Pictures of a prompt that the memory of a source is counted for
    #[arg(long, value_name = "N", default_value = "64")]
    max_images: usize,
    /// Print the text form of this graph instead
    #[arg(long, value_name = "STAGE", value_parser = ["media", "decoder"])]
    graph: Option<String>,
    /// What an artifact takes on this device, and how long: a prediction
    #[arg(long, value_name = "NAME", value_parser = device_parser(), conflicts_with = "graph")]
    device: Option<&'static Device>,
    /// Which execution provider would run each node of an artifact there, found without a GPU
    #[arg(long, value_name = "TARGET", value_parser = TARGETS.map(|(name, _)| name),
          conflicts_with_all = ["graph", "device"])]
    coverage: Option<String>,
    /// Graphs that `--coverage` looks at [default: those that are compiled for the target]
    #[arg(long, value_name = "FLAVOUR", value_parser = Flavour::ALL.map(Flavour::name), requires = "coverage")]
    flavour: Option<String>,
    /// Write what `--coverage` finds as a page, too
    #[arg(long, value_name = "FILE", requires = "coverage")]
    html: Option<PathBuf>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

impl Inspect {
    pub(super) fn run(self, output: &mut Output) -> Result<Outcome> {
        match self.path.join("manifest.json").is_file() {
            true => self.artifact(output)?,
            false => self.source(output)?,
        }
        Ok(Outcome::Ok)
    }

    fn artifact(&self, output: &mut Output) -> Result<()> {
        let artifact = Artifact::open(&self.path, false)?;
        if let Some(target) = &self.coverage {
            let (flavour, html) = (self.flavour.as_deref(), self.html.as_deref());
            return coverage::show(&artifact, target, flavour, html, self.json, output);
        }
        let graphs = artifact.load()?;
        if let Some(stage) = &self.graph {
            let graph = if stage == "media" { &graphs.media } else { &graphs.decoder };
            return output.text(&graph.to_string());
        }
        let report: Report =
            serde_json::from_str(&std::fs::read_to_string(self.path.join("report.json"))?)?;
        let model = Model::of_artifact(&artifact, &graphs)?;
        let limits = &artifact.manifest.limits;
        let memory = memory_plan(&model, limits)?;
        let plan = self.device.map(|device| DevicePlan::new(&model, limits, device)).transpose()?;
        if self.json {
            let mut found = json!({
                "manifest": artifact.manifest,
                "report": report,
                "memory_bytes": memory,
            });
            if let Some(plan) = plan {
                found["plan"] = plan.json();
            }
            return output.json(&found);
        }
        describe_config(output, &artifact.manifest.config)?;
        let files = artifact.manifest.files.iter();
        let rows: Vec<Vec<String>> = files.map(|f| vec![f.path.clone(), bytes(f.bytes)]).collect();
        output.line("\nfiles")?;
        output.table(&["", "size"], &rows)?;
        let rows = artifact.manifest.precision.iter().map(|(g, p)| vec![g.clone(), p.clone()]);
        output.line("\nweights by layer group")?;
        output.table(&["", "precision"], &rows.collect::<Vec<_>>())?;
        storage(output, &report.quantisation)?;
        for (stage, records) in &report.passes {
            let total = |ops: &BTreeMap<String, usize>| ops.values().sum::<usize>().to_string();
            let row = |r: &crate::passes::PassRecord| {
                vec![r.pass.clone(), r.replaced.to_string(), total(&r.ops)]
            };
            let rows: Vec<Vec<String>> = records.iter().map(row).collect();
            output.line(&format!("\n{stage}: passes"))?;
            output.table(&["", "values replaced", "ops after"], &rows)?;
            if let Some(last) = records.last() {
                let rows: Vec<Vec<String>> =
                    last.ops.iter().map(|(op, n)| vec![op.clone(), n.to_string()]).collect();
                output.line(&format!("\n{stage}: ops on the device"))?;
                output.table(&["", "nodes"], &rows)?;
            }
        }
        output.line("\nmemory beside the weights, native backend")?;
        let rows: Vec<Vec<String>> =
            memory.iter().map(|(what, n)| vec![what.clone(), bytes(*n)]).collect();
        output.table(&["", "size"], &rows)?;
        if let Some(plan) = plan {
            plan.show(output)?;
        }
        output.line(&format!(
            "\nverdict: {}{}",
            report.verdict,
            match report.parity.is_null() {
                true => " (parity not checked yet: `flamingoc check`)",
                false => "",
            }
        ))
    }
}

/// How weight matrices are stored, by scheme: bytes, and the layer that lost most.
fn storage(output: &mut Output, quantisation: &Quantisation) -> Result<()> {
    let mut schemes: BTreeMap<&str, Vec<&LayerStorage>> = BTreeMap::new();
    for layer in &quantisation.layers {
        schemes.entry(&layer.scheme).or_default().push(layer);
    }
    if schemes.is_empty() {
        return Ok(());
    }
    let row = |(scheme, layers): (&&str, &Vec<&LayerStorage>)| {
        let lossy = layers.iter().filter_map(|layer| Some((layer.sqnr_db?, &layer.name)));
        let worst = lossy.min_by(|a, b| a.0.total_cmp(&b.0));
        vec![
            (*scheme).to_owned(),
            layers.len().to_string(),
            bytes(layers.iter().map(|layer| layer.bytes).sum()),
            worst.map_or("-".into(), |(db, _)| format!("{db:.1}")),
            worst.map_or("-".into(), |(_, name)| name.clone()),
        ]
    };
    let rows: Vec<Vec<String>> = schemes.iter().map(row).collect();
    output.line("\nweight matrices")?;
    output.table(&["", "matrices", "size", "worst SQNR, dB", "in"], &rows)?;
    let (found, in_f32) = (bytes(quantisation.bytes), bytes(quantisation.bytes_f32));
    output.line(&format!("weight file: {found}; in f32 {in_f32}"))
}

fn describe_config(output: &mut Output, config: &flamingo_models::ModelConfig) -> Result<()> {
    let (vision, language, cross) = (&config.vision, &config.language, &config.cross_attention);
    output.line(&format!("family            {:?}", config.family))?;
    let (size, width) = (vision.image_size, vision.width);
    output.line(&match &vision.encoder {
        VisionEncoder::Clip(clip) => format!(
            "vision encoder    {} ViT, {size} x {size} pixels, patch {}, {} layers of width {width}",
            if clip.has_class_token { "CLIP" } else { "SigLIP" },
            clip.patch_size,
            clip.n_layers
        ),
        VisionEncoder::Nfnet(nfnet) => format!(
            "vision encoder    NFNet{}, {size} x {size} pixels, {} blocks, {} tokens of width {width}",
            nfnet.variant().map_or_else(String::new, |name| format!("-{}", name.to_uppercase())),
            vision.n_layers(),
            vision.n_tokens()
        ),
    })?;
    match &config.resampler {
        Some(resampler) => output.line(&format!(
            "resampler         {} layers, {} visual tokens, {} heads of {}",
            resampler.n_layers, resampler.n_latents, resampler.n_heads, resampler.head_dim
        ))?,
        None => output.line("resampler         none")?,
    }
    output.line(&format!(
        "language model    {:?}, {} layers of width {}, {} heads, vocabulary {}",
        language.architecture,
        language.n_layers,
        language.width,
        language.n_heads,
        language.vocabulary
    ))?;
    output.line(&format!(
        "cross-attention   {} gated blocks, {} heads of {}, before layers {:?}",
        cross.layers.len(),
        cross.n_heads,
        cross.head_dim,
        cross.layers
    ))
}

/// Bytes the native backend needs beside the weights, by what they are for.
fn memory_plan(model: &Model, limits: &Limits) -> Result<BTreeMap<String, u64>> {
    let needs = model.needs()?;
    let cached = needs.token.saturating_mul(u64::try_from(limits.max_context)?);
    Ok(BTreeMap::from([
        ("encode one picture".to_owned(), model.picture_buffer_bytes()?),
        ("prefill of 128 tokens".to_owned(), model.text_buffer_bytes(128)?),
        ("decode step".to_owned(), model.text_buffer_bytes(1)?),
        (format!("KV cache of {} tokens", limits.max_context), cached),
        ("visual tokens, keys and values of one picture".to_owned(), needs.picture),
    ]))
}
