//! Weights in panels: every format against its meaning, and what must not change a bit.

use super::*;
use crate::reference::{PackedWeight, rounded, unpacked};

const FORMATS: [PanelFormat; 5] = [
    PanelFormat::F16,
    PanelFormat::Bf16,
    PanelFormat::Int8,
    PanelFormat::Int4 { block: 32 },
    PanelFormat::Int4 { block: 128 },
];

fn linear(kernels: &Kernels, x: Matrix<'_>, weight: Panels<'_>) -> Vec<f32> {
    let (m, n) = (x.rows(), weight.rows());
    output(m, n, |out| kernels.linear(x, weight.into(), None, None, None, out))
}

fn check_panels(
    kernels: &Kernels,
    format: PanelFormat,
    (m, k, n): (usize, usize, usize),
    activation: Option<Activation>,
    extras: bool,
) {
    let what = format!("{} {format} {m}x{k}x{n} {activation:?} extras {extras}", kernels.isa());
    let gap = if extras { 3 } else { 0 };
    let (x, w) = (Random::new(1, m, k, gap), Random::new(2, n, k, gap));
    let (bias, residual) = (random(3, n), Random::new(4, m, n, gap));
    let bias = extras.then_some(bias.as_slice());
    let residual = extras.then(|| residual.view());
    let packed = PackedWeight::new(format, w.view());
    let weight = packed.view();
    let out = output(m, n, |out| {
        kernels.linear(x.view(), weight.into(), bias, activation, residual, out)
    });
    let (x, w) = (rounded(format, x.view()), unpacked(weight));
    let (x, w) = (Matrix::new(&x, m, k), Matrix::new(&w, n, k));
    let expected = reference::linear(x, w, bias, activation, residual);
    check(&what, &out, &expected, 2e-6 * (k as f64).sqrt().max(2.0));
}

#[test]
fn panels_agree_on_awkward_sizes() {
    for kernels in all_kernels() {
        for format in FORMATS {
            for size in 1..=35 {
                check_panels(&kernels, format, (1, size, 5), None, false);
                check_panels(&kernels, format, (3, 33, size), Some(Activation::Gelu), true);
                check_panels(&kernels, format, (size, 17, 7), None, true);
            }
            for shape in
                [(0, 4, 3), (2, 0, 3), (2, 3, 0), (1, 1, 1), (13, 1023, 67), (29, 2061, 66)]
            {
                check_panels(&kernels, format, shape, None, true);
                check_panels(&kernels, format, shape, Some(Activation::Silu), false);
            }
        }
    }
}

#[test]
fn gated_panels_agree() {
    for kernels in all_kernels() {
        for format in FORMATS {
            for (m, k, n) in [(0, 3, 16), (1, 1, 16), (2, 100, 48), (9, 37, 80), (3, 5, 0)] {
                let (x, bias) = (Random::new(1, m, k, 2), random(3, 2 * n));
                let mut w = Random::new(2, 2 * n, k, 1);
                w.data.iter_mut().for_each(|value| *value /= (k as f32).sqrt());
                let packed = PackedWeight::new(format, w.view());
                let (rounded, unpacked) = (rounded(format, x.view()), unpacked(packed.view()));
                for bias in [None, Some(bias.as_slice())] {
                    let out = output(m, n, |out| {
                        let weight = packed.view().into();
                        kernels.gated_linear(x.view(), weight, bias, Activation::Silu, out);
                    });
                    let (x, w) = (Matrix::new(&rounded, m, k), Matrix::new(&unpacked, 2 * n, k));
                    let expected = reference::gated_linear(x, w, bias, Activation::Silu);
                    check(
                        &format!("{} {format} gated {m}x{k}x{n}", kernels.isa()),
                        &out,
                        &expected,
                        1e-5,
                    );
                }
            }
        }
    }
}

#[test]
fn panel_rows_have_the_same_bits_alone_together_and_on_any_threads() {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        for format in FORMATS {
            let (m, k, n) = (31, 1100, 150);
            let (x, w) = (Random::new(1, m, k, 0), Random::new(2, n, k, 0));
            let packed = PackedWeight::new(format, w.view());
            let together = linear(&kernels(isa, 1), x.view(), packed.view());
            assert_eq!(bits(&linear(&kernels(isa, 3), x.view(), packed.view())), bits(&together));
            for n_rows in 1..=13 {
                let kernels = kernels(isa, 2);
                for start in (0..m).step_by(n_rows) {
                    let rows = start..m.min(start + n_rows);
                    let some = linear(&kernels, x.view().row_range(rows.clone()), packed.view());
                    let expected = &together[rows.start * n..rows.end * n];
                    assert_eq!(bits(&some), bits(expected), "{isa} {format} rows {rows:?}");
                }
            }
        }
    }
}

