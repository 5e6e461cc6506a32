//! Tables of the kernels that an execution provider has, and whether one of them takes a node.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::{Context, Result};
use flamingo_ir::onnx::{ListedInput, ListedNode};
use serde::{Deserialize, Serialize};

use super::Provider;
use super::signatures::{Side, Signature, Signatures, key_of};

/// Domain of this program's own functions.
const FLAMINGO: &str = "flamingo";

/// A table: its name, and the data that `coverage/refresh.py` made.
pub const TABLES: [(&str, &str); 5] = [
    ("ort-cpu-1.32.0", include_str!("tables/ort-cpu-1.32.0.json")),
    ("ort-cuda-1.31.1", include_str!("tables/ort-cuda-1.31.1.json")),
    ("tensorrt-10.3", include_str!("tables/tensorrt-10.3.json")),
    ("tensorrt-10.15", include_str!("tables/tensorrt-10.15.json")),
    ("tensorrt-11", include_str!("tables/tensorrt-11.json")),
];

/// Kernels of a provider, of one version.
pub struct KernelTable {
    provider: Provider,
    file: File,
    signatures: Arc<Signatures>,
}

#[derive(Deserialize)]
struct File {
    provider: String,
    version: String,
    sources: Vec<String>,
    /// Versions of ONNX's operator set that a model may have; else each kernel tells.
    opsets: Option<(i64, i64)>,
    /// By `Op` or `domain:Op`; no kernel: the provider is said not to have it.
    ops: BTreeMap<String, Vec<Kernel>>,
}

/// A kernel, or several that differ in types of one constraint.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// Versions of the operator, first and last; without a last, only the first is sure.
    versions: Vec<(i64, Option<i64>)>,
    /// Element types by constraint, parameter, or position (`input 0`).
    types: BTreeMap<String, String>,
    #[serde(default)]
    limits: Vec<Limit>,
    /// Limits in words, which nothing checks.
    #[serde(default)]
    notes: Vec<String>,
    /// Known from a class name in the library alone, which is no registration.
    #[serde(default)]
    inferred: bool,
}

/// What a kernel asks beyond types.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Limit {
    /// The input is known when the file is loaded, or absent.
    Constant(usize),
    /// The input is 0, or absent.
    Zero(usize),
    /// The input has this rank, or is absent.
    Rank(usize, usize),
    /// The attribute has this value, which is its default.
    Attribute(String, i64),
    /// The input is absent.
    Absent(usize),
    /// Outputs after so many are absent.
    Outputs(usize),
    /// The attribute is absent or 0.
    Without(String),
}

/// Why a provider does not take a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, thiserror::Error)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Reason {
    /// A function of this program.
    #[error("a local function: expected standard operators only\n\nhint: inline functions")]
    Function,
    /// The table does not have the operator.
    #[error("unknown operator")]
    UnknownOp,
    /// The table has the operator, as one that the provider does not have.
    #[error("not supported, says the vendor")]
    Unsupported,
    /// No kernel of this version.
    #[error("version {found}: expected {expected}")]
    Version {
        /// Versions that there are kernels of.
        expected: String,
        /// The operator's, or the model's for TensorRT.
        found: i64,
    },
    /// No kernel of these element types.
    #[error("{role}: expected {expected}, got {found}")]
    Type {
        /// The first input or output that no kernel takes: position and name.
        role: String,
        /// What kernels take there.
        expected: String,
        /// What it is.
        found: String,
    },
    /// Something else that the provider does not take.
    #[error("{role}: expected {expected}, got {found}")]
    Limit {
        /// The input, output or attribute.
        role: String,
        /// What the provider takes.
        expected: String,
        /// What there is.
        found: String,
    },
}

impl KernelTable {
    /// The table called `name`, one of [`TABLES`].
    ///
    /// # Errors
    /// A name that there is no table of; data that does not parse.
    pub fn load(name: &str, signatures: &Arc<Signatures>) -> Result<KernelTable> {
        let known = || TABLES.map(|(name, _)| name).join(", ");
        let found = TABLES.iter().find(|(known, _)| *known == name);
        let (_, text) =
            found.with_context(|| format!("kernel table `{name}`: expected {}", known()))?;
        let file: File =
            serde_json::from_str(text).with_context(|| format!("kernel table `{name}`"))?;
        let provider = Provider::ALL.into_iter().find(|p| p.ort_name() == file.provider);
        let provider = provider
            .with_context(|| format!("kernel table `{name}`: provider {}", file.provider))?;
        Ok(KernelTable { provider, file, signatures: signatures.clone() })
    }

