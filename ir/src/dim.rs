//! Symbolic dimensions: sums of products of named symbols with integer factors.
//!
//! A dimension is a polynomial such as `past_len + text_len` or `256*n_frames`, kept in one
//! canonical form, so that two dimensions are equal exactly when they print alike.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Add, Mul};

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
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Dim {
    /// Factor of each product of symbols (sorted); the empty product is the constant term.
    terms: BTreeMap<Vec<String>, usize>,
}

impl Dim {
    /// The dimension that is the symbol `name`.
    pub fn symbol(name: &str) -> Dim {
        Dim { terms: BTreeMap::from([(vec![name.to_owned()], 1)]) }
    }

    /// The size, if no symbol occurs in it.
    pub fn known(&self) -> Option<usize> {
        match self.terms.len() {
            0 => Some(0),
            1 => self.terms.get(&Vec::new() as &Vec<String>).copied(),
            _ => None,
        }
    }

    /// The symbol's name, if this dimension is one bare symbol.
    pub fn as_symbol(&self) -> Option<&str> {
        let (product, factor) = self.terms.first_key_value()?;
        (self.terms.len() == 1 && *factor == 1 && product.len() == 1).then(|| product[0].as_str())
    }

    /// Names of all symbols that occur, sorted, without repeats.
    pub fn symbols(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.terms.keys().flatten().map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The size under `bindings`; the missing symbol's name if one is unbound, and
    /// `Err("overflow")` where the size does not fit.
    pub fn evaluate(&self, bindings: &Bindings) -> Result<usize, String> {
        let mut total = 0usize;
        for (product, factor) in &self.terms {
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
        match size {
            0 => Dim::default(),
            _ => Dim { terms: BTreeMap::from([(Vec::new(), size)]) },
        }
    }
}

impl Add for Dim {
    type Output = Dim;

    fn add(mut self, other: Dim) -> Dim {
        for (product, factor) in other.terms {
            let sum = self.terms.entry(product).or_insert(0);
            *sum = sum.saturating_add(factor);
        }
        self
    }
}

impl Mul for Dim {
    type Output = Dim;

    fn mul(self, other: Dim) -> Dim {
        let mut terms = BTreeMap::new();
        for (left, left_factor) in &self.terms {
            for (right, right_factor) in &other.terms {
                let mut product = [left.as_slice(), right.as_slice()].concat();
                product.sort_unstable();
                let sum: &mut usize = terms.entry(product).or_insert(0);
                *sum = sum.saturating_add(left_factor.saturating_mul(*right_factor));
            }
        }
        Dim { terms }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.terms.is_empty() {
            return f.write_str("0");
        }
        let constant_last = self.terms.iter().skip_while(|(product, _)| product.is_empty());
        let constant = self.terms.iter().take_while(|(product, _)| product.is_empty());
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
    }
}
