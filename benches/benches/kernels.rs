//! Times of the kernels beside the machine's own limits: `cargo bench -p flamingo-benches --bench kernels`.
//!
//! Throughput is in multiply-adds counted as two (`elem/s` = FLOP/s), or in bytes of weights where these decide. The two
//! limits are printed first, measured in the same process; a machine that others use moves both.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use flamingo_kernels::{
    Activation, Convolution, Kernels, KvCache, Matrix, MatrixMut, PANEL_ROWS, PanelFormat, Panels,
    Position, SelfAttention, probe,
};

/// Numbers in -1..1 that no branch predictor or compressor knows.
fn random(n: usize) -> Vec<f32> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(next).collect()
}

fn kernels() -> Kernels {
    Kernels::new(None).expect("kernels start on this machine")
}

#[expect(
    clippy::print_stderr,
    reason = "the limits belong beside the timings that criterion prints"
)]
fn limits(_: &mut Criterion) {
    let kernels = kernels();
    eprintln!(
        "{kernels:?}: reads {:.1} GB/s, multiplies and adds {:.1} GOP/s",
        probe::read_bandwidth(&kernels),
        probe::fma_peak(&kernels)
    );
}

/// Few rows: the weight streams from memory. Several copies take turns, so that no cache holds one.
fn linear_few_rows(criterion: &mut Criterion) {
    let kernels = kernels();
    let (k, n, n_copies) = (4096, 4096, 4);
    let weights: Vec<Vec<f32>> = (0..n_copies).map(|_| random(n * k)).collect();
    let mut group = criterion.benchmark_group("linear 4096x4096");
    group.throughput(Throughput::Bytes((4 * n * k) as u64));
    for m in [1, 4, 8] {
        let (x, mut out, mut turn) = (random(m * k), vec![0.0; m * n], 0);
        group.bench_function(format!("{m} rows"), |bencher| {
            bencher.iter(|| {
                turn = (turn + 1) % n_copies;
                let weight = Matrix::new(&weights[turn], n, k);
                let out = MatrixMut::new(&mut out, m, n);
                kernels.linear(
                    Matrix::new(&x, m, k),
                    weight.into(),
                    None,
                    None,
                    None,
                    black_box(out),
                );
            });
        });
    }
}

/// Many rows: arithmetic decides.
fn linear_many_rows(criterion: &mut Criterion) {
    let kernels = kernels();
    let mut group = criterion.benchmark_group("linear");
    for (m, k, n) in [(257, 1024, 4096), (257, 4096, 1024), (128, 2048, 8192), (64, 1024, 1024)] {
        let (x, weight, bias) = (random(m * k), random(n * k), random(n));
        let mut out = vec![0.0; m * n];
        group.throughput(Throughput::Elements((2 * m * k * n) as u64));
        group.bench_function(format!("{m}x{k}x{n} gelu"), |bencher| {
            bencher.iter(|| {
                let (x, weight) = (Matrix::new(&x, m, k), Matrix::new(&weight, n, k));
                let out = MatrixMut::new(&mut out, m, n);
                let activation = Some(Activation::Gelu);
                kernels.linear(x, weight.into(), Some(&bias), activation, None, black_box(out));
            });
        });
    }
}

/// A weight in panels; which numbers its bytes mean does not matter here, but that halves are finite.
struct RandomPanels {
    format: PanelFormat,
    shape: (usize, usize),
    data: Vec<u8>,
    row_scales: Vec<f32>,
    block_scales: Vec<u8>,
}

impl RandomPanels {
    fn new(format: PanelFormat, n: usize, k: usize) -> RandomPanels {
        let len = format.data_bytes(n, k).expect("a small weight");
        let n_blocks = format.n_blocks(k).expect("a block of 32");
        let n_rows = n.next_multiple_of(PANEL_ROWS);
        let n_scales = if format.has_row_scales() { n_rows } else { 0 };
        RandomPanels {
            format,
            shape: (n, k),
            // Bytes below 0x3C: halves and bfloat16 numbers in -1..1.
            data: random(len).into_iter().map(|value| (value.abs() * 59.0) as u8).collect(),
            row_scales: vec![0.01; n_scales],
            block_scales: vec![7; n_rows * n_blocks],
        }
    }

    fn view(&self) -> Panels<'_> {
        let RandomPanels { format, shape: (n, k), data, row_scales, block_scales } = self;
        let panels = Panels::new(*format, *n, *k, data, row_scales, block_scales);
        panels.expect("lengths that the format asks for")
    }
}

