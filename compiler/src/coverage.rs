//! Which execution provider of ONNX Runtime would run each node of a file, found without a GPU: nodes and element types
//! against tables of the kernels that each provider has ([`kernels`]).
//!
//! Tables are data in `coverage/tables/`, made by `coverage/refresh.py` from what the vendors publish; each says where
//! it comes from. What follows from them is an expectation, not a run:
//!
//! * A node goes to the first provider of the target that has a kernel of its version and types. A kernel may refuse
//!   more than its table tells, such as sizes or attributes; what TensorRT's page states in other words than types is
//!   checked where it can be ([`kernels::Reason::Limit`]).
//! * A node of f16 whose CPU kernel takes only f32 runs on the CPU between casts, as ONNX Runtime inserts them.
//! * ONNX Runtime replaces nodes when it loads a file (fusions, removed casts); here each node is taken as it stands,
//!   except constants, which are folded, and functions of ONNX without a kernel, which it would inline, count as not
//!   supported.
//! * Partitions are grouped as ONNX Runtime groups nodes for providers that compile ([`partition`]). The TensorRT
//!   provider asks TensorRT's parser, which may split further.
//! * Copies are values that a device reads and another made; shapes stay on the CPU by design ([`placement`]).

pub mod kernels;
pub mod memory;
pub mod page;
pub mod partition;
pub mod placement;
pub mod report;
pub mod signatures;

#[cfg(test)]
mod example;

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use flamingo_ir::onnx::{ListedNode, Listing};
use serde::Serialize;

use kernels::{KernelTable, Reason};
use partition::Partition;
use placement::ValueCopy;
use signatures::{Signatures, key_of};

/// What a file is to run on, and the tables of its providers, the preferred first.
pub const TARGETS: [(&str, &[&str]); 5] = [
    ("cpu", &["ort-cpu-1.32.0"]),
    ("cuda", &["ort-cuda-1.31.1", "ort-cpu-1.32.0"]),
    ("tensorrt-10.3", &["tensorrt-10.3", "ort-cuda-1.31.1", "ort-cpu-1.32.0"]),
    ("tensorrt-10.15", &["tensorrt-10.15", "ort-cuda-1.31.1", "ort-cpu-1.32.0"]),
    ("tensorrt-11", &["tensorrt-11", "ort-cuda-1.31.1", "ort-cpu-1.32.0"]),
];

/// Headings of [`Coverage::table`].
pub const COLUMNS: [&str; 5] = ["operator", "nodes", "runs on", "first node", "why"];

/// An execution provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Provider {
    /// TensorRT engines.
    #[serde(rename = "tensorrt")]
    TensorRt,
    /// CUDA kernels.
    Cuda,
    /// CPU kernels.
    Cpu,
}

/// What becomes of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It runs.
    Work,
    /// It computes a shape, on the CPU by design.
    Shape,
    /// It is evaluated when the file is loaded.
    Folded,
}

/// A node and where it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Assigned {
    /// The node.
    pub name: String,
    /// `Op`, or `domain:Op`.
    pub op: String,
    /// What becomes of it.
    pub role: Role,
    /// Who runs it; none if nobody can. Of a folded node: the CPU.
    pub provider: Option<Provider>,
    /// Runs in f32 between casts, for the CPU has no kernel of f16.
    pub has_casts: bool,
    /// The kernel is known from a class name in the library alone.
    pub is_inferred: bool,
    /// Providers before it, and why each does not take the node.
    pub refusals: Vec<Refusal>,
    /// Whether the CPU takes it.
    #[serde(skip)]
    runs_on_cpu: bool,
}

/// Why a provider does not take a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Refusal {
    /// The provider.
    pub provider: Provider,
    /// Why.
    pub reason: Reason,
}

/// Nodes that the preferred provider does not run, with one operator and one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fallback {
    /// `Op`, or `domain:Op`.
    pub op: String,
    /// How many nodes.
    pub n_nodes: usize,
    /// The first of them, in the order of the file.
    pub first: String,
    /// Who runs them; none if nobody can.
    pub provider: Option<Provider>,
    /// Whether they run in f32 between casts.
    pub has_casts: bool,
    /// Why those before do not.
    pub refusals: Vec<Refusal>,
}

/// Where a kernel table comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TableSource {
    /// The provider.
    pub provider: Provider,
    /// The version of ONNX Runtime, or of TensorRT.
    pub version: String,
    /// What it was made of.
    pub sources: Vec<String>,
}