    /// Whose kernels these are.
    pub fn provider(&self) -> Provider {
        self.provider
    }

    /// The version of ONNX Runtime, or of TensorRT.
    pub fn version(&self) -> &str {
        &self.file.version
    }

    /// Where the table comes from.
    pub fn sources(&self) -> &[String] {
        &self.file.sources
    }

    /// How many operators the table has.
    pub fn n_ops(&self) -> usize {
        self.file.ops.len()
    }

    /// Whether the provider has a kernel for `node`.
    ///
    /// # Errors
    /// Why it has none.
    pub fn supports(&self, node: &ListedNode) -> Result<(), Reason> {
        self.kernel(node).map(|_| ())
    }

    /// The kernel that takes `node`. Element types that the file does not tell are taken to fit.
    ///
    /// # Errors
    /// Why there is none.
    pub fn kernel(&self, node: &ListedNode) -> Result<&Kernel, Reason> {
        if node.domain == FLAMINGO {
            return Err(Reason::Function);
        }
        let kernels = self.file.ops.get(&key_of(node)).ok_or(Reason::UnknownOp)?;
        if kernels.is_empty() {
            return Err(Reason::Unsupported);
        }
        let kernels = self.of_version(node, kernels)?;
        let signature = self.signatures.of(node);
        let fits = kernels.iter().find(|kernel| kernel.mismatch(node, signature).is_none());
        let kernel = fits.ok_or_else(|| type_reason(node, signature, &kernels))?;
        kernel.limits.iter().try_for_each(|limit| limit.check(node, signature))?;
        Ok(kernel)
    }

    /// Kernels of the operator's version. ONNX Runtime's rule: a kernel that is open to later versions takes only the
    /// one that it begins with, for nothing is known of later ones.
    fn of_version<'a>(
        &self,
        node: &ListedNode,
        kernels: &'a [Kernel],
    ) -> Result<Vec<&'a Kernel>, Reason> {
        let opset = node.opset.unwrap_or(0);
        if let Some((first, last)) = self.file.opsets {
            let expected = format!("{first} to {last} of the operator set");
            return match (first..=last).contains(&opset) {
                true => Ok(kernels.iter().collect()),
                false => Err(Reason::Version { expected, found: opset }),
            };
        }
        let since = match (self.signatures.of(node), self.signatures.first_version(node)) {
            (Some(signature), _) => signature.since(),
            (None, Some(first)) => {
                let expected = format!("{first} or later of the operator set");
                return Err(Reason::Version { expected, found: opset });
            }
            (None, None) => opset,
        };
        let takes = |(first, last): &(i64, Option<i64>)| {
            *first == since || *first < since && last.is_some_and(|last| since <= last)
        };
        let of_version: Vec<&Kernel> =
            kernels.iter().filter(|kernel| kernel.versions.iter().any(takes)).collect();
        match of_version.is_empty() {
            false => Ok(of_version),
            true => Err(Reason::Version { expected: versions(kernels), found: since }),
        }
    }
}

impl Kernel {
    /// Limits in words, which nothing checked.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Whether a class name in the library is all that tells of the kernel.
    pub fn is_inferred(&self) -> bool {
        self.inferred
    }

    /// The first value of `node` whose element type the kernel does not take.
    fn mismatch<'a>(
        &self,
        node: &'a ListedNode,
        signature: Option<&Signature>,
    ) -> Option<Mismatch<'a>> {
        typed_values(node).find(|value| {
            let allowed = self.allowed(signature, value.side, value.index);
            allowed.is_some_and(|allowed| !allowed.split(' ').any(|name| name == value.dtype))
        })
    }

    /// Element types that the kernel takes for a parameter; none if it takes any.
    fn allowed(&self, signature: Option<&Signature>, side: Side, index: usize) -> Option<&str> {
        let at = match side {
            Side::Input => format!("input {index}"),
            Side::Output => format!("output {index}"),
        };
        let parameter = signature.and_then(|signature| signature.parameter(side, index));
        let (name, constraint) = parameter.unwrap_or_default();
        let names = [at.as_str(), name, constraint];
        names.into_iter().find_map(|name| self.types.get(name)).map(String::as_str)
    }
}

/// A value of a known element type.
#[derive(Clone, Copy)]
struct Mismatch<'a> {
    side: Side,
    index: usize,
    dtype: &'a str,
}

