//! The plots of the page of `bench`, as SVG; none where there is nothing to show.

use std::collections::BTreeMap;

use anyhow::Result;
use flamingo_runtime::machine::Machine;
use plotters::prelude::*;

use super::process::MemoryAt;
use super::{Profile, Stage, StageResult};
use crate::page::plot::{Area, FONT, legend, svg};
use crate::profile::parts;

/// Colours of lines and bars, readable on white.
const COLOURS: [RGBColor; 8] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 39, 40),
    RGBColor(44, 160, 44),
    RGBColor(148, 103, 189),
    RGBColor(255, 127, 14),
    RGBColor(23, 190, 207),
    RGBColor(140, 86, 75),
    RGBColor(127, 127, 127),
];
/// Bars of a histogram.
const BINS: usize = 30;
/// Parts of a stage that have a colour of their own; the others are one.
const PARTS: usize = 7;

/// What a plot of times has on its horizontal axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Axis {
    /// Pictures in the text.
    Images,
    /// Tokens before the decoded one.
    Context,
    /// Sequences of a step.
    Batch,
}

impl Axis {
    fn name(self) -> &'static str {
        match self {
            Axis::Images => "pictures",
            Axis::Context => "tokens before",
            Axis::Batch => "sequences in one step",
        }
    }

    fn place(self, result: &StageResult) -> usize {
        match self {
            Axis::Images => result.images,
            Axis::Context => result.context,
            Axis::Batch => result.batch,
        }
    }

    /// What must be equal for results to lie on one line.
    fn others(self, result: &StageResult) -> (usize, usize) {
        let StageResult { images, context, batch, .. } = *result;
        match self {
            Axis::Images => (context, batch),
            Axis::Context => (images, batch),
            Axis::Batch => (images, context),
        }
    }
}

/// Resident memory over time, a colour for what was going on.
pub(super) fn memory_plot(memory: &[MemoryAt]) -> Result<Option<String>> {
    let (Some(last), Some(most)) = (memory.last(), memory.iter().map(|at| at.rss_bytes).max())
    else {
        return Ok(None);
    };
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    let mut doing: Vec<&str> = Vec::new();
    for pair in memory.windows(2) {
        if !doing.contains(&pair[0].doing) {
            doing.push(pair[0].doing);
        }
    }
    let draw = |area: &Area<'_>| {
        let (x, y) = (0.0..last.ms / 1e3 * 1.02 + 1e-3, 0.0..megabytes(most) * 1.35 + 1.0);
        let mut builder = ChartBuilder::on(area);
        builder.margin(8).x_label_area_size(36).y_label_area_size(72);
        let mut chart = builder.build_cartesian_2d(x, y)?;
        let mut mesh = chart.configure_mesh();
        mesh.x_desc("seconds").y_desc("MB resident").label_style(FONT).draw()?;
        for (index, name) in doing.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            // Each piece goes on to the next look, whatever that was at.
            let pieces = memory.windows(2).filter(|pair| pair[0].doing == *name);
            let points = |pair: &[MemoryAt]| {
                let point = |at: &MemoryAt| (at.ms / 1e3, megabytes(at.rss_bytes));
                PathElement::new([point(&pair[0]), point(&pair[1])], colour.stroke_width(3))
            };
            chart
                .draw_series(pieces.map(points))?
                .label(*name)
                .legend(move |(x, y)| Circle::new((x + 8, y), 3, colour.filled()));
        }
        legend(&mut chart, SeriesLabelPosition::UpperLeft)
    };
    svg(320, draw).map(Some)
}

