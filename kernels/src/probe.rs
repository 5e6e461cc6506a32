//! What the machine can do: physical cores, processor features, read bandwidth, and peak arithmetic rates. The ceilings
//! that timings are held against.

use std::{
    collections::BTreeSet,
    hint::black_box,
    num::NonZeroUsize,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Instant,
};

use crate::{
    Kernels,
    arch::{Dot, Simd, Task, Token},
};

/// Elements read by each pass of the bandwidth probe: 512 MiB, beyond any cache.
const N_ELEMENTS: usize = 128 << 20;

/// Passes of the bandwidth probe for each number of streams; the best counts.
const N_PASSES: usize = 9;

/// Samples of an arithmetic rate; the best counts.
const N_SAMPLES: usize = 300;

/// Length of a sample of an arithmetic rate: shorter than the turns that a system gives to processes, so that a
/// neighbour which keeps a core busy still leaves samples that have every core to themselves.
const SAMPLE_SECONDS: f64 = 0.0015;

/// Rounds that a thread spins for the others before it gives up its turn.
const N_SPINS: usize = 1000;

/// Measured ceilings of all threads together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peaks {
    /// Sustained read bandwidth, GB/s (10⁹ bytes).
    pub read_gb_per_s: f64,
    /// f32 multiply-adds in registers, GOP/s (10⁹ operations, a multiply-add is two).
    pub f32_gop_per_s: f64,
    /// bfloat16 dot products in registers, GOP/s; none without an instruction for them.
    pub bf16_gop_per_s: Option<f64>,
    /// Dot products of bytes in registers, GOP/s; none without instructions for them.
    pub int8_gop_per_s: Option<f64>,
}

/// Hardware threads that share a core with `cpu`, as the system lists them.
fn siblings(cpu: usize) -> Option<String> {
    let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
    std::fs::read_to_string(path).ok()
}

/// Physical cores this process may use: hardware threads that share a core count once, where the system tells.
pub fn n_physical_cores() -> NonZeroUsize {
    let n_threads = thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let cores: BTreeSet<String> = (0..).map_while(siblings).collect();
    NonZeroUsize::new(cores.len()).map_or(n_threads, |n_cores| n_cores.min(n_threads))
}

/// One hardware thread of each physical core that this process may use, by the system's number; none where the system
/// does not tell.
#[cfg(target_os = "linux")]
pub(crate) fn hardware_threads() -> Vec<usize> {
    let Ok(allowed) = rustix::thread::sched_getaffinity(None) else {
        return Vec::new();
    };
    let mut cores = BTreeSet::new();
    let is_first = |cpu: &usize| cores.insert(siblings(*cpu).unwrap_or_else(|| cpu.to_string()));
    (0..rustix::thread::CpuSet::MAX_CPU)
        .filter(|cpu| allowed.is_set(*cpu))
        .filter(is_first)
        .collect()
}

/// As above: this system does not tell.
#[cfg(not(target_os = "linux"))]
pub(crate) fn hardware_threads() -> Vec<usize> {
    Vec::new()
}

/// Binds the calling thread to a hardware thread. A wish: one that was taken away meanwhile leaves the thread free.
#[cfg(target_os = "linux")]
pub(crate) fn bind_to(cpu: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    let _ = rustix::thread::sched_setaffinity(None, &set);
}

/// As above: not on this system.
#[cfg(not(target_os = "linux"))]
pub(crate) fn bind_to(_: usize) {}

/// Processor features that decide which kernels are fast, by name, and whether this processor has them.
pub fn features() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "x86_64")]
    return vec![
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
    ];
    #[cfg(target_arch = "aarch64")]
    return vec![
        ("neon", std::arch::is_aarch64_feature_detected!("neon")),
        ("fp16", std::arch::is_aarch64_feature_detected!("fp16")),
        ("dotprod", std::arch::is_aarch64_feature_detected!("dotprod")),
        ("i8mm", std::arch::is_aarch64_feature_detected!("i8mm")),
        ("bf16", std::arch::is_aarch64_feature_detected!("bf16")),
        ("sve", std::arch::is_aarch64_feature_detected!("sve")),
    ];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    Vec::new()
}

