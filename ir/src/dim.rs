//! Symbolic dimensions: sums of products of named symbols with integer factors.
//!
//! A dimension is a polynomial such as `past_len + text_len` or `256*n_frames`, kept in one
//! canonical form, so that two dimensions are equal exactly when they print alike.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Add, Mul};
use std::sync::Arc;

/// Values of symbols, by name.
pub type Bindings = BTreeMap<String, usize>;

/// One dimension of a shape. Factors that do not fit saturate: no such tensor can exist.
///
/// ```
/// use flamingo_ir::Dim;
/// let total = Dim::symbol("past_len") + Dim::symbol("text_len");
/// assert_eq!(total.to_string(), "past_len + text_len");
/// assert_eq!("past_len + text_len".parse::<Dim>().unwrap(), total);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dim(Form);

/// Most dimensions are sizes, and all are copied often: neither form copies names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Form {
    /// A size.
    Known(usize),
    /// A sum in which some symbol occurs.
    Sum(Arc<Terms>),
}

/// Factor of each product of symbols (sorted); the empty product is the constant term.
type Terms = BTreeMap<Vec<String>, usize>;

impl Dim {
    /// The dimension that is the symbol `name`.
    pub fn symbol(name: &str) -> Dim {
        Dim::of_terms(Terms::from([(vec![name.to_owned()], 1)]))
    }

    fn of_terms(terms: Terms) -> Dim {
        let is_known = terms.keys().all(Vec::is_empty);
        Dim(match is_known {
            true => Form::Known(terms.into_values().next().unwrap_or(0)),
            false => Form::Sum(Arc::new(terms)),
        })
    }

    fn into_terms(self) -> Terms {
        match self.0 {
            Form::Known(0) => Terms::new(),
            Form::Known(size) => Terms::from([(Vec::new(), size)]),
            Form::Sum(terms) => Arc::unwrap_or_clone(terms),
        }
    }

    /// The size, if no symbol occurs in it.
    pub fn known(&self) -> Option<usize> {
        match self.0 {
            Form::Known(size) => Some(size),
            Form::Sum(_) => None,
        }
    }

    /// The symbol's name, if this dimension is one bare symbol.
    pub fn as_symbol(&self) -> Option<&str> {
        let Form::Sum(terms) = &self.0 else { return None };
        let (product, factor) = terms.first_key_value()?;
        (terms.len() == 1 && *factor == 1 && product.len() == 1).then(|| product[0].as_str())
    }

    /// Names of all symbols that occur, sorted, without repeats.
    pub fn symbols(&self) -> Vec<&str> {
        let Form::Sum(terms) = &self.0 else { return Vec::new() };
        let mut names: Vec<&str> = terms.keys().flatten().map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The size under `bindings`; the missing symbol's name if one is unbound, and
    /// `Err("overflow")` where the size does not fit.
    pub fn evaluate(&self, bindings: &Bindings) -> Result<usize, String> {
        let terms = match &self.0 {
            Form::Known(size) => return Ok(*size),
            Form::Sum(terms) => terms,
        };
        let mut total = 0usize;
        for (product, factor) in terms.iter() {
            let mut term = *factor;
            for symbol in product {
                let value = bindings.get(symbol).ok_or_else(|| symbol.clone())?;
                term = term.checked_mul(*value).ok_or("overflow")?;
            }
            total = total.checked_add(term).ok_or("overflow")?;
        }
        Ok(total)
    }
}

impl From<usize> for Dim {
    fn from(size: usize) -> Dim {
        Dim(Form::Known(size))
    }
}

/// The size 0.
impl Default for Dim {
    fn default() -> Dim {
        Dim::from(0)
    }
}

impl Add for Dim {
    type Output = Dim;

    fn add(self, other: Dim) -> Dim {
        if let (Form::Known(left), Form::Known(right)) = (&self.0, &other.0) {
            return Dim::from(left.saturating_add(*right));
        }
        let mut terms = self.into_terms();
        for (product, factor) in other.into_terms() {
            let sum = terms.entry(product).or_insert(0);
            *sum = sum.saturating_add(factor);
        }
        Dim::of_terms(terms)
    }
}

impl Mul for Dim {
    type Output = Dim;

