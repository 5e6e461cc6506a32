//! What a stage holds: its weights, and its largest intermediate value.

use std::collections::BTreeSet;

use flamingo_ir::onnx::{ListedValue, Listing};
use flamingo_ir::{Bindings, DType, Dim};
use serde::Serialize;

/// Bytes of a stage, for given sizes of symbols. An estimate from below: engines add work space, padding and copies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Values stored in the file or its weight file.
    pub initializer_bytes: u64,
    /// The largest value that a node computes; the first of equal ones.
    pub largest: Option<Largest>,
    /// Computed values whose type or sizes the file does not tell, or whose symbols have no size.
    pub n_unknown: usize,
    /// Symbols that sizes are missing of.
    pub missing: BTreeSet<String>,
}

/// A value and what it takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Largest {
    /// The value.
    pub value: String,
    /// Bytes.
    pub bytes: u64,
}

/// What the stage of `listing` holds where its symbols have `sizes`.
pub fn memory(listing: &Listing, sizes: &Bindings) -> Memory {
    let stored = listing.initializers.iter().filter_map(|value| bytes(value, sizes).ok().flatten());
    let mut memory = Memory {
        initializer_bytes: stored.fold(0, u64::saturating_add),
        largest: None,
        n_unknown: 0,
        missing: BTreeSet::new(),
    };
    let computed = listing.nodes.iter().filter(|node| !node.is_constant);
    for value in computed.flat_map(|node| &node.outputs).filter(|value| !value.name.is_empty()) {
        match bytes(value, sizes) {
            Ok(Some(bytes)) if memory.largest.as_ref().is_none_or(|l| l.bytes < bytes) => {
                memory.largest = Some(Largest { value: value.name.clone(), bytes });
            }
            Ok(Some(_)) => {}
            Ok(None) => memory.n_unknown += 1,
            Err(symbols) => {
                memory.n_unknown += 1;
                memory.missing.extend(symbols);
            }
        }
    }
    memory
}

/// Bytes of a value; none if the file does not tell, or if they do not fit 64 bits. Errors with symbols without a size.
fn bytes(value: &ListedValue, sizes: &Bindings) -> Result<Option<u64>, Vec<String>> {
    let (Some(bits), Some(dims)) = (value.dtype.and_then(bits), &value.dims) else {
        return Ok(None);
    };
    let mut n = Some(bits);
    let mut missing = Vec::new();
    for text in dims {
        let Ok(dim) = text.parse::<Dim>() else { return Ok(None) };
        let unbound = dim.symbols().into_iter().filter(|symbol| !sizes.contains_key(*symbol));
        missing.extend(unbound.map(str::to_owned));
        let size = dim.evaluate(sizes).ok().and_then(|size| u64::try_from(size).ok());
        n = n.zip(size).and_then(|(n, size)| n.checked_mul(size));
    }
    if missing.is_empty() { Ok(n.map(|bits| bits.div_ceil(8))) } else { Err(missing) }
}

/// Bits of an element; none if elements differ.
fn bits(dtype: &str) -> Option<u64> {
    if let Some(dtype) = DType::from_name(dtype) {
        return u64::try_from(dtype.size()).ok().map(|bytes| 8 * bytes);
    }
    Some(match dtype {
        "c128" => 128,
        "u64" | "c64" => 64,
        "u32" => 32,
        "u16" => 16,
        "f8e4m3fn" | "f8e4m3fnuz" | "f8e5m2" | "f8e5m2fnuz" | "f8e8m0" => 8,
        "u4" | "i4" | "f4e2m1" => 4,
        "u2" | "i2" => 2,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::example::{graph, value};
    use super::*;

    fn sized(text: &str, dims: &[&str]) -> ListedValue {
        let dims = dims.iter().map(|dim| (*dim).to_owned()).collect();
        ListedValue { dims: Some(dims), ..value(text) }
    }

    #[test]
    fn weights_are_added_and_the_largest_value_is_found() {
        let mut listing = graph(
            "Relu@17 | x:f16 | a:f16
             Relu@17 | a | b:f16
             Relu@17 | b | c:f16
             Neg@17 | =w:f32 | folded:f32",
        );
        listing.initializers = vec![sized("w:f32", &["3", "5"]), sized("q:u4", &["7"])];
        listing.nodes[0].outputs[0] = sized("a:f16", &["rows", "4"]);
        listing.nodes[1].outputs[0] = sized("b:f16", &["rows", "rows+1"]);
        let sizes = Bindings::from([("rows".into(), 9)]);
        let found = memory(&listing, &sizes);
        assert_eq!(found.initializer_bytes, 60 + 4);
        assert_eq!(found.largest, Some(Largest { value: "b".into(), bytes: 2 * 9 * 10 }));
        assert_eq!((found.n_unknown, found.missing.len()), (1, 0));
        let found = memory(&listing, &Bindings::new());
        assert_eq!((found.largest, found.n_unknown), (None, 3));
        assert_eq!(found.missing, ["rows".to_owned()].into());
    }

    #[test]
    fn sizes_that_are_no_numbers_do_not_count() {
        let mut listing = graph("Relu@17 | x:f32 | y:f32");
        for dims in [&["?"][..], &["a b"], &["18446744073709551615", "9"]] {
            listing.nodes[0].outputs[0] = sized("y:f32", dims);
            let found = memory(&listing, &Bindings::new());
            assert_eq!((found.largest, found.n_unknown), (None, 1), "{dims:?}");
        }
    }
}
