//! Writes an artifact: weights streamed into one file, graphs that point into it, manifest and
//! report; whole or not at all.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, bail};
use flamingo_ir::onnx::{MAX_INLINE_BYTES, Typing, WeightEntry, WeightLayout, typed_graph};
use flamingo_ir::op::{Fit, Flavour, Inputs, Op, PanelFormat, output_sqnr_db, sqnr_db};
use flamingo_ir::{Constant, DType, Fact, Graph, NodeId, Tensor, ValueId, Verified, Weights, fold};
use flamingo_models::manifest::{FileEntry, GraphEntry, TensorEntry};
use flamingo_models::map::MappedFile;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::scratch::{REPLACED, Scratch};

/// Name of the weight file inside `graphs/`. ONNX readers refuse external data outside the
/// model's folder, so the weights lie beside the graphs.
pub const WEIGHTS: &str = "weights.safetensors";

/// Tensors begin at multiples of this.
const ALIGNMENT: u64 = 64;

/// One tensor to be written.
struct Planned {
    name: String,
    graph: usize,
    value: ValueId,
    fact: Fact,
    n_bytes: u64,
    /// Bytes that it would take in f32; a scale would not be there.
    n_bytes_f32: u64,
    panels: Option<PanelPart>,
}

/// Which part of a packed weight a tensor is.
#[derive(Clone, Copy, PartialEq)]
struct PanelPart {
    node: NodeId,
    format: PanelFormat,
    weight: ValueId,
    /// 0 data, then scales.
    output: usize,
}

/// How one weight matrix is stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerStorage {
    /// Name of the tensor, without its part.
    pub name: String,
    /// `f32`, `f16`, `bf16`, `int8`, `int4/32`.
    pub scheme: String,
    /// Bytes of data and scales.
    pub bytes: u64,
    /// Signal-to-noise ratio against f32, in dB; none if nothing was lost.
    pub sqnr_db: Option<f64>,
    /// The same of its products with the rows that calibration saw; none without calibration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_sqnr_db: Option<f64>,
    /// Largest magnitude that calibration saw in a column of those rows over that of the median column, before outliers
    /// were migrated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outlier_ratio: Option<f64>,
    /// Mean KL of next tokens from f32 if only this weight's op is stored so; none if that was not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_alone: Option<f64>,
}

impl LayerStorage {
    /// The op that it belongs to, as [`Scheme::layers`] names it.
    ///
    /// [`Scheme::layers`]: crate::scheme::Scheme::layers
    pub fn op(&self) -> &str {
        self.name.rsplit_once('.').map_or(self.name.as_str(), |(op, _)| op)
    }

    /// Noise over signal, of products where calibration measured them; 0 where nothing was lost.
    pub fn noise(&self) -> f64 {
        self.output_sqnr_db.or(self.sqnr_db).map_or(0.0, |db| 10f64.powf(-db / 10.0))
    }
}

/// Largest magnitude in a column over that of the median column.
pub fn outlier_ratio(inputs: &Inputs) -> f64 {
    let mut largest = inputs.largest().to_vec();
    largest.sort_by(f32::total_cmp);
    let (median, most) = (largest.get(largest.len() / 2), largest.last());
    let ratio = f64::from(*most.unwrap_or(&1.0)) / f64::from(*median.unwrap_or(&1.0));
    if ratio.is_finite() { ratio } else { f64::from(f32::MAX) }
}

/// What the rounding is fitted to, by the name of a packed weight; others are rounded to nearest.
pub type Fits<'a> = BTreeMap<String, Fitted<'a>>;

/// What the rounding of one weight is fitted to, as [`Fit`], which borrows it.
#[derive(Debug, Clone, Default)]
pub struct Fitted<'a> {
    /// The rows that calibration saw.
    pub inputs: Option<Cow<'a, Inputs>>,
    /// Share of the largest magnitude that a scale reaches.
    pub reach: Option<f32>,
    /// Largest magnitude in a column of the rows, before outliers were migrated, over that of the median column.
    pub outlier_ratio: Option<f64>,
}

/// The weight file, written.
pub struct WrittenWeights {
    /// Size and hash.
    pub file: FileEntry,
    /// Number of values that are not finite, by the weight that they come from.
    pub not_finite: BTreeMap<String, usize>,
    /// Every weight matrix, in the order of the file.
    pub layers: Vec<LayerStorage>,
}

