//! Keys and values of a sequence's tokens as tensors of an engine: joined with new ones in every step, or in buffers of a
//! fixed size that steps write into, as the decoder's graph has it.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::sync::Arc;

use flamingo_ir::{DType, Dim, Fact};

use super::{Buffers, Engine, Input, Stage};
use crate::backend::BackendError;
use crate::contract::indices;

/// Rows of the smallest buffer. Buffers grow by doubling.
const MIN_ROWS: usize = 256;

/// Keys or values of one layer's tokens: an input `past_*` and the output `present_*` that
/// follows it.
#[derive(Clone, Debug)]
pub(super) struct Cache {
    form: Form,
    element_bytes: usize,
    /// Place among the decoder's inputs.
    pub(super) input: usize,
    /// Place among the decoder's outputs.
    pub(super) output: usize,
}

/// How keys or values lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// [n_heads, past_len, head_dim]: a step puts out a longer one.
    Joined { n_heads: usize, head_dim: usize },
    /// [cache_len, width]: a step puts out the same with new rows.
    Rows { width: usize },
    /// [1, n_heads, cache_len, head_dim]: the same by head.
    ByHead { n_heads: usize, head_dim: usize },
}

impl Cache {
    /// The cache of an input and an output of the decoder, if they fit each other.
    pub(super) fn new(past: (usize, &Fact), present: (usize, &Fact)) -> Option<Cache> {
        let ((input, past), (output, present)) = (past, present);
        let form = match &past.shape[..] {
            [n_heads, past_len, head_dim] if past_len.as_symbol() == Some("past_len") => {
                let total_len = Dim::symbol("past_len") + Dim::symbol("text_len");
                let joined = [n_heads.clone(), total_len, head_dim.clone()];
                (*present == Fact::new(past.dtype, joined)).then_some(())?;
                Form::Joined { n_heads: n_heads.known()?, head_dim: head_dim.known()? }
            }
            [rows, width] if rows.as_symbol() == Some("cache_len") && past == present => {
                Form::Rows { width: width.known()? }
            }
            [one, n_heads, rows, head_dim]
                if rows.as_symbol() == Some("cache_len") && past == present =>
            {
                (one.known() == Some(1)).then_some(())?;
                Form::ByHead { n_heads: n_heads.known()?, head_dim: head_dim.known()? }
            }
            _ => return None,
        };
        let is_float = matches!(past.dtype, DType::F32 | DType::F16);
        is_float.then(|| Cache { form, element_bytes: past.dtype.size(), input, output })
    }

    /// Whether steps write into the tensor itself.
    pub(super) fn is_fixed(&self) -> bool {
        !matches!(self.form, Form::Joined { .. })
    }

    fn shape(&self, n_rows: usize) -> Vec<usize> {
        match self.form {
            Form::Joined { n_heads, head_dim } => vec![n_heads, n_rows, head_dim],
            Form::Rows { width } => vec![n_rows, width],
            Form::ByHead { n_heads, head_dim } => vec![1, n_heads, n_rows, head_dim],
        }
    }

    fn row_elements(&self) -> usize {
        self.shape(1).iter().product()
    }

    /// The first `len` rows of `data`, which has `n_rows`, and zeros after them, `rows_after` in all.
    fn resized<'d>(
        &self,
        data: &'d [f32],
        (n_rows, len, rows_after): (usize, usize, usize),
    ) -> Cow<'d, [f32]> {
        let n_parts = match self.form {
            Form::Joined { n_heads, .. } | Form::ByHead { n_heads, .. } => n_heads,
            Form::Rows { .. } => 1,
        };
        let row = self.row_elements() / n_parts.max(1);
        let mut resized = Vec::with_capacity(rows_after * self.row_elements());
        for part in 0..n_parts {
            let from = part * n_rows * row;
            resized.extend_from_slice(data.get(from..from + len * row).unwrap_or(&[]));
            resized.resize((part * rows_after + rows_after) * row, 0.0);
        }
        Cow::Owned(resized)
    }
}

