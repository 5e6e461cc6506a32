//! Curves of a run as one SVG: the losses of each stage, and the gates.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use plotters::prelude::*;
use serde_json::Value;

type Series = BTreeMap<String, Vec<(f64, f64)>>;

/// Draws what a file of metrics says.
///
/// # Errors
/// Files that cannot be read or written.
pub fn curves(metrics: &Path, svg: &Path) -> Result<()> {
    let text = fs::read_to_string(metrics)
        .with_context(|| format!("cannot read `{}`", metrics.display()))?;
    let lines: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let panels = [
        ("contrastive: loss", numbers(&lines, "losses", "contrastive")),
        ("language: loss", numbers(&lines, "losses", "language")),
        ("flamingo: losses", numbers(&lines, "losses", "flamingo")),
        ("flamingo: tanh of the gates", gates(&lines)),
        ("language: right in words", numbers(&lines, "accuracy", "language")),
        ("flamingo: right", numbers(&lines, "accuracy", "flamingo")),
    ];
    let area = SVGBackend::new(svg, (960, 1800)).into_drawing_area();
    area.fill(&WHITE)?;
    for (area, (title, series)) in area.split_evenly((panels.len(), 1)).iter().zip(&panels) {
        panel(area, title, series).with_context(|| format!("cannot draw `{}`", svg.display()))?;
    }
    area.present().with_context(|| format!("cannot write `{}`", svg.display()))
}

/// One curve for each number below a key.
fn numbers(lines: &[Value], key: &str, stage: &str) -> Series {
    let mut series = Series::new();
    for line in lines.iter().filter(|line| line["stage"] == stage) {
        for (name, loss) in line[key].as_object().into_iter().flatten() {
            let point = (line["step"].as_f64().unwrap_or(0.0), loss.as_f64().unwrap_or(0.0));
            series.entry(name.clone()).or_default().push(point);
        }
    }
    series
}

fn gates(lines: &[Value]) -> Series {
    let mut series = Series::new();
    for line in lines {
        for (index, gate) in line["gates"].as_array().into_iter().flatten().enumerate() {
            let part = if index % 2 == 0 { "attention" } else { "feed-forward" };
            let point = (line["step"].as_f64().unwrap_or(0.0), gate.as_f64().unwrap_or(0.0));
            series.entry(format!("{} {part}", index / 2)).or_default().push(point);
        }
    }
    series
}

fn panel(
    area: &DrawingArea<SVGBackend, plotters::coord::Shift>,
    title: &str,
    series: &Series,
) -> Result<()> {
    let points = || series.values().flatten();
    let last = points().map(|(step, _)| *step).fold(1.0, f64::max);
    let low = points().map(|(_, y)| *y).fold(0.0, f64::min);
    let high = points().map(|(_, y)| *y).fold(0.1, f64::max) * 1.05;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(8)
        .x_label_area_size(24)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..last, low..high)?;
    chart.configure_mesh().x_desc("step").draw()?;
    for (index, (name, points)) in series.iter().enumerate() {
        let colour = Palette99::pick(index).to_rgba();
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour))?
            .label(name)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], colour));
    }
    if !series.is_empty() {
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).draw()?;
    }
    Ok(())
}