    fn mul(self, other: Dim) -> Dim {
        if let (Form::Known(left), Form::Known(right)) = (&self.0, &other.0) {
            return Dim::from(left.saturating_mul(*right));
        }
        let (lefts, rights) = (self.into_terms(), other.into_terms());
        let mut terms = Terms::new();
        for (left, left_factor) in &lefts {
            for (right, right_factor) in &rights {
                let mut product = [left.as_slice(), right.as_slice()].concat();
                product.sort_unstable();
                let sum: &mut usize = terms.entry(product).or_insert(0);
                *sum = sum.saturating_add(left_factor.saturating_mul(*right_factor));
            }
        }
        Dim::of_terms(terms)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let terms = match &self.0 {
            Form::Known(size) => return write!(f, "{size}"),
            Form::Sum(terms) => terms,
        };
        let constant_last = terms.iter().skip_while(|(product, _)| product.is_empty());
        let constant = terms.iter().take_while(|(product, _)| product.is_empty());
        for (i, (product, factor)) in constant_last.chain(constant).enumerate() {
            if i > 0 {
                f.write_str(" + ")?;
            }
            match (product.is_empty(), *factor) {
                (true, factor) => write!(f, "{factor}")?,
                (false, 1) => f.write_str(&product.join("*"))?,
                (false, factor) => write!(f, "{factor}*{}", product.join("*"))?,
            }
        }
        Ok(())
    }
}

impl std::str::FromStr for Dim {
    type Err = String;

    fn from_str(text: &str) -> Result<Dim, String> {
        let mut sum = Dim::default();
        for term in text.split('+') {
            let mut product = Dim::from(1);
            for factor in term.split('*').map(str::trim) {
                product = product * parse_factor(factor)?;
            }
            sum = sum + product;
        }
        Ok(sum)
    }
}

fn parse_factor(text: &str) -> Result<Dim, String> {
    let is_name = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if is_name {
        return Ok(Dim::symbol(text));
    }
    let size: u32 = text.parse().map_err(|_| format!("`{text}` is neither a size nor a symbol"))?;
    usize::try_from(size).map(Dim::from).map_err(|_| format!("size `{text}` is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn print_and_parse_agree() {
        let media = Dim::symbol("n_media");
        let cases = [
            Dim::from(0),
            Dim::from(7),
            media.clone(),
            media.clone() * Dim::symbol("n_frames") * Dim::from(256) + Dim::from(1),
            Dim::symbol("past_len") + Dim::symbol("text_len"),
        ];
        for dim in cases {
            assert_eq!(dim.to_string().parse::<Dim>().as_ref(), Ok(&dim), "{dim}");
        }
        assert!("a-b".parse::<Dim>().is_err());
        assert!("".parse::<Dim>().is_err());
    }

    #[test]
    fn evaluation_names_the_unbound_symbol() {
        let dim = Dim::symbol("a") * Dim::from(3) + Dim::from(1);
        assert_eq!(dim.evaluate(&Bindings::from([("a".into(), 4)])), Ok(13));
        assert_eq!(dim.evaluate(&Bindings::new()), Err("a".into()));
        assert!(dim.evaluate(&Bindings::from([("a".into(), usize::MAX)])).is_err());
    }

    #[test]
    fn sums_are_canonical() {
        let (a, b) = (Dim::symbol("a"), Dim::symbol("b"));
        assert_eq!(a.clone() + b.clone(), b.clone() + a.clone());
        assert_eq!(a.clone() * b.clone(), b * a.clone());
        assert_eq!((a.clone() + a.clone()).to_string(), "2*a");
        assert_eq!(a.as_symbol(), Some("a"));
        assert_eq!((Dim::from(2) * Dim::from(3)).known(), Some(6));
        assert_eq!(a.clone() + Dim::from(0), a);
        assert_eq!(a.clone() * Dim::from(0), Dim::from(0));
        assert_eq!(Dim::from(0) + Dim::default(), Dim::from(0));
        assert_eq!((a + Dim::from(usize::MAX) + Dim::from(1)).known(), None);
    }
}