/// The roofline (Williams, Waterman, Patterson, 2009): operations a second against operations per byte of weights, below
/// the read bandwidth and the peak of each arithmetic that this machine has.
pub(super) fn roofline_plot(machine: &Machine, results: &[StageResult]) -> Result<Option<String>> {
    let point = |r: &StageResult| {
        let intensity = r.gop? * 1e9 / r.weight_bytes.filter(|bytes| *bytes > 0)? as f64;
        Some((intensity, r.gop_per_s?, r.stage))
    };
    let mut points: Vec<(f64, f64, Stage)> = results.iter().filter_map(point).collect();
    points.retain(|(_, rate, stage)| *rate > 0.0 && *stage != Stage::FirstToken);
    if points.is_empty() {
        return Ok(None);
    }
    let peaks = [
        ("f32", Some(machine.f32_gop_per_s)),
        ("bf16", machine.bf16_gop_per_s),
        ("int8", machine.int8_gop_per_s),
    ];
    let peaks: Vec<(&str, f64)> = peaks.into_iter().filter_map(|(n, p)| Some((n, p?))).collect();
    let top = peaks.iter().map(|(_, peak)| *peak).fold(0.0, f64::max) * 2.0;
    let least = points.iter().map(|p| p.0).fold(1.0, f64::min) / 2.0;
    let most = points.iter().map(|p| p.0).fold(top / machine.read_gb_per_s, f64::max) * 4.0;
    let bottom = points.iter().map(|p| p.1).fold(f64::INFINITY, f64::min) / 2.0;
    let draw = |area: &Area<'_>| {
        let mut builder = ChartBuilder::on(area);
        builder.margin(8).x_label_area_size(40).y_label_area_size(72);
        let mut chart =
            builder.build_cartesian_2d((least..most).log_scale(), (bottom..top).log_scale())?;
        let mut mesh = chart.configure_mesh();
        mesh.x_desc("operations per byte of weights").y_desc("GOP/s").label_style(FONT).draw()?;
        for (name, peak) in &peaks {
            let ridge = peak / machine.read_gb_per_s;
            let roof = [least, ridge.clamp(least, most), most];
            let line = roof.map(|x| (x, (x * machine.read_gb_per_s).min(*peak)));
            chart.draw_series(LineSeries::new(line, BLACK.mix(0.5).stroke_width(2)))?;
            let text = format!("{name} {peak:.0} GOP/s");
            let at = (most / 8.0, peak * 1.28);
            chart.draw_series([Text::new(text, at, FONT.into_font())])?;
        }
        let mut stages: Vec<Stage> = points.iter().map(|(_, _, stage)| *stage).collect();
        stages.sort_unstable();
        stages.dedup();
        for (index, stage) in stages.into_iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let own = points.iter().filter(|(_, _, of)| *of == stage);
            chart
                .draw_series(own.map(|(x, y, _)| Circle::new((*x, *y), 6, colour.filled())))?
                .label(stage.name())
                .legend(move |(x, y)| Circle::new((x + 8, y), 4, colour.filled()));
        }
        legend(&mut chart, SeriesLabelPosition::LowerRight)
    };
    svg(420, draw).map(Some)
}

/// What the instructions of an encode, a prefill and a token spend their time on, in hundredths of it.
pub(super) fn parts_plot(profiles: &[Profile]) -> Result<Option<String>> {
    let shown = [Stage::Encode, Stage::Prefill, Stage::Decode];
    let first = |stage| profiles.iter().find(|p| p.stage == stage && !p.records.is_empty());
    let rows: Vec<(&str, Vec<(String, f64)>)> =
        shown.into_iter().filter_map(first).map(|p| (p.stage.name(), shares(p))).collect();
    if rows.is_empty() {
        return Ok(None);
    }
    let tallest = rows.iter().map(|(_, shares)| shares.len()).max().unwrap_or(0);
    let height = u32::try_from(rows.len() * (56 + 24 * tallest))?;
    let draw = |area: &Area<'_>| {
        let areas = area.split_evenly((rows.len(), 1));
        for (area, (stage, shares)) in areas.iter().zip(&rows) {
            let n = shares.len() as f64;
            let most = shares.iter().map(|(_, share)| *share).fold(1.0, f64::max);
            let mut builder = ChartBuilder::on(area);
            builder.margin(8).caption(*stage, FONT);
            let mut chart = builder.build_cartesian_2d(0.0..most * 2.2, 0.0..n.max(1.0))?;
            for (row, (name, share)) in shares.iter().rev().enumerate() {
                let y = row as f64;
                let bar = [(0.0, y + 0.12), (*share, y + 0.88)];
                chart.draw_series([Rectangle::new(bar, COLOURS[0].filled())])?;
                let text = format!("{share:.0} % {name}");
                let at = (*share + most * 0.01, y + 0.85);
                chart.draw_series([Text::new(text, at, FONT.into_font())])?;
            }
        }
        Ok(())
    };
    svg(height, draw).map(Some)
}

/// Parts of a stage by their share of its time, in hundredths, the largest first.
fn shares(profile: &Profile) -> Vec<(String, f64)> {
    let parts = parts(&profile.records);
    let all = parts.iter().map(|part| part.ms).sum::<f64>().max(1e-9);
    let share = |ms: f64| 100.0 * ms / all;
    let mut shares: Vec<(String, f64)> = parts
        .iter()
        .take(PARTS)
        .map(|part| (format!("{} ({})", part.part, part.op), share(part.ms)))
        .collect();
    let others: f64 = parts.iter().skip(PARTS).map(|part| part.ms).sum();
    if others > 0.0 {
        shares.push((format!("{} others", parts.len() - PARTS), share(others)));
    }
    shares
}

