//! Profiles of the native backend for people: records summed by part of the model, held against
//! the machine's ceilings, and as a trace for Chrome's `about:tracing` or Perfetto.

use std::collections::BTreeMap;
use std::time::Instant;

use flamingo_runtime::machine::Machine;
use flamingo_runtime::profile::{Arithmetic, Record};
use serde_json::{Value, json};

/// All instructions of one kind in one part of the model, whatever their layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// The node without its layer: `decoder.*.mlp`.
    pub part: String,
    /// What the instructions do.
    pub op: &'static str,
    /// How often one ran.
    pub calls: usize,
    /// How long they took together.
    pub ms: f64,
    /// Bytes of weights read.
    pub weight_bytes: usize,
    /// Operations, a multiply-add as two.
    pub operations: u64,
    /// What the multiply-adds were done in.
    pub arithmetic: Arithmetic,
}

impl Part {
    /// GB of weights read a second.
    pub fn gb_per_s(&self) -> f64 {
        self.weight_bytes as f64 / self.ms.max(1e-9) / 1e6
    }

    /// 10⁹ operations a second.
    pub fn gop_per_s(&self) -> f64 {
        self.operations as f64 / self.ms.max(1e-9) / 1e6
    }

    /// The larger of the shares of the machine's read bandwidth and of its peak arithmetic.
    pub fn of_ceiling(&self, machine: &Machine) -> f64 {
        let read = self.gb_per_s() / machine.read_gb_per_s;
        read.max(self.gop_per_s() / machine.gop_per_s(self.arithmetic))
    }
}

/// Records summed by part, op and arithmetic, those that took longest first.
pub fn parts(records: &[Record]) -> Vec<Part> {
    let mut parts: BTreeMap<(String, &'static str, Arithmetic), Part> = BTreeMap::new();
    for record in records {
        let (part, op, arithmetic) = (any_layer(&record.node), record.op, record.work.arithmetic);
        let sum = parts.entry((part.clone(), op, arithmetic)).or_insert(Part {
            part,
            op,
            calls: 0,
            ms: 0.0,
            weight_bytes: 0,
            operations: 0,
            arithmetic,
        });
        sum.calls += 1;
        sum.ms += record.duration.as_secs_f64() * 1e3;
        sum.weight_bytes = sum.weight_bytes.saturating_add(record.work.weight_bytes);
        sum.operations = sum.operations.saturating_add(record.work.operations);
    }
    let mut parts: Vec<Part> = parts.into_values().collect();
    parts.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    parts
}

/// `decoder.3.mlp` → `decoder.*.mlp`.
fn any_layer(node: &str) -> String {
    let word = |word: &str| {
        let is_number = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
        if is_number { "*".to_owned() } else { word.to_owned() }
    };
    node.split('.').map(word).collect::<Vec<_>>().join(".")
}

/// Header of [`rows`].
pub const HEADER: [&str; 8] = ["", "op", "calls", "ms", "share %", "GB/s", "GOP/s", "% of ceiling"];

/// A table of parts, with the total last.
pub fn rows(records: &[Record], machine: &Machine) -> Vec<Vec<String>> {
    let parts = parts(records);
    let total_ms: f64 = parts.iter().map(|part| part.ms).sum();
    let total = Part {
        part: "total".into(),
        op: "",
        calls: parts.iter().map(|part| part.calls).sum(),
        ms: total_ms,
        weight_bytes: parts.iter().map(|part| part.weight_bytes).sum(),
        operations: parts.iter().map(|part| part.operations).sum(),
        arithmetic: main_arithmetic(records),
    };
    let row = |part: &Part| {
        vec![
            part.part.clone(),
            part.op.to_owned(),
            part.calls.to_string(),
            format!("{:.3}", part.ms),
            format!("{:.1}", 100.0 * part.ms / total_ms.max(1e-9)),
            format!("{:.1}", part.gb_per_s()),
            format!("{:.1}", part.gop_per_s()),
            format!("{:.0}", 100.0 * part.of_ceiling(machine)),
        ]
    };
    parts.iter().chain(std::iter::once(&total)).map(row).collect()
}

/// The arithmetic that does most operations.
pub fn main_arithmetic(records: &[Record]) -> Arithmetic {
    let operations = |arithmetic: &Arithmetic| -> u64 {
        let own = records.iter().filter(|record| record.work.arithmetic == *arithmetic);
        own.map(|record| record.work.operations).sum()
    };
    let all = [Arithmetic::Int8, Arithmetic::Bf16, Arithmetic::F32];
    all.into_iter().max_by_key(operations).unwrap_or(Arithmetic::F32)
}

/// The records as Chrome's trace events, a thread for each graph, times in microseconds.
pub fn chrome_trace(records: &[Record]) -> Value {
    let origin = records.iter().map(|record| record.start).min();
    let since = |start: Instant| {
        origin.map_or(0.0, |origin| start.duration_since(origin).as_secs_f64() * 1e6)
    };
    let event = |record: &Record| {
        json!({
            "name": format!("{} {}", record.node, record.op),
            "cat": record.op,
            "ph": "X",
            "ts": since(record.start),
            "dur": record.duration.as_secs_f64() * 1e6,
            "pid": 1,
            "tid": record.graph,
            "args": {
                "weight_bytes": record.work.weight_bytes,
                "operations": record.work.operations,
                "arithmetic": record.work.arithmetic.name(),
            },
        })
    };
    let events: Vec<Value> = records.iter().map(event).collect();
    json!({ "traceEvents": events, "displayTimeUnit": "ms" })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use flamingo_runtime::profile::Work;

    use super::*;

    fn record(node: &str, ms: u64, weight_bytes: usize, operations: u64) -> Record {
        Record {
            graph: "decoder".into(),
            node: node.into(),
            op: "linear",
            start: Instant::now(),
            duration: Duration::from_millis(ms),
            work: Work { weight_bytes, operations, arithmetic: Arithmetic::F32 },
        }
    }

    #[test]
    fn layers_are_summed_and_the_slowest_part_is_first() {
        let records = [
            record("decoder.0.mlp", 2, 4_000_000, 10_000_000),
            record("decoder.head", 3, 0, 0),
            record("decoder.11.mlp", 2, 4_000_000, 10_000_000),
        ];
        let parts = parts(&records);
        let names: Vec<&str> = parts.iter().map(|part| part.part.as_str()).collect();
        assert_eq!(names, ["decoder.*.mlp", "decoder.head"]);
        assert_eq!((parts[0].calls, parts[0].gb_per_s(), parts[0].gop_per_s()), (2, 2.0, 5.0));
    }

    #[test]
    fn a_trace_begins_at_zero_and_has_every_record() {
        let records = [record("decoder.0.mlp", 2, 1, 2), record("decoder.1.mlp", 1, 1, 2)];
        let trace = chrome_trace(&records);
        let events = trace["traceEvents"].as_array().unwrap();
        assert_eq!(events.len(), 2);
        assert_eq!(
            (events[0]["ts"].as_f64(), events[0]["dur"].as_f64()),
            (Some(0.0), Some(2000.0))
        );
        assert!(events[1]["ts"].as_f64().unwrap() >= 0.0);
    }
}
