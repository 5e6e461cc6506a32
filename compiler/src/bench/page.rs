//! `bench --html`: a report for people, one page without anything from outside.

use anyhow::{Context as _, Result};
use minijinja::{Environment, context};
use serde_json::{Value, json};

use super::plots::{
    Axis, axis_plot, ceiling_plot, memory_plot, parts_plot, roofline_plot, tokens_plot,
};
use super::scenario::{SCENARIOS, ScenarioResult};
use super::{Label, MUCH_OF_OTHERS, Report, StageResult, rounded};
use crate::page::STYLE;

const TEMPLATE: &str = include_str!("page.html");
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
    let label = report.results.first().map(|result| &result.label);
    // Plots are of the first variant; the table has all.
    let first: Vec<StageResult> =
        report.results.iter().filter(|r| Some(&r.label) == label).cloned().collect();
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
        system => report.system,
        system_line => report.system.line(),
        energy => report.energy_sensor,
        harness => format!("{:.4}", report.harness_ms),
        has_variants => report.has_variants(),
        rows => report.results.iter().map(row).collect::<Vec<Value>>(),
        scenarios => report.scenarios.iter().map(scenario_row).collect::<Vec<Value>>(),
        images_plot => axis_plot(&first, Axis::Images)?,
        context_plot => axis_plot(&first, Axis::Context)?,
        batch_plot => axis_plot(&first, Axis::Batch)?,
        tokens_plot => tokens_plot(&first)?,
        roofline_plot => roofline_plot(machine, &first)?,
        ceiling_plot => ceiling_plot(&first)?,
        parts_plot => parts_plot(&report.profiles)?,
        memory_plot => memory_plot(&report.memory)?,
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
    let ms = &result.ms;
    json!({
        "variant": variant(&result.label),
        "stage": result.stage.name(), "precision": result.precision, "images": result.images,
        "context": result.context, "batch": result.batch, "median": ms.text(ms.median),
        "interval": format!("{} – {}", ms.text(ms.low), ms.text(ms.high)),
        "p10": ms.text(ms.p10), "p90": ms.text(ms.p90), "p99": ms.text(ms.p99), "n": ms.n, "far_out": ms.far_out,
        "tokens_per_s": number(result.tokens_per_s, 1),
        "gb_per_s": number(result.weight_gb_per_s, 1),
        "gop_per_s": number(result.gop_per_s, 0),
        "of_ceiling": number(result.of_ceiling.map(|share| 100.0 * share), 0),
        "joules": number(result.joules, 3),
        "others": number(result.others, 2),
        "is_disturbed": result.others.is_some_and(|cores| cores > MUCH_OF_OTHERS),
    })
}

fn scenario_row(result: &ScenarioResult) -> Value {
    let about = |value: f64| rounded(value, value / 100.0);
    let (first, token, whole) = (&result.first_token_ms, &result.token_ms, &result.end_to_end_ms);
    let meaning = SCENARIOS.iter().find(|scenario| scenario.name == result.scenario);
    let stream = result.stream.as_ref().map(|stream| {
        format!("{} of {} at {} a second", stream.dropped, stream.arrived, stream.fps)
    });
    json!({
        "variant": variant(&result.label),
        "name": result.scenario, "about": meaning.map(|scenario| scenario.about),
        "answers": first.n + 1, "cold": about(result.cold_first_token_ms),
        "first": first.text(first.median), "first_p90": first.text(first.p90),
        "token": token.text(token.median), "token_p90": token.text(token.p90), "token_p99": token.text(token.p99),
        "whole": whole.text(whole.median), "tokens_per_s": about(result.tokens_per_s),
        "session": format!("{:.1}", result.session_bytes as f64 / 1e6), "dropped": stream,
    })
}

fn variant(label: &Label) -> String {
    format!("{}, {}, {} threads", label.artifact, label.backend, label.threads)
}