/// Weights in panels: few rows by bytes, many rows by operations.
fn panels(criterion: &mut Criterion) {
    let kernels = kernels();
    let formats = [
        ("f16", PanelFormat::F16),
        ("bf16", PanelFormat::Bf16),
        ("int8", PanelFormat::Int8),
        ("int4", PanelFormat::Int4 { block: 32 }),
    ];
    for (name, format) in formats {
        let mut group = criterion.benchmark_group(format!("panels {name}"));
        for (m, k, n) in [(1, 4096, 4096), (4, 4096, 4096), (8, 4096, 4096), (257, 1024, 4096)] {
            // Copies take turns, so that no cache holds the weight of few rows.
            let weights: Vec<_> = (0..8).map(|_| RandomPanels::new(format, n, k)).collect();
            let (x, mut out, mut turn) = (random(m * k), vec![0.0; m * n], 0);
            group.throughput(match m {
                0..=8 => Throughput::Bytes(weights[0].view().bytes() as u64),
                _ => Throughput::Elements((2 * m * k * n) as u64),
            });
            group.bench_function(format!("{m}x{k}x{n}"), |bencher| {
                bencher.iter(|| {
                    turn = (turn + 1) % weights.len();
                    let (x, weight) = (Matrix::new(&x, m, k), weights[turn].view());
                    let out = MatrixMut::new(&mut out, m, n);
                    kernels.linear(x, weight.into(), None, None, None, black_box(out));
                });
            });
        }
    }
}

/// NFNet-F0's third stage at 256 pixels: 16 x 16, groups of 128 channels.
fn convolution(criterion: &mut Criterion) {
    let kernels = kernels();
    let (size, channels, width) = ([16, 16], 768, 128);
    let geometry = Convolution::same(size, [3, 3], 1, channels / width);
    let (x, weight) = (random(256 * channels), random(channels * 9 * width));
    let mut out = vec![0.0; 256 * channels];
    let mut group = criterion.benchmark_group("convolution");
    group.throughput(Throughput::Elements((2 * 256 * channels * 9 * width) as u64));
    group.bench_function("3x3, 16x16 pixels, 6 groups of 128", |bencher| {
        bencher.iter(|| {
            let (x, weight) =
                (Matrix::new(&x, 256, channels), Matrix::new(&weight, channels, 9 * width));
            let out = MatrixMut::new(&mut out, 256, channels);
            let activation = Some(Activation::Gelu);
            kernels.convolution(x, weight, None, activation, &geometry, black_box(out));
        });
    });
}

/// A vision encoder's layer: 257 patches, 16 heads of 64.
fn attention(criterion: &mut Criterion) {
    let kernels = kernels();
    let (len, n_heads, width) = (257, 16, 1024);
    let (qkv, mut out) = (random(len * 3 * width), vec![0.0; len * width]);
    let qkv = Matrix::new(&qkv, len, 3 * width);
    let segment = (qkv.columns(width..2 * width), qkv.columns(2 * width..3 * width));
    let mut group = criterion.benchmark_group("attention");
    group.throughput(Throughput::Elements((4 * len * len * width) as u64));
    group.bench_function("257 keys, 16 heads of 64", |bencher| {
        bencher.iter(|| {
            let out = MatrixMut::new(&mut out, len, width);
            kernels.attention(qkv.columns(0..width), &[segment], 1, n_heads, 0.125, black_box(out));
        });
    });
}

/// A decoder's layer of 32 heads of 128: one token over a long cache, and a prefill.
fn self_attention(criterion: &mut Criterion) {
    let kernels = kernels();
    let (n_heads, head_dim) = (32, 128);
    let attributes = SelfAttention {
        n_heads,
        n_kv_heads: n_heads,
        head_dim,
        scale: 0.1,
        position: Position::Alibi { slopes: vec![0.1; n_heads] },
    };
    let width = n_heads * head_dim;
    let mut group = criterion.benchmark_group("self-attention");
    for (m, past_len) in [(1, 1023), (128, 0)] {
        let mut cache = KvCache::new(n_heads, head_dim, past_len + m);
        let (qkv, mut out) = (random(m * 3 * width), vec![0.0; m * width]);
        let qkv = Matrix::new(&qkv, m, 3 * width);
        let [q, k, v] = [0, 1, 2].map(|part| qkv.columns(part * width..(part + 1) * width));
        group.bench_function(format!("{m} rows after {past_len}"), |bencher| {
            bencher.iter(|| {
                let out = MatrixMut::new(&mut out, m, width);
                kernels.self_attention(q, k, v, &mut cache, past_len, &attributes, black_box(out));
            });
        });
    }
}

fn main() {
    let mut criterion = Criterion::default().sample_size(20).configure_from_args();
    let benchmarks =
        [limits, linear_few_rows, linear_many_rows, panels, convolution, attention, self_attention];
    for benchmark in benchmarks {
        benchmark(&mut criterion);
    }
    criterion.final_summary();
}