/// The weight file before it is written: names, order and offsets of its tensors.
pub struct WeightPlan {
    header: Vec<u8>,
    tensors: Vec<(u64, Planned)>,
    total_bytes: u64,
    layouts: Vec<WeightLayout>,
}

impl WeightPlan {
    /// Plans the build-time values that the nodes of `graphs` read.
    pub fn new(graphs: &[&Verified]) -> Result<WeightPlan> {
        let mut planned = Vec::new();
        let mut names = BTreeSet::new();
        let mut shared: BTreeMap<String, usize> = BTreeMap::new();
        let mut slots: Vec<BTreeMap<ValueId, usize>> = vec![BTreeMap::new(); graphs.len()];
        for (index, graph) in graphs.iter().enumerate() {
            for (value, name) in stored_values(graph) {
                let weight = identity(graph, value);
                let known = weight.as_ref().and_then(|weight| shared.get(weight).copied());
                let slot = match known {
                    Some(slot) => slot,
                    None => {
                        planned.push(plan(graph, index, value, unique(&mut names, name))?);
                        planned.len() - 1
                    }
                };
                shared.extend(weight.map(|weight| (weight, slot)));
                slots[index].insert(value, slot);
            }
        }
        WeightPlan::lay_out(planned, slots)
    }

    /// Puts tensors whose size is a multiple of the alignment first, and pads the others: the
    /// format allows no gaps, so a gap is a tensor of its own. Parts of one packed weight stay
    /// together, so that it is read and packed once.
    fn lay_out(planned: Vec<Planned>, slots: Vec<BTreeMap<ValueId, usize>>) -> Result<WeightPlan> {
        let mut order: Vec<usize> = (0..planned.len()).collect();
        let loose = |tensor: &Planned| !tensor.n_bytes.is_multiple_of(ALIGNMENT);
        let loose_packs: BTreeSet<_> =
            planned.iter().filter(|tensor| loose(tensor)).filter_map(Planned::pack).collect();
        order.sort_by_key(|slot| match planned[*slot].pack() {
            Some(pack) => loose_packs.contains(&pack),
            None => loose(&planned[*slot]),
        });
        let mut entries = serde_json::Map::new();
        let mut offsets = vec![0u64; planned.len()];
        let mut end = 0u64;
        for slot in order {
            let padding = end.next_multiple_of(ALIGNMENT) - end;
            if padding > 0 {
                let entry = json!({"dtype": "U8", "shape": [padding], "data_offsets": [end, end + padding]});
                entries.insert(format!("__padding__.{end}"), entry);
                end += padding;
            }
            let tensor = &planned[slot];
            let shape = tensor.fact.known_shape().unwrap_or_default();
            let span = [end, end + tensor.n_bytes];
            let dtype = header_dtype(tensor.fact.dtype)?;
            entries.insert(
                tensor.name.clone(),
                json!({"dtype": dtype, "shape": shape, "data_offsets": span}),
            );
            offsets[slot] = end;
            end += tensor.n_bytes;
        }
        let mut header = serde_json::to_vec(&entries)?;
        let begin = u64::try_from(header.len() + 8)?.next_multiple_of(ALIGNMENT);
        header.resize(usize::try_from(begin)? - 8, b' ');
        let entry = |slot: &usize| WeightEntry {
            name: planned[*slot].name.clone(),
            offset: begin + offsets[*slot],
            length: planned[*slot].n_bytes,
        };
        let layout = |values: &BTreeMap<ValueId, usize>| WeightLayout {
            location: WEIGHTS.to_owned(),
            entries: values.iter().map(|(value, slot)| (*value, entry(slot))).collect(),
        };
        let layouts = slots.iter().map(layout).collect();
        let mut tensors: Vec<(u64, Planned)> = offsets.into_iter().zip(planned).collect();
        tensors.sort_by_key(|(offset, _)| *offset);
        Ok(WeightPlan { header, tensors, total_bytes: begin + end, layouts })
    }

    /// Size of the weight file.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Size of the weight file if all weights were f32.
    pub fn total_bytes_f32(&self) -> u64 {
        let stored: u64 = self.tensors.iter().map(|(_, tensor)| tensor.n_bytes).sum();
        let in_f32: u64 = self.tensors.iter().map(|(_, tensor)| tensor.n_bytes_f32).sum();
        self.total_bytes - stored + in_f32
    }