/// Medians of the stages that were timed at several places of an axis, with bars from p10 to p90; all else as in the
/// stage's first result.
pub(super) fn axis_plot(results: &[StageResult], axis: Axis) -> Result<Option<String>> {
    let mut by_stage: BTreeMap<Stage, Vec<&StageResult>> = BTreeMap::new();
    for result in results {
        let of_stage = by_stage.entry(result.stage).or_default();
        if of_stage.first().is_none_or(|first| axis.others(first) == axis.others(result)) {
            of_stage.push(result);
        }
    }
    by_stage.retain(|_, of_stage| of_stage.len() > 1);
    let shown = || by_stage.values().flatten();
    let most = shown().map(|result| axis.place(result)).max().unwrap_or(0) as f64;
    let top = shown().map(|result| result.ms.p90).fold(0.0, f64::max);
    let bottom = shown().map(|result| result.ms.p10).fold(f64::INFINITY, f64::min);
    if by_stage.is_empty() || bottom <= 0.0 {
        return Ok(None);
    }
    let draw = |area: &Area<'_>| {
        let (x, y) = (-0.02 * most..most * 1.05, (bottom * 0.8..top * 8.0).log_scale());
        let mut builder = ChartBuilder::on(area);
        builder.margin(8).x_label_area_size(36).y_label_area_size(64);
        let mut chart = builder.build_cartesian_2d(x, y)?;
        chart.configure_mesh().x_desc(axis.name()).y_desc("ms").label_style(FONT).draw()?;
        for (index, (stage, of_stage)) in by_stage.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let points = of_stage.iter().map(|r| (axis.place(r) as f64, r.ms.median));
            chart
                .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
                .label(stage.name())
                .legend(move |(x, y)| Circle::new((x + 8, y), 3, colour.filled()));
            for result in of_stage {
                let x = axis.place(result) as f64;
                let bar = PathElement::new([(x, result.ms.p10), (x, result.ms.p90)], colour);
                chart.draw_series([bar])?;
                chart.draw_series([Circle::new((x, result.ms.median), 3, colour.filled())])?;
            }
        }
        legend(&mut chart, SeriesLabelPosition::UpperLeft)
    };
    svg(400, draw).map(Some)
}

/// How the times of single tokens are spread, for the most pictures that were timed.
pub(super) fn tokens_plot(results: &[StageResult]) -> Result<Option<String>> {
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
    let (n, images, context) = (samples.len(), decode.images, decode.context);
    let draw = |area: &Area<'_>| {
        let mut builder = ChartBuilder::on(area);
        builder.margin(8).x_label_area_size(36).y_label_area_size(48);
        let mut chart = builder.build_cartesian_2d(least..least + width * BINS as f64, 0.0..top)?;
        let x = format!("ms of a token after {context} with {images} pictures, {n} samples");
        chart.configure_mesh().x_desc(x).y_desc("samples").label_style(FONT).draw()?;
        let bars = bins.iter().enumerate().map(|(bin, count)| {
            let from = least + width * bin as f64;
            Rectangle::new([(from, 0.0), (from + width, f64::from(*count))], COLOURS[0].filled())
        });
        chart.draw_series(bars)?;
        let marks = [("p50", decode.ms.median), ("p90", decode.ms.p90), ("p99", decode.ms.p99)];
        for (index, (name, at)) in marks.into_iter().enumerate() {
            let colour = COLOURS[index + 1];
            let line = PathElement::new([(at, 0.0), (at, top)], colour.stroke_width(2));
            chart
                .draw_series([line])?
                .label(format!("{name} {at:.2} ms"))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour));
        }
        legend(&mut chart, SeriesLabelPosition::UpperRight)
    };
    svg(320, draw).map(Some)
}

/// How near each stage is to what the machine can do.
pub(super) fn ceiling_plot(results: &[StageResult]) -> Result<Option<String>> {
    let shares: Vec<(String, f64)> = results
        .iter()
        .filter_map(|result| {
            let plural = if result.images == 1 { "" } else { "s" };
            let StageResult { images, context, batch, .. } = *result;
            let tokens = if context > 0 { format!(", {context} tokens") } else { String::new() };
            let batch = if batch > 1 { format!(" × {batch}") } else { String::new() };
            let name = format!("{}, {images} picture{plural}{tokens}{batch}", result.stage.name());
            Some((name, 100.0 * result.of_ceiling?))
        })
        .collect();
    if shares.is_empty() {
        return Ok(None);
    }
    let most = shares.iter().map(|(_, share)| *share).fold(10.0, f64::max);
    let height = 48 + 32 * u32::try_from(shares.len())?;
    let draw = |area: &Area<'_>| {
        let mut builder = ChartBuilder::on(area);
        builder.margin(8).x_label_area_size(36);
        let mut chart = builder.build_cartesian_2d(0.0..most * 1.35, 0.0..shares.len() as f64)?;
        let mut mesh = chart.configure_mesh();
        mesh.disable_y_mesh().disable_y_axis().x_desc("%").label_style(FONT).draw()?;
        for (row, (name, share)) in shares.iter().rev().enumerate() {
            let y = row as f64;
            let bar = Rectangle::new([(0.0, y + 0.15), (*share, y + 0.85)], COLOURS[0].filled());
            chart.draw_series([bar])?;
            let text = format!("{name}: {share:.0} %");
            chart.draw_series([Text::new(
                text,
                (*share + most * 0.01, y + 0.75),
                FONT.into_font(),
            )])?;
        }
        Ok(())
    };
    svg(height, draw).map(Some)
}
