//! `coverage.html`: what would run where, for people, one page without anything from outside.

use anyhow::{Context as _, Result};
use minijinja::{Environment, context};
use plotters::prelude::*;
use serde_json::{Value, json};

use super::memory::Memory;
use super::placement::{Device, ValueCopy};
use super::{COLUMNS, Coverage, Role, TableSource};
use crate::page::STYLE;
use crate::page::plot::{Area, svg};

const TEMPLATE: &str = include_str!("page.html");
/// Most partitions and copies that are listed.
const MAX_ROWS: usize = 200;

/// One stage of an artifact on the page.
pub struct StageCoverage<'a> {
    /// The stage: `media` or `decoder`.
    pub name: &'a str,
    /// What would run where.
    pub coverage: &'a Coverage,
    /// What it holds.
    pub memory: &'a Memory,
}

/// The page of an artifact's stages.
///
/// # Errors
/// A plot that cannot be drawn.
pub fn coverage_page(title: &str, stages: &[StageCoverage<'_>]) -> Result<Vec<u8>> {
    let mut environment = Environment::new();
    environment.add_template("page.html", TEMPLATE).context("the page's template")?;
    let shown = stages.iter().map(stage_json).collect::<Result<Vec<Value>>>()?;
    let page = environment.get_template("page.html")?.render(context! {
        style => STYLE,
        title => title,
        columns => COLUMNS,
        stages => shown,
    });
    Ok(page.context("the page's template")?.into_bytes())
}

fn stage_json(stage: &StageCoverage<'_>) -> Result<Value> {
    let (coverage, memory) = (stage.coverage, stage.memory);
    let largest = memory.largest.as_ref();
    let partitions = coverage.partitions.iter().take(MAX_ROWS).map(|partition| {
        json!({"provider": partition.provider.name(), "n_nodes": partition.n_nodes, "first": partition.first})
    });
    Ok(json!({
        "name": stage.name,
        "target": coverage.target,
        "is_full": coverage.is_full(),
        "summary": coverage.summary(),
        "fallbacks": coverage.table(),
        "partitions": partitions.collect::<Vec<Value>>(),
        "n_more_partitions": coverage.partitions.len().saturating_sub(MAX_ROWS),
        "copies": coverage.copies.iter().take(MAX_ROWS).map(copy_json).collect::<Vec<Value>>(),
        "n_more_copies": coverage.copies.len().saturating_sub(MAX_ROWS),
        "weights": megabytes(memory.initializer_bytes),
        "largest": largest.map(|largest| format!("{} ({})", megabytes(largest.bytes), largest.value)),
        "n_unknown": memory.n_unknown,
        "tables": coverage.tables.iter().map(table_json).collect::<Vec<Value>>(),
        "plot": plot(coverage)?,
    }))
}

fn copy_json(copy: &ValueCopy) -> Value {
    let device = |device| match device {
        Device::Cpu => "cpu",
        Device::Gpu => "gpu",
    };
    json!({"value": copy.value, "from": device(copy.from), "to": device(copy.to), "node": copy.node})
}

fn table_json(table: &TableSource) -> Value {
    json!({"name": format!("{} {}", table.provider.name(), table.version), "sources": table.sources})
}

fn megabytes(bytes: u64) -> String {
    format!("{:.2} MB", bytes as f64 / 1e6)
}

/// Nodes by who runs them.
fn plot(coverage: &Coverage) -> Result<String> {
    let mut bars: Vec<(&str, usize)> = coverage
        .tables
        .iter()
        .map(|table| (table.provider.name(), coverage.n_nodes(Some(table.provider))))
        .collect();
    bars.push(("nobody", coverage.n_nodes(None)));
    bars.push(("shapes", coverage.n_of(Role::Shape)));
    bars.push(("folded", coverage.n_of(Role::Folded)));
    let most = bars.iter().map(|(_, n)| *n).max().unwrap_or(0).max(1);
    let height = 48 + 28 * u32::try_from(bars.len())?;
    let draw = |area: &Area<'_>| {
        let mut builder = ChartBuilder::on(area);
        builder.margin(8).x_label_area_size(32).y_label_area_size(80);
        let mut chart = builder.build_cartesian_2d(0.0..most as f64, 0.0..bars.len() as f64)?;
        let name = |y: &f64| bars.get(*y as usize).map_or("", |(name, _)| *name).to_owned();
        let mut mesh = chart.configure_mesh();
        mesh.disable_y_mesh().x_desc("nodes").y_labels(bars.len()).y_label_formatter(&name);
        mesh.draw()?;
        let bar = |(row, (_, n)): (usize, &(&str, usize))| {
            let y = row as f64;
            let colour = Palette99::pick(row).to_rgba();
            Rectangle::new([(0.0, y + 0.15), (*n as f64, y + 0.85)], colour.filled())
        };
        chart.draw_series(bars.iter().enumerate().map(bar))?;
        Ok(())
    };
    svg(height, draw)
}

#[cfg(test)]
mod tests {
    use super::super::example::graph;
    use super::super::memory::memory;
    use super::*;
    use flamingo_ir::Bindings;

    #[test]
    fn the_page_shows_fallbacks_and_escapes_names() {
        let listing = graph(
            "Relu@17 | x:f32 | a<b:f32
             com.microsoft:QuickGelu@1 | a<b | y:f32",
        );
        let coverage = Coverage::new(&listing, "tensorrt-10.3").unwrap();
        let memory = memory(&listing, &Bindings::new());
        let stages = [StageCoverage { name: "decoder", coverage: &coverage, memory: &memory }];
        let page = String::from_utf8(coverage_page("model", &stages).unwrap()).unwrap();
        for text in ["decoder", "QuickGelu", "unknown operator", "<svg", "10.1-GA", "a&lt;b"] {
            assert!(page.contains(text), "{text}");
        }
        assert!(!page.contains("a<b") && !page.contains("<script") && !page.contains("src="));
    }
}
