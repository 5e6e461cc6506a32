//! `eval --report`: a page with scores, plots and answers with their pictures, without anything from outside.

use std::io::Cursor;

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::imageops::FilterType;
use image::{DynamicImage, ImageFormat, RgbImage};
use minijinja::{Environment, context};
use plotters::prelude::*;
use serde_json::{Value, json};

use super::ask::{AskOptions, Asker};
use super::data::{Field, Row};
use super::journal::Journal;
use super::run::{Outcome, Timing};
use super::select::Select;
use crate::page::STYLE;
use crate::page::plot::{Area, FONT, legend, svg};

const TEMPLATE: &str = include_str!("page.html");
/// Questions that are shown of a task: half of them answered wrong, if there are so many.
const N_SHOWN: usize = 8;
/// Examples that are shown of a question, the last ones.
const N_EXAMPLES: usize = 4;
/// Most pixels of a side of a picture in the page.
const SIDE: u32 = 160;

/// The page of a run. `shown` are rows of tables that [`shown`] made.
///
/// # Errors
/// A plot that cannot be drawn.
pub fn eval_page(
    title: &str,
    options: &AskOptions,
    results: &[(Outcome, Timing)],
    shown: &[Value],
    reasons: &[String],
) -> Result<Vec<u8>> {
    let select = match options.select {
        Select::Fixed => "The same",
        Select::Random => "Randomly drawn",
        Select::Rices => "Similar (RICES)",
    };
    let orders = match options.ensemble {
        0 | 1 => "one order".to_owned(),
        n => format!("mean of up to {n} orders"),
    };
    let mut environment = Environment::new();
    environment.add_template("page.html", TEMPLATE).context("the page's template")?;
    let page = environment.get_template("page.html")?.render(context! {
        style => STYLE,
        title => title,
        select => select,
        orders => orders,
        seed => options.seed,
        timing_note => "Times are of questions asked together; reading examples that all share is not in them.",
        rows => results.iter().map(row).collect::<Vec<Value>>(),
        reasons => reasons,
        shots_plot => plot(results, "examples before the question", |outcome, _| outcome.shots as f64)?,
        time_plot => plot(results, "milliseconds a question", |_, timing| timing.ms)?,
        examples => shown,
    });
    Ok(page.context("the page's template")?.into_bytes())
}

fn row((outcome, timing): &(Outcome, Timing)) -> Value {
    let percent = |share: f64| format!("{:.1}", 100.0 * share);
    json!({
        "task": outcome.task, "metric": outcome.metric, "shots": outcome.shots, "n": outcome.n,
        "bad": outcome.bad.to_string(), "score": percent(outcome.score),
        "interval": format!("{} – {}", percent(outcome.low), percent(outcome.high)),
        "ms": format!("{:.1}", timing.ms),
    })
}

/// Some questions of a task with pictures and answers.
pub fn shown(asker: &Asker<'_>, shots: usize, journal: &Journal) -> Value {
    let task = asker.task();
    let answers = asker.queries().iter().enumerate();
    let answers = answers.filter_map(|(n, row)| Some((*row, journal.get(&task.name, shots, n)?)));
    let good = answers.filter(|(_, answer)| answer.bad.is_none());
    let is_wrong = |row: &Row, given: &str| !row.answers.iter().any(|right| right == given);
    let (wrong, right): (Vec<_>, Vec<_>) =
        good.partition(|(row, answer)| is_wrong(row, &answer.given));
    let n_wrong = wrong.len().min(N_SHOWN.saturating_sub(right.len()).max(N_SHOWN / 2));
    let picked = wrong.iter().take(n_wrong).chain(right.iter().take(N_SHOWN - n_wrong));
    let example = |place: &usize| {
        let row = asker.support().get(*place)?;
        Some(json!({ "images": images(row), "answer": row.answers.first() }))
    };
    let row = |(row, answer): &(&Row, &super::journal::Answer)| {
        let first = answer.examples.len().saturating_sub(N_EXAMPLES);
        let examples: Vec<Value> = answer.examples[first..].iter().filter_map(example).collect();
        json!({
            "id": row.id, "images": images(row), "text": text(row), "given": answer.given,
            "references": row.answers.iter().take(5).cloned().collect::<Vec<_>>().join(" | "),
            "is_wrong": is_wrong(row, &answer.given), "examples": examples,
        })
    };
    json!({ "name": task.name, "shots": shots, "rows": picked.map(row).collect::<Vec<Value>>() })
}