    /// Where the values of the `index`-th graph lie.
    pub fn layout(&self, index: usize) -> &WeightLayout {
        &self.layouts[index]
    }

    /// Writes the file. One weight at a time is read and folded, one packed and one written, for which a tensor may wait;
    /// `progress` is told the bytes that are packed.
    pub fn write(
        &self,
        path: &Path,
        graphs: &[&Verified],
        weights: &(dyn Weights + Sync),
        fits: &Fits,
        progress: &mut dyn FnMut(u64),
    ) -> Result<WrittenWeights> {
        let file =
            File::create(path).with_context(|| format!("cannot create `{}`", path.display()))?;
        let mut writer = HashingWriter { file, hasher: blake3::Hasher::new(), n: 0 };
        writer.put(&u64::try_from(self.header.len())?.to_le_bytes())?;
        writer.put(&self.header)?;
        let begin = writer.n;
        // Tensors that are made of one folded value: one alone, or the parts of a packed weight.
        let units =
            self.tensors.chunk_by(|(_, a), (_, b)| a.panels.is_some() && a.pack() == b.pack());
        let source = FoldedWeights { graphs, weights };
        let mut layers = Vec::new();
        let (not_finite, writer) = thread::scope(|scope| {
            let (folded_sender, folded) = mpsc::sync_channel(0);
            let (packed_sender, packed) = mpsc::sync_channel::<(u64, Tensor)>(1);
            let fold = scope.spawn(move || {
                let mut not_finite = BTreeMap::new();
                for unit in units {
                    let value = source.fold(&unit[0].1, &mut not_finite)?;
                    if folded_sender.send((unit, value)).is_err() {
                        break;
                    }
                }
                anyhow::Ok(not_finite)
            });
            let write = scope.spawn(move || {
                for (offset, tensor) in packed {
                    writer.pad_to(begin + offset)?;
                    writer.put(&tensor.le_bytes())?;
                }
                anyhow::Ok(writer)
            });
            'units: for (unit, value) in folded {
                let (tensors, layer) = pack(unit, value, graphs, fits)?;
                layers.extend(layer);
                for ((offset, _), tensor) in unit.iter().zip(tensors) {
                    if packed_sender.send((*offset, tensor)).is_err() {
                        // The writer stopped: its error is told below.
                        break 'units;
                    }
                    progress(begin + offset);
                }
            }
            drop(packed_sender);
            // What the first of them says ended all.
            let not_finite = fold.join().unwrap_or_else(|panic| resume_unwind(panic))?;
            anyhow::Ok((not_finite, write.join().unwrap_or_else(|panic| resume_unwind(panic))?))
        })?;
        if writer.n != self.total_bytes {
            bail!("weight file of {} bytes, planned {}", writer.n, self.total_bytes);
        }
        progress(writer.n);
        Ok(WrittenWeights { file: writer.finish()?, not_finite, layers })
    }
}

/// Values of the graphs that are known when an artifact is made.
struct FoldedWeights<'a> {
    graphs: &'a [&'a Verified],
    weights: &'a (dyn Weights + Sync),
}

impl FoldedWeights<'_> {
    /// What a tensor is made of: the value itself, or the weight that is packed. Weights with values that are not
    /// finite are added to `not_finite`.
    fn fold(&self, tensor: &Planned, not_finite: &mut BTreeMap<String, usize>) -> Result<Tensor> {
        let graph = self.graphs[tensor.graph];
        let id = tensor.panels.map_or(tensor.value, |part| part.weight);
        let value = fold(graph, id, self.weights)?;
        let bad = count_not_finite(&value);
        if bad > 0 {
            let guilty = not_finite_weights(graph, id, self.weights)?;
            match guilty.is_empty() {
                true => drop(not_finite.insert(tensor.name.clone(), bad)),
                false => not_finite.extend(guilty),
            }
        }
        Ok(value)
    }
}

