//! norm(x), then Wᵀ → (norm(x) / s), then (W · s)ᵀ: large columns of activations become larger columns of the weight,
//! where rounding to 8 or 4 bits loses less (G. Xiao et al., SmoothQuant, 2022, with the exponent chosen for each norm).
//! Exact but for rounding in f32.

use flamingo_ir::op::{Inputs, LayerNorm, Mul, Op, PanelFormat, RmsNorm};
use flamingo_ir::{Constant, Graph, GraphError, Node, Patch, Tensor, ValueId, fold};

use super::Context;

/// Exponents of the activations' share that are tried beside none.
const EXPONENTS: [f64; 3] = [0.25, 0.5, 0.75];
/// Factors stay within this of 1, both ways.
const MAX_FACTOR: f64 = 1e3;
/// What the noise must fall to for the norm to get a scale again.
const WORTH_IT: f64 = 0.8;
/// Name of the node that multiplies a weight.
const MIGRATED: &str = "migrated_weight";

pub(super) fn run(patch: &mut Patch, context: &Context) -> Result<(), GraphError> {
    let Some(calibration) = context.calibration else { return Ok(()) };
    let stage = patch.graph().name.clone();
    for node in patch.nodes() {
        let Some(scaled) = with_scale(&node.op) else { continue };
        let readers = patch.readers(node.outputs[0]);
        if patch.is_output(node.outputs[0]) || readers.is_empty() {
            continue;
        }
        let mut weights = Vec::new();
        for reader in &readers {
            let format = context.scheme.choice(&stage, &reader.name).and_then(|c| c.format);
            let inputs = role(reader)
                .and_then(|role| calibration.inputs(&format!("{}.{role}", reader.name)));
            match (format.and_then(levels), inputs) {
                (Some(levels), Some(inputs)) if takes_it(patch, reader, node.outputs[0]) => {
                    weights.push((
                        fold(patch.graph(), reader.inputs[1], context.weights)?,
                        inputs,
                        levels,
                    ));
                }
                _ => break,
            }
        }
        if weights.len() < readers.len() {
            continue;
        }
        let Some([factors, inverse]) = factors(&weights).and_then(with_inverse) else { continue };
        drop(weights);
        let (factors, inverse) = (patch.literal(factors), patch.literal(inverse));
        let normed = patch.add(&node.name, scaled, &[node.inputs[0], inverse])?;
        for reader in readers {
            let mut inputs = reader.inputs.clone();
            inputs[0] = normed;
            inputs[1] = patch.add(MIGRATED, Mul, &[inputs[1], factors])?;
            let new = patch.add(&reader.name, reader.op, &inputs)?;
            patch.replace(reader.outputs[0], new)?;
        }
    }
    Ok(())
}

/// Factors and one by each, `[k]`.
fn with_inverse(factors: Vec<f32>) -> Option<[Tensor; 2]> {
    let inverse = factors.iter().map(|factor| 1.0 / factor).collect();
    let shape = [factors.len()];
    Some([Tensor::f32(&shape, factors)?, Tensor::f32(&shape, inverse)?])
}

/// The factors that a weight's columns were multiplied with by this pass.
pub(super) fn factors_of(graph: &Graph, weight: ValueId) -> Option<Vec<f32>> {
    let node = graph.node(*graph.producers().get(&weight)?);
    let factors = node.inputs.get(1).filter(|_| node.name == MIGRATED)?;
    match &graph.value(*factors).constant {
        Some(Constant::Literal(tensor)) => tensor.to_f32_vec(),
        _ => None,
    }
}

/// A norm without affine part, with a scale.
fn with_scale(op: &Op) -> Option<Op> {
    match op {
        Op::LayerNorm(norm) if norm.n_heads == 1 && !norm.scale && !norm.bias => {
            Some(LayerNorm { scale: true, ..norm.clone() }.into())
        }
        Op::RmsNorm(norm) if norm.n_heads == 1 && !norm.scale => {
            Some(RmsNorm { scale: true, ..norm.clone() }.into())
        }
        _ => None,
    }
}

/// What the weight is for that the normalised rows meet.
fn role(reader: &Node) -> Option<&'static str> {
    match &reader.op {
        Op::Linear(_) => Some("weight"),
        Op::FeedForward(_) => Some("up"),
        Op::GatedCrossAttention(_) => Some("query_weight"),
        _ => None,
    }
}

fn takes_it(patch: &Patch, reader: &Node, normed: ValueId) -> bool {
    let places = reader.inputs.iter().filter(|input| **input == normed).count();
    reader.inputs[0] == normed
        && places == 1
        && patch.is_build_time(reader.inputs[1])
        && patch.is_read_once(reader.inputs[1])
        && patch.fact(reader.inputs[1]).rank() == 2
}