#[test]
fn sums_of_bytes_are_exact_so_equal_on_every_instruction_set() {
    for format in [PanelFormat::Int8, PanelFormat::Int4 { block: 32 }] {
        let (x, w) = (Random::new(1, 7, 8192, 0), Random::new(2, 40, 8192, 0));
        let packed = PackedWeight::new(format, w.view());
        let all =
            all_kernels().into_iter().map(|kernels| linear(&kernels, x.view(), packed.view()));
        let all: Vec<_> = all.map(|out| bits(&out)).collect();
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{format}");
    }
}

#[test]
fn extreme_bytes_do_not_saturate() {
    // All magnitudes at their largest, signs of every kind: 16-bit partial sums would overflow first.
    let (k, n) = (256, 16);
    let x: Vec<f32> =
        (0..4 * k).map(|i| if i / k == 0 || i % (i / k + 1) == 0 { 1.0 } else { -1.0 }).collect();
    let w: Vec<f32> = (0..n * k).map(|i| if i % (i / k + 1) == 0 { -1.0 } else { 1.0 }).collect();
    let (x, w) = (Matrix::new(&x, 4, k), Matrix::new(&w, n, k));
    for kernels in all_kernels() {
        for format in FORMATS {
            let packed = PackedWeight::new(format, w);
            let out = linear(&kernels, x, packed.view());
            let w = unpacked(packed.view());
            let expected = reference::linear(x, Matrix::new(&w, n, k), None, None, None);
            check(&format!("{} {format}", kernels.isa()), &out, &expected, 1e-5);
        }
    }
}

#[test]
fn nan_and_infinity_stay_in_their_row_of_panels() {
    for kernels in all_kernels() {
        for format in FORMATS {
            let (mut x, w) = (Random::new(1, 9, 37, 0), Random::new(2, 21, 37, 0));
            x.data[2 * 37 + 36] = f32::NAN;
            x.data[5 * 37 + 3] = f32::INFINITY;
            let packed = PackedWeight::new(format, w.view());
            let out = linear(&kernels, x.view(), packed.view());
            for (i, row) in out.chunks(21).enumerate() {
                let what = format!("{} {format} row {i}", kernels.isa());
                assert_eq!(
                    row.iter().all(|value| value.is_finite()),
                    ![2, 5].contains(&i),
                    "{what}"
                );
                assert!(
                    ![2, 5].contains(&i) || row.iter().all(|value| !value.is_finite()),
                    "{what}"
                );
            }
        }
    }
}

#[test]
fn rows_of_a_table_are_read_as_their_format_says() {
    for format in FORMATS {
        let w = Random::new(2, 21, 37, 0);
        let packed = PackedWeight::new(format, w.view());
        let all = unpacked(packed.view());
        for row in 0..21 {
            let mut out = vec![f32::NAN; 37];
            Weight::from(packed.view()).read_row(row, &mut out);
            assert_eq!(out, all[row * 37..][..37]);
            let step = match format {
                PanelFormat::F16 => 1e-3,
                PanelFormat::Bf16 | PanelFormat::Int8 => 1e-2,
                PanelFormat::Int4 { .. } => 0.15,
            };
            let worst = out.iter().zip(w.view().row(row)).map(|(a, b)| (a - b).abs());
            assert!(worst.fold(0.0, f32::max) < step, "{format}");
        }
    }
}

#[test]
fn panels_of_other_lengths_are_refused() {
    let packed = PackedWeight::new(PanelFormat::Int8, Random::new(1, 20, 10, 0).view());
    let (data, scales) = (vec![0; 2 * 3 * 64], vec![0.0; 32]);
    assert_eq!(packed.view().bytes(), data.len() + 4 * scales.len());
    assert!(Panels::new(PanelFormat::Int8, 20, 10, &data, &scales, &[]).is_some());
    assert!(Panels::new(PanelFormat::Int8, 20, 10, &data[1..], &scales, &[]).is_none());
    assert!(Panels::new(PanelFormat::Int8, 20, 10, &data, &scales[1..], &[]).is_none());
    assert!(Panels::new(PanelFormat::Int8, 20, 10, &data, &scales, &[0]).is_none());
    assert!(Panels::new(PanelFormat::Int8, usize::MAX, usize::MAX, &data, &scales, &[]).is_none());
    assert!(PanelFormat::Int8.data_bytes(1, MAX_BYTE_COLS).is_some());
    for format in [PanelFormat::Int8, PanelFormat::Int4 { block: 32 }] {
        assert!(format.data_bytes(1, MAX_BYTE_COLS + 1).is_none(), "{format}");
    }
    for block in [0, 4, 12] {
        assert!(Panels::new(PanelFormat::Int4 { block }, 1, 8, &data, &scales, &[]).is_none());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn panels_agree_on_any_shape(
        m in 0..40usize,
        k in 0..700usize,
        n in 0..90usize,
        extras: bool,
        format in prop::sample::select(FORMATS.to_vec()),
        activation in prop::option::of(prop::sample::select(ACTIVATIONS.to_vec())),
    ) {
        for kernels in all_kernels() {
            check_panels(&kernels, format, (m, k, n), activation, extras);
        }
    }
}
