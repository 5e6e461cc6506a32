//! Files that hold a run at a step: weights and the optimiser's moments, replaced as one.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::optimiser::Optimiser;
use crate::weights::Weights;

/// Where a run stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// Hash of the recipe.
    pub recipe: String,
    /// Stage whose steps `step` counts.
    pub stage: String,
    /// Steps done.
    pub step: usize,
}

const MOMENT_1: &str = "optimiser.moment_1.";
const MOMENT_2: &str = "optimiser.moment_2.";

/// Writes weights of given names, shapes and values as safetensors.
///
/// # Errors
/// A file that cannot be written.
pub fn write_tensors(
    path: &Path,
    weights: &Weights,
    metadata: Option<HashMap<String, String>>,
) -> Result<()> {
    let values: Vec<(&str, &[usize], Vec<f32>)> = weights
        .iter()
        .map(|(name, w)| {
            let values = w.value.clone().into_data().try_into_vec().expect("weights are f32");
            (name, w.shape.as_slice(), values)
        })
        .collect();
    let views = values.iter().map(|(name, shape, values)| {
        let bytes = bytemuck::cast_slice(values);
        Ok((*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes)?))
    });
    let views: Vec<(&str, TensorView)> = views.collect::<Result<_>>()?;
    let bytes = safetensors::serialize(views, metadata)?;
    let unfinished = path.with_extension("unfinished");
    fs::write(&unfinished, bytes)
        .and_then(|()| fs::rename(&unfinished, path))
        .with_context(|| format!("cannot write `{}`", path.display()))
}

/// Saves weights and optimiser at a position.
///
/// # Errors
/// A file that cannot be written.
pub fn save(path: &Path, weights: &Weights, optimiser: &Optimiser, at: &Position) -> Result<()> {
    let mut all = weights.clone();
    for (name, moments) in optimiser.moments() {
        for (prefix, moment) in [MOMENT_1, MOMENT_2].into_iter().zip(moments) {
            all.insert_value(format!("{prefix}{name}"), moment);
        }
    }
    let metadata =
        [("recipe", at.recipe.clone()), ("stage", at.stage.clone()), ("step", at.step.to_string())];
    let metadata = metadata.map(|(key, value)| (key.to_owned(), value));
    write_tensors(path, &all, Some(metadata.into_iter().collect()))
}

/// Weights of a file as [`write_tensors`] writes it.
///
/// # Errors
/// A file that cannot be read or holds other numbers than f32.
pub fn read_tensors(path: &Path) -> Result<Weights> {
    let bytes = fs::read(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let tensors = SafeTensors::deserialize(&bytes);
    let tensors = tensors.with_context(|| format!("in `{}`", path.display()))?;
    let mut weights = Weights::default();
    for (name, view) in tensors.tensors() {
        weights.insert(&name, view.shape(), floats(&name, &view, path)?);
    }
    Ok(weights)
}

fn floats(name: &str, view: &TensorView<'_>, path: &Path) -> Result<Vec<f32>> {
    ensure!(view.dtype() == Dtype::F32, "`{name}` in `{}` is not f32", path.display());
    let number = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    Ok(view.data().chunks_exact(4).map(number).collect())
}

/// What [`save`] saved.
///
/// # Errors
/// A file that cannot be read or is not one of ours.
pub fn load(path: &Path) -> Result<(Weights, Moments, Position)> {
    let bytes = fs::read(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let place = || format!("in `{}`", path.display());
    let (_, header) = SafeTensors::read_metadata(&bytes).with_context(place)?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let entry = |key: &str| {
        let value = metadata.get(key).cloned();
        value.with_context(|| format!("`{}` has no `{key}` in its metadata", path.display()))
    };
    let step = entry("step")?.parse().with_context(place)?;
    let position = Position { recipe: entry("recipe")?, stage: entry("stage")?, step };
    let (mut weights, mut moments) = (Weights::default(), Moments::new());
    for (name, view) in SafeTensors::deserialize(&bytes).with_context(place)?.tensors() {
        let values = floats(&name, &view, path)?;
        let moment = |prefix| name.strip_prefix(prefix).map(str::to_owned);
        match (moment(MOMENT_1), moment(MOMENT_2)) {
            (Some(own), _) => {
                moments.entry(own).or_default()[0] = Some((view.shape().to_vec(), values))
            }
            (_, Some(own)) => {
                moments.entry(own).or_default()[1] = Some((view.shape().to_vec(), values))
            }
            _ => weights.insert(name, view.shape(), values),
        }
    }
    Ok((weights, moments, position))
}

/// Two moments of each weight: shape and values.
pub type Moments = BTreeMap<String, [Option<(Vec<usize>, Vec<f32>)>; 2]>;
