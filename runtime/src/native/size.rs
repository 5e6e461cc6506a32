//! Sizes that are known per call only: each symbolic dimension of a plan is stored once and
//! evaluated once a call.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use flamingo_ir::{Bindings, Dim};

/// A dimension of a plan, by its place in the plan's [`SizeTable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Size(usize);

/// The distinct dimensions of a plan.
#[derive(Debug, Default)]
pub(super) struct SizeTable {
    dims: Vec<Dim>,
    places: BTreeMap<Dim, Size>,
}

impl SizeTable {
    /// The place of `dim`; equal dimensions share one.
    pub(super) fn place(&mut self, dim: Dim) -> Size {
        let next = Size(self.dims.len());
        *self.places.entry(dim).or_insert_with_key(|dim| {
            self.dims.push(dim.clone());
            next
        })
    }

    /// The dimension at a place.
    pub(super) fn dim(&self, size: Size) -> &Dim {
        &self.dims[size.0]
    }

    /// All sizes under `bindings`.
    ///
    /// # Errors
    /// The dimension that cannot be evaluated, and why.
    pub(super) fn evaluate(&self, bindings: &Bindings) -> Result<Sizes, (Dim, String)> {
        let value = |dim: &Dim| dim.evaluate(bindings).map_err(|reason| (dim.clone(), reason));
        Ok(Sizes(self.dims.iter().map(value).collect::<Result<_, _>>()?))
    }
}

/// The sizes of one call.
#[derive(Debug)]
pub(super) struct Sizes(Vec<usize>);

impl Sizes {
    /// The size at a place.
    pub(super) fn get(&self, size: Size) -> usize {
        self.0[size.0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_dimensions_share_a_place() {
        let mut table = SizeTable::default();
        let text_len = Dim::symbol("text_len");
        let (a, b) = (table.place(text_len.clone()), table.place(Dim::from(3)));
        assert_eq!(table.place(text_len.clone()), a);
        let sizes = table.evaluate(&Bindings::from([("text_len".into(), 5)])).unwrap();
        assert_eq!((sizes.get(a), sizes.get(b)), (5, 3));
        assert_eq!(table.evaluate(&Bindings::new()).unwrap_err().0, text_len);
    }
}