/// What would run where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Coverage {
    /// A name of [`TARGETS`].
    pub target: String,
    /// In the order of preference.
    pub tables: Vec<TableSource>,
    /// In the order of the file.
    pub nodes: Vec<Assigned>,
    /// In the order of the file.
    pub partitions: Vec<Partition>,
    /// In the order of the file.
    pub copies: Vec<ValueCopy>,
    /// By operator.
    pub fallbacks: Vec<Fallback>,
}

impl Provider {
    /// Every provider, those of a GPU first.
    pub const ALL: [Provider; 3] = [Provider::TensorRt, Provider::Cuda, Provider::Cpu];

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Provider::TensorRt => "tensorrt",
            Provider::Cuda => "cuda",
            Provider::Cpu => "cpu",
        }
    }

    /// The name in ONNX Runtime.
    pub fn ort_name(self) -> &'static str {
        match self {
            Provider::TensorRt => "TensorrtExecutionProvider",
            Provider::Cuda => "CUDAExecutionProvider",
            Provider::Cpu => "CPUExecutionProvider",
        }
    }
}

impl Coverage {
    /// What would run where, of a file that `target` is to run.
    ///
    /// # Errors
    /// A target that [`TARGETS`] does not have.
    pub fn new(listing: &Listing, target: &str) -> Result<Coverage> {
        let tables = tables_of(target)?;
        let mut nodes: Vec<Assigned> =
            listing.nodes.iter().map(|node| assign(node, &tables)).collect();
        if tables.len() > 1 {
            placement::place_shapes(listing, &mut nodes);
        }
        let source = |table: &KernelTable| TableSource {
            provider: table.provider(),
            version: table.version().to_owned(),
            sources: table.sources().to_vec(),
        };
        Ok(Coverage {
            target: target.to_owned(),
            tables: tables.iter().map(source).collect(),
            partitions: partition::partitions(listing, &nodes),
            copies: placement::copies(listing, &nodes),
            fallbacks: fallbacks(&nodes),
            nodes,
        })
    }

    /// Whether the preferred provider runs all nodes but those of shapes and constants.
    pub fn is_full(&self) -> bool {
        self.fallbacks.is_empty()
    }

    /// How many nodes a provider runs, shapes aside; for none, how many nobody runs.
    pub fn n_nodes(&self, provider: Option<Provider>) -> usize {
        let runs = |node: &&Assigned| node.role == Role::Work && node.provider == provider;
        self.nodes.iter().filter(runs).count()
    }

    /// How many nodes have a role.
    pub fn n_of(&self, role: Role) -> usize {
        self.nodes.iter().filter(|node| node.role == role).count()
    }

    /// The whole in lines: what, and how many.
    pub fn summary(&self) -> Vec<(String, usize)> {
        let on = |provider: Provider| format!("nodes on {}", provider.name());
        let mut lines: Vec<(String, usize)> = self
            .tables
            .iter()
            .map(|table| (on(table.provider), self.n_nodes(Some(table.provider))))
            .collect();
        let inferred = self.nodes.iter().filter(|node| node.is_inferred).count();
        lines.extend([
            ("nodes that nobody runs".to_owned(), self.n_nodes(None)),
            ("shape nodes, on cpu by design".to_owned(), self.n_of(Role::Shape)),
            ("constant nodes, folded".to_owned(), self.n_of(Role::Folded)),
            ("nodes whose kernel is inferred".to_owned(), inferred),
        ]);
        for table in &self.tables {
            let own = self.partitions.iter().filter(|p| p.provider == table.provider);
            lines.push((format!("partitions of {}", table.provider.name()), own.count()));
        }
        lines.push(("copies between cpu and gpu".to_owned(), self.copies.len()));
        lines
    }

    /// Fallbacks as rows below [`COLUMNS`], without line breaks.
    pub fn table(&self) -> Vec<[String; 5]> {
        let row = |fallback: &Fallback| {
            [
                fallback.op.clone(),
                fallback.n_nodes.to_string(),
                runs_on(fallback.provider, fallback.has_casts).to_owned(),
                fallback.first.clone(),
                why(&fallback.refusals),
            ]
        };
        self.fallbacks.iter().map(row).collect()
    }
}

fn runs_on(provider: Option<Provider>, has_casts: bool) -> &'static str {
    match provider {
        Some(Provider::Cpu) if has_casts => "cpu in f32, between casts",
        Some(provider) => provider.name(),
        None => "nobody",
    }
}