/// Measures all ceilings with as many threads as `kernels` has. Takes about three seconds and 512 MiB.
///
/// The best sample counts, so that other processes lower a figure only if they never rest.
pub fn peaks(kernels: &Kernels) -> Peaks {
    Peaks {
        read_gb_per_s: read_bandwidth(kernels),
        f32_gop_per_s: fma_peak(kernels),
        bf16_gop_per_s: dot_peak(kernels, Dot::Bf16),
        int8_gop_per_s: dot_peak(kernels, Dot::Int8),
    }
}

/// Sustained read bandwidth, GB/s: each thread sums its own share of the data, as one stream and as four side by side.
pub fn read_bandwidth(kernels: &Kernels) -> f64 {
    let n_threads = kernels.n_threads();
    let data = vec![1.0_f32; N_ELEMENTS];
    let shares: Vec<&[f32]> = data.chunks(N_ELEMENTS.div_ceil(n_threads)).collect();
    let token = kernels.token;
    let one = best_seconds(shares.len(), N_PASSES, &|thread| {
        black_box(token.run(ReadOneStream(shares[thread])));
    });
    let four = best_seconds(shares.len(), N_PASSES, &|thread| {
        black_box(token.run(ReadFourStreams(shares[thread])));
    });
    size_of_val(data.as_slice()) as f64 / one.min(four) / 1e9
}

/// Peak of f32 multiply-adds in registers, GOP/s.
pub fn fma_peak(kernels: &Kernels) -> f64 {
    let token = kernels.token;
    peak(kernels.n_threads(), &|n_rounds| token.run(FmaChains(n_rounds)))
}

fn dot_peak(kernels: &Kernels, dot: Dot) -> Option<f64> {
    let token: Token = kernels.token;
    token.dot_rounds(dot, 0)?;
    let rounds = |n_rounds| token.dot_rounds(dot, n_rounds).unwrap_or(0);
    Some(peak(kernels.n_threads(), &rounds))
}

/// Rate of `run`, which does a number of rounds and returns the multiply-adds of one, on all threads at once, GOP/s.
fn peak(n_threads: usize, run: &(dyn Fn(usize) -> usize + Sync)) -> f64 {
    const TRIAL_ROUNDS: usize = 20_000;
    let trial = best_seconds(1, 3, &|_| {
        black_box(run(black_box(TRIAL_ROUNDS)));
    });
    let n_rounds = (TRIAL_ROUNDS as f64 * SAMPLE_SECONDS / trial.max(1e-9)).ceil() as usize;
    let seconds = best_seconds(n_threads, N_SAMPLES, &|_| {
        black_box(run(black_box(n_rounds)));
    });
    let multiply_adds = run(0) as f64 * n_rounds as f64 * n_threads as f64;
    2.0 * multiply_adds / seconds / 1e9
}

/// Shortest time from the first start to the last end in which `n_threads` threads, released together, each did `work`
/// once with its number, seconds.
///
/// The threads are the probe's own, not the pool's: a pool lets the caller do the tasks of a worker that comes late,
/// and then the figure is that of fewer threads. They meet spinning: to be woken takes as long as a sample.
fn best_seconds(n_threads: usize, n_repeats: usize, work: &(dyn Fn(usize) + Sync)) -> f64 {
    let (n_arrived, origin) = (AtomicUsize::new(0), Instant::now());
    let repeat = |thread: usize, i: usize| {
        n_arrived.fetch_add(1, Ordering::AcqRel);
        let mut n_spins = 0;
        while n_arrived.load(Ordering::Acquire) < (i + 1) * n_threads {
            n_spins += 1;
            match n_spins % N_SPINS {
                0 => thread::yield_now(),
                _ => std::hint::spin_loop(),
            }
        }
        let start = origin.elapsed().as_secs_f64();
        work(thread);
        (start, origin.elapsed().as_secs_f64())
    };
    let repeat = &repeat;
    let spans: Vec<Vec<(f64, f64)>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..n_threads)
            .map(|i| scope.spawn(move || (0..n_repeats).map(|at| repeat(i, at)).collect()))
            .collect();
        let join = |thread: thread::ScopedJoinHandle<'_, _>| {
            thread.join().expect("the probe's work does not panic")
        };
        threads.into_iter().map(join).collect()
    });
    let seconds = |i: usize| {
        let start = spans.iter().map(|spans| spans[i].0).fold(f64::INFINITY, f64::min);
        spans.iter().map(|spans| spans[i].1).fold(0.0, f64::max) - start
    };
    (0..n_repeats).map(seconds).fold(f64::INFINITY, f64::min)
}

