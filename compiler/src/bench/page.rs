//! `bench --html`: a report for people, one page without anything from outside.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use minijinja::{Environment, context};
use plotters::prelude::*;
use serde_json::{Value, json};

use super::measure::quantile;
use super::{MUCH_OF_OTHERS, Report, Stage, StageResult};
use crate::page::STYLE;

const TEMPLATE: &str = include_str!("page.html");
/// Width of a plot, in pixels.
const WIDTH: u32 = 960;
/// Colours of lines and bars, readable on white.
const COLOURS: [RGBColor; 5] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 39, 40),
    RGBColor(44, 160, 44),
    RGBColor(148, 103, 189),
    RGBColor(255, 127, 14),
];
/// Letters that are readable when a phone shrinks the plot.
const FONT: (&str, i32) = ("sans-serif", 18);
/// Bars of a histogram.
const BINS: usize = 30;

/// The page of a report.
///
/// # Errors
/// A plot that cannot be drawn.
pub fn bench_page(title: &str, report: &Report) -> Result<Vec<u8>> {
    let rate = |rate: Option<f64>| rate.map_or("none".to_owned(), |rate| format!("{rate:.0}"));
    let megabytes = |bytes: f64| format!("{:.1}", bytes / 1e6);
    let known = |bytes: Option<u64>| {
        bytes.map_or_else(|| "unknown".to_owned(), |bytes| megabytes(bytes as f64))
    };
    let machine = &report.machine;
    let mut environment = Environment::new();
    environment.add_template("page.html", TEMPLATE).context("the page's template")?;
    let page = environment.get_template("page.html")?.render(context! {
        style => STYLE,
        title => title,
        machine => machine,
        backend => report.backend,
        read => format!("{:.1}", machine.read_gb_per_s),
        f32 => format!("{:.0}", machine.f32_gop_per_s),
        bf16 => rate(machine.bf16_gop_per_s),
        int8 => rate(machine.int8_gop_per_s),
        warnings => report.warnings,
        rows => report.results.iter().map(row).collect::<Vec<Value>>(),
        images_plot => images_plot(&report.results)?,
        tokens_plot => tokens_plot(&report.results)?,
        ceiling_plot => ceiling_plot(&report.results)?,
        peak => known(report.peak_rss_bytes),
        steady => known(report.steady_rss_bytes),
        kv => megabytes(report.cache_bytes.kv as f64),
        media => megabytes(report.cache_bytes.media_per_image as f64),
    });
    Ok(page.context("the page's template")?.into_bytes())
}

fn row(result: &StageResult) -> Value {
    let number = |value: Option<f64>, digits: usize| {
        value.map_or_else(|| "—".to_owned(), |value| format!("{value:.digits$}"))
    };
    let ms = |value: f64| format!("{value:.2}");
    json!({
        "stage": result.stage.name(), "precision": result.precision, "images": result.images,
        "context": result.context, "median": ms(result.ms.median), "p10": ms(result.ms.p10),
        "p90": ms(result.ms.p90), "p99": ms(quantile(&result.samples_ms, 99)), "n": result.ms.n,
        "tokens_per_s": number(result.tokens_per_s, 1),
        "gb_per_s": number(result.weight_gb_per_s, 1),
        "gop_per_s": number(result.gop_per_s, 0),
        "of_ceiling": number(result.of_ceiling.map(|share| 100.0 * share), 0),
        "others": number(result.others, 2),
        "is_disturbed": result.others.is_some_and(|cores| cores > MUCH_OF_OTHERS),
    })
}

/// Medians of the stages that were timed with several numbers of pictures, with bars from p10 to p90.
fn images_plot(results: &[StageResult]) -> Result<Option<String>> {
    let mut by_stage: BTreeMap<Stage, Vec<&StageResult>> = BTreeMap::new();
    for result in results {
        by_stage.entry(result.stage).or_default().push(result);
    }
    by_stage.retain(|_, of_stage| of_stage.len() > 1);
    let shown = || by_stage.values().flatten();
    let most = shown().map(|result| result.images).max().unwrap_or(0);
    let top = shown().map(|result| result.ms.p90).fold(0.0, f64::max);
    let bottom = shown().map(|result| result.ms.p10).fold(f64::INFINITY, f64::min);
    if by_stage.is_empty() || bottom <= 0.0 {
        return Ok(None);
    }
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, 400)).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .x_label_area_size(36)
            .y_label_area_size(64)
            .build_cartesian_2d(
                -0.5..most as f64 * 1.05 + 0.5,
                (bottom * 0.8..top * 8.0).log_scale(),
            )?;
        chart.configure_mesh().x_desc("pictures").y_desc("ms").label_style(FONT).draw()?;
        for (index, (stage, of_stage)) in by_stage.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let points = of_stage.iter().map(|r| (r.images as f64, r.ms.median));
            chart
                .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
                .label(stage.name())
                .legend(move |(x, y)| Circle::new((x + 8, y), 3, colour.filled()));
            for result in of_stage {
                let x = result.images as f64;
                let bar = PathElement::new([(x, result.ms.p10), (x, result.ms.p90)], colour);
                chart.draw_series([bar])?;
                chart.draw_series([Circle::new((x, result.ms.median), 3, colour.filled())])?;
            }
        }
        let mut legend = chart.configure_series_labels();
        legend.position(SeriesLabelPosition::UpperLeft).label_font(FONT);
        legend.background_style(WHITE.mix(0.8)).draw()?;
        area.present()?;
    }
    Ok(Some(svg))
}

