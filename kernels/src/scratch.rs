//! Buffers that kernels work in, kept between calls: fresh memory costs a page fault for every 4 KiB.

use std::sync::{Mutex, PoisonError};

/// Buffers not in use. Their contents mean nothing.
#[derive(Debug, Default)]
pub(crate) struct Scratch<T> {
    free: Mutex<Vec<Vec<T>>>,
}

/// Bytes of a cache line, and of the largest vector.
const ALIGNMENT: usize = 64;

impl<T: Copy + Default> Scratch<T> {
    /// Calls `body` with `len` elements of any value, the first at the start of a cache line.
    pub(crate) fn with<R>(&self, len: usize, body: impl FnOnce(&mut [T]) -> R) -> R {
        let mut buffer = self.lock().pop().unwrap_or_default();
        let padded = len + ALIGNMENT / size_of::<T>();
        if buffer.len() < padded {
            buffer.resize(padded, T::default());
        }
        let start = buffer.as_ptr().align_offset(ALIGNMENT).min(padded - len);
        let result = body(&mut buffer[start..start + len]);
        self.lock().push(buffer);
        result
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vec<T>>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_reused_and_nest() {
        let scratch = Scratch::<f32>::default();
        for len in [0, 1, 1000, 10] {
            scratch.with(len, |outer| {
                outer.fill(1.0);
                scratch.with(len + 1, |inner| inner.fill(2.0));
                assert_eq!((outer.len(), outer.as_ptr().align_offset(64)), (len, 0));
                assert!(outer.iter().all(|&value| value == 1.0));
            });
        }
        assert_eq!(scratch.lock().len(), 2);
    }
}