/// Inputs and outputs of `node` with a known element type.
fn typed_values(node: &ListedNode) -> impl Iterator<Item = Mismatch<'_>> {
    let inputs = node.inputs.iter().map(|input| (Side::Input, input.value.dtype));
    let outputs = node.outputs.iter().map(|output| (Side::Output, output.dtype));
    let values = inputs.enumerate().chain(outputs.enumerate());
    values.filter_map(|(index, (side, dtype))| Some(Mismatch { side, index, dtype: dtype? }))
}

/// The value that stops the kernel that comes furthest, and what all kernels take there.
fn type_reason(node: &ListedNode, signature: Option<&Signature>, kernels: &[&Kernel]) -> Reason {
    let rank = |value: &Mismatch<'_>| (value.side == Side::Output, value.index);
    let mismatches = kernels.iter().filter_map(|kernel| kernel.mismatch(node, signature));
    let Some(value) = mismatches.max_by_key(rank) else { return Reason::UnknownOp };
    let allowed = kernels.iter().filter_map(|k| k.allowed(signature, value.side, value.index));
    let names: BTreeSet<&str> = allowed.flat_map(|names| names.split(' ')).collect();
    Reason::Type {
        role: role(signature, value.side, value.index),
        expected: names.into_iter().collect::<Vec<_>>().join(", "),
        found: value.dtype.to_owned(),
    }
}

/// Position and name of a parameter.
fn role(signature: Option<&Signature>, side: Side, index: usize) -> String {
    let at = match side {
        Side::Input => format!("input {index}"),
        Side::Output => format!("output {index}"),
    };
    match signature.and_then(|signature| signature.parameter(side, index)) {
        Some((name, _)) => format!("{at} ({name})"),
        None => at,
    }
}

/// Versions of kernels as text.
fn versions(kernels: &[Kernel]) -> String {
    let all: BTreeSet<&(i64, Option<i64>)> = kernels.iter().flat_map(|k| &k.versions).collect();
    let text = |(first, last): &&(i64, Option<i64>)| match last {
        Some(last) if last == first => first.to_string(),
        Some(last) => format!("{first} to {last}"),
        None => format!("{first}"),
    };
    format!("{} of the operator", all.iter().map(text).collect::<Vec<_>>().join(", "))
}

impl Limit {
    fn check(&self, node: &ListedNode, signature: Option<&Signature>) -> Result<(), Reason> {
        let input = |index: usize| present(node, index);
        let at = |index: usize| role(signature, Side::Input, index);
        let broken = |role: String, expected: &str, found: String| {
            Err(Reason::Limit { role, expected: expected.to_owned(), found })
        };
        match self {
            Limit::Constant(index) if input(*index).is_some_and(|input| !input.is_constant) => {
                broken(at(*index), "a constant", "a computed value".into())
            }
            Limit::Zero(index) => match input(*index).map(|input| input.is_zero) {
                None | Some(Some(true)) => Ok(()),
                Some(Some(false)) => broken(at(*index), "0", "another number".into()),
                Some(None) => broken(at(*index), "0", "a value that the file does not tell".into()),
            },
            Limit::Rank(index, rank) => match input(*index).and_then(|i| i.value.dims.as_ref()) {
                Some(dims) if dims.len() != *rank => {
                    broken(at(*index), &format!("rank {rank}"), format!("rank {}", dims.len()))
                }
                Some(_) | None => Ok(()),
            },
            Limit::Attribute(name, value) => match node.integers.get(name) {
                Some(found) if found != value => {
                    broken(attribute(name), &value.to_string(), found.to_string())
                }
                Some(_) | None => Ok(()),
            },
            Limit::Absent(index) if input(*index).is_some() => {
                broken(at(*index), "no such input", "one".into())
            }
            Limit::Outputs(n) => {
                let extra = node.outputs.iter().skip(*n).position(|value| !value.name.is_empty());
                let role = |index| role(signature, Side::Output, n + index);
                extra.map_or(Ok(()), |i| broken(role(i), "no such output", "one".into()))
            }
            Limit::Without(name) if has_attribute(node, name) => {
                broken(attribute(name), "none", "one".into())
            }
            Limit::Constant(_) | Limit::Absent(_) | Limit::Without(_) => Ok(()),
        }
    }
}

fn attribute(name: &str) -> String {
    format!("attribute `{name}`")
}

fn has_attribute(node: &ListedNode, name: &str) -> bool {
    node.attributes.contains(name) || node.integers.get(name).is_some_and(|value| *value != 0)
}

