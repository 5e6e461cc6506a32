//! Ops of the vision side that only move, repeat or add rows.

use super::{
    Add, Attributes, Concat, Expand, Flavour, MatMul, OpError, Operator, Reshape, Slice, Transpose,
    expect_fact, expect_inputs, expect_rank, input_error,
};
use crate::Dim;
use crate::Fact;
use crate::graph::{Graph, GraphError};

/// Cuts pictures into square patches, one row a patch, ordered (channel, y, x) inside a row as
/// a convolution's weight is: [n, c, H, W] → [n, ⌊H/p⌋ · ⌊W/p⌋, c·p·p]. Pixels right and below of whole patches are left out,
/// as such a convolution leaves them.
#[derive(Debug, Clone, PartialEq)]
pub struct Patches {
    /// Side of a patch in pixels (p).
    pub patch_size: usize,
}

/// Prepends the class token and adds positional embeddings.
/// x `[n, t, w]`, class `[w]`, positions `[t + 1, w]` → `[n, t + 1, w]`.
#[derive(Debug, Clone, PartialEq)]
pub struct ClassEmbedding;

/// Adds temporal embeddings to frames: x [n_media · n_frames, t, w] with n_frames rows of
/// mixing weights [n_frames, n_max] over the learnt table [n_max, w] → same shape as x.
/// Also takes pixel values [n_media, n_frames, ..], for the number of frames.
#[derive(Debug, Clone, PartialEq)]
pub struct FrameEmbedding;

/// Puts the tokens of a medium's frames into one sequence: x [n_media · n_frames, t, w], pixel
/// values [n_media, n_frames, ..] → [n_media, n_frames · t, w].
#[derive(Debug, Clone, PartialEq)]
pub struct MergeFrames;

/// Repeats x [..] for each medium of `like` [n, ..]: → [n, ..].
#[derive(Debug, Clone, PartialEq)]
pub struct ExpandBatch;

impl Patches {
    pub(crate) fn parse(attributes: &Attributes) -> Result<Patches, OpError> {
        attributes.expect_only(&["patch_size"])?;
        Ok(Patches { patch_size: attributes.positive("patch_size")? })
    }

    fn definition(&self, inputs: &[Fact]) -> Result<Graph, GraphError> {
        let mut graph = Graph::new("Patches");
        let x = graph.input("x", inputs[0].clone());
        let known = |axis: usize| inputs[0].shape[axis].known().unwrap_or(0);
        let (n, p) = (inputs[0].shape[0].clone(), self.patch_size);
        let (channels, rows, columns) = (known(1), known(2) / p, known(3) / p);
        let mut whole = x;
        for (axis, end) in [(2, rows * p), (3, columns * p)] {
            if end < known(axis) {
                whole = graph.add("whole", Slice { axis, start: 0, end }, &[whole])?;
            }
        }
        let sizes = [channels, rows, p, columns, p].map(Dim::from);
        let shape = [std::slice::from_ref(&n), &sizes[..]].concat();
        let grid = graph.add("grid", Reshape { shape }, &[whole])?;
        let permutation = vec![0, 2, 4, 1, 3, 5];
        let moved = graph.add("moved", Transpose { permutation }, &[grid])?;
        let patch = Dim::from(channels) * Dim::from(p) * Dim::from(p);
        let shape = vec![n, Dim::from(rows) * Dim::from(columns), patch];
        let y = graph.add("y", Reshape { shape }, &[moved])?;
        graph.output("y", y);
        Ok(graph)
    }
}

macro_rules! without_attributes {
    ($($name:ident),*) => {$(
        impl $name {
            pub(crate) fn parse(attributes: &Attributes) -> Result<$name, OpError> {
                attributes.expect_only(&[]).map(|()| $name)
            }
        }
    )*};
}

without_attributes!(ClassEmbedding, FrameEmbedding, MergeFrames, ExpandBatch);

impl Operator for Patches {
    fn name(&self) -> &'static str {
        "Patches"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("patch_size", self.patch_size)
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 1)?;
        expect_rank(inputs, 0, "pictures", 4)?;
        let known = |axis: usize| inputs[0].shape[axis].known();
        let p = self.patch_size;
        match (known(1), known(2), known(3)) {
            (Some(channels), Some(height), Some(width)) if height >= p && width >= p => {
                let n_patches = Dim::from(height / p) * Dim::from(width / p);
                let patch = Dim::from(channels) * Dim::from(p) * Dim::from(p);
                let shape = [inputs[0].shape[0].clone(), n_patches, patch];
                Ok(vec![Fact::f32(shape)])
            }
            _ => {
                let expected = format!("[n, c, H, W] with H and W of {p} and more");
                Err(input_error(0, "pictures", &expected, &inputs[0]))
            }
        }
    }

    fn body(&self, inputs: &[Fact], _flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        Some(self.definition(inputs))
    }
}

