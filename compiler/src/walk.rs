//! Prompts through the two graphs of an artifact, node by node, with the reference evaluator: what values look like in
//! between, and what graphs of any flavour mean without an engine that runs them.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, available_parallelism};

use anyhow::{Context as _, Result};
use flamingo_ir::{Constant, Dim, Fact, Graph, Node, Tensor, Value, Weights, evaluate_wide};
use flamingo_models::config::ModelConfig;
use flamingo_runtime::LoadedGraphs;
use flamingo_runtime::backend::{WeightBytes, frame_weights};

use crate::calibrate::Example;
use crate::parity::{at_their_places, text_inputs};

/// Hears of each node of a graph, with its inputs and outputs; what is of half precision comes in f32.
pub(crate) type Observe<'a> = &'a mut dyn FnMut(&Graph, &Node, &[Tensor], &[Tensor]);

/// Graphs of an artifact, in any form, with its weights.
pub(crate) struct Walk<'a> {
    config: &'a ModelConfig,
    /// Media and decoder.
    pub(crate) stages: [Graph; 2],
    weights: Mapped<'a>,
}

impl<'a> Walk<'a> {
    /// `stages` made of the graphs that the weights are of.
    pub(crate) fn new(
        config: &'a ModelConfig,
        graphs: &'a LoadedGraphs,
        stages: [Graph; 2],
    ) -> Walk<'a> {
        Walk { config, stages, weights: Mapped::new(graphs) }
    }

    /// Runs a prompt, all in f32; gives the logits `[L, vocabulary]`. Media of unequal length are encoded, and there are no
    /// logits.
    pub(crate) fn run(&self, example: &Example, observe: Observe<'_>) -> Result<Option<Vec<f32>>> {
        let [media, decoder] = &self.stages;
        let max_frames = self.config.resampler.as_ref().map_or(0, |r| r.max_frames);
        let size = self.config.vision.image_size;
        let mut encoded = Vec::new();
        for (pixels, n_frames) in &example.media {
            let pixels = floats(&[1, *n_frames, 3, size, size], pixels.clone())?;
            let weights = floats(&[*n_frames, max_frames], frame_weights(*n_frames, max_frames))?;
            let inputs = [("pixel_values", pixels), ("frame_weights", weights)];
            let inputs = inputs.map(|(name, tensor)| (name.to_owned(), tensor));
            let inputs = BTreeMap::from(inputs);
            encoded.push(self.run_stage(media, &inputs, observe)?);
        }
        let n_media = encoded.len().max(1);
        let texts = text_inputs(self.config, &example.input_ids, n_media)?;
        let mut inputs: BTreeMap<String, Tensor> = texts.into_iter().collect();
        for (name, id) in decoder.inputs() {
            if name.starts_with("media_k.") || name.starts_with("media_v.") {
                match stacked(&encoded, name, decoder.fact(*id))? {
                    Some(tensor) => {
                        let n_places = if encoded.is_empty() { 1 } else { self.config.n_places() };
                        inputs.insert(name.clone(), at_their_places(n_places, tensor)?);
                    }
                    None => return Ok(None),
                }
            }
        }
        let outputs = self.run_stage(decoder, &inputs, observe)?;
        let logits = outputs.get("logits").and_then(Tensor::to_f32_vec);
        logits.context("a decoder without logits in f32").map(Some)
    }

    fn run_stage(
        &self,
        graph: &Graph,
        inputs: &BTreeMap<String, Tensor>,
        observe: Observe<'_>,
    ) -> Result<BTreeMap<String, Tensor>> {
        let pick = |(name, _): &(String, _)| {
            inputs.get(name).cloned().with_context(|| format!("no input `{name}`"))
        };
        let ordered = graph.inputs().iter().map(pick).collect::<Result<Vec<Tensor>>>()?;
        let mut observe = |node: &Node, inputs: &[Tensor], outputs: &[Tensor]| {
            observe(graph, node, inputs, outputs);
        };
        let outputs = evaluate_wide(graph, &ordered, &self.weights, &mut observe)?;
        Ok(graph.outputs().iter().map(|(name, _)| name.clone()).zip(outputs).collect())
    }
}