/// Reasons in one line.
fn why(refusals: &[Refusal]) -> String {
    let line = |refusal: &Refusal| {
        let reason = refusal.reason.to_string();
        format!("{}: {}", refusal.provider.name(), reason.split('\n').next().unwrap_or_default())
    };
    refusals.iter().map(line).collect::<Vec<String>>().join("; ")
}

/// The tables of a target, the preferred provider's first.
fn tables_of(target: &str) -> Result<Vec<KernelTable>> {
    let known = TARGETS.map(|(name, _)| name).join(", ");
    let found = TARGETS.iter().find(|(name, _)| *name == target);
    let (_, tables) =
        found.ok_or_else(|| anyhow::anyhow!("target `{target}`: expected one of {known}"))?;
    let signatures = Arc::new(Signatures::load()?);
    tables.iter().map(|name| KernelTable::load(name, &signatures)).collect()
}

fn assign(node: &ListedNode, tables: &[KernelTable]) -> Assigned {
    let mut assigned = Assigned {
        name: node.name.clone(),
        op: key_of(node),
        role: if node.is_constant { Role::Folded } else { Role::Work },
        provider: None,
        has_casts: false,
        is_inferred: false,
        refusals: Vec::new(),
        runs_on_cpu: false,
    };
    if node.is_constant {
        assigned.provider = Some(Provider::Cpu);
        return assigned;
    }
    for table in tables {
        let provider = table.provider();
        match table.kernel(node) {
            Ok(kernel) if assigned.provider.is_none() => {
                assigned.provider = Some(provider);
                assigned.is_inferred = kernel.is_inferred();
                assigned.runs_on_cpu |= provider == Provider::Cpu;
            }
            Ok(_) => assigned.runs_on_cpu |= provider == Provider::Cpu,
            Err(reason) if assigned.provider.is_none() => {
                assigned.refusals.push(Refusal { provider, reason });
                if provider == Provider::Cpu && table.supports(&in_f32(node)).is_ok() {
                    (assigned.provider, assigned.has_casts) = (Some(provider), true);
                }
            }
            Err(_) => {}
        }
    }
    assigned
}

/// The same node with f32 for f16.
fn in_f32(node: &ListedNode) -> ListedNode {
    let mut node = node.clone();
    let values = node.inputs.iter_mut().map(|input| &mut input.value).chain(&mut node.outputs);
    for value in values.filter(|value| value.dtype == Some("f16")) {
        value.dtype = Some("f32");
    }
    node
}