/// The tensors of all caches of a sequence. Forks share them until one of them steps.
pub(super) struct Kept<E: Engine> {
    /// In the order of the caches; none before the first step.
    tensors: Vec<Arc<E::Tensor>>,
    /// Rows of each: tokens, or places for them.
    n_rows: usize,
    /// 0, 1, … for each place.
    row_positions: Option<Arc<E::Tensor>>,
}

impl<E: Engine> Clone for Kept<E> {
    fn clone(&self) -> Kept<E> {
        let (tensors, row_positions) = (self.tensors.clone(), self.row_positions.clone());
        Kept { tensors, n_rows: self.n_rows, row_positions }
    }
}

impl<E: Engine> Kept<E> {
    pub(super) fn new() -> Kept<E> {
        Kept { tensors: Vec::new(), n_rows: 0, row_positions: None }
    }

    /// Makes the tensors what a step of `n_new` tokens after the first `len` takes: these tokens alone, or room for all.
    /// `position_input` is the decoder's input of row positions.
    pub(super) fn prepare(
        &mut self,
        engine: &E,
        caches: &[Cache],
        position_input: Option<usize>,
        (len, n_new, max_context): (usize, usize, usize),
    ) -> Result<(), BackendError> {
        let is_fixed = caches.iter().any(Cache::is_fixed);
        let total = len + n_new;
        let fits = if is_fixed { self.n_rows >= total } else { self.n_rows == len };
        if fits && self.tensors.len() == caches.len() {
            return Ok(());
        }
        let n_rows = match is_fixed {
            true => total.next_power_of_two().max(MIN_ROWS).min(max_context.max(total)),
            false => len,
        };
        let mut tensors = Vec::with_capacity(caches.len());
        for (place, cache) in caches.iter().enumerate() {
            let data = match self.tensors.get(place) {
                Some(tensor) => engine.numbers(tensor)?,
                None => Cow::Borrowed(&[][..]),
            };
            let data = cache.resized(&data, (self.n_rows, len.min(self.n_rows), n_rows));
            let input = Input::Numbers { shape: cache.shape(n_rows), data };
            tensors.push(Arc::new(engine.keep(Stage::Decoder, cache.input, &input)?));
        }
        if let Some(input) = position_input.filter(|_| is_fixed) {
            let positions = Input::Indices(indices(0..n_rows).unwrap_or_default());
            self.row_positions = Some(Arc::new(engine.keep(Stage::Decoder, input, &positions)?));
        }
        (self.tensors, self.n_rows) = (tensors, n_rows);
        Ok(())
    }

    /// The tensors for a step.
    pub(super) fn take(&mut self, caches: &[Cache]) -> Buffers<E::Tensor> {
        let outputs = caches.iter().map(|cache| cache.output);
        Buffers {
            tensors: outputs.zip(std::mem::take(&mut self.tensors)).collect(),
            in_place: caches.iter().any(Cache::is_fixed),
        }
    }

    /// Takes back what a step left: the tensors as they were, or `present` ones if it went well.
    pub(super) fn put_back(
        &mut self,
        buffers: Buffers<E::Tensor>,
        present: Option<(Vec<E::Tensor>, usize)>,
    ) {
        match present {
            None => self.tensors = buffers.tensors.into_iter().map(|(_, tensor)| tensor).collect(),
            Some((outputs, n_tokens)) => {
                self.tensors = outputs.into_iter().map(Arc::new).collect();
                if !buffers.in_place {
                    self.n_rows = n_tokens;
                }
            }
        }
    }

    pub(super) fn row_positions(&self) -> Option<&E::Tensor> {
        self.row_positions.as_deref()
    }

    pub(super) fn bytes(&self, caches: &[Cache]) -> usize {
        let held = caches.iter().take(self.tensors.len());
        held.map(|cache| cache.row_elements() * cache.element_bytes * self.n_rows).sum()
    }
}