/// What `run` gives for each item, in their order, on all cores; `on_item` hears how many had begun before.
pub(crate) fn on_all_cores<I: Sync, T: Send>(
    items: &[I],
    on_item: &mut dyn FnMut(usize),
    run: impl Fn(&I) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let next = AtomicUsize::new(0);
    let work = |sender: Sender<(usize, Option<Result<T>>)>| {
        while let index = next.fetch_add(1, Ordering::Relaxed)
            && let Some(item) = items.get(index)
        {
            // Nobody listens any more once an item failed.
            let is_heard = sender.send((index, None)).is_ok();
            if !is_heard || sender.send((index, Some(run(item)))).is_err() {
                return;
            }
        }
    };
    thread::scope(|scope| {
        let (sender, messages) = channel();
        for _ in 0..available_parallelism().map_or(1, NonZero::get).min(items.len()) {
            let (work, sender) = (&work, sender.clone());
            scope.spawn(move || work(sender));
        }
        drop(sender);
        let (mut n_begun, mut results) = (0, BTreeMap::new());
        for (index, result) in messages {
            match result {
                Some(result) => drop(results.insert(index, result?)),
                None => {
                    on_item(n_begun);
                    n_begun += 1;
                }
            }
        }
        Ok(results.into_values().collect())
    })
}

fn floats(shape: &[usize], values: Vec<f32>) -> Result<Tensor> {
    Tensor::f32(shape, values).context("values fill their shape")
}

/// Keys or values of all media as one tensor, of none as zeros of one; nothing where they are unequally long.
fn stacked(
    encoded: &[BTreeMap<String, Tensor>],
    name: &str,
    fact: &Fact,
) -> Result<Option<Tensor>> {
    let known = |axis: usize| fact.shape.get(axis).and_then(Dim::known).unwrap_or(1);
    if encoded.is_empty() {
        let shape = [1, known(1), known(2)];
        return floats(&shape, vec![0.0; shape.iter().product()]).map(Some);
    }
    let (mut shapes, mut values) = (Vec::new(), Vec::new());
    for outputs in encoded {
        let tensor = outputs.get(name).with_context(|| format!("no output `{name}`"))?;
        shapes.push(tensor.shape().to_vec());
        values.extend(tensor.to_f32_vec().with_context(|| format!("`{name}` is not of f32"))?);
    }
    shapes.dedup();
    match shapes.as_slice() {
        [only] if only.len() == 3 => floats(&[encoded.len(), only[1], only[2]], values).map(Some),
        _ => Ok(None),
    }
}

/// Weights of an artifact, read when they are asked for.
struct Mapped<'a> {
    weights: &'a dyn WeightBytes,
    shapes: BTreeMap<&'a str, Vec<usize>>,
}

impl<'a> Mapped<'a> {
    fn new(graphs: &'a LoadedGraphs) -> Mapped<'a> {
        let values = graphs.media.values().chain(graphs.decoder.values());
        let shape = |value: &'a Value| match &value.constant {
            Some(Constant::Weight(name)) => Some((name.as_str(), value.fact.known_shape()?)),
            _ => None,
        };
        let shapes = values.filter_map(|(_, value)| shape(value)).collect();
        Mapped { weights: graphs.weights.as_ref(), shapes }
    }
}

impl Weights for Mapped<'_> {
    fn tensor(&self, name: &str) -> Result<Tensor, String> {
        let found = self.shapes.get(name).zip(self.weights.bytes(name));
        let (shape, (dtype, bytes)) = found.ok_or_else(|| format!("no weight `{name}`"))?;
        Tensor::from_stored_bytes(dtype, shape, bytes)
            .ok_or_else(|| format!("weight `{name}`: other bytes than {dtype} {shape:?}"))
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_items_and_errors_end_the_work() {
        for n in [0, 1, 2, 17] {
            let items: Vec<usize> = (0..n).collect();
            let mut heard = Vec::new();
            let squares = on_all_cores(&items, &mut |n| heard.push(n), |i| Ok(i * i)).unwrap();
            assert_eq!(squares, items.iter().map(|i| i * i).collect::<Vec<usize>>());
            assert_eq!(heard, items);
        }
        let failing = |i: &usize| if *i == 3 { bail!("item {i}") } else { Ok(*i) };
        let items: Vec<usize> = (0..100).collect();
        let error = on_all_cores(&items, &mut |_| (), failing).unwrap_err();
        assert_eq!(error.to_string(), "item 3");
    }
}