/// Nodes with refusals, by operator, who runs them, and why.
fn fallbacks(nodes: &[Assigned]) -> Vec<Fallback> {
    let mut found: BTreeMap<(&str, Option<Provider>, &[Refusal]), Fallback> = BTreeMap::new();
    let refused = |node: &&Assigned| node.role == Role::Work && !node.refusals.is_empty();
    for node in nodes.iter().filter(refused) {
        let fallback = found.entry((&node.op, node.provider, &node.refusals)).or_insert(Fallback {
            op: node.op.clone(),
            n_nodes: 0,
            first: node.name.clone(),
            provider: node.provider,
            has_casts: node.has_casts,
            refusals: node.refusals.clone(),
        });
        fallback.n_nodes += 1;
    }
    found.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::example::{graph, node};
    use super::*;
    use flamingo_ir::onnx::{Functions, ReadLimits, WriteOptions, list_nodes, write_onnx};
    use flamingo_ir::op::{Activate, Activation, Flavour, Linear};
    use flamingo_ir::{Fact, Graph, Tensor, verify};
    use placement::Device;

    fn coverage(lines: &str, target: &str) -> Coverage {
        Coverage::new(&graph(lines), target).unwrap()
    }

    /// Provider and number of nodes of each partition.
    fn pieces(coverage: &Coverage) -> Vec<(Provider, usize)> {
        coverage.partitions.iter().map(|p| (p.provider, p.n_nodes)).collect()
    }

    fn copied(coverage: &Coverage) -> Vec<(&str, Device)> {
        coverage.copies.iter().map(|copy| (copy.value.as_str(), copy.to)).collect()
    }

    #[test]
    fn a_good_graph_is_covered_by_every_target() {
        let lines = "MatMul@17 | x:f32,=w:f32 | a:f32
                     Neg@17 | =w | v:f32
                     Add@17 | a,v | b:f32
                     Softmax@17 | b | y:f32";
        for (target, tables) in TARGETS {
            let coverage = coverage(lines, target);
            assert!(coverage.is_full(), "{target}: {:?}", coverage.table());
            let preferred = coverage.tables[0].provider;
            assert_eq!(pieces(&coverage), [(preferred, 3)], "{target}");
            assert_eq!(coverage.copies, [], "{target}");
            assert_eq!((coverage.n_of(Role::Folded), coverage.tables.len()), (1, tables.len()));
        }
        assert!(Coverage::new(&graph(lines), "tpu").is_err());
    }

    #[test]
    fn a_file_of_our_writer_is_covered_without_functions() {
        let mut graph = Graph::new("g");
        let x = graph.input("x", Fact::f32([3, 2]));
        let weight = graph.literal(Tensor::f32(&[2, 2], vec![1.0, 2.0, 3.0, 4.0]).unwrap());
        let linear = graph.add("linear", Linear::default(), &[x, weight]).unwrap();
        let activation = Activate { activation: Activation::Silu };
        let y = graph.add("silu", activation, &[linear]).unwrap();
        graph.output("y", y);
        let graph = verify(graph).unwrap();
        let listed = |functions| {
            let options = WriteOptions { flavour: Flavour::Portable, functions };
            let bytes = write_onnx(&graph, options, &Default::default()).unwrap();
            list_nodes(&bytes, &ReadLimits::default()).unwrap()
        };
        for (target, _) in TARGETS {
            let inlined = Coverage::new(&listed(Functions::Inline), target).unwrap();
            assert!(inlined.is_full(), "{target}: {:?}", inlined.table());
            let kept = Coverage::new(&listed(Functions::Keep), target).unwrap();
            assert!(kept.n_nodes(None) > 0, "{target}: {:?}", kept.summary());
            assert!(kept.table().iter().all(|row| row[2] == "nobody"), "{:?}", kept.table());
            assert_eq!(kept.copies, [], "{target}: nothing crosses to nodes that nobody runs");
        }
    }

    #[test]
    fn what_a_provider_lacks_falls_back_with_its_reason() {
        let lines = "Relu@17 | x:f32 | a:f32
                     DynamicQuantizeLinear@17 | a | q:u8,s:f32,z:u8
                     com.microsoft:MatMulIntegerToFloat@1 | q,=w:i8,s,=ws:f32,z | b:f32
                     com.microsoft:QuickGelu@1 | b | y:f32";
        let cuda = coverage(lines, "cuda");
        assert_eq!(cuda.n_nodes(Some(Provider::Cpu)), 2);
        assert_eq!(pieces(&cuda), [(Provider::Cuda, 1), (Provider::Cpu, 2), (Provider::Cuda, 1)]);
        assert_eq!(copied(&cuda), [("a", Device::Cpu), ("b", Device::Gpu)]);
        let row = |op: &str, first: &str, why: &str| {
            [op.to_owned(), "1".into(), "cpu".into(), first.to_owned(), why.to_owned()]
        };
        let unknown = "cuda: unknown operator";
        let integers = "com.microsoft:MatMulIntegerToFloat";
        let expected = [row("DynamicQuantizeLinear", "q", unknown), row(integers, "b", unknown)];
        assert_eq!(cuda.table(), expected);

        let tensorrt = coverage(lines, "tensorrt-10.15");
        let rows = tensorrt.table();
        let why = |op: &str| {
            let row = rows.iter().find(|row| row[0] == op).unwrap();
            (row[2].as_str(), row[4].as_str())
        };
        let quick = ("cuda", "tensorrt: unknown operator");
        assert_eq!(why("com.microsoft:QuickGelu"), quick);
        let dynamic = "tensorrt: not supported, says the vendor; cuda: unknown operator";
        assert_eq!(why("DynamicQuantizeLinear"), ("cpu", dynamic));
        assert_eq!(copied(&tensorrt), [("a", Device::Cpu), ("b", Device::Gpu)]);
    }

    #[test]
    fn attention_of_opset_23_splits_an_old_tensorrt() {
        let lines = "Relu@23 | x:f16 | q:f16
                     Attention@23 | q,q,q | a:f16
                     Relu@23 | a | y:f16";
        let old = coverage(lines, "tensorrt-10.3");
        assert_eq!(old.n_nodes(Some(Provider::TensorRt)), 0, "the whole operator set is new");
        let new = coverage(lines, "tensorrt-10.15");
        assert!(new.is_full(), "{:?}", new.table());
    }

    #[test]
    fn counts_go_by_operator_and_reason() {
        let lines = "Relu@17 | x:f64 | a:f64
                     Relu@17 | a | b:f64
                     Cast@17 | b | c:f16
                     Cast@17 | c | y:f32";
        let found = coverage(lines, "tensorrt-10.3");
        let types = "tensorrt: input 0 (X): expected bf16, f16, f32, i32, i64, got f64";
        let cast =
            "tensorrt: input 0 (input): expected bf16, bool, f16, f32, i32, i64, u8, got f64";
        let rows = [["Cast", "1", "cuda", "c", cast], ["Relu", "2", "cuda", "a", types]];
        assert_eq!(found.table(), rows.map(|row| row.map(str::to_owned)));
        assert_eq!(pieces(&found), [(Provider::Cuda, 3), (Provider::TensorRt, 1)]);
        assert_eq!(found.copies, [], "both run on the GPU");
    }

    #[test]
    fn f16_on_the_cpu_runs_between_casts() {
        let found = coverage("MatMul@17 | x:f16,=w:f16 | y:f16", "cpu");
        assert_eq!(found.n_nodes(Some(Provider::Cpu)), 1);
        assert_eq!(found.table()[0][2], "cpu in f32, between casts");
        let brain = coverage("MatMul@17 | x:bf16,=w:bf16 | y:bf16", "cpu");
        assert_eq!((brain.n_nodes(None), brain.table()[0][2].as_str()), (1, "nobody"));
    }

    #[test]
    fn shapes_stay_on_the_cpu_and_are_no_fallback() {
        let lines = "Relu@17 | x:f32 | a:f32
                     Shape@17 | a | n:i64
                     Concat@17 | n,=two:i64 | shape:i64
                     Reshape@17 | a,shape | y:f32";
        let found = coverage(lines, "cuda");
        assert!(found.is_full(), "{:?}", found.table());
        assert_eq!((found.n_of(Role::Shape), found.copies.len()), (2, 0));
        assert_eq!(pieces(&found), [(Provider::Cuda, 2)]);
        // Numbers of the GPU that a shape is made of do cross.
        let lines = "ReduceMax@17 | x:i64 | n:i64
                     Reshape@17 | x,n | y:i64";
        assert_eq!(copied(&coverage(lines, "cuda")), [("n", Device::Cpu)]);
        // What only fills a value of that shape stays on the GPU.
        let lines = "Shape@17 | x:f32 | n:i64
                     ConstantOfShape@17 | n | zeros:f32
                     Add@17 | x,zeros | y:f32";
        let found = coverage(lines, "cuda");
        assert_eq!((found.n_nodes(Some(Provider::Cuda)), found.copies.len()), (2, 0));
        let tensorrt = coverage(lines, "tensorrt-10.3");
        assert_eq!(
            (tensorrt.n_of(Role::Shape), pieces(&tensorrt)),
            (0, vec![(Provider::TensorRt, 3)])
        );
    }

    #[test]
    fn a_value_is_copied_once() {
        let lines = "Relu@17 | x:f32 | a:f32
                     DynamicQuantizeLinear@17 | a | q:u8,s:f32,z:u8
                     DynamicQuantizeLinear@17 | a | r:u8,t:f32,u:u8
                     Mul@17 | s,t | b:f32
                     Add@17 | a,s | y:f32";
        let found = coverage(lines, "cuda");
        let expected = [("a", Device::Cpu), ("s", Device::Gpu), ("t", Device::Gpu)];
        assert_eq!(copied(&found), expected);
    }

    #[test]
    fn coverage_is_told_in_json() {
        let found = coverage("com.microsoft:QuickGelu@1 | x:f32 | y:f32", "tensorrt-11");
        let json = serde_json::to_value(&found).unwrap();
        assert_eq!(json["nodes"][0]["provider"], "cuda");
        assert_eq!(json["nodes"][0]["refusals"][0]["provider"], "tensorrt");
        assert_eq!(json["fallbacks"][0]["refusals"][0]["reason"]["kind"], "unknown_op");
        assert_eq!(json["partitions"][0]["n_nodes"], 1);
        assert_eq!(node("Relu@17", "x:f32", "y:f32").op_type, "Relu");
    }
}