/// The input at `index`, unless it is absent.
fn present(node: &ListedNode, index: usize) -> Option<&ListedInput> {
    node.inputs.get(index).filter(|input| !input.value.name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::super::example::node;
    use super::*;

    fn table(name: &str) -> KernelTable {
        KernelTable::load(name, &Arc::new(Signatures::load().unwrap())).unwrap()
    }

    /// What the table says of a node, as text.
    fn said(name: &str, node: &ListedNode) -> String {
        table(name).supports(node).map_or_else(|reason| reason.to_string(), |()| "yes".into())
    }

    #[test]
    fn tables_parse_and_say_where_they_come_from() {
        for (name, _) in TABLES {
            let table = table(name);
            assert!(table.n_ops() > 100, "{name}: {}", table.n_ops());
            assert!(table.sources().iter().any(|source| source.len() > 20), "{name}");
            assert!(name.ends_with(table.version()), "{name}");
            for (op, kernels) in &table.file.ops {
                for kernel in kernels {
                    assert!(!kernel.versions.is_empty(), "{name}, {op}");
                    let mut names = kernel.types.values().flat_map(|types| types.split(' '));
                    let is_known = |n: &str| flamingo_ir::DType::from_name(n).is_some();
                    assert!(names.all(is_known), "{name}, {op}: {:?}", kernel.types);
                }
            }
        }
        let signatures = Arc::new(Signatures::load().unwrap());
        assert!(signatures.sources().count() > 0);
        let error = KernelTable::load("ort-cpu-0", &signatures).err().unwrap().to_string();
        assert!(error.contains("`ort-cpu-0`") && error.contains("ort-cpu-1.32.0"), "{error}");
    }

    #[test]
    fn types_are_matched_by_constraint() {
        for (table, node, expected) in [
            ("ort-cpu-1.32.0", node("MatMul@17", "a:f32,b:f32", "y:f32"), "yes"),
            (
                "ort-cpu-1.32.0",
                node("MatMul@17", "a:f16,b:f16", "y:f16"),
                "input 0 (A): expected f32, f64, i32, i64, got f16",
            ),
            ("ort-cuda-1.31.1", node("MatMul@17", "a:f16,b:f16", "y:f16"), "yes"),
            ("ort-cuda-1.31.1", node("MatMul@17", "a:f64,b:f64", "y:f64"), "yes"),
            (
                "tensorrt-10.3",
                node("MatMul@17", "a:f64,b:f64", "y:f64"),
                "input 0 (A): expected bf16, f16, f32, got f64",
            ),
            (
                "ort-cuda-1.31.1",
                node("com.microsoft:GroupQueryAttention@1", "q:f32,k:f32,v:f32", "y:f32"),
                "input 0 (query): expected bf16, f16, got f32",
            ),
            ("ort-cpu-1.32.0", node("MatMulInteger@17", "a:u8,b:i8", "y:i32"), "yes"),
            (
                "ort-cuda-1.31.1",
                node("MatMulInteger@17", "a:u8,b:i8", "y:i32"),
                "input 0 (A): expected i8, got u8",
            ),
            (
                "ort-cuda-1.31.1",
                node("com.microsoft:MatMulNBits@1", "a:bf16,b:u8,s:bf16", "y:bf16"),
                "yes",
            ),
            ("ort-cpu-1.32.0", node("Gather@17", "x:f16,i:i64", "y:f16"), "yes"),
            (
                "ort-cpu-1.32.0",
                node("Gather@17", "x:f16,i:i8", "y:f16"),
                "input 1 (indices): expected i32, i64, got i8",
            ),
            ("ort-cpu-1.32.0", node("Concat@17", "a:i64,b:i64,c:i64", "y:i64"), "yes"),
            ("tensorrt-10.3", node("Where@17", "c:bool,a:f16,b:f16", "y:f16"), "yes"),
            (
                "tensorrt-10.3",
                node("Relu@17", "a:u4", "y:u4"),
                "input 0 (X): expected bf16, f16, f32, i32, i64, got u4",
            ),
        ] {
            assert_eq!(said(table, &node), expected, "{table}: {}", node.op_type);
        }
    }

    #[test]
    fn versions_are_matched_as_onnx_runtime_does() {
        let cos = |opset: &str| node(&format!("Cos@{opset}"), "x:f32", "y:f32");
        assert_eq!(said("ort-cuda-1.31.1", &cos("17")), "yes");
        let floor = node("ThresholdedRelu@22", "x:f32", "y:f32");
        assert_eq!(said("ort-cuda-1.31.1", &floor), "version 22: expected 1, 10 of the operator");
        assert_eq!(
            said("tensorrt-10.3", &cos("21")),
            "version 21: expected 9 to 20 of the operator set"
        );
        assert_eq!(said("tensorrt-10.15", &cos("21")), "yes");
        let early = node("Attention@22", "q:f32,k:f32,v:f32", "y:f32");
        assert_eq!(
            said("ort-cpu-1.32.0", &early),
            "version 22: expected 23 or later of the operator set"
        );
        let inferred = table("ort-cuda-1.31.1");
        let bf16 = node("Cos@22", "x:bf16", "y:bf16");
        assert!(inferred.kernel(&bf16).unwrap().is_inferred());
    }

    #[test]
    fn operators_that_a_provider_lacks_are_named() {
        let integer = node("com.microsoft:MatMulIntegerToFloat@1", "a:u8,b:i8", "y:f32");
        assert_eq!(said("ort-cpu-1.32.0", &integer), "yes");
        assert_eq!(table("ort-cuda-1.31.1").supports(&integer), Err(Reason::UnknownOp));
        assert_eq!(table("tensorrt-11").supports(&integer), Err(Reason::UnknownOp));
        let quantise = node("DynamicQuantizeLinear@17", "x:f32", "y:u8,s:f32,z:u8");
        assert_eq!(table("tensorrt-10.3").supports(&quantise), Err(Reason::Unsupported));
        let attention = node("Attention@23", "q:f16,k:f16,v:f16", "y:f16");
        assert_eq!(table("tensorrt-10.3").supports(&attention), Err(Reason::UnknownOp));
        let call = node("flamingo:Linear@1", "x:f32", "y:f32");
        for (name, _) in TABLES {
            assert_eq!(table(name).supports(&call), Err(Reason::Function), "{name}");
        }
        let swish = node("Swish@24", "x:f16", "y:f16");
        assert_eq!(table("tensorrt-10.15").supports(&swish), Err(Reason::UnknownOp));
        assert_eq!(said("tensorrt-11", &swish), "yes");
    }

    #[test]
    fn limits_of_tensorrt_are_checked() {
        let norm = |outputs| node("LayerNormalization@17", "x:f16,s:f16", outputs);
        assert_eq!(said("tensorrt-10.3", &norm("y:f16")), "yes");
        assert_eq!(
            said("tensorrt-10.3", &norm("y:f16,m:f32")),
            "output 1 (Mean): expected no such output, got one"
        );
        let mut attention = node("Attention@23", "q:f16,k:f16,v:f16", "y:f16");
        for input in &mut attention.inputs {
            input.value.dims = Some(vec!["b".into(), "h".into(), "n".into(), "64".into()]);
        }
        assert_eq!(said("tensorrt-10.15", &attention), "yes");
        attention.attributes.insert("softcap".into());
        assert_eq!(
            said("tensorrt-10.15", &attention),
            "attribute `softcap`: expected none, got one"
        );
        attention.inputs[1].value.dims = Some(vec!["b".into(), "n".into(), "64".into()]);
        assert_eq!(said("tensorrt-10.15", &attention), "input 1 (K): expected rank 4, got rank 3");
        let past = node("Attention@23", "q:f16,k:f16,v:f16,,p:f16", "y:f16");
        assert_eq!(
            said("tensorrt-10.15", &past),
            "input 4 (past_key): expected no such input, got one"
        );
        let axes = node("ReduceSum@17", "x:f32,a:i64", "y:f32");
        assert_eq!(
            said("tensorrt-10.3", &axes),
            "input 1 (axes): expected a constant, got a computed value"
        );
        let mut quantise = node("QuantizeLinear@17", "x:f32,s:f32,=z:i8", "y:i8");
        let unknown = "input 2 (y_zero_point): expected 0, got a value that the file does not tell";
        assert_eq!(said("tensorrt-10.15", &quantise), unknown);
        quantise.inputs[2].is_zero = Some(true);
        assert_eq!(said("tensorrt-10.15", &quantise), "yes");
        quantise.inputs[2].is_zero = Some(false);
        let nonzero = "input 2 (y_zero_point): expected 0, got another number";
        assert_eq!(said("tensorrt-10.15", &quantise), nonzero);
        let mut top = node("TopK@17", "x:f32,k:i64", "v:f32,i:i64");
        top.integers.insert("sorted".into(), 0);
        assert_eq!(said("tensorrt-10.3", &top), "attribute `sorted`: expected 1, got 0");
    }
}
