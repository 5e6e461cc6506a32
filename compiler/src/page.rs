//! `report.html`: the report of an artifact for people, one page without anything from outside.

pub(crate) mod plot;

use anyhow::{Context as _, Result};
use flamingo_models::manifest::Manifest;
use minijinja::{Environment, context};
use plotters::prelude::*;
use serde_json::{Value, json};

use crate::compile::Report;
use crate::emit::LayerStorage;
use crate::gate::{OUTLIERS, TaskScore};
use crate::ranges::{HalfRanges, OpRange};
use crate::static_ranges::{StaticRange, StaticRanges};
use plot::{Area, svg};

const TEMPLATE: &str = include_str!("page/report.html");
/// Ops without islands that are shown with their largest value.
const N_LARGEST: usize = 12;
/// What all pages look like.
pub(crate) const STYLE: &str = include_str!("page/style.css");

/// The page of an artifact's quantisation.
///
/// # Errors
/// A plot that cannot be drawn.
pub fn report_page(title: &str, manifest: &Manifest, report: &Report) -> Result<Vec<u8>> {
    let quantisation = &report.quantisation;
    let number = |value: Option<f64>, digits: usize| {
        value.map_or_else(|| "—".to_owned(), |value| format!("{value:.digits$}"))
    };
    let exact = |value: f64| format!("{value:.2e}");
    let row = |layer: &LayerStorage| -> Value {
        json!({
            "name": layer.name, "scheme": layer.scheme, "bytes": layer.bytes,
            "weight_sqnr": number(layer.sqnr_db, 1),
            "output_sqnr": number(layer.output_sqnr_db, 1),
            "kl_alone": layer.kl_alone.map_or_else(|| "—".to_owned(), exact),
            "outlier_ratio": number(layer.outlier_ratio, 1),
            "has_outliers": layer.outlier_ratio.is_some_and(|ratio| ratio > OUTLIERS),
        })
    };
    let layers: Vec<Value> = quantisation.layers.iter().map(row).collect();
    let verdict = quantisation.verdict.as_ref();
    let precision: Vec<String> =
        manifest.precision.iter().map(|(group, format)| format!("{group} {format}")).collect();
    let percent = |share: f64| format!("{:.1}", 100.0 * share);
    let task = |task: &TaskScore| {
        json!({"task": task.task, "shots": task.shots, "n": task.n,
               "f32": percent(task.f32), "rounded": percent(task.rounded)})
    };
    let mut environment = Environment::new();
    environment.add_template("report.html", TEMPLATE).context("the page's template")?;
    let page = environment.get_template("report.html")?.render(context! {
        style => STYLE,
        title => format!("{title}: {}", precision.join(", ")),
        bytes_f32 => bytes(quantisation.bytes_f32),
        bytes => bytes(quantisation.bytes),
        share => format!("{:.1}", 100.0 * quantisation.bytes as f64 / quantisation.bytes_f32.max(1) as f64),
        verdict => verdict,
        max_kl => quantisation.bounds.map(|bounds| exact(bounds.max_kl)),
        max_lost => quantisation.bounds.map(|bounds| bounds.max_lost),
        tasks => verdict.map(|v| v.tasks.iter().map(task).collect::<Vec<Value>>()),
        mean_kl => verdict.map(|v| exact(v.mean_kl)),
        p99_kl => verdict.map(|v| exact(v.p99_kl)),
        top1 => verdict.map(|v| format!("{:.2}", 100.0 * v.top1_agreement)),
        cosine => verdict.map(|v| format!("{:.6}", v.visual_cosine)),
        perplexity => verdict.map(|v| format!("{:.3}", v.perplexity)),
        perplexity_f32 => verdict.map(|v| format!("{:.3}", v.perplexity_f32)),
        raised => quantisation.raised,
        ranges => quantisation.static_ranges,
        static_kl => quantisation.static_ranges.as_ref().map(|ranges| exact(ranges.mean_kl)),
        static_linears => quantisation.static_ranges.as_ref().map(static_rows),
        f16 => report.f16,
        f16_ops => report.f16.as_ref().map(half_rows),
        layers => layers,
        noise_plot => noise_plot(&quantisation.layers)?,
        bytes_plot => bytes_plot(&quantisation.layers)?,
    });
    Ok(page.context("the page's template")?.into_bytes())
}

/// Ops that are in f32 for GPUs, and those whose values in f16 are largest.
fn half_rows(ranges: &HalfRanges) -> Vec<Value> {
    let mut ops: Vec<&OpRange> = ranges.ops.iter().collect();
    ops.sort_by(|a, b| b.largest.total_cmp(&a.largest));
    let (in_f32, others): (Vec<_>, Vec<_>) = ops.into_iter().partition(|op| op.in_f32.is_some());
    let row = |op: &OpRange| {
        let in_f32 = match op.in_f32.as_deref() {
            Some("output") => "its output",
            Some(_) => "all of it",
            None => "—",
        };
        json!({"stage": op.stage, "value": op.value, "largest": format!("{:.3e}", op.largest),
               "in_f32": in_f32, "is_wide": op.in_f32.is_some()})
    };
    in_f32.into_iter().chain(others.into_iter().take(N_LARGEST)).map(row).collect()
}