/// How the times of single tokens are spread, for the most pictures that were timed.
fn tokens_plot(results: &[StageResult]) -> Result<Option<String>> {
    let decodes = results.iter().filter(|result| result.stage == Stage::Decode);
    let Some(decode) = decodes.max_by_key(|result| result.images) else { return Ok(None) };
    let samples = &decode.samples_ms;
    let least = samples.iter().copied().fold(f64::INFINITY, f64::min);
    let most = samples.iter().copied().fold(0.0, f64::max);
    if samples.is_empty() || !most.is_finite() {
        return Ok(None);
    }
    let width = ((most - least) / BINS as f64).max(1e-6);
    let mut bins = [0u32; BINS];
    for sample in samples {
        bins[(((sample - least) / width) as usize).min(BINS - 1)] += 1;
    }
    let top = f64::from(bins.iter().copied().max().unwrap_or(1)) * 1.15;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, 320)).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .x_label_area_size(36)
            .y_label_area_size(48)
            .build_cartesian_2d(least..least + width * BINS as f64, 0.0..top)?;
        let (n, images) = (samples.len(), decode.images);
        let x =
            format!("ms of a token after {} with {images} pictures, {n} samples", decode.context);
        chart.configure_mesh().x_desc(x).y_desc("samples").label_style(FONT).draw()?;
        let bars = bins.iter().enumerate().map(|(bin, count)| {
            let from = least + width * bin as f64;
            Rectangle::new([(from, 0.0), (from + width, f64::from(*count))], COLOURS[0].filled())
        });
        chart.draw_series(bars)?;
        for (index, (name, percent)) in
            [("p50", 50), ("p90", 90), ("p99", 99)].into_iter().enumerate()
        {
            let (colour, at) = (COLOURS[(index + 1) % COLOURS.len()], quantile(samples, percent));
            let line = PathElement::new([(at, 0.0), (at, top)], colour.stroke_width(2));
            chart
                .draw_series([line])?
                .label(format!("{name} {at:.2} ms"))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour));
        }
        let mut legend = chart.configure_series_labels();
        legend.position(SeriesLabelPosition::UpperRight).label_font(FONT);
        legend.background_style(WHITE.mix(0.8)).draw()?;
        area.present()?;
    }
    Ok(Some(svg))
}

/// How near each stage is to what the machine can do.
fn ceiling_plot(results: &[StageResult]) -> Result<Option<String>> {
    let shares: Vec<(String, f64)> = results
        .iter()
        .filter_map(|result| {
            let plural = if result.images == 1 { "" } else { "s" };
            let name = format!("{}, {} picture{plural}", result.stage.name(), result.images);
            Some((name, 100.0 * result.of_ceiling?))
        })
        .collect();
    if shares.is_empty() {
        return Ok(None);
    }
    let most = shares.iter().map(|(_, share)| *share).fold(10.0, f64::max);
    let height = 48 + 32 * u32::try_from(shares.len())?;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .x_label_area_size(36)
            .build_cartesian_2d(0.0..most * 1.35, 0.0..shares.len() as f64)?;
        let mut mesh = chart.configure_mesh();
        mesh.disable_y_mesh().disable_y_axis().x_desc("%").label_style(FONT).draw()?;
        for (row, (name, share)) in shares.iter().rev().enumerate() {
            let y = row as f64;
            let bar = Rectangle::new([(0.0, y + 0.15), (*share, y + 0.85)], COLOURS[0].filled());
            chart.draw_series([bar])?;
            let text = format!("{name}: {share:.0} %");
            chart.draw_series([Text::new(text, (*share + 1.0, y + 0.75), FONT.into_font())])?;
        }
        area.present()?;
    }
    Ok(Some(svg))
}
