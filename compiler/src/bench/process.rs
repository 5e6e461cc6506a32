//! What the system tells of this process and its neighbours: memory, and processor time of others.
//! Nothing where there is no Linux `/proc`.

use std::fs;
use std::time::{Duration, Instant};

use serde::Serialize;

/// Ticks a second of the times in `/proc`: part of its interface.
const TICKS_PER_SECOND: f64 = 100.0;

/// Forgets the peak of resident memory, where the system lets us.
pub(super) fn reset_peak_memory() {
    // Refused: then the peak counts from the start of the process, and says more than it should.
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// Largest resident memory since the start or [`reset_peak_memory`], bytes, mapped files included.
pub(super) fn peak_memory() -> Option<u64> {
    status_bytes("VmHWM:")
}

/// Resident memory now, bytes, mapped files included.
pub(super) fn resident_memory() -> Option<u64> {
    status_bytes("VmRSS:")
}

fn status_bytes(key: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Least time between two entries of a [`MemoryLog`].
const LOG_STEP: Duration = Duration::from_millis(20);

/// Resident memory at a time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct MemoryAt {
    /// Milliseconds from the beginning.
    pub ms: f64,
    /// What was going on.
    pub doing: &'static str,
    /// Resident bytes, mapped files included.
    pub rss_bytes: u64,
}

/// Resident memory over time, looked at between samples: what a sample takes and gives back is in the peak alone.
#[derive(Debug)]
pub(super) struct MemoryLog {
    start: Instant,
    last: Option<Instant>,
    pub(super) entries: Vec<MemoryAt>,
}

impl MemoryLog {
    pub(super) fn start() -> MemoryLog {
        MemoryLog { start: Instant::now(), last: None, entries: Vec::new() }
    }

    /// Looks, unless it did a moment ago at the same work.
    pub(super) fn look(&mut self, doing: &'static str) {
        let now = Instant::now();
        let is_new = self.entries.last().is_none_or(|last| last.doing != doing);
        let is_due = self.last.is_none_or(|last| now.duration_since(last) >= LOG_STEP);
        if let (true, Some(rss_bytes)) = (is_new || is_due, resident_memory()) {
            let ms = now.duration_since(self.start).as_secs_f64() * 1e3;
            self.entries.push(MemoryAt { ms, doing, rss_bytes });
            self.last = Some(now);
        }
    }
}

/// A moment, with the processor time that all other processes have used until then.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment {
    at: Instant,
    others_seconds: Option<f64>,
}

impl Moment {
    pub(super) fn now() -> Moment {
        Moment { at: Instant::now(), others_seconds: others_seconds() }
    }

    /// Seconds from `self` until now, and processor seconds of others in them.
    pub(super) fn elapsed(&self) -> (f64, Option<f64>) {
        let others = others_seconds().zip(self.others_seconds).map(|(now, then)| now - then);
        (self.at.elapsed().as_secs_f64(), others)
    }
}

/// Processor seconds of the machine since it started, less those of this process.
fn others_seconds() -> Option<f64> {
    let busy = busy_ticks(&fs::read_to_string("/proc/stat").ok()?)?;
    let own = own_ticks(&fs::read_to_string("/proc/self/stat").ok()?)?;
    Some((busy - own) / TICKS_PER_SECOND)
}

/// User, nice, system, interrupts and soft interrupts of the first line of `/proc/stat`.
fn busy_ticks(stat: &str) -> Option<f64> {
    let mut words = stat.lines().next()?.split_ascii_whitespace();
    words.next().filter(|word| *word == "cpu")?;
    let ticks: Vec<f64> = words.map_while(|word| word.parse().ok()).collect();
    [0, 1, 2, 5, 6].into_iter().map(|column: usize| ticks.get(column).copied()).sum()
}

/// User and system time of `/proc/self/stat`; the name in brackets may have spaces.
fn own_ticks(stat: &str) -> Option<f64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let words: Vec<&str> = rest.split_ascii_whitespace().collect();
    [11, 12].into_iter().map(|column: usize| words.get(column)?.parse::<f64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_the_machine_and_of_this_process_are_read() {
        let stat = "cpu  1 2 4 1000 500 8 16 32 0 0\ncpu0 0 0\n";
        assert_eq!(busy_ticks(stat), Some(31.0));
        assert_eq!(busy_ticks("intr 1 2 3"), None);
        let own = "12 (a) b) S 1 1 1 0 -1 4194560 1 0 0 0 70 5 0 0 20 0 1 0 1";
        assert_eq!(own_ticks(own), Some(75.0));
    }

    #[test]
    fn memory_is_logged_by_time_and_by_work() {
        let mut log = MemoryLog::start();
        for doing in ["loading", "loading", "timing"] {
            log.look(doing);
        }
        let doing: Vec<&str> = log.entries.iter().map(|entry| entry.doing).collect();
        if cfg!(target_os = "linux") {
            assert_eq!(doing, ["loading", "timing"]);
        }
    }

    #[test]
    fn memory_is_known_on_linux_and_its_peak_is_no_less() {
        if cfg!(target_os = "linux") {
            let (now, peak) = (resident_memory().unwrap(), peak_memory().unwrap());
            assert!(now > 0 && peak >= now / 2, "{now} {peak}");
        }
    }
}