/// Largest level of weights, for formats that are rounded with their activations.
fn levels(format: PanelFormat) -> Option<f64> {
    match format {
        PanelFormat::Int8 => Some(127.0),
        PanelFormat::Int4 { .. } => Some(7.5),
        PanelFormat::F16 | PanelFormat::Bf16 => None,
    }
}

/// The factors of the columns that lose least; none if leaving them is as good.
fn factors(weights: &[(Tensor, &Inputs, f64)]) -> Option<Vec<f32>> {
    let inputs = weights.first()?.1;
    let k = inputs.k();
    let seen: Vec<f64> = inputs.largest().iter().map(|x| f64::from(*x)).collect();
    let mut columns = vec![0.0f64; k];
    let rows: Vec<Vec<f32>> =
        weights.iter().map(|(weight, ..)| weight.to_f32_vec()).collect::<Option<_>>()?;
    if rows.iter().any(|values| values.len() % k != 0) {
        return None;
    }
    for row in rows.iter().flat_map(|values| values.chunks(k)) {
        columns.iter_mut().zip(row).for_each(|(most, w)| *most = most.max(f64::from(w.abs())));
    }
    let of = |exponent: f64| -> Vec<f64> {
        let factor = |(x, w): (&f64, &f64)| match *x > 0.0 && *w > 0.0 {
            true => (x.powf(exponent) / w.powf(1.0 - exponent)).clamp(1.0 / MAX_FACTOR, MAX_FACTOR),
            false => 1.0,
        };
        seen.iter().zip(&columns).map(factor).collect()
    };
    let noise = |factors: &[f64]| -> f64 {
        let of_weight = |((_, inputs, levels), values): (&(Tensor, &Inputs, f64), &Vec<f32>)| {
            noise_of(values, inputs, *levels, factors)
        };
        weights.iter().zip(&rows).map(of_weight).sum()
    };
    let none = noise(&vec![1.0; k]);
    let tried = EXPONENTS.map(|exponent| {
        let factors = of(exponent);
        (noise(&factors), factors)
    });
    let (best, factors) = tried.into_iter().min_by(|a, b| a.0.total_cmp(&b.0))?;
    (best < WORTH_IT * none).then(|| factors.into_iter().map(|factor| factor as f32).collect())
}

/// Expected noise of a weight's products if both sides are rounded, activations to 8 bits: steps² / 12 of one side
/// times the power of the other.
fn noise_of(values: &[f32], inputs: &Inputs, levels: f64, factors: &[f64]) -> f64 {
    let largest = inputs.largest().iter().zip(factors).map(|(x, f)| f64::from(*x) / f);
    let step = largest.fold(0.0, f64::max) / 127.0;
    let power: f64 =
        inputs.power().iter().zip(factors).map(|(power, f)| f64::from(*power) / (f * f)).sum();
    let of_row = |row: &[f32]| {
        let scaled = || row.iter().zip(factors).map(|(w, f)| f64::from(*w) * f);
        let weight_step = scaled().fold(0.0f64, |most, w| most.max(w.abs())) / levels;
        let weight_power: f64 = scaled().map(|w| w * w).sum();
        step * step * weight_power + weight_step * weight_step * power
    };
    values.chunks(factors.len()).map(of_row).sum::<f64>() / 12.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outliers_of_activations_or_weights_get_factors_and_even_columns_none() {
        let k = 32;
        let noise = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 504.5 - 1.0;
        let seen = |outlier: f32| {
            let mut inputs = Inputs::new(k);
            for row in 0..50 {
                let large = |j: usize| if j == 3 { outlier } else { 1.0 };
                let x: Vec<f32> = (0..k).map(|j| large(j) * noise(row * k + j)).collect();
                inputs.add(&x);
            }
            inputs
        };
        let weight = |outlier: f32| {
            let large = |i: usize| if i % k == 5 { outlier } else { 1.0 };
            let values = (0..k * k).map(|i| large(i) * noise(i + 5)).collect();
            Tensor::f32(&[k, k], values).unwrap()
        };
        let even = seen(1.0);
        assert_eq!(factors(&[(weight(1.0), &even, 127.0)]), None);
        let of_activations = seen(100.0);
        let found = factors(&[(weight(1.0), &of_activations, 127.0)]).unwrap();
        assert!(found[3] > 3.0 * found[4], "{found:?}");
        let of_weights = factors(&[(weight(100.0), &even, 127.0)]).unwrap();
        assert!(of_weights[5] < 0.4 * of_weights[4], "{of_weights:?}");
    }
}
