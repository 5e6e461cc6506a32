//! Convolutions, means and gates against their references.

use super::*;

#[test]
fn convolutions_agree_on_awkward_sizes() {
    for kernels in all_kernels() {
        for (size, window, stride, n_groups, n_in, n_out) in [
            ([1, 1], [1, 1], 1, 1, 1, 1),
            ([5, 7], [3, 3], 1, 3, 5, 7),
            ([6, 4], [3, 3], 2, 2, 8, 4),
            ([9, 10], [3, 3], 2, 1, 3, 17),
            ([4, 5], [2, 4], 3, 2, 1, 2),
            ([13, 11], [3, 3], 1, 4, 16, 16),
            ([0, 3], [3, 3], 1, 2, 4, 4),
            ([2, 2], [3, 3], 1, 1, 4, 0),
        ] {
            let geometry = Convolution::same(size, window, stride, n_groups);
            let n_weights = window[0] * window[1] * n_in;
            let x = Random::new(1, size[0] * size[1], n_groups * n_in, 3);
            let weight = Random::new(2, n_groups * n_out, n_weights, 1);
            let bias = random(3, n_groups * n_out);
            let n_pixels = geometry.output.iter().product();
            for (bias, activation) in [(None, None), (Some(&*bias), Some(Activation::Gelu))] {
                let run = |out: MatrixMut<'_>| {
                    kernels.convolution(x.view(), weight.view(), bias, activation, &geometry, out);
                };
                let out = output(n_pixels, n_groups * n_out, run);
                let expected =
                    reference::convolution(x.view(), weight.view(), bias, activation, &geometry);
                check(&format!("{} {geometry:?}", kernels.isa()), &out, &expected, 1e-5);
            }
        }
    }
}

#[test]
fn means_and_gates_agree() {
    for kernels in all_kernels() {
        for (n_pixels, n_channels) in [(1, 1), (7, 65), (100, 130), (900, 33)] {
            let x = Random::new(1, n_pixels, n_channels, 2);
            let residual = Random::new(2, n_pixels, n_channels, 0);
            let mut mean = vec![0.0; n_channels];
            kernels.mean_of_rows(x.view(), &mut mean);
            let expected = reference::mean_of_rows(x.view());
            check(&format!("{} mean of rows", kernels.isa()), &mean, &expected, 1e-5);
            let gates = random(3, n_channels);
            for residual in [None, Some(residual.view())] {
                let run = |out: MatrixMut<'_>| {
                    kernels.gate_channels(x.view(), &gates, 0.4, residual, out);
                };
                let out = output(n_pixels, n_channels, run);
                let expected = reference::gate_channels(x.view(), &gates, 0.4, residual);
                check(&format!("{} gates", kernels.isa()), &out, &expected, 1e-5);
            }
        }
    }
}

#[test]
fn means_of_squares_agree_at_the_ends() {
    for kernels in all_kernels() {
        for (size, side) in [([1, 1], 2), ([4, 6], 2), ([5, 7], 2), ([9, 4], 3), ([0, 3], 2)] {
            let x = Random::new(1, size[0] * size[1], 19, 1);
            let n_pixels = size.map(|size: usize| size.div_ceil(side)).iter().product();
            let out = output(n_pixels, 19, |out| kernels.mean_pool(x.view(), size, side, out));
            let expected = reference::mean_pool(x.view(), size, side);
            check(&format!("{} {size:?} {side}", kernels.isa()), &out, &expected, 1e-5);
        }
    }
}

#[test]
fn convolutions_do_not_depend_on_the_number_of_threads() {
    let geometry = Convolution::same([17, 13], [3, 3], 1, 2);
    let (x, weight) = (Random::new(1, 17 * 13, 32, 0), Random::new(2, 48, 9 * 16, 0));
    let run = |n_threads: usize| {
        let kernels = kernels(Isa::best(), n_threads);
        let convolve = |out: MatrixMut<'_>| {
            kernels.convolution(x.view(), weight.view(), None, None, &geometry, out);
        };
        bits(&output(17 * 13, 48, convolve))
    };
    assert_eq!(run(1), run(3));
}