fn text(row: &Row) -> String {
    let field = |(name, field): (&String, &Field)| match field {
        Field::Text(text) => format!("{name}: {text}"),
        Field::Turns(turns) => format!("{name}: {} turns", turns.len()),
    };
    row.fields.iter().map(field).collect::<Vec<String>>().join("; ")
}

/// Pictures of a row as data URIs; those that cannot be read are left out.
fn images(row: &Row) -> Vec<String> {
    let pictures = row.media.iter().filter_map(|media| media.pictures().ok()).flatten();
    let uri = |picture: flamingo_runtime::image::Picture| {
        let (width, height) =
            (u32::try_from(picture.width()).ok()?, u32::try_from(picture.height()).ok()?);
        let rgb = RgbImage::from_raw(width, height, picture.to_rgb().pixels().to_vec())?;
        let mut image = DynamicImage::ImageRgb8(rgb);
        if width.max(height) > SIDE {
            image = image.resize(SIDE, SIDE, FilterType::Triangle);
        }
        let mut png = Cursor::new(Vec::new());
        image.write_to(&mut png, ImageFormat::Png).ok()?;
        Some(format!("data:image/png;base64,{}", STANDARD.encode(png.into_inner())))
    };
    pictures.filter_map(uri).collect()
}

/// Scores with their intervals over something, a line for each task.
fn plot(
    results: &[(Outcome, Timing)],
    x_name: &str,
    x: impl Fn(&Outcome, &Timing) -> f64,
) -> Result<String> {
    let mut tasks: Vec<&str> = results.iter().map(|(outcome, _)| outcome.task.as_str()).collect();
    tasks.dedup();
    let right = results.iter().map(|(outcome, timing)| x(outcome, timing)).fold(1e-3, f64::max);
    let top = results.iter().map(|(outcome, _)| 100.0 * outcome.high).fold(100.0, f64::max);
    let draw = |area: &Area<'_>| {
        let mut builder = ChartBuilder::on(area);
        builder.margin(8).x_label_area_size(40).y_label_area_size(64);
        let mut chart = builder.build_cartesian_2d(-0.02 * right..right * 1.05, 0.0..top * 1.05)?;
        chart.configure_mesh().x_desc(x_name).y_desc("score × 100").label_style(FONT).draw()?;
        for (index, task) in tasks.iter().enumerate() {
            let colour = Palette99::pick(index).to_rgba();
            let own: Vec<(f64, &Outcome)> = results
                .iter()
                .filter(|(outcome, _)| outcome.task == *task)
                .map(|(outcome, timing)| (x(outcome, timing), outcome))
                .collect();
            let points = own.iter().map(|(x, outcome)| (*x, 100.0 * outcome.score));
            chart
                .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
                .label(*task)
                .legend(move |(x, y)| Circle::new((x + 8, y), 3, colour.filled()));
            for (x, outcome) in own {
                let bar = [(x, 100.0 * outcome.low), (x, 100.0 * outcome.high)];
                chart.draw_series([PathElement::new(bar, colour)])?;
                let label = format!("{}", outcome.shots);
                let point = (x, 100.0 * outcome.score);
                chart.draw_series([Circle::new(point, 3, colour.filled())])?;
                chart.draw_series([Text::new(label, point, FONT.into_font())])?;
            }
        }
        match tasks.is_empty() {
            true => Ok(()),
            false => legend(&mut chart, SeriesLabelPosition::LowerRight),
        }
    };
    svg(400, draw)
}