/// The tensors that a folded value makes, and how it is stored if it is a matrix.
fn pack(
    unit: &[(u64, Planned)],
    value: Tensor,
    graphs: &[&Verified],
    fits: &Fits,
) -> Result<(Vec<Tensor>, Option<LayerStorage>)> {
    let (_, tensor) = &unit[0];
    let Some(part) = tensor.panels else {
        let layer = (tensor.fact.rank() == 2).then(|| tensor.storage("f32", tensor.n_bytes, None));
        return Ok((vec![value], layer));
    };
    let node = graphs[tensor.graph].node(part.node);
    let name = node.name.strip_suffix(".panels").unwrap_or(&node.name);
    let fitted = fits.get(name);
    let fit = fitted.map_or_else(Fit::default, |fitted| Fit {
        inputs: fitted.inputs.as_deref(),
        reach: fitted.reach,
    });
    let packed = match &node.op {
        Op::PackPanels(op) => op.pack_for(&value, fit),
        op => op.operator().evaluate(std::slice::from_ref(&value)),
    };
    let packed = packed.with_context(|| format!("cannot pack `{}`", tensor.stem()))?;
    let output_sqnr_db = match fit.inputs {
        Some(inputs) => Some(output_sqnr_db(part.format, &value, &packed, inputs)?),
        None => None,
    };
    let bytes: usize = packed.iter().map(|t| t.n_elements() * t.dtype().size()).sum();
    let sqnr_db = Some(sqnr_db(part.format, &value, &packed)?).filter(|db| db.is_finite());
    let mut layer = tensor.storage(&part.format.to_string(), u64::try_from(bytes)?, sqnr_db);
    layer.output_sqnr_db = output_sqnr_db.filter(|db| db.is_finite());
    layer.outlier_ratio = fitted.and_then(|fitted| fitted.outlier_ratio);
    let stored = |(_, tensor): &(u64, Planned)| {
        let part = tensor.panels.and_then(|part| packed.get(part.output).cloned());
        part.context("a part of a packed weight")
    };
    Ok((unit.iter().map(stored).collect::<Result<_>>()?, Some(layer)))
}

impl Planned {
    /// The packed weight that it is a part of.
    fn pack(&self) -> Option<(usize, NodeId)> {
        self.panels.map(|part| (self.graph, part.node))
    }

    /// The name without the part of a packed weight.
    fn stem(&self) -> &str {
        match self.panels.and_then(|_| self.name.rsplit_once('.')) {
            Some((stem, _)) => stem,
            None => &self.name,
        }
    }

    fn storage(&self, scheme: &str, bytes: u64, sqnr_db: Option<f64>) -> LayerStorage {
        let (name, scheme) = (self.stem().to_owned(), scheme.to_owned());
        LayerStorage {
            name,
            scheme,
            bytes,
            sqnr_db,
            output_sqnr_db: None,
            outlier_ratio: None,
            kl_alone: None,
        }
    }
}

/// What a value is made of, if another graph may make the same: a weight, or a part of one packed.
fn identity(graph: &Graph, value: ValueId) -> Option<String> {
    if let Some(Constant::Weight(weight)) = &graph.value(value).constant {
        return Some(weight.clone());
    }
    let part = panel_part(graph, value)?;
    let weight = identity(graph, part.weight)?;
    Some(format!("{weight}#{}#{}", part.format, part.output))
}

fn panel_part(graph: &Graph, value: ValueId) -> Option<PanelPart> {
    let id = *graph.producers().get(&value)?;
    let node = graph.node(id);
    let Op::PackPanels(op) = &node.op else { return None };
    let output = node.outputs.iter().position(|output| *output == value)?;
    Some(PanelPart { node: id, format: op.format, weight: *node.inputs.first()?, output })
}

/// Build-time values that runtime nodes or outputs read, with a name after the reader and its
/// role there; weights keep their checkpoint name.
fn stored_values(graph: &Graph) -> Vec<(ValueId, String)> {
    let build_time = graph.build_time_values();
    let mut stored: Vec<(ValueId, String)> = Vec::new();
    let mut seen = BTreeSet::new();
    for node in graph.nodes() {
        if node.outputs.iter().all(|output| build_time.contains(output)) {
            continue;
        }
        for (index, input) in node.inputs.iter().enumerate() {
            if !build_time.contains(input) || is_inline(graph, *input) || !seen.insert(*input) {
                continue;
            }
            let name = match &graph.value(*input).constant {
                Some(Constant::Weight(weight)) => weight.replace('/', "."),
                _ => format!("{}.{}", node.name, role(graph, node, index)),
            };
            stored.push((*input, name));
        }
    }
    stored
}

/// Literals of integers and small ones are written into the graph itself.
fn is_inline(graph: &Graph, value: ValueId) -> bool {
    match &graph.value(value).constant {
        Some(Constant::Literal(tensor)) => {
            tensor.dtype() == DType::I64
                || tensor.n_elements() * tensor.dtype().size() <= MAX_INLINE_BYTES
        }
        _ => false,
    }
}

