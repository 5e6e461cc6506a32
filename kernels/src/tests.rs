//! Every kernel against its reference, on every instruction set of the machine, over awkward sizes; and what must not
//! change a bit: the number of threads, and the rows processed together.

mod convolution;
mod panels;

use std::num::NonZeroUsize;

use proptest::prelude::*;

use crate::*;

const ACTIVATIONS: [Activation; 6] = [
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::QuickGelu,
    Activation::Relu,
    Activation::SquaredRelu,
    Activation::Silu,
];

fn kernels(isa: Isa, n_threads: usize) -> Kernels {
    Kernels::with_isa(isa, NonZeroUsize::new(n_threads)).unwrap()
}

/// One set of kernels for each instruction set of this machine.
fn all_kernels() -> Vec<Kernels> {
    let available = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    available.map(|isa| kernels(isa, 2)).collect()
}

/// Uniform in -1..1, by a linear congruential generator.
fn random(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = |_| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(next).collect()
}

/// A random matrix whose rows lie `gap` elements apart.
struct Random {
    data: Vec<f32>,
    shape: (usize, usize, usize),
}

impl Random {
    fn new(seed: u64, rows: usize, cols: usize, gap: usize) -> Random {
        Random { data: random(seed, rows * (cols + gap)), shape: (rows, cols, cols + gap) }
    }

    fn view(&self) -> Matrix<'_> {
        let (rows, cols, stride) = self.shape;
        Matrix::strided(&self.data, rows, cols, stride)
    }
}