/// Sum of a slice read from one end to the other.
struct ReadOneStream<'a>(&'a [f32]);

impl Task for ReadOneStream<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.splat(0.0); 4];
        for group in s.split(self.0).0.as_chunks::<4>().0 {
            for (sum, lanes) in sums.iter_mut().zip(group) {
                *sum = s.add(*sum, s.load(lanes));
            }
        }
        s.reduce_add_4(sums).iter().sum()
    }
}

/// Sum of a slice read as four streams side by side.
struct ReadFourStreams<'a>(&'a [f32]);

impl Task for ReadFourStreams<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (lanes, _) = s.split(self.0);
        let quarter = lanes.len() / 4;
        let (low, high) = lanes[..4 * quarter].split_at(2 * quarter);
        let ((a, b), (c, d)) = (low.split_at(quarter), high.split_at(quarter));
        let mut sums = [s.splat(0.0); 4];
        for (((a, b), c), d) in a.iter().zip(b).zip(c).zip(d) {
            for (sum, lanes) in sums.iter_mut().zip([a, b, c, d]) {
                *sum = s.add(*sum, s.load(lanes));
            }
        }
        s.reduce_add_4(sums).iter().sum()
    }
}

/// Independent chains of multiply-adds: more than latency times ports of any core, few enough for 16 registers.
const N_CHAINS: usize = 12;

/// Runs the chains a number of rounds; returns the multiply-adds of a round.
struct FmaChains(usize);

impl Task for FmaChains {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> usize {
        let (factor, addend) = (s.splat(black_box(0.999)), s.splat(black_box(0.001)));
        let mut chains = [s.splat(black_box(1.0)); N_CHAINS];
        for _ in 0..self.0 {
            for chain in &mut chains {
                *chain = s.mul_add(*chain, factor, addend);
            }
        }
        let sum: f32 = chains.into_iter().map(|chain| s.reduce_add(chain)).sum();
        black_box(sum);
        N_CHAINS * S::LANES
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::Isa;

    #[test]
    fn cores_are_counted_and_at_most_the_hardware_threads() {
        assert!(n_physical_cores() <= std::thread::available_parallelism().unwrap());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn threads_are_bound_where_they_are_allowed() {
        let cores = hardware_threads();
        assert!(!cores.is_empty() && cores.len() <= n_physical_cores().get());
        let last = cores[cores.len() - 1];
        let bound = std::thread::spawn(move || {
            bind_to(last);
            rustix::thread::sched_getaffinity(None).unwrap()
        });
        let bound = bound.join().unwrap();
        assert!(bound.is_set(last) && bound.count() == 1);
    }

    #[test]
    fn every_thread_works_in_every_repeat_and_the_last_end_counts() {
        let counts = [const { AtomicUsize::new(0) }; 3];
        let seconds = best_seconds(3, 4, &|thread| {
            counts[thread].fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(if thread == 1 { 20 } else { 1 }));
        });
        assert_eq!(counts.map(AtomicUsize::into_inner), [4; 3]);
        assert!((0.02..2.0).contains(&seconds), "{seconds}");
    }

    #[test]
    fn rates_exist_where_instructions_do() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let kernels = Kernels::with_isa(isa, NonZeroUsize::new(1)).unwrap();
            let names: Vec<&str> = features().iter().filter(|f| f.1).map(|f| f.0).collect();
            let expects = |set: Isa, feature: &str| isa == set && names.contains(&feature);
            let bf16 = kernels.token.dot_rounds(Dot::Bf16, 1);
            assert_eq!(bf16.is_some(), expects(Isa::Avx512, "avx512bf16"), "{isa}");
            let int8 = kernels.token.dot_rounds(Dot::Int8, 1);
            let has_int8 = expects(Isa::Avx512, "avx512vnni")
                || isa == Isa::Avx2
                || expects(Isa::Neon, "dotprod");
            assert_eq!(int8.is_some(), has_int8, "{isa}");
            assert!(fma_peak(&kernels) > 0.0);
        }
    }

    #[test]
    fn streams_read_every_whole_group_once() {
        let data = [1.0_f32; 1024];
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let token = Token::new(isa).unwrap();
            assert_eq!(token.run(ReadOneStream(&data)), 1024.0, "{isa}");
            assert_eq!(token.run(ReadFourStreams(&data)), 1024.0, "{isa}");
        }
    }
}