/// What the `index`-th input of a node is for.
fn role(graph: &Graph, node: &flamingo_ir::Node, index: usize) -> String {
    let facts: Vec<Fact> = node.inputs.iter().map(|input| graph.fact(*input).clone()).collect();
    let body = node.op.operator().body(&facts, Flavour::Portable).and_then(Result::ok);
    let role = body.and_then(|body| body.inputs().get(index).map(|(name, _)| name.clone()));
    role.unwrap_or_else(|| format!("input_{index}"))
}

fn unique(names: &mut BTreeSet<String>, name: String) -> String {
    let mut unique = name.clone();
    let mut n = 1;
    while !names.insert(unique.clone()) {
        n += 1;
        unique = format!("{name}.{n}");
    }
    unique
}

fn plan(graph: &Graph, index: usize, value: ValueId, name: String) -> Result<Planned> {
    let fact = graph.fact(value).clone();
    let n_elements =
        fact.n_elements().known().context("a build-time value has a symbolic shape")?;
    let n_bytes = u64::try_from(n_elements)? * u64::try_from(fact.dtype.size())?;
    let panels = panel_part(graph, value);
    let n_bytes_f32 = match panels {
        None => n_bytes,
        Some(part) if part.output > 0 => 0,
        Some(part) => {
            let n_elements = graph.fact(part.weight).n_elements().known();
            4 * u64::try_from(n_elements.context("a packed weight has a symbolic shape")?)?
        }
    };
    Ok(Planned { name, graph: index, value, fact, n_bytes, n_bytes_f32, panels })
}

fn header_dtype(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("F32"),
        DType::I64 => Ok("I64"),
        DType::Bool => Ok("BOOL"),
        DType::F16 => Ok("F16"),
        DType::BF16 => Ok("BF16"),
        DType::I8 => Ok("I8"),
        DType::U8 => Ok("U8"),
        other => bail!("weights of {other} are not written"),
    }
}

fn count_not_finite(tensor: &Tensor) -> usize {
    let Some(array) = tensor.as_f32() else { return 0 };
    let is_bad = |value: &&f32| !value.is_finite();
    match array.as_slice_memory_order() {
        Some(values) => values.iter().filter(is_bad).count(),
        None => array.iter().filter(is_bad).count(),
    }
}

/// Weights with values that are not finite among those that `value` is computed from.
fn not_finite_weights(
    graph: &Graph,
    value: ValueId,
    weights: &dyn Weights,
) -> Result<BTreeMap<String, usize>> {
    let producers = graph.producers();
    let mut guilty = BTreeMap::new();
    let mut seen = BTreeSet::from([value]);
    let mut open = vec![value];
    while let Some(value) = open.pop() {
        if let Some(Constant::Weight(name)) = &graph.value(value).constant {
            let tensor = weights.tensor(name).map_err(anyhow::Error::msg)?;
            let bad = count_not_finite(&tensor);
            guilty.extend((bad > 0).then(|| (name.clone(), bad)));
        }
        if let Some(node) = producers.get(&value) {
            open.extend(graph.node(*node).inputs.iter().filter(|input| seen.insert(**input)));
        }
    }
    Ok(guilty)
}

/// The weight file, hashed as it grows.
struct HashingWriter {
    file: File,
    hasher: blake3::Hasher,
    n: u64,
}

impl HashingWriter {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).context("cannot write the weights")?;
        self.hasher.update(bytes);
        self.n += u64::try_from(bytes.len())?;
        Ok(())
    }

    fn finish(self) -> Result<FileEntry> {
        self.file.sync_all().context("cannot write the weights")?;
        Ok(FileEntry {
            path: format!("graphs/{WEIGHTS}"),
            bytes: self.n,
            blake3: self.hasher.finalize().to_hex().to_string(),
        })
    }

    fn pad_to(&mut self, offset: u64) -> Result<()> {
        let missing = usize::try_from(offset.saturating_sub(self.n))?;
        self.put(&vec![0; missing])
    }
}

