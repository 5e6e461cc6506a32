//! Runs the instructions of convolutional encoders, picture by picture.
#![forbid(unsafe_code)]

use flamingo_kernels::MatrixMut;

use super::execute::{Context, Rows, Unresolved};
use super::plan::Action;

impl Context<'_> {
    /// Runs one of the actions over pictures into `out`, `[rows, cols]` dense.
    pub(super) fn pictures(
        &self,
        action: &Action,
        out: &mut [f32],
        shape: (usize, usize),
    ) -> Result<(), Unresolved> {
        match action {
            Action::Convolution { x, weight, bias, activation, geometry } => {
                let (weight, bias) = (self.rows(weight)?.matrix(), self.vector(bias.as_ref())?);
                let n_pixels = [geometry.input, geometry.output].map(|size| size.iter().product());
                let each = |x: Rows<'_>, out: MatrixMut<'_>| {
                    let x = x.matrix();
                    self.kernels.convolution(x, weight, bias, *activation, geometry, out);
                };
                by_picture(self.rows(x)?, n_pixels, out, shape, |_, x, out| each(x, out))
            }
            Action::MeanPool { x, input, side } => {
                let output: usize = input.map(|size| size.div_ceil(*side)).iter().product();
                let n_pixels = [input.iter().product(), output];
                by_picture(self.rows(x)?, n_pixels, out, shape, |_, x, out| {
                    self.kernels.mean_pool(x.matrix(), *input, *side, out);
                })
            }
            Action::PictureMean { x, n_pixels } => {
                by_picture(self.rows(x)?, [*n_pixels, 1], out, shape, |_, x, mut out| {
                    self.kernels.mean_of_rows(x.matrix(), out.row_mut(0));
                })
            }
            Action::ChannelGate { x, gates, gain, residual, n_pixels } => {
                let gain = *self.rows(gain)?.row(0).first().ok_or(Unresolved)?;
                let gates = self.rows(gates)?;
                let residual = residual.as_ref().map(|view| self.rows(view)).transpose()?;
                by_picture(self.rows(x)?, [*n_pixels; 2], out, shape, |picture, x, out| {
                    let pixels = picture * n_pixels..(picture + 1) * n_pixels;
                    let residual = residual.map(|residual| residual.range(pixels).matrix());
                    self.kernels.gate_channels(x.matrix(), gates.row(picture), gain, residual, out);
                })
            }
            _ => Err(Unresolved),
        }
    }
}

/// Calls `each` with the number, the rows and the output of each picture, of which x has `n_pixels[0]` and the output
/// `n_pixels[1]` rows.
fn by_picture<'a>(
    x: Rows<'a>,
    n_pixels: [usize; 2],
    out: &mut [f32],
    (n_rows, n_cols): (usize, usize),
    mut each: impl FnMut(usize, Rows<'a>, MatrixMut<'_>),
) -> Result<(), Unresolved> {
    let [n_in, n_out] = n_pixels;
    if n_out == 0 || n_cols == 0 {
        return Ok(());
    }
    if x.rows != n_rows / n_out * n_in {
        return Err(Unresolved);
    }
    for (picture, out) in out.chunks_exact_mut(n_out * n_cols).enumerate() {
        let x = x.range(picture * n_in..(picture + 1) * n_in);
        each(picture, x, MatrixMut::new(out, n_out, n_cols));
    }
    Ok(())
}
