//! `flamingoc inspect` of a source.

use anyhow::{Result, bail};
use flamingo_models::{Source, Survey};
use serde_json::{Value, json};

use super::{Inspect, describe_config};
use crate::cli::output::{Output, bytes};
use crate::compile::limits;
use crate::inspection::{Inspection, Memory, Part};
use crate::origin::Origin;
use crate::passes::runtime_ops;
use crate::plan::devices::DEVICES;

impl Inspect {
    pub(super) fn source(&self, output: &mut Output) -> Result<()> {
        self.refuse_options_of_artifacts()?;
        let origin = Origin::of(&self.path)?;
        match self.parts.open(&origin, output) {
            Ok(source) => self.whole(&source, output),
            Err(error) => match partial(&origin) {
                Some(survey) if self.graph.is_none() => self.partial(&survey, output),
                _ => Err(error),
            },
        }
    }

    fn whole(&self, source: &Source, output: &mut Output) -> Result<()> {
        let graphs = source.graphs()?;
        if let Some(stage) = &self.graph {
            let graph = if stage == "media" { &graphs.media } else { &graphs.decoder };
            return output.text(&graph.to_string());
        }
        let limits = limits(source, self.max_context, self.max_images)?;
        let inspection = Inspection::of(source, &graphs).with_memory(source, &limits)?;
        if self.json {
            let ops = json!({"media": runtime_ops(&graphs.media), "decoder": runtime_ops(&graphs.decoder)});
            let more = [
                ("config", json!(source.config)),
                ("limits", json!(limits)),
                ("ops", ops),
                ("notes", json!(source.notes)),
            ];
            return output.json(&as_json(&inspection, more));
        }
        output.line(&format!("{}, complete\n", inspection.what))?;
        describe_config(output, &source.config)?;
        show_parts(&inspection.parts, output)?;
        show_parameters(&inspection, output)?;
        output.line(&format!(
            "\nmemory for {} tokens and {} pictures",
            limits.max_context, limits.max_images
        ))?;
        show_memory(&inspection.memory, output)?;
        for note in &source.notes {
            output.line(&format!("note: {note}"))?;
        }
        Ok(())
    }

    fn partial(&self, survey: &Survey, output: &mut Output) -> Result<()> {
        let inspection = Inspection::of_survey(survey);
        if self.json {
            return output.json(&as_json(&inspection, []));
        }
        output.line(&inspection.what)?;
        show_parts(&inspection.parts, output)?;
        show_parameters(&inspection, output)?;
        for part in inspection.parts.iter().filter(|part| part.problem.is_some()) {
            output.line(&format!("missing: {}, `{}`", part.part, part.path.display()))?;
        }
        Ok(())
    }

    fn refuse_options_of_artifacts(&self) -> Result<()> {
        if self.coverage.is_some() {
            bail!(
                "`--coverage`: `{}` is not an artifact\n\nhint: compile it first, with `--target`",
                self.path.display()
            );
        }
        if let Some(device) = self.device {
            bail!(
                "`--device`: `{}` is not an artifact\n\n\
                 hint: `flamingoc compile {0} --device {}` plans a source before it compiles it",
                self.path.display(),
                device.name
            );
        }
        Ok(())
    }
}

/// What there is of a source that lacks parts.
fn partial(origin: &Origin) -> Option<Survey> {
    match origin {
        Origin::Path(path) => Survey::of(path).ok().filter(Survey::lacks_parts),
        Origin::Hub(_) => None,
    }
}

fn as_json<const N: usize>(inspection: &Inspection, more: [(&str, Value); N]) -> Value {
    let mut value = json!(inspection);
    let total = inspection.total();
    value["total"] = json!(total);
    for (key, found) in more {
        value[key] = found;
    }
    value
}

fn show_parts(parts: &[Part], output: &mut Output) -> Result<()> {
    let row = |part: &Part| {
        let types: Vec<&str> = part.types.iter().map(String::as_str).collect();
        let name = part.path.file_name().unwrap_or(part.path.as_os_str());
        match &part.problem {
            None => vec![
                part.part.to_owned(),
                name.to_string_lossy().into_owned(),
                part.tensors.to_string(),
                digits(part.values),
                bytes(part.bytes),
                types.join(" "),
            ],
            Some(problem) => {
                let name = name.to_string_lossy().into_owned();
                [part.part.to_owned(), name, problem.clone()]
                    .into_iter()
                    .chain(["-", "-", "-"].map(str::to_owned))
                    .collect()
            }
        }
    };
    output.line("")?;
    let rows: Vec<Vec<String>> = parts.iter().map(row).collect();
    output.table(&["part", "file", "tensors", "numbers", "size", "as"], &rows)
}

fn show_parameters(inspection: &Inspection, output: &mut Output) -> Result<()> {
    if !inspection.parameters.is_empty() {
        let row = |name: &str, trained: u64, frozen: u64| {
            let all = trained.saturating_add(frozen);
            vec![name.to_owned(), digits(all), digits(trained), digits(frozen)]
        };
        let own = inspection.parameters.iter();
        let mut rows: Vec<Vec<String>> =
            own.map(|own| row(own.component.name(), own.count.trained, own.count.frozen)).collect();
        let total = inspection.total();
        rows.push(row("total", total.trained, total.frozen));
        output.line("")?;
        output.table(&["parameters", "all", "trained", "frozen"], &rows)?;
    }
    let beside = [
        (inspection.aliases, "hold what others hold"),
        (inspection.unread, "are in the files and in no computation"),
    ];
    for (tally, what) in beside.into_iter().filter(|(tally, _)| tally.tensors > 0) {
        output.line(&format!(
            "{} tensors of {} numbers {what}",
            tally.tensors,
            digits(tally.values)
        ))?;
    }
    Ok(())
}

fn show_memory(memory: &[Memory], output: &mut Output) -> Result<()> {
    let row = |memory: &Memory| {
        let sizes = [
            memory.weights_bytes,
            memory.text_bytes,
            memory.pictures_bytes,
            memory.buffers_bytes,
            memory.total_bytes,
        ];
        let sizes = sizes.into_iter().map(bytes);
        [memory.precision.to_owned()].into_iter().chain(sizes).collect()
    };
    let rows: Vec<Vec<String>> = memory.iter().map(row).collect();
    output.table(&["precision", "weights", "text", "pictures", "buffers", "total"], &rows)?;
    output.line("\nfits, beside runtime and system")?;
    let mark = |memory: &Memory, device| if memory.fits.contains(&device) { "yes" } else { "-" };
    let rows: Vec<Vec<String>> = DEVICES
        .iter()
        .map(|device| {
            let marks = memory.iter().map(|memory| mark(memory, device.name).to_owned());
            [device.name.to_owned()].into_iter().chain(marks).collect()
        })
        .collect();
    let names = memory.iter().map(|memory| memory.precision);
    output.table(&["device"].into_iter().chain(names).collect::<Vec<_>>(), &rows)
}

/// `1,046,992,944`.
fn digits(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::digits;

    #[test]
    fn thousands_are_set_apart() {
        let numbers = [0, 12, 999, 1000, 1_046_992_944];
        assert_eq!(numbers.map(digits), ["0", "12", "999", "1,000", "1,046,992,944"]);
    }
}
