//! Names of the instruction sets that kernels are compiled for, and the choice made once at start-up.

use std::{fmt, str::FromStr};

use crate::{arch::Token, env, error::KernelError};

/// An instruction set, in rising order of preference on each kind of processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust on four-lane arrays, vectorised by the compiler for the target's baseline.
    Scalar,
    /// x86-64 with AVX2 and FMA, eight f32 lanes.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL, sixteen f32 lanes.
    Avx512,
    /// aarch64 with NEON, four f32 lanes.
    Neon,
}

impl Isa {
    /// Every instruction set this crate knows, in rising order of preference.
    pub const ALL: [Isa; 4] = [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Neon];

    /// The name used by the `FLAMINGO_ISA` environment variable.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
        }
    }

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        Token::new(self).is_some()
    }

    /// The best instruction set of this processor.
    pub fn best() -> Isa {
        Isa::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Isa::Scalar)
    }

    /// The instruction set to use: the one named by the environment, else the best.
    pub(crate) fn from_environment() -> Result<Isa, KernelError> {
        env::isa().map_or(Ok(Isa::best()), |name| name.parse())
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Isa {
    type Err = KernelError;

    fn from_str(name: &str) -> Result<Isa, KernelError> {
        let known = Isa::ALL.into_iter().find(|isa| isa.name() == name);
        known.ok_or_else(|| KernelError::UnknownIsa { found: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_unknown_names_are_errors() {
        for isa in Isa::ALL {
            assert_eq!(isa.name().parse::<Isa>().unwrap(), isa);
        }
        for name in ["", "AVX2", "sse", "avx512 ", "NEON"] {
            let error = name.parse::<Isa>().unwrap_err().to_string();
            assert!(error.contains(&format!("`{name}`")), "{error}");
        }
    }

    #[test]
    fn scalar_is_always_available() {
        assert!(Isa::Scalar.is_available());
        assert!(Isa::best().is_available());
    }

    /// `FLAMINGO_TEST_ISAS`, for tests alone: who emulates a processor names what must be found, so that no kernel goes
    /// untested unseen.
    #[test]
    fn the_caller_of_the_tests_finds_the_sets_it_expects() {
        let name = |isa: Isa| {
            let extensions = Token::new(isa)?.extensions();
            Some([vec![isa.name()], extensions].concat().join("+"))
        };
        let found = Isa::ALL.into_iter().filter_map(name).collect::<Vec<_>>().join(" ");
        assert_eq!(std::env::var("FLAMINGO_TEST_ISAS").unwrap_or(found.clone()), found);
    }

    #[test]
    fn every_aarch64_has_neon_and_nothing_of_x86() {
        let expected: &[Isa] = &[Isa::Scalar, Isa::Neon];
        let available: Vec<Isa> = Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect();
        assert_eq!(available == expected, cfg!(target_arch = "aarch64"), "{available:?}");
    }
}
