//! `--device`: which one, whether a model fits, and how long it will take there.

use anyhow::{Result, anyhow};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use flamingo_models::Source;
use flamingo_models::manifest::Limits;
use serde_json::{Value, json};

use super::output::{Output, bytes, table};
use crate::plan::devices::{DEVICES, Device};
use crate::plan::{Budget, CANDIDATES, Forecast, Model, Needs, WouldFit};
use crate::scheme::{Precision, Scheme};

/// Parses the name of a device; clap lists all of them where it is missing or unknown.
pub(super) fn device_parser() -> impl TypedValueParser<Value = &'static Device> {
    let names = PossibleValuesParser::new(DEVICES.iter().map(|device| device.name));
    names.try_map(|name| Device::from_name(&name).ok_or("no such device"))
}

/// What a model takes on a device, and how long.
pub(super) struct DevicePlan {
    device: &'static Device,
    budget: Budget,
    forecast: Forecast,
}

impl DevicePlan {
    pub(super) fn new(
        model: &Model,
        limits: &Limits,
        device: &'static Device,
    ) -> Result<DevicePlan> {
        let budget = model.needs()?.on(limits, device);
        Ok(DevicePlan { device, budget, forecast: model.forecast(limits, device)? })
    }

    pub(super) fn fits(&self) -> bool {
        self.budget.fits()
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "device": self.device,
            "memory": self.budget,
            "fits": self.fits(),
            "predicted": self.forecast.stages,
            "method": self.forecast.method,
        })
    }

    pub(super) fn show(&self, output: &mut Output) -> Result<()> {
        let device = self.device;
        output.line(&format!(
            "\n{} ({}): {} GB/s, dense {:.1} TFLOP/s of fp16, {:.1} TOP/s of int8",
            device.name,
            device.mode,
            device.bandwidth_gb_per_s,
            device.fp16_tflop_per_s(),
            device.int8_top_per_s()
        ))?;
        for source in device.sources {
            output.line(&format!("  {source}"))?;
        }
        output.line("\nmemory on the device")?;
        output.line(&budgets(&[("size".to_owned(), &self.budget)]))?;
        output.line(if self.fits() { "it fits" } else { "it does NOT fit" })?;
        output.line("\npredicted")?;
        let rows: Vec<Vec<String>> = self.forecast.stages.iter().map(row).collect();
        output.table(&["", "ms", "low", "high", "bound by", "wider since"], &rows)?;
        output.line(&self.forecast.method)
    }
}

fn row(prediction: &crate::plan::Prediction) -> Vec<String> {
    let ms = |ms: f64| format!("{ms:.*}", if ms < 10.0 { 2 } else { 0 });
    vec![
        prediction.what.clone(),
        ms(prediction.ms),
        ms(prediction.low_ms),
        ms(prediction.high_ms),
        prediction.bound_by.to_owned(),
        prediction.carried_over.clone().unwrap_or_else(|| "-".to_owned()),
    ]
}

/// Budgets side by side.
fn budgets(columns: &[(String, &Budget)]) -> String {
    let Some((_, first)) = columns.first() else { return String::new() };
    let line = |what: &str, of: &dyn Fn(&Budget) -> u64| -> Vec<String> {
        let sizes = columns.iter().map(|(_, budget)| bytes(of(budget)));
        [what.to_owned()].into_iter().chain(sizes).collect()
    };
    let parts = first.rows.iter().enumerate();
    let mut rows: Vec<Vec<String>> =
        parts.map(|(index, (what, _))| line(what, &|budget| budget.rows[index].1)).collect();
    rows.push(line("needed", &|budget| budget.needed_bytes));
    rows.push(line("there is", &|budget| budget.visible_bytes));
    let header = columns.iter().map(|(name, _)| name.as_str());
    table(&[""].into_iter().chain(header).collect::<Vec<_>>(), &rows)
}

/// The finest precision at which a source fits a device: the one asked for, or of [`CANDIDATES`].
///
/// # Errors
/// If it does not fit, with the arithmetic and what would.
pub(super) fn choose(
    source: &Source,
    limits: &Limits,
    device: &Device,
    asked: Option<Precision>,
    scheme: &dyn Fn(Precision) -> Scheme,
) -> Result<Precision> {
    let candidates = asked.map_or_else(|| CANDIDATES.to_vec(), |precision| vec![precision]);
    let mut tried = Vec::new();
    for precision in candidates {
        let needs = Model::of_source(source, &scheme(precision))?.needs()?;
        if needs.on(limits, device).fits() {
            return Ok(precision);
        }
        tried.push((precision, needs));
    }
    let coarser = CANDIDATES.into_iter().filter(|other| {
        asked.is_some_and(|asked| asked != *other)
            && Model::of_source(source, &scheme(*other))
                .and_then(|model| model.needs())
                .is_ok_and(|needs| needs.on(limits, device).fits())
    });
    Err(refusal(limits, device, &tried, coarser.collect()))
}

/// What was tried beside what there is, and what would fit.
fn refusal(
    limits: &Limits,
    device: &Device,
    tried: &[(Precision, Needs)],
    coarser: Vec<Precision>,
) -> anyhow::Error {
    let counted: Vec<(String, Budget)> = tried
        .iter()
        .map(|(precision, needs)| (precision.name().to_owned(), needs.on(limits, device)))
        .collect();
    let columns: Vec<(String, &Budget)> =
        counted.iter().map(|(name, budget)| (name.clone(), budget)).collect();
    let mut hints: Vec<String> =
        coarser.iter().map(|precision| format!("`--precision {}`", precision.name())).collect();
    if let Some((precision, needs)) = tried.last() {
        let at = format!("`--precision {}", precision.name());
        let WouldFit { max_context, max_images } = needs.would_fit(limits, device);
        hints.extend(max_context.map(|most| format!("{at} --max-context {most}`")));
        hints.extend(max_images.map(|most| format!("{at} --max-images {most}`")));
        let larger = DEVICES.iter().find(|larger| needs.on(limits, larger).fits());
        hints.extend(larger.map(|larger| format!("`--device {}`", larger.name)));
    }
    let hint = match hints.is_empty() {
        true => "no limits, precision or device of the table would do".to_owned(),
        false => format!("{} would fit", hints.join(", or ")),
    };
    anyhow!("`--device {}`: does not fit\n{}\n\nhint: {hint}", device.name, budgets(&columns))
}
