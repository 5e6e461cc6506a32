//! Attribute lists: the one form in which ops are printed, parsed and stored in ONNX.

use std::fmt;

use super::OpError;
use crate::Dim;

/// The value of an attribute.
#[derive(Debug, Clone, PartialEq)]
pub enum Attribute {
    /// An integer (also truth values, as 0 and 1).
    Int(i64),
    /// A 32-bit float.
    Float(f32),
    /// A word.
    Text(String),
    /// Integers.
    Ints(Vec<i64>),
    /// Dimensions, possibly symbolic.
    Dims(Vec<Dim>),
}

/// Attributes by name, in the order they print.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Attributes(pub Vec<(String, Attribute)>);

impl Attributes {
    /// No attributes.
    pub fn none() -> Attributes {
        Attributes::default()
    }

    /// This list with one more attribute.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Attribute>) -> Attributes {
        self.0.push((name.to_owned(), value.into()));
        self
    }

    /// Errors unless exactly the attributes `names` are there.
    pub fn expect_only(&self, names: &[&str]) -> Result<(), OpError> {
        let unknown: Vec<&str> =
            self.0.iter().map(|(name, _)| name.as_str()).filter(|n| !names.contains(n)).collect();
        if unknown.is_empty() {
            return Ok(());
        }
        Err(OpError::Attribute {
            name: unknown.join("`, `"),
            expected: format!("only {names:?}"),
            found: "an unknown attribute".into(),
        })
    }

    /// The integer `name`.
    pub fn int(&self, name: &str) -> Result<i64, OpError> {
        match self.get(name)? {
            Attribute::Int(value) => Ok(*value),
            other => Err(wrong_kind(name, "an integer", other)),
        }
    }

    /// The non-negative integer `name` as a size.
    pub fn size(&self, name: &str) -> Result<usize, OpError> {
        let value = self.int(name)?;
        let out_of_range = |_| wrong_kind(name, "a size from 0 to 2^31", &Attribute::Int(value));
        i32::try_from(value).and_then(usize::try_from).map_err(out_of_range)
    }

    /// The positive integer `name` as a size.
    pub fn positive(&self, name: &str) -> Result<usize, OpError> {
        match self.size(name)? {
            0 => Err(wrong_kind(name, "a size above 0", &Attribute::Int(0))),
            size => Ok(size),
        }
    }

    /// The truth value `name`.
    pub fn flag(&self, name: &str) -> Result<bool, OpError> {
        match self.int(name)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(wrong_kind(name, "0 or 1", &Attribute::Int(other))),
        }
    }

    /// The float `name`.
    pub fn float(&self, name: &str) -> Result<f32, OpError> {
        match self.get(name)? {
            Attribute::Float(value) => Ok(*value),
            other => Err(wrong_kind(name, "a float", other)),
        }
    }

    /// The word `name`.
    pub fn text(&self, name: &str) -> Result<&str, OpError> {
        match self.get(name)? {
            Attribute::Text(value) => Ok(value),
            other => Err(wrong_kind(name, "a word", other)),
        }
    }

    /// The integers `name` as sizes.
    pub fn sizes(&self, name: &str) -> Result<Vec<usize>, OpError> {
        match self.get(name)? {
            Attribute::Ints(values) => values
                .iter()
                .map(|value| {
                    i32::try_from(*value).and_then(usize::try_from).map_err(|_| {
                        wrong_kind(name, "sizes from 0 to 2^31", self.get_or_none(name))
                    })
                })
                .collect(),
            other => Err(wrong_kind(name, "integers", other)),
        }
    }

    /// The dimensions `name`.
    pub fn dims(&self, name: &str) -> Result<Vec<Dim>, OpError> {
        match self.get(name)? {
            Attribute::Dims(dims) => Ok(dims.clone()),
            other => Err(wrong_kind(name, "dimensions", other)),
        }
    }

    fn get(&self, name: &str) -> Result<&Attribute, OpError> {
        let found = self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value);
        found.ok_or_else(|| OpError::Attribute {
            name: name.to_owned(),
            expected: "a value".into(),
            found: "nothing".into(),
        })
    }

    fn get_or_none(&self, name: &str) -> &Attribute {
        self.get(name).unwrap_or(&Attribute::Int(0))
    }
}

fn wrong_kind(name: &str, expected: &str, found: &Attribute) -> OpError {
    OpError::Attribute {
        name: name.to_owned(),
        expected: expected.to_owned(),
        found: found.to_string(),
    }
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Attribute::Int(value) => write!(f, "{value}"),
            Attribute::Float(value) => write!(f, "{value:?}"),
            Attribute::Text(value) => write!(f, "\"{value}\""),
            Attribute::Ints(values) => {
                let words: Vec<String> = values.iter().map(i64::to_string).collect();
                write!(f, "[{}]", words.join(", "))
            }
            Attribute::Dims(dims) => {
                let words: Vec<String> = dims.iter().map(Dim::to_string).collect();
                write!(f, "({})", words.join(", "))
            }
        }
    }
}

impl From<usize> for Attribute {
    fn from(size: usize) -> Attribute {
        Attribute::Int(i64::try_from(size).expect("sizes in graphs are below 2^31"))
    }
}

impl From<bool> for Attribute {
    fn from(flag: bool) -> Attribute {
        Attribute::Int(i64::from(flag))
    }
}

impl From<f32> for Attribute {
    fn from(value: f32) -> Attribute {
        Attribute::Float(value)
    }
}

impl From<&str> for Attribute {
    fn from(value: &str) -> Attribute {
        Attribute::Text(value.to_owned())
    }
}

impl From<&[usize]> for Attribute {
    fn from(sizes: &[usize]) -> Attribute {
        let to_i64 = |size: &usize| i64::try_from(*size).expect("sizes in graphs are below 2^31");
        Attribute::Ints(sizes.iter().map(to_i64).collect())
    }
}

impl From<&[Dim]> for Attribute {
    fn from(dims: &[Dim]) -> Attribute {
        Attribute::Dims(dims.to_vec())
    }
}