impl Operator for ClassEmbedding {
    fn name(&self) -> &'static str {
        "ClassEmbedding"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 3)?;
        expect_rank(inputs, 0, "x", 3)?;
        let [n, t, width] = &inputs[0].shape[..] else { unreachable!("rank was checked") };
        let rows = t.clone() + Dim::from(1);
        expect_fact(inputs, 1, "class", &Fact::f32([width.clone()]))?;
        expect_fact(inputs, 2, "positions", &Fact::f32([rows.clone(), width.clone()]))?;
        Ok(vec![Fact::f32([n.clone(), rows, width.clone()])])
    }

    fn body(&self, inputs: &[Fact], _flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        let build = || {
            let mut graph = Graph::new("ClassEmbedding");
            let x = graph.input("x", inputs[0].clone());
            let class = graph.input("class", inputs[1].clone());
            let positions = graph.input("positions", inputs[2].clone());
            let shape = vec![inputs[0].shape[0].clone(), Dim::from(1), inputs[0].shape[2].clone()];
            let class = graph.add("classes", Expand { shape }, &[class])?;
            let tokens = graph.add("tokens", Concat { axis: 1 }, &[class, x])?;
            let y = graph.add("y", Add, &[tokens, positions])?;
            graph.output("y", y);
            Ok(graph)
        };
        Some(build())
    }
}

/// [n_media, n_frames] of pixel values, after checking that x has one row block a frame.
fn frames(inputs: &[Fact], pixels: usize) -> Result<[Dim; 2], OpError> {
    expect_rank(inputs, 0, "x", 3)?;
    expect_rank(inputs, pixels, "pixel_values", 5)?;
    let [n_media, n_frames] = [0, 1].map(|axis| inputs[pixels].shape[axis].clone());
    match n_media.clone() * n_frames.clone() == inputs[0].shape[0] {
        true => Ok([n_media, n_frames]),
        false => {
            let expected = format!("[{n_media}*{n_frames}, t, w]");
            Err(input_error(0, "x", &expected, &inputs[0]))
        }
    }
}

impl Operator for FrameEmbedding {
    fn name(&self) -> &'static str {
        "FrameEmbedding"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 4)?;
        let [_, n_frames] = frames(inputs, 3)?;
        expect_rank(inputs, 2, "table", 2)?;
        let [n_max, width] = [0, 1].map(|axis| inputs[2].shape[axis].clone());
        expect_fact(inputs, 1, "weights", &Fact::f32([n_frames, n_max.clone()]))?;
        expect_fact(inputs, 2, "table", &Fact::f32([n_max, inputs[0].shape[2].clone()]))?;
        debug_assert_eq!(width, inputs[0].shape[2]);
        Ok(vec![inputs[0].clone()])
    }

    fn body(&self, inputs: &[Fact], _flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        let build = || {
            let mut graph = Graph::new("FrameEmbedding");
            let names = ["x", "weights", "table", "pixel_values"];
            let [x, weights, table, _] =
                [0, 1, 2, 3].map(|i| graph.input(names[i], inputs[i].clone()));
            let [n_media, n_frames] = [0, 1].map(|axis| inputs[3].shape[axis].clone());
            let [t, width] = [1, 2].map(|axis| inputs[0].shape[axis].clone());
            let rows = graph.add("rows", MatMul, &[weights, table])?;
            let shape = vec![n_frames.clone(), Dim::from(1), width.clone()];
            let rows = graph.add("frame_rows", Reshape { shape }, &[rows])?;
            let shape = vec![n_media, n_frames, t, width];
            let split = graph.add("by_frame", Reshape { shape }, &[x])?;
            let sum = graph.add("sum", Add, &[split, rows])?;
            let y = graph.add("y", Reshape { shape: inputs[0].shape.clone() }, &[sum])?;
            graph.output("y", y);
            Ok(graph)
        };
        Some(build())
    }
}