/// Runs a kernel on an output poisoned with NaN, so that an element left out is seen.
fn output(rows: usize, cols: usize, run: impl FnOnce(MatrixMut<'_>)) -> Vec<f32> {
    let mut out = vec![f32::NAN; rows * cols];
    run(MatrixMut::new(&mut out, rows, cols));
    out
}

/// Holds when every element is within `tolerance * max(1, |expected|)`.
#[track_caller]
fn check(what: &str, actual: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len(), "{what}: length");
    let error = |(&a, &e): (&f32, &f64)| (f64::from(a) - e).abs() / e.abs().max(1.0);
    let errors =
        actual.iter().zip(expected).map(error).map(|e| if e.is_nan() { f64::INFINITY } else { e });
    let Some((worst, error)) = errors.enumerate().max_by(|a, b| a.1.total_cmp(&b.1)) else {
        return;
    };
    assert!(
        error <= tolerance,
        "{what}: element {worst} is {}, expected {}, passes with {error:e}",
        actual[worst],
        expected[worst]
    );
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn check_linear(
    kernels: &Kernels,
    m: usize,
    k: usize,
    n: usize,
    activation: Option<Activation>,
    extras: bool,
) {
    let what = format!("{} linear {m}x{k}x{n} {activation:?} extras {extras}", kernels.isa());
    let gap = if extras { 3 } else { 0 };
    let (x, w) = (Random::new(1, m, k, gap), Random::new(2, n, k, gap));
    let (bias, residual) = (random(3, n), Random::new(4, m, n, gap));
    let bias = extras.then_some(bias.as_slice());
    let residual = extras.then(|| residual.view());
    let out = output(m, n, |out| {
        kernels.linear(x.view(), w.view().into(), bias, activation, residual, out)
    });
    let expected = reference::linear(x.view(), w.view(), bias, activation, residual);
    check(&what, &out, &expected, 1e-6 * (k as f64).sqrt().max(2.0));
}

#[test]
fn linear_agrees_on_awkward_sizes() {
    for kernels in all_kernels() {
        for size in 1..=35 {
            check_linear(&kernels, 1, size, 5, None, false);
            check_linear(&kernels, 3, 33, size, Some(Activation::Gelu), true);
            check_linear(&kernels, size, 17, 7, None, true);
        }
        for (m, k, n) in [
            (0, 4, 3),
            (2, 0, 3),
            (2, 3, 0),
            (1, 1, 1),
            (13, 1023, 67),
            (7, 1025, 131),
            (29, 2061, 66),
        ] {
            check_linear(&kernels, m, k, n, None, true);
            check_linear(&kernels, m, k, n, Some(Activation::Silu), false);
        }
    }
}

#[test]
fn gated_linear_agrees() {
    for kernels in all_kernels() {
        for (m, k, n) in [
            (0, 3, 2),
            (1, 1, 1),
            (1, 100, 33),
            (9, 37, 70),
            (14, 1030, 9),
            (3, 5, 0),
            (47, 1030, 70),
        ] {
            let (x, bias) = (Random::new(1, m, k, 2), random(3, 2 * n));
            let mut w = Random::new(2, 2 * n, k, 1);
            w.data.iter_mut().for_each(|value| *value /= (k as f32).sqrt());
            for bias in [None, Some(bias.as_slice())] {
                for activation in ACTIVATIONS {
                    let out = output(m, n, |out| {
                        kernels.gated_linear(x.view(), w.view().into(), bias, activation, out)
                    });
                    let expected = reference::gated_linear(x.view(), w.view(), bias, activation);
                    check(&format!("{} gated {m}x{k}x{n}", kernels.isa()), &out, &expected, 1e-5);
                }
            }
        }
    }
}

#[test]
fn activations_agree() {
    for kernels in all_kernels() {
        for cols in (1..=35).chain([997]) {
            let mut x = Random::new(5, 3, cols, 2);
            x.data.iter_mut().for_each(|value| *value *= 12.0);
            for activation in ACTIVATIONS {
                let out = output(3, cols, |out| kernels.activate(activation, x.view(), out));
                let rows = (0..3).flat_map(|i| x.view().row(i).to_vec());
                let expected: Vec<f64> =
                    rows.map(|v| reference::activate(activation, f64::from(v))).collect();
                check(&format!("{} {activation:?} {cols}", kernels.isa()), &out, &expected, 1e-6);
            }
        }
    }
}

#[test]
fn activations_keep_nan_and_saturate() {
    for kernels in all_kernels() {
        let x = [f32::NAN, f32::INFINITY, -1e30, 1e10, -0.0];
        for activation in ACTIVATIONS {
            let out = output(1, 5, |out| kernels.activate(activation, Matrix::new(&x, 1, 5), out));
            assert!(out[0].is_nan(), "{activation:?} loses NaN");
            let square = activation == Activation::SquaredRelu;
            let expected = [f32::INFINITY, 0.0, if square { 1e20 } else { 1e10 }, 0.0];
            assert_eq!(out[1..], expected, "{} {activation:?}", kernels.isa());
        }
    }
}

#[test]
fn addition_is_exact() {
    for kernels in all_kernels() {
        for (rows, cols) in [(0, 5), (1, 1), (3, 17), (5, 64), (2, 0), (40, 1001)] {
            let (a, b) = (Random::new(1, rows, cols, 1), Random::new(2, rows, cols, 4));
            let out = output(rows, cols, |out| kernels.add(a.view(), b.view(), out));
            let row = |i: usize| {
                a.view().row(i).iter().zip(b.view().row(i)).map(|(a, b)| a + b).collect::<Vec<_>>()
            };
            assert_eq!(out, (0..rows).flat_map(row).collect::<Vec<_>>());
        }
    }
}

#[test]
fn norms_agree() {
    for kernels in all_kernels() {
        for cols in (1..=35).chain([997, 2048]) {
            let rows = if cols == 997 { 41 } else { 3 };
            let mut x = Random::new(6, rows, cols, 2);
            x.data.iter_mut().for_each(|value| *value = *value * 3.0 + 5.0);
            let (scale, bias) = (random(7, cols), random(8, cols));
            for (scale, bias) in [(None, None), (Some(scale.as_slice()), Some(bias.as_slice()))] {
                let out =
                    output(rows, cols, |out| kernels.layer_norm(x.view(), scale, bias, 1e-5, out));
                let what = format!("{} layer norm {cols}", kernels.isa());
                check(&what, &out, &reference::layer_norm(x.view(), scale, bias, 1e-5), 2e-5);
                let out = output(rows, cols, |out| kernels.rms_norm(x.view(), scale, 1e-6, out));
                let what = format!("{} rms norm {cols}", kernels.isa());
                check(&what, &out, &reference::rms_norm(x.view(), scale, 1e-6), 2e-6);
            }
        }
    }
}

#[test]
fn attention_agrees() {
    for kernels in all_kernels() {
        for head_dim in [1, 3, 4, 7, 8, 15, 16, 17, 33, 64, 80] {
            for (n_groups, q_len, lens) in [
                (1, 1, vec![1]),
                (2, 7, vec![5, 3]),
                (3, 25, vec![26]),
                (1, 5, vec![0, 31, 2]),
                (2, 2, vec![]),
            ] {
                let (n_heads, scale) = (3, 1.3);
                let width = n_heads * head_dim;
                let q = Random::new(1, n_groups * q_len, width, 2);
                let kv: Vec<_> = (2..)
                    .zip(&lens)
                    .map(|(seed, len)| {
                        let random = |seed| Random::new(seed, n_groups * len, width, 1);
                        (random(seed), random(seed + 50))
                    })
                    .collect();
                let segments: Vec<_> = kv.iter().map(|(k, v)| (k.view(), v.view())).collect();
                let out = output(n_groups * q_len, width, |out| {
                    kernels.attention(q.view(), &segments, n_groups, n_heads, scale, out);
                });
                let expected = reference::attention(q.view(), &segments, n_groups, n_heads, scale);
                check(
                    &format!("{} attention {head_dim} {lens:?}", kernels.isa()),
                    &out,
                    &expected,
                    1e-5,
                );
            }
        }
    }
}

/// Attributes with each kind of position, heads of odd and even widths, and shared key heads.
fn self_attention_cases() -> Vec<SelfAttention> {
    let of = |n_heads, n_kv_heads, head_dim, position| SelfAttention {
        n_heads,
        n_kv_heads,
        head_dim,
        scale: 0.7,
        position,
    };
    let rotary = |n_dims: usize| Position::Rotary {
        n_dims,
        inverse_frequencies: (0..n_dims / 2).map(|i| 0.5_f32.powi(i as i32)).collect(),
    };
    vec![
        of(1, 1, 1, Position::None),
        of(2, 2, 64, Position::None),
        of(3, 3, 17, Position::Alibi { slopes: vec![0.5, 0.25, 0.125] }),
        of(4, 2, 32, rotary(32)),
        of(6, 2, 20, rotary(8)),
        of(2, 1, 9, rotary(0)),
    ]
}

struct Qkv {
    fused: Random,
    q_width: usize,
    kv_width: usize,
}

impl Qkv {
    fn new(m: usize, attributes: &SelfAttention) -> Qkv {
        let (q_width, kv_width) =
            (attributes.n_heads * attributes.head_dim, attributes.n_kv_heads * attributes.head_dim);
        Qkv { fused: Random::new(9, m, q_width + 2 * kv_width, 0), q_width, kv_width }
    }

    /// Rows of q, k and v as views of the fused matrix.
    fn rows(&self, rows: std::ops::Range<usize>) -> [Matrix<'_>; 3] {
        let fused = self.fused.view().row_range(rows);
        let (k, v) = (self.q_width, self.q_width + self.kv_width);
        [fused.columns(0..k), fused.columns(k..v), fused.columns(v..v + self.kv_width)]
    }
}

/// Self-attention over `m` rows in chunks of the given lengths, and the cache after it.
fn run_in_chunks(
    kernels: &Kernels,
    attributes: &SelfAttention,
    qkv: &Qkv,
    chunks: &[usize],
) -> (Vec<f32>, KvCache) {
    let m: usize = chunks.iter().sum();
    let cache = KvCache::new(attributes.n_kv_heads, attributes.head_dim, m + 3);
    run_in_chunks_of(kernels, attributes, qkv, chunks, cache)
}

fn run_in_chunks_of(
    kernels: &Kernels,
    attributes: &SelfAttention,
    qkv: &Qkv,
    chunks: &[usize],
    mut cache: KvCache,
) -> (Vec<f32>, KvCache) {
    let (mut out, mut past_len) = (Vec::new(), 0);
    for &len in chunks {
        let [q, k, v] = qkv.rows(past_len..past_len + len);
        out.extend(output(len, qkv.q_width, |out| {
            kernels.self_attention(q, k, v, &mut cache, past_len, attributes, out);
        }));
        past_len += len;
    }
    (out, cache)
}

#[test]
fn self_attention_agrees() {
    for kernels in all_kernels() {
        for attributes in self_attention_cases() {
            for m in [0, 1, 2, 5, 13, 25, 61] {
                let qkv = Qkv::new(m, &attributes);
                let (out, _) = run_in_chunks(&kernels, &attributes, &qkv, &[m]);
                let [q, k, v] = qkv.rows(0..m);
                let expected = reference::self_attention(q, k, v, &attributes);
                check(
                    &format!("{} self-attention {m} {attributes:?}", kernels.isa()),
                    &out,
                    &expected,
                    1e-5,
                );
            }
        }
    }
}

#[test]
fn a_step_has_the_bits_of_a_prefill() {
    for kernels in all_kernels() {
        for attributes in self_attention_cases() {
            let m = 53;
            let qkv = Qkv::new(m, &attributes);
            let (whole, whole_cache) = run_in_chunks(&kernels, &attributes, &qkv, &[m]);
            for chunks in [vec![1; m], vec![30, 23], vec![7, 1, 25, 20]] {
                let (parts, cache) = run_in_chunks(&kernels, &attributes, &qkv, &chunks);
                assert_eq!(
                    bits(&parts),
                    bits(&whole),
                    "{} {attributes:?} {chunks:?}",
                    kernels.isa()
                );
                assert_eq!(
                    (cache.keys(m), cache.values(m)),
                    (whole_cache.keys(m), whole_cache.values(m))
                );
            }
        }
    }
}

#[test]
fn long_contexts_agree_in_every_cache_format() {
    for kernels in all_kernels() {
        for attributes in self_attention_cases() {
            let m = 353;
            let qkv = Qkv::new(m, &attributes);
            let [q, k, v] = qkv.rows(0..m);
            let expected = reference::self_attention(q, k, v, &attributes);
            for format in KvFormat::ALL {
                let (heads, dim) = (attributes.n_kv_heads, attributes.head_dim);
                let run = |chunks: &[usize]| {
                    let cache = KvCache::with_format(heads, dim, m, format);
                    run_in_chunks_of(&kernels, &attributes, &qkv, chunks, cache)
                };
                let (whole, cache) = run(&[m]);
                let bound = match format {
                    KvFormat::F32 => 1e-5,
                    KvFormat::F16 => 2e-3,
                    KvFormat::Int8 => 3e-2,
                };
                let what = format!("{} {format} {attributes:?}", kernels.isa());
                check(&what, &whole, &expected, bound);
                let (parts, parts_cache) = run(&[200, 56, 1, 1, 90, 5]);
                assert_eq!(bits(&parts), bits(&whole), "{what}");
                assert_eq!(cache.keys(m), parts_cache.keys(m), "{what}");
            }
        }
    }
}

/// Lengths around the borders of cache blocks (64) and of softmax blocks (320).
#[test]
fn lengths_around_block_borders_agree_in_every_cache_format() {
    for kernels in all_kernels() {
        for attributes in self_attention_cases()[1..5].iter().step_by(2) {
            for m in [16, 63, 64, 65, 129, 321] {
                let qkv = Qkv::new(m, attributes);
                let [q, k, v] = qkv.rows(0..m);
                let expected = reference::self_attention(q, k, v, attributes);
                let chunks = [m / 3, 1, m - m / 3 - 1];
                for (format, bound) in KvFormat::ALL.into_iter().zip([1e-5, 2e-3, 3e-2]) {
                    let run = |chunks: &[usize]| {
                        let (heads, dim) = (attributes.n_kv_heads, attributes.head_dim);
                        let cache = KvCache::with_format(heads, dim, m, format);
                        run_in_chunks_of(&kernels, attributes, &qkv, chunks, cache).0
                    };
                    let (whole, what) = (run(&[m]), format!("{} {format} {m}", kernels.isa()));
                    check(&what, &whole, &expected, bound);
                    assert_eq!(bits(&run(&chunks)), bits(&whole), "{what}");
                }
            }
        }
    }
}

/// A fork at any length goes its own way: neither side sees what the other writes.
#[test]
fn forks_share_blocks_until_they_write() {
    let kernels = &all_kernels()[0];
    for attributes in self_attention_cases().into_iter().step_by(2) {
        let (heads, dim) = (attributes.n_kv_heads, attributes.head_dim);
        for split in [40, 64, 100, 320] {
            for format in KvFormat::ALL {
                let len = split + 70;
                let (ours, mut theirs) = (Qkv::new(len, &attributes), Qkv::new(len, &attributes));
                let changed = split * theirs.fused.shape.1;
                theirs.fused.data[changed..].iter_mut().for_each(|value| *value = -*value);
                let fresh = |qkv: &Qkv| {
                    let cache = KvCache::with_format(heads, dim, len, format);
                    run_in_chunks_of(kernels, &attributes, qkv, &[len], cache)
                };
                let cache = KvCache::with_format(heads, dim, len, format);
                let (_, mut cache) = run_in_chunks_of(kernels, &attributes, &ours, &[split], cache);
                let mut fork = cache.clone();
                let shares = |cache: &KvCache| -> Vec<SharedBlock> {
                    (0..split.div_ceil(KV_BLOCK)).map(|block| cache.share(block).unwrap()).collect()
                };
                let shared = shares(&cache);
                let same = |other: &KvCache| {
                    shared.iter().zip(&shares(other)).filter(|(a, b)| a.id() == b.id()).count()
                };
                assert_eq!(same(&fork), split.div_ceil(KV_BLOCK));
                for (qkv, cache) in [(&theirs, &mut fork), (&ours, &mut cache)] {
                    let [q, k, v] = qkv.rows(split..len);
                    let out = output(len - split, qkv.q_width, |out| {
                        kernels.self_attention(q, k, v, cache, split, &attributes, out);
                    });
                    let (whole, whole_cache) = fresh(qkv);
                    assert_eq!(bits(&out), bits(&whole[split * qkv.q_width..]), "{split} {format}");
                    assert_eq!(cache.keys(len), whole_cache.keys(len));
                    assert_eq!(cache.values(len), whole_cache.values(len));
                    assert_eq!(same(cache), split / KV_BLOCK, "whole blocks stay shared");
                }
                let mut adopted = KvCache::with_format(heads, dim, len, format);
                adopted.adopt(&shared);
                assert_eq!(adopted.keys(split), fresh(&ours).1.keys(split));
                fork.truncate(0);
                assert_eq!(
                    fork.bytes() / shared[0].bytes(),
                    len.div_ceil(KV_BLOCK) - split / KV_BLOCK
                );
            }
        }
    }
}

#[test]
#[should_panic(expected = "blocks of another cache")]
fn blocks_of_another_format_are_refused() {
    let (k, v) = (random(1, 32), random(2, 32));
    let mut cache = KvCache::new(2, 16, 5);
    cache.write_heads(1, &k, &v);
    KvCache::with_format(2, 16, 5, KvFormat::F16).adopt(&[cache.share(0).unwrap()]);
}

#[test]
fn later_rows_are_never_seen() {
    for kernels in all_kernels() {
        let attributes = &self_attention_cases()[1];
        let mut qkv = Qkv::new(40, attributes);
        let (clean, _) = run_in_chunks(&kernels, attributes, &qkv, &[40]);
        let (width, split) = (qkv.fused.shape.1, 33);
        qkv.fused.data[split * width..].fill(f32::NAN);
        let (poisoned, _) = run_in_chunks(&kernels, attributes, &qkv, &[40]);
        let (seen, unseen) = poisoned.split_at(split * qkv.q_width);
        assert_eq!(bits(seen), bits(&clean[..seen.len()]));
        assert!(unseen.iter().all(|value| value.is_nan()));
    }
}

#[test]
fn cross_attention_agrees_and_is_zero_without_a_medium() {
    for kernels in all_kernels() {
        for head_dim in [1, 5, 16, 64] {
            let (n_heads, scale) = (2, 0.9);
            let width = n_heads * head_dim;
            let kv: Vec<_> = (0..3)
                .map(|i| (Random::new(20 + i, 9, width, 0), Random::new(30 + i, 9, width, 1)))
                .collect();
            let media: Vec<_> = kv.iter().map(|(k, v)| (k.view(), v.view())).collect();
            let caches: Vec<_> = media
                .iter()
                .map(|(k, v)| KvCache::from_rows(n_heads, *k, *v, KvFormat::F32))
                .collect();
            let caches: Vec<_> = caches.iter().collect();
            let long: Vec<u32> = (0..70).map(|row| row / 30 + 1).collect();
            for media_time in [vec![], vec![0], vec![0, 0, 1, 1, 1, 3, 2, 0, 3], long] {
                let q = Random::new(1, media_time.len(), width, 3);
                let out = output(media_time.len(), width, |out| {
                    kernels.cross_attention(q.view(), &caches, &media_time, n_heads, scale, out);
                });
                let expected =
                    reference::cross_attention(q.view(), &media, &media_time, n_heads, scale);
                check(
                    &format!("{} cross-attention {head_dim} {media_time:?}", kernels.isa()),
                    &out,
                    &expected,
                    1e-5,
                );
                for (row, &time) in out.chunks(width).zip(&media_time) {
                    assert!(time > 0 || bits(row).iter().all(|&bits| bits == 0));
                }
            }
        }
    }
}

#[test]
fn linear_rows_have_the_same_bits_alone_and_together() {
    for kernels in all_kernels() {
        let (m, k, n) = (61, 1100, 71);
        let (x, w) = (Random::new(1, m, k, 0), Random::new(2, n, k, 0));
        let together =
            output(m, n, |out| kernels.linear(x.view(), w.view().into(), None, None, None, out));
        for (i, row) in together.chunks(n).enumerate() {
            let x = x.view().row_range(i..i + 1);
            let alone =
                output(1, n, |out| kernels.linear(x, w.view().into(), None, None, None, out));
            assert_eq!(bits(&alone), bits(row), "{} row {i}", kernels.isa());
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let activation = Activation::Gelu;
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let run = |n_threads| {
            let kernels = kernels(isa, n_threads);
            let (x, w, bias) =
                (Random::new(1, 43, 301, 0), Random::new(2, 206, 301, 0), random(3, 206));
            let mut all = output(43, 206, |out| {
                kernels.linear(x.view(), w.view().into(), Some(&bias), Some(activation), None, out);
            });
            all.extend(output(43, 103, |out| {
                kernels.gated_linear(x.view(), w.view().into(), Some(&bias), activation, out)
            }));
            all.extend(output(43, 301, |out| kernels.layer_norm(x.view(), None, None, 1e-5, out)));
            all.extend(output(206, 301, |out| kernels.rms_norm(w.view(), None, 1e-5, out)));
            let kv = (w.view().columns(0..48), w.view().columns(48..96));
            all.extend(output(43, 48, |out| {
                kernels.attention(x.view().columns(0..48), &[kv], 1, 3, 1.0, out)
            }));
            for attributes in self_attention_cases() {
                all.extend(
                    run_in_chunks(&kernels, &attributes, &Qkv::new(50, &attributes), &[50]).0,
                );
            }
            bits(&all)
        };
        let one = run(1);
        for n_threads in [2, 3, 7] {
            assert_eq!(run(n_threads), one, "{isa} on {n_threads} threads");
        }
    }
}

#[test]
fn nan_and_infinity_stay_in_their_row() {
    for kernels in all_kernels() {
        let (mut x, w) = (Random::new(1, 9, 37, 0), Random::new(2, 21, 37, 0));
        x.data[2 * 37 + 36] = f32::NAN;
        x.data[5 * 37 + 3] = f32::INFINITY;
        let linear =
            output(9, 21, |out| kernels.linear(x.view(), w.view().into(), None, None, None, out));
        let norm = output(9, 37, |out| kernels.layer_norm(x.view(), None, None, 1e-5, out));
        for (row, linear) in linear.chunks(21).enumerate() {
            assert_eq!(
                linear.iter().any(|v| v.is_nan()),
                row == 2,
                "{} linear row {row}",
                kernels.isa()
            );
            assert_eq!(
                linear.iter().any(|v| v.is_infinite()),
                row == 5,
                "{} linear row {row}",
                kernels.isa()
            );
        }
        for (row, norm) in norm.chunks(37).enumerate() {
            assert_eq!(
                norm.iter().any(|v| v.is_nan()),
                row == 2 || row == 5,
                "{} norm row {row}",
                kernels.isa()
            );
        }
    }
}

#[test]
fn unavailable_instruction_sets_are_errors() {
    for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
        let error = Kernels::with_isa(isa, None).unwrap_err();
        assert!(matches!(error, KernelError::UnsupportedIsa { .. }), "{error}");
    }
}

#[test]
#[should_panic(expected = "linear: shape of x")]
fn linear_rejects_disagreeing_shapes() {
    let mut out = [0.0; 2];
    let (x, w) = ([0.0; 3], [0.0; 8]);
    kernels(Isa::Scalar, 1).linear(
        Matrix::new(&x, 1, 3),
        Matrix::new(&w, 2, 4).into(),
        None,
        None,
        None,
        MatrixMut::new(&mut out, 1, 2),
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn linear_agrees_on_any_shape(
        m in 0..80usize,
        k in 0..1200usize,
        n in 0..90usize,
        extras: bool,
        activation in prop::option::of(prop::sample::select(ACTIVATIONS.to_vec())),
    ) {
        for kernels in all_kernels() {
            check_linear(&kernels, m, k, n, activation, extras);
        }
    }
}

/// With linear biases only distances count: what follows a block is the same with the block gone and never written.
#[test]
fn a_cache_without_its_first_block_counts_from_its_second() {
    let (n_heads, head_dim, past_len, m) = (3, 20, KV_BLOCK + 37, 5);
    let attributes = SelfAttention {
        n_heads,
        n_kv_heads: n_heads,
        head_dim,
        scale: 0.3,
        position: Position::Alibi { slopes: vec![0.5, 0.25, 0.125] },
    };
    let width = n_heads * head_dim;
    let rows = |seed| Random::new(seed, past_len, width, 0);
    let (past_k, past_v) = (rows(1), rows(2));
    let (q, k, v) =
        (Random::new(3, m, width, 1), Random::new(4, m, width, 0), Random::new(5, m, width, 2));
    for kernels in all_kernels() {
        for format in KvFormat::ALL {
            let run = |first: usize, forgets: bool| {
                let mut cache = KvCache::with_format(n_heads, head_dim, past_len + m, format);
                let rows = first..past_len;
                cache.write(
                    0,
                    past_k.view().row_range(rows.clone()),
                    past_v.view().row_range(rows),
                );
                if forgets {
                    cache.forget_first_block();
                }
                output(m, width, |out| {
                    let past_len = past_len - KV_BLOCK;
                    kernels.self_attention(
                        q.view(),
                        k.view(),
                        v.view(),
                        &mut cache,
                        past_len,
                        &attributes,
                        out,
                    );
                })
            };
            assert_eq!(
                bits(&run(0, true)),
                bits(&run(KV_BLOCK, false)),
                "{} {format}",
                kernels.isa()
            );
        }
    }
}
