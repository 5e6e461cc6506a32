//! timm's NFNets of the F family: tensors under their genuine names.

use super::tensor::{Fill, TensorList};

/// Classes of the classifier, which no Flamingo uses but the file has.
const N_CLASSES: usize = 1000;

/// Shape of an NFNet. Blocks are half as wide within, and so is squeeze-excite.
#[derive(Clone, Debug)]
pub(super) struct Nfnet {
    /// Side of the pictures, which no tensor tells.
    pub(super) image_size: usize,
    /// Channels after the stem, whose first convolutions have an eighth, a quarter and a half of them.
    pub(super) stem_width: usize,
    /// Blocks and channels of each stage.
    pub(super) stages: Vec<(usize, usize)>,
    /// Channels of a group of the 3 × 3 convolutions.
    pub(super) group_width: usize,
    /// Channels after the last convolution.
    pub(super) width: usize,
}

impl Nfnet {
    /// `dm_nfnet_f{number}`, at the side that Flamingo's pictures have.
    pub(super) fn f(number: usize) -> Nfnet {
        let depths = [1, 2, 6, 3].map(|n_blocks| n_blocks * (number + 1));
        Nfnet {
            image_size: 320,
            stem_width: 128,
            stages: depths.into_iter().zip([256, 512, 1536, 1536]).collect(),
            group_width: 128,
            width: 3072,
        }
    }

    /// The tensors of `nfnet.pt`.
    pub(super) fn tensors(&self) -> TensorList {
        let mut list = TensorList::default();
        let mut width = 3;
        for (index, part) in [8, 4, 2, 1].into_iter().enumerate() {
            let c_out = self.stem_width / part;
            convolution(&mut list, &format!("stem.conv{}", index + 1), [c_out, width, 3]);
            width = c_out;
        }
        for (index, (n_blocks, out)) in self.stages.iter().enumerate() {
            for number in 0..*n_blocks {
                self.block(
                    &mut list,
                    &format!("stages.{index}.{number}"),
                    [width, *out],
                    number == 0,
                );
                width = *out;
            }
        }
        convolution(&mut list, "final_conv", [self.width, width, 1]);
        list.linear_with_bias("head.fc", N_CLASSES, self.width);
        list
    }

    fn block(&self, list: &mut TensorList, block: &str, [width, out]: [usize; 2], is_first: bool) {
        let inner = out / 2;
        list.add(format!("{block}.skipinit_gain"), &[], Fill::Gate);
        if is_first {
            convolution(list, &format!("{block}.downsample.conv"), [out, width, 1]);
        }
        convolution(list, &format!("{block}.conv1"), [inner, width, 1]);
        convolution(list, &format!("{block}.conv2"), [inner, self.group_width, 3]);
        convolution(list, &format!("{block}.conv2b"), [inner, self.group_width, 3]);
        convolution(list, &format!("{block}.conv3"), [out, inner, 1]);
        for (name, [c_out, c_in]) in [("fc1", [inner, out]), ("fc2", [out, inner])] {
            let name = format!("{block}.attn_last.{name}");
            list.add(format!("{name}.weight"), &[c_out, c_in, 1, 1], Fill::Linear);
            list.add(format!("{name}.bias"), &[c_out], Fill::Bias);
        }
    }
}

/// Weight, bias and gain of a convolution with standardised filters.
fn convolution(list: &mut TensorList, name: &str, [c_out, c_in, side]: [usize; 3]) {
    list.add(format!("{name}.weight"), &[c_out, c_in, side, side], Fill::Linear);
    list.add(format!("{name}.bias"), &[c_out], Fill::Bias);
    list.add(format!("{name}.gain"), &[c_out, 1, 1, 1], Fill::NormScale);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// timm counts 438 359 116 and 71 489 284 with the classifier; 435 million are the paper's.
    #[test]
    fn variants_have_timms_parameters() {
        for (number, expected) in [(0, 68_416_284), (6, 435_286_116)] {
            let list = Nfnet::f(number).tensors();
            let classifier = (N_CLASSES * (3072 + 1)) as u64;
            assert_eq!(list.n_values() - classifier, expected, "f{number}");
        }
        assert_eq!(Nfnet::f(6).tensors().specs().len(), 1457);
    }
}
