//! What the machine can do: physical cores, read bandwidth, and peak f32 rate. The ceilings that timings are held against.
#![expect(
    clippy::needless_range_loop,
    reason = "register tiles: several arrays walk by one index, and constant bounds unroll"
)]

use std::{collections::BTreeSet, hint::black_box, num::NonZeroUsize, time::Instant};

use crate::{
    Kernels,
    arch::{Simd, Task},
};

/// Elements read by each pass of the bandwidth probe: 512 MiB, beyond any cache.
const N_ELEMENTS: usize = 128 << 20;

/// Times each measurement is repeated; the best counts.
const N_REPEATS: usize = 5;

/// Physical cores this process may use: hardware threads that share a core count once, where the system tells.
pub fn n_physical_cores() -> NonZeroUsize {
    let n_threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let siblings = |cpu: usize| {
        std::fs::read_to_string(format!(
            "/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        ))
        .ok()
    };
    let cores: BTreeSet<String> = (0..).map_while(siblings).collect();
    NonZeroUsize::new(cores.len()).map_or(n_threads, |n_cores| n_cores.min(n_threads))
}

/// Sustained read bandwidth of all threads together, GB/s (10⁹ bytes): each thread sums four streams of its
/// own share. Takes about a second and 512 MiB.
pub fn read_bandwidth(kernels: &Kernels) -> f64 {
    let data = vec![1.0_f32; N_ELEMENTS];
    let shares: Vec<&[f32]> = data.chunks(N_ELEMENTS.div_ceil(kernels.n_threads())).collect();
    let seconds = best_seconds(|| {
        kernels.pool.run(shares.len(), &|share| {
            black_box(kernels.token.run(ReadStreams(shares[share])));
        });
    });
    size_of_val(data.as_slice()) as f64 / seconds / 1e9
}

/// Peak rate of f32 multiply-adds of all threads together, GFLOP/s (a multiply-add is two): registers only.
pub fn fma_peak(kernels: &Kernels) -> f64 {
    const N_STEPS: usize = 2_000_000;
    let n_threads = kernels.n_threads();
    let lanes = kernels.token.run(FmaChains(0)).1;
    let seconds = best_seconds(|| {
        kernels.pool.run(n_threads, &|_| {
            black_box(kernels.token.run(FmaChains(black_box(N_STEPS))));
        });
    });
    (2 * N_STEPS * N_CHAINS * lanes * n_threads) as f64 / seconds / 1e9
}

fn best_seconds(mut measured: impl FnMut()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        measured();
        start.elapsed().as_secs_f64()
    };
    (0..N_REPEATS).map(time).fold(f64::INFINITY, f64::min)
}

/// Sum of a slice read as four streams side by side.
struct ReadStreams<'a>(&'a [f32]);

impl Task for ReadStreams<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (lanes, _) = s.split(self.0);
        let quarter = lanes.len() / 4;
        let streams = [0, 1, 2, 3].map(|i| &lanes[i * quarter..(i + 1) * quarter]);
        let mut sums = [s.splat(0.0); 4];
        for p in 0..quarter {
            for i in 0..4 {
                sums[i] = s.add(sums[i], s.load(&streams[i][p]));
            }
        }
        s.reduce_add_4(sums).iter().sum()
    }
}

/// Independent chains of multiply-adds: more than latency times ports of any core, few enough for 16 registers.
const N_CHAINS: usize = 12;

/// Runs the chains a number of steps; returns their sum and the lanes of a vector.
struct FmaChains(usize);

impl Task for FmaChains {
    type Output = (f32, usize);

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (f32, usize) {
        let (factor, addend) = (s.splat(black_box(0.999)), s.splat(black_box(0.001)));
        let mut chains = [s.splat(black_box(1.0)); N_CHAINS];
        for _ in 0..self.0 {
            for chain in &mut chains {
                *chain = s.mul_add(*chain, factor, addend);
            }
        }
        let sum = chains.into_iter().map(|chain| s.reduce_add(chain)).sum();
        (sum, S::LANES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_counted_and_at_most_the_hardware_threads() {
        assert!(n_physical_cores() <= std::thread::available_parallelism().unwrap());
    }
}
