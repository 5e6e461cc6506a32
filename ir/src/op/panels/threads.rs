//! Work on panels over all cores, with results that do not depend on their number.

use std::num::NonZero;
use std::panic::resume_unwind;
use std::thread;

/// Threads that the machine runs at once.
pub(super) fn n_cores() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get)
}

/// What `work` gives for each piece, in the order of the pieces, on up to `n_threads` threads.
pub(super) fn map_in_order<T: Send, R: Send>(
    pieces: impl IntoIterator<Item = T>,
    n_threads: usize,
    work: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    let mut pieces: Vec<T> = pieces.into_iter().collect();
    let n_each = pieces.len().div_ceil(n_threads.max(1)).max(1);
    if n_each == pieces.len() {
        return pieces.into_iter().map(work).collect();
    }
    let mut runs = Vec::new();
    while !pieces.is_empty() {
        let rest = pieces.split_off(n_each.min(pieces.len()));
        runs.push(std::mem::replace(&mut pieces, rest));
    }
    let work = &work;
    thread::scope(|scope| {
        let start =
            |run: Vec<T>| scope.spawn(move || run.into_iter().map(work).collect::<Vec<R>>());
        let threads: Vec<_> = runs.into_iter().map(start).collect();
        let results = threads.into_iter().map(|thread| thread.join());
        results.flat_map(|result| result.unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_pieces() {
        for n in [0, 1, 2, 5, 16] {
            for n_threads in [0, 1, 2, 3, 16, 99] {
                let squares = map_in_order(0..n, n_threads, |i| i * i);
                assert_eq!(squares, (0..n).map(|i| i * i).collect::<Vec<usize>>());
            }
        }
    }

    #[test]
    fn each_piece_may_be_written() {
        let mut values = vec![0; 7];
        let pieces = values.chunks_mut(2).enumerate();
        map_in_order(pieces, 3, |(index, piece)| piece.fill(index));
        assert_eq!(values, [0, 0, 1, 1, 2, 2, 3]);
    }
}
