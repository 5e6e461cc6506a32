//! Looking on while a backend runs: the rows that meet each weight, for calibration.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Hears of rows before they are multiplied with a weight: the weight's name in the weight file, and the rows,
/// `[n, k]` row-major. Of a layer that runs only over tokens that see a medium, those.
pub type Watcher = Arc<dyn Fn(&str, &[f32], usize) + Send + Sync>;

/// A place for one watcher.
#[derive(Default)]
pub(crate) struct Watch {
    is_on: AtomicBool,
    watcher: Mutex<Option<Watcher>>,
}

impl Watch {
    /// Sets or takes away the watcher.
    pub(crate) fn set(&self, watcher: Option<Watcher>) {
        self.is_on.store(watcher.is_some(), Ordering::Relaxed);
        *self.watcher.lock().unwrap_or_else(PoisonError::into_inner) = watcher;
    }

    /// Whether somebody looks on.
    pub(crate) fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Relaxed)
    }

    /// Shows rows of `k` numbers.
    pub(crate) fn show(&self, weight: &str, rows: &[f32], k: usize) {
        let watcher = self.watcher.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(watcher) = watcher {
            watcher(weight, rows, k);
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("is_on", &self.is_on()).finish_non_exhaustive()
    }
}