impl Operator for MergeFrames {
    fn name(&self) -> &'static str {
        "MergeFrames"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 2)?;
        let [n_media, n_frames] = frames(inputs, 1)?;
        let [t, width] = [1, 2].map(|axis| inputs[0].shape[axis].clone());
        Ok(vec![Fact::f32([n_media, n_frames * t, width])])
    }

    fn body(&self, inputs: &[Fact], _flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        let build = || {
            let mut graph = Graph::new("MergeFrames");
            let x = graph.input("x", inputs[0].clone());
            graph.input("pixel_values", inputs[1].clone());
            let [n_media, n_frames] = [0, 1].map(|axis| inputs[1].shape[axis].clone());
            let [t, width] = [1, 2].map(|axis| inputs[0].shape[axis].clone());
            let shape = vec![n_media, n_frames * t, width];
            let y = graph.add("y", Reshape { shape }, &[x])?;
            graph.output("y", y);
            Ok(graph)
        };
        Some(build())
    }
}

impl Operator for ExpandBatch {
    fn name(&self) -> &'static str {
        "ExpandBatch"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 2)?;
        let Some(n) = inputs[1].shape.first() else {
            return Err(input_error(1, "like", &"rank 1 or more", &inputs[1]));
        };
        Ok(vec![Fact {
            dtype: inputs[0].dtype,
            shape: [std::slice::from_ref(n), &inputs[0].shape[..]].concat(),
        }])
    }

    fn body(&self, inputs: &[Fact], _flavour: Flavour) -> Option<Result<Graph, GraphError>> {
        let build = || {
            let mut graph = Graph::new("ExpandBatch");
            let x = graph.input("x", inputs[0].clone());
            graph.input("like", inputs[1].clone());
            let shape = [&inputs[1].shape[..1], &inputs[0].shape[..]].concat();
            let y = graph.add("y", Expand { shape }, &[x])?;
            graph.output("y", y);
            Ok(graph)
        };
        Some(build())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tensor;

    fn counting(shape: &[usize]) -> Tensor {
        let n: usize = shape.iter().product();
        Tensor::f32(shape, (0..n).map(|i| i as f32).collect()).unwrap()
    }

    #[test]
    fn patches_follow_a_convolution_weight() {
        let rows = Patches { patch_size: 2 }.evaluate(&[counting(&[1, 1, 2, 4])]).unwrap();
        assert_eq!(rows[0].shape(), [1, 2, 4]);
        assert_eq!(rows[0].to_f32_vec().unwrap(), [0.0, 1.0, 4.0, 5.0, 2.0, 3.0, 6.0, 7.0]);
        let rows = Patches { patch_size: 2 }.evaluate(&[counting(&[1, 1, 3, 5])]).unwrap();
        assert_eq!(rows[0].to_f32_vec().unwrap(), [0.0, 1.0, 5.0, 6.0, 2.0, 3.0, 7.0, 8.0]);
        assert!(Patches { patch_size: 3 }.infer(&[Fact::f32([1, 1, 2, 4])]).is_err());
        assert!(Patches { patch_size: usize::MAX }.infer(&[Fact::f32([1, 3, 0, 0])]).is_err());
    }

    #[test]
    fn frames_of_a_medium_become_one_sequence() {
        let x = counting(&[4, 1, 2]);
        let pixels = counting(&[2, 2, 1, 1, 1]);
        let y = MergeFrames.evaluate(&[x.clone(), pixels.clone()]).unwrap();
        assert_eq!(y[0].shape(), [2, 2, 2]);
        let weights = Tensor::f32(&[2, 3], vec![1.0, 0.0, 0.0, 0.0, 0.5, 0.5]).unwrap();
        let table = Tensor::f32(&[3, 2], vec![0.0, 0.0, 10.0, 20.0, 30.0, 40.0]).unwrap();
        let y = FrameEmbedding.evaluate(&[x, weights, table, pixels]).unwrap();
        let expected = [0.0, 1.0, 22.0, 33.0, 4.0, 5.0, 26.0, 37.0];
        assert_eq!(y[0].to_f32_vec().unwrap(), expected);
    }

    #[test]
    fn the_class_token_comes_first() {
        let class = Tensor::vector(vec![7.0]);
        let positions = Tensor::f32(&[3, 1], vec![0.1, 0.2, 0.3]).unwrap();
        let y = ClassEmbedding.evaluate(&[counting(&[1, 2, 1]), class, positions]).unwrap();
        assert_eq!(y[0].to_f32_vec().unwrap(), [7.1, 0.2, 1.3]);
    }
}
