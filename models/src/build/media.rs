//! The media graph: pixels → visual tokens → keys and values of every gated layer.

use flamingo_ir::op::{Add, Concat, FrameEmbedding, MergeFrames, Reshape, RmsNorm};
use flamingo_ir::{Dim, Fact, Graph, GraphError, ValueId};

use super::resampler::build_resampler;
use super::vision::build_vision;
use super::{GatedKey, KeyMap, ResamplerKey, linear, reshaped, rows};
use crate::config::{ModelConfig, Normalisation, ResamplerConfig};
use crate::source::Binder;

/// Builds the media graph.
///
/// Inputs: `pixel_values` f32 [n_media, n_frames, 3, S, S] (one frame without a resampler); with temporal embeddings also
/// `frame_weights` f32 [n_frames, max_frames], the mixing weights of the table's rows for each
/// frame. Outputs: `visual_tokens` [n_media, n_latents, width], and `media_k.{i}`, `media_v.{i}`
/// [n_media, n_latents, heads · head_dim] for the i-th gated block. Where places have embeddings, n_latents counts those of each
/// place a medium can have in a prompt, one after the other.
pub(crate) fn build_media(
    binder: &mut Binder,
    keys: &dyn KeyMap,
    config: &ModelConfig,
) -> Result<Graph, GraphError> {
    let mut graph = Graph::new("media");
    let g = &mut graph;
    let n_media = Dim::symbol("n_media");
    // Without a resampler each frame would add visual tokens: such models take still pictures.
    let n_frames = match &config.resampler {
        Some(_) => Dim::symbol("n_frames"),
        None => Dim::from(1),
    };
    let size = Dim::from(config.vision.image_size);
    let picture = [Dim::from(3), size.clone(), size];
    let shape = [&[n_media.clone(), n_frames.clone()], &picture[..]].concat();
    let pixel_values = g.input("pixel_values", Fact::f32(shape));
    let shape = [&[n_media * n_frames.clone()], &picture[..]].concat();
    let pictures = g.add("vision.pictures", Reshape { shape }, &[pixel_values])?;
    let mut x = build_vision(g, binder, keys, &config.vision, pictures)?;
    let width = config.vision.width;
    let visual_tokens = match &config.resampler {
        None => g.add("vision.merged", MergeFrames, &[x, pixel_values])?,
        Some(resampler) => {
            if resampler.max_frames > 0 {
                let fact = Fact::f32([n_frames, Dim::from(resampler.max_frames)]);
                let weights = g.input("frame_weights", fact);
                let name = keys.resampler(ResamplerKey::FrameEmbeddings);
                let table = binder.weight(g, &name, &[resampler.max_frames, width]);
                let inputs = [x, weights, table, pixel_values];
                x = g.add("resampler.frame_embedding", FrameEmbedding, &inputs)?;
            }
            let media = g.add("resampler.media", MergeFrames, &[x, pixel_values])?;
            match resampler.max_places {
                0 => build_resampler(g, binder, keys, resampler, width, media, pixel_values)?,
                _ => {
                    let placed = at_each_place(g, binder, keys, (resampler, width), media)?;
                    let x = build_resampler(g, binder, keys, resampler, width, placed, placed)?;
                    one_after_the_other(g, x, resampler.max_places)?
                }
            }
        }
    };
    let mut outputs = vec![("visual_tokens".to_owned(), visual_tokens)];
    for (index, layer) in config.cross_attention.layers.iter().enumerate() {
        let [k, v] = media_key_value(g, binder, keys, config, (index, *layer), visual_tokens)?;
        outputs.push((format!("media_k.{index}"), k));
        outputs.push((format!("media_v.{index}"), v));
    }
    for (name, value) in outputs {
        graph.output(&name, value);
    }
    Ok(graph)
}

/// Media [n_media, t, width] → [n_media · max_places, t, width], each with the embedding of each place added.
fn at_each_place(
    graph: &mut Graph,
    binder: &mut Binder,
    keys: &dyn KeyMap,
    (resampler, width): (&ResamplerConfig, usize),
    media: ValueId,
) -> Result<ValueId, GraphError> {
    let n_places = resampler.max_places;
    let name = keys.resampler(ResamplerKey::PlaceEmbeddings);
    let table = binder.weight(graph, &name, &[n_places, 1, width]);
    let mut placed = Vec::with_capacity(n_places);
    for place in 0..n_places {
        let embedding = rows(graph, table, place, place + 1)?;
        let embedding = reshaped(graph, embedding, &[width])?;
        placed.push(graph.add("resampler.place_embedding", Add, &[media, embedding])?);
    }
    let placed = graph.add("resampler.places", Concat { axis: 1 }, &placed)?;
    let [n_media, t, width] = &graph.fact(media).shape[..] else {
        return Err(GraphError::Structure {
            graph: "media".into(),
            reason: "media of rank 3".into(),
        });
    };
    let shape = vec![n_media.clone() * Dim::from(n_places), t.clone(), width.clone()];
    graph.add("resampler.placed", Reshape { shape }, &[placed])
}

/// Visual tokens [n_media · n_places, n_latents, width] → [n_media, n_places · n_latents, width].
fn one_after_the_other(
    graph: &mut Graph,
    x: ValueId,
    n_places: usize,
) -> Result<ValueId, GraphError> {
    let [_, n_latents, width] = graph.fact(x).shape.clone().try_into().map_err(|_| {
        GraphError::Structure { graph: "media".into(), reason: "visual tokens of rank 3".into() }
    })?;
    let shape = vec![Dim::symbol("n_media"), Dim::from(n_places) * n_latents, width];
    graph.add("resampler.of_all_places", Reshape { shape }, &[x])
}

/// Keys and values of one gated block for all media.
fn media_key_value(
    graph: &mut Graph,
    binder: &mut Binder,
    keys: &dyn KeyMap,
    config: &ModelConfig,
    (index, layer): (usize, usize),
    visual_tokens: ValueId,
) -> Result<[ValueId; 2], GraphError> {
    let cross = &config.cross_attention;
    let (inner, width) = (cross.n_heads * cross.head_dim, config.vision.width);
    let fused = keys.gated(index, layer, GatedKey::KeyValue);
    let [key, value] = match binder.has(&fused) {
        true => {
            let fused = binder.weight(graph, &fused, &[2 * inner, width]);
            [rows(graph, fused, 0, inner)?, rows(graph, fused, inner, 2 * inner)?]
        }
        false => [GatedKey::Key, GatedKey::Value]
            .map(|key| binder.weight(graph, &keys.gated(index, layer, key), &[inner, width])),
    };
    let name = |part: &str| format!("media.{index}.{part}");
    let mut k = linear(graph, &name("key"), visual_tokens, key, None)?;
    if cross.qk_norm {
        let scale = keys.gated(index, layer, GatedKey::KeyNorm);
        let scale = binder.weight(graph, &scale, &[cross.head_dim]);
        let op = RmsNorm { epsilon: rms_epsilon(config), n_heads: cross.n_heads, scale: true };
        k = graph.add(&name("key_norm"), op, &[k, scale])?;
    }
    let v = linear(graph, &name("value"), visual_tokens, value, None)?;
    Ok([k, v])
}

/// ε of the RMS norms of IDEFICS' gated blocks: the language model's.
pub(super) fn rms_epsilon(config: &ModelConfig) -> f32 {
    match config.language.normalisation {
        Normalisation::Rms { epsilon } | Normalisation::Layer { epsilon } => epsilon,
    }
}
