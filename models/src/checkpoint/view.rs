//! Strided views of a storage: bounds, contiguity, and copies in row-major order.

/// Where the elements of a tensor lie in its storage. All fields count elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View {
    /// First element.
    pub(super) offset: usize,
    /// Sizes of the dimensions.
    pub(super) shape: Vec<usize>,
    /// Steps of the dimensions, as many as there are sizes; 0 where the tensor is expanded.
    pub(super) strides: Vec<usize>,
}

impl View {
    /// A whole storage of elements in row-major order.
    pub(super) fn contiguous(shape: &[usize]) -> View {
        let mut strides = vec![1usize; shape.len()];
        for dim in (1..shape.len()).rev() {
            strides[dim - 1] = strides[dim].saturating_mul(shape[dim]);
        }
        View { offset: 0, shape: shape.to_vec(), strides }
    }

    /// Number of elements; `None` where it overflows.
    pub(super) fn n_elements(&self) -> Option<usize> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        self.shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size))
    }

    /// Elements a storage needs to hold the view; `None` where that overflows.
    pub(super) fn extent(&self) -> Option<usize> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        let mut dims = self.shape.iter().zip(&self.strides);
        let last = dims.try_fold(self.offset, |last, (size, stride)| {
            last.checked_add((size - 1).checked_mul(*stride)?)
        })?;
        last.checked_add(1)
    }

    /// Whether the elements lie next to each other in row-major order.
    pub(super) fn is_contiguous(&self) -> bool {
        let mut expected = 1usize;
        for (size, stride) in self.shape.iter().zip(&self.strides).rev() {
            if *size != 1 && *stride != expected {
                return false;
            }
            expected = expected.saturating_mul(*size);
        }
        true
    }

    /// Copies the elements, of `size` bytes each, out of `storage` in row-major order.
    ///
    /// `storage` holds at least [`View::extent`] elements; the caller has bounded the result.
    pub(super) fn gather(&self, storage: &[u8], size: usize) -> Vec<u8> {
        let n_elements = self.n_elements().unwrap_or(0);
        let mut bytes = Vec::with_capacity(n_elements * size);
        let mut index = vec![0; self.shape.len()];
        let mut at = self.offset;
        for _ in 0..n_elements {
            bytes.extend_from_slice(&storage[at * size..][..size]);
            at = self.advance(&mut index, at);
        }
        bytes
    }

    /// Steps `index` to the next element in row-major order, and the element offset with it.
    fn advance(&self, index: &mut [usize], mut at: usize) -> usize {
        for dim in (0..index.len()).rev() {
            index[dim] += 1;
            at += self.strides[dim];
            if index[dim] < self.shape[dim] {
                return at;
            }
            at -= self.strides[dim] * self.shape[dim];
            index[dim] = 0;
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::View;

    fn view(offset: usize, shape: &[usize], strides: &[usize]) -> View {
        View { offset, shape: shape.to_vec(), strides: strides.to_vec() }
    }

    #[test]
    fn gathers_in_row_major_order() {
        let storage: Vec<u8> = (0..12).collect();
        assert_eq!(
            view(0, &[4, 3], &[1, 4]).gather(&storage, 1),
            [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
        );
        assert_eq!(view(1, &[2, 2], &[3, 0]).gather(&storage, 2), [2, 3, 2, 3, 8, 9, 8, 9]);
        assert_eq!(view(3, &[], &[]).gather(&storage, 2), [6, 7]);
    }

    #[test]
    fn contiguity_ignores_dimensions_of_one() {
        assert!(view(5, &[2, 1, 3], &[3, 99, 1]).is_contiguous());
        assert!(!view(0, &[3, 2], &[1, 3]).is_contiguous());
        assert!(!view(0, &[2, 3], &[0, 1]).is_contiguous());
    }

    #[test]
    fn extents_are_checked() {
        assert_eq!(view(2, &[2, 3], &[5, 1]).extent(), Some(10));
        assert_eq!(view(7, &[0, 3], &[5, 1]).extent(), Some(0));
        assert_eq!(view(1, &[usize::MAX, 3], &[usize::MAX, 1]).extent(), None);
        assert_eq!(view(0, &[usize::MAX, 3], &[0, 1]).n_elements(), None);
    }
}