/// Writes one graph in one flavour, typed so where that is of half precision, and describes it.
pub fn write_graph(
    folder: &Path,
    stage: &str,
    (flavour, typing): (Flavour, &Typing),
    graph: &Verified,
    layout: &WeightLayout,
) -> Result<(GraphEntry, FileEntry)> {
    let path = format!("graphs/{stage}.{}.onnx", flavour.name());
    let context = || format!("cannot write `{path}`");
    let written = typed_graph(graph, flavour, typing, layout).with_context(context)?;
    let bytes = flamingo_ir::onnx::write_graph(&written, flavour, layout).with_context(context)?;
    let file = write_file(folder, &path, &bytes)?;
    let describe = |ends: &[(String, ValueId)]| -> Vec<TensorEntry> {
        let entry = |(name, id): &(String, ValueId)| TensorEntry {
            name: name.clone(),
            dtype: written.fact(*id).dtype.to_string(),
            shape: written.fact(*id).shape.iter().map(ToString::to_string).collect(),
        };
        ends.iter().map(entry).collect()
    };
    let entry = GraphEntry {
        stage: stage.to_owned(),
        flavour: flavour.name().to_owned(),
        path,
        inputs: describe(written.inputs()),
        outputs: describe(written.outputs()),
    };
    Ok((entry, file))
}

/// Writes one whole file of the artifact and hashes it.
pub fn write_file(folder: &Path, path: &str, bytes: &[u8]) -> Result<FileEntry> {
    let target = folder.join(path);
    let context = || format!("cannot write `{}`", target.display());
    let mut file = File::create(&target).with_context(context)?;
    file.write_all(bytes).with_context(context)?;
    file.sync_all().with_context(context)?;
    Ok(FileEntry {
        path: path.to_owned(),
        bytes: u64::try_from(bytes.len())?,
        blake3: blake3::hash(bytes).to_hex().to_string(),
    })
}

/// Size and hash of a source file.
pub fn hash_file(path: &Path) -> Result<FileEntry> {
    /// Bytes that are hashed at once: the disk is read in order, also where cores share the work.
    const WINDOW: usize = 64 << 20;
    let map =
        MappedFile::open(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let mut hasher = blake3::Hasher::new();
    for (index, bytes) in map.bytes().chunks(WINDOW).enumerate() {
        map.will_need(index * WINDOW, 2 * WINDOW);
        hasher.update_rayon(bytes);
        map.release();
    }
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(FileEntry {
        path: name,
        bytes: hasher.count(),
        blake3: hasher.finalize().to_hex().to_string(),
    })
}

/// A folder that becomes `target` when it is whole, and leaves nothing otherwise.
pub struct Staging {
    folder: Scratch,
    target: PathBuf,
}

impl Staging {
    /// Begins an artifact at `target`, which must not exist; with `overwrite` it may be one.
    pub fn begin(target: &Path, overwrite: bool) -> Result<Staging> {
        if target.exists() && !overwrite {
            bail!(
                "`{}` exists already\n\nhint: choose another `-o`, or pass `--overwrite`",
                target.display()
            );
        }
        refuse_other_than_artifact(target)?;
        let parent = parent_of(target);
        fs::create_dir_all(parent)
            .with_context(|| format!("cannot create `{}`", parent.display()))?;
        let folder = Scratch::new(parent)
            .with_context(|| format!("cannot write in `{}`", parent.display()))?;
        fs::create_dir(folder.path().join("graphs"))?;
        fs::create_dir(folder.path().join("device"))?;
        Ok(Staging { folder, target: target.to_owned() })
    }

    /// The folder to write into.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Puts the folder in place. What was there goes only then, and only if it is an artifact.
    pub fn finish(self) -> Result<()> {
        let root = self.folder.path();
        for folder in [root.join("graphs"), root.join("device"), root.to_owned()] {
            File::open(&folder)?.sync_all()?;
        }
        refuse_other_than_artifact(&self.target)?;
        let parent = parent_of(&self.target);
        let aside = Scratch::new(parent)?;
        let context = || format!("cannot put the artifact at `{}`", self.target.display());
        if self.target.exists() {
            fs::rename(&self.target, aside.path().join(REPLACED)).with_context(context)?;
        }
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(self.folder.path(), mode)?;
        fs::rename(self.folder.path(), &self.target).with_context(context)?;
        File::open(parent)?.sync_all()?;
        Ok(())
    }
}

fn parent_of(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Whatever is at `target` and is no artifact stays.
fn refuse_other_than_artifact(target: &Path) -> Result<()> {
    if target.exists() && !target.join("manifest.json").is_file() {
        bail!(
            "`{}` is not an artifact; it stays as it is\n\nhint: choose another `-o`",
            target.display()
        );
    }
    Ok(())
}
