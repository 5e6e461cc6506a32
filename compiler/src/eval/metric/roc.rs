//! The area under the ROC curve: how likely a positive stands above a negative.

/// The area, of scores and whether each is of a positive; equal scores count half. NaN never comes out: without positives
/// or without negatives it is 0.5.
pub(super) fn area(mut ranked: Vec<(f64, bool)>) -> f64 {
    ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
    let n_positives = ranked.iter().filter(|(_, positive)| *positive).count();
    let n_negatives = ranked.len() - n_positives;
    if n_positives == 0 || n_negatives == 0 {
        return 0.5;
    }
    let (mut below, mut pairs) = (0.0, 0.0);
    for equal in ranked.chunk_by(|a, b| a.0 == b.0) {
        let positives = equal.iter().filter(|(_, positive)| *positive).count() as f64;
        let negatives = equal.len() as f64 - positives;
        pairs += positives * (below + negatives / 2.0);
        below += negatives;
    }
    pairs / (n_positives as f64 * n_negatives as f64)
}