/// Ranges of activations, in the order of the graphs.
fn static_rows(ranges: &StaticRanges) -> Vec<Value> {
    let row = |linear: &StaticRange| {
        json!({"linear": linear.linear, "largest": format!("{:.3}", linear.largest),
               "range": format!("{:.3}", linear.range), "sqnr": format!("{:.1}", linear.sqnr_db),
               "is_static": linear.is_static})
    };
    ranges.linears.iter().map(row).collect()
}

fn bytes(n: u64) -> String {
    format!("{:.2} MB", n as f64 / 1e6)
}

/// A colour for each scheme, in the order of their names.
fn schemes(layers: &[LayerStorage]) -> Vec<&str> {
    let mut schemes: Vec<&str> = layers.iter().map(|layer| layer.scheme.as_str()).collect();
    schemes.sort_unstable();
    schemes.dedup();
    schemes
}

/// Signal to noise over the layers in the order of the file: of products where calibration measured them.
fn noise_plot(layers: &[LayerStorage]) -> Result<String> {
    let lossy: Vec<(usize, f64, &str)> = layers
        .iter()
        .enumerate()
        .filter_map(|(index, layer)| {
            Some((index, layer.output_sqnr_db.or(layer.sqnr_db)?, layer.scheme.as_str()))
        })
        .collect();
    let top = lossy.iter().map(|(_, db, _)| *db).fold(10.0, f64::max) * 1.05;
    let bottom = lossy.iter().map(|(_, db, _)| *db).fold(0.0, f64::min);
    let draw = |area: &Area<'_>| {
        let mut builder = ChartBuilder::on(area);
        builder.margin(8).x_label_area_size(32).y_label_area_size(48);
        let mut chart = builder.build_cartesian_2d(0..layers.len().max(1), bottom..top)?;
        chart.configure_mesh().x_desc("layer, in the order of the file").y_desc("dB").draw()?;
        for (index, scheme) in schemes(layers).into_iter().enumerate() {
            let colour = Palette99::pick(index).to_rgba();
            let points = lossy.iter().filter(|(_, _, of)| *of == scheme);
            chart
                .draw_series(points.map(|(at, db, _)| Circle::new((*at, *db), 3, colour.filled())))?
                .label(scheme)
                .legend(move |(x, y)| Circle::new((x + 8, y), 3, colour.filled()));
        }
        if !lossy.is_empty() {
            chart.configure_series_labels().background_style(WHITE.mix(0.8)).draw()?;
        }
        Ok(())
    };
    svg(320, draw)
}

/// Bytes of each part of the model, by how they are stored.
fn bytes_plot(layers: &[LayerStorage]) -> Result<String> {
    let part = |layer: &LayerStorage| layer.name.split('.').next().unwrap_or("").to_owned();
    let mut parts: Vec<String> = layers.iter().map(part).collect();
    parts.sort();
    parts.dedup();
    let of = |name: &str, scheme: &str| -> u64 {
        let own = layers.iter().filter(|layer| part(layer) == name && layer.scheme == scheme);
        own.map(|layer| layer.bytes).sum()
    };
    let total = |name: &str| schemes(layers).into_iter().map(|scheme| of(name, scheme)).sum();
    let most = parts.iter().map(|name| total(name)).max().unwrap_or(1).max(1);
    let height = 48 + 32 * u32::try_from(parts.len())?;
    let draw = |area: &Area<'_>| {
        let mut builder = ChartBuilder::on(area);
        builder.margin(8).x_label_area_size(32).y_label_area_size(140);
        let mut chart =
            builder.build_cartesian_2d(0.0..most as f64 / 1e6, 0.0..parts.len().max(1) as f64)?;
        let name = |y: &f64| parts.get(*y as usize).cloned().unwrap_or_default();
        let mut mesh = chart.configure_mesh();
        mesh.disable_y_mesh().x_desc("MB").y_labels(parts.len()).y_label_formatter(&name);
        mesh.draw()?;
        for (index, scheme) in schemes(layers).into_iter().enumerate() {
            let colour = Palette99::pick(index).to_rgba();
            let bar = |(row, part): (usize, &String)| {
                let before: u64 =
                    schemes(layers).into_iter().take(index).map(|scheme| of(part, scheme)).sum();
                let (from, to) = (before as f64 / 1e6, (before + of(part, scheme)) as f64 / 1e6);
                let y = row as f64;
                Rectangle::new([(from, y + 0.15), (to, y + 0.85)], colour.filled())
            };
            chart
                .draw_series(parts.iter().enumerate().map(bar))?
                .label(scheme)
                .legend(move |(x, y)| Circle::new((x + 8, y), 3, colour.filled()));
        }
        if !layers.is_empty() {
            chart.configure_series_labels().background_style(WHITE.mix(0.8)).draw()?;
        }
        Ok(())
    };
    svg(height, draw)
}
