//! Thread pool: workers that live as long as the kernels, spin briefly between jobs and then sleep.
//!
//! A job is a closure and a number of tasks. Tasks are drawn from one atomic counter by the calling thread and by every
//! worker that arrives in time; the caller never waits for a worker that is still asleep.

use std::{
    any::Any,
    cell::UnsafeCell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use super::matrix_mut::{MatrixMut, Tiles};
use crate::{error::KernelError, probe::bind_to};

/// Rounds a thread spins before it sleeps (worker) or yields (caller); some tens of microseconds.
const N_SPINS: usize = 4000;

/// Bit of [`Shared::state`] that says a job may be joined; below it the number of workers inside, above it the job's
/// number.
const OPEN: u64 = 1 << 31;
const JOB: u64 = 1 << 32;

/// A closure of the caller, its lifetime erased.
type Body = *const (dyn Fn(usize) + Sync);

/// State shared by the caller and the workers.
///
/// # Why the erased closure is sound
/// `job` is written only by the thread that holds `Pool::caller`, and only while `state` is closed with no worker inside.
/// A worker reads `job` only between joining (a compare-exchange that finds the job open and counts the worker in) and
/// leaving (counting it out). The caller's [`Closing`] guard, dropped on return and on unwinding alike, closes the job
/// and then waits until the count is zero, before `Pool::run` lets the borrow of the closure end. So the closure outlives
/// every use. Opening is a release store and joining an acquire, so a worker sees the job of the number it joined; leaving
/// is a release and the guard's wait an acquire, so the caller sees all that the tasks wrote.
struct Shared {
    state: AtomicU64,
    job: UnsafeCell<Option<(Body, usize)>>,
    next_task: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    n_sleeping: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
}

// SAFETY: every field but `job` is `Send` and `Sync`; `job` is guarded by the protocol above, and the closure it points
// to is `Sync`, so workers may call it.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// Persistent threads that share the tasks of one job at a time.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    caller: Mutex<()>,
}

impl Pool {
    /// A pool of `n_threads`, the calling thread included; workers are bound to `cores`, in turn, from the second on.
    pub(crate) fn new(n_threads: usize, cores: &[usize]) -> Result<Pool, KernelError> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next_task: AtomicUsize::new(0),
            panic: Mutex::new(None),
            n_sleeping: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let mut pool = Pool { shared, workers: Vec::new(), caller: Mutex::new(()) };
        let n_workers = n_threads.saturating_sub(1);
        for worker in 0..n_workers {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new().name(format!("flamingo-{}", worker + 1));
            let core = cores.get((worker + 1) % cores.len().max(1)).copied();
            let handle = thread.spawn(move || {
                core.into_iter().for_each(bind_to);
                shared.work();
            });
            pool.workers.push(handle.map_err(|source| KernelError::Spawn {
                worker,
                n_workers,
                source,
            })?);
        }
        Ok(pool)
    }

    /// Threads that share a job, the caller included.
    pub(crate) fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body` once with every number below `n_tasks`, on any thread, in any order, and returns when all are done.
    ///
    /// A single task, a call from inside a task, and a call while another thread runs a job stay on the calling thread.
    /// A panic in a task is passed on after the others have ended.
    pub(crate) fn run(&self, n_tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        let alone = n_tasks <= 1 || self.workers.is_empty();
        let Some(caller) = (!alone).then(|| self.caller.try_lock().ok()).flatten() else {
            return (0..n_tasks).for_each(body);
        };
        self.run_shared(n_tasks, body, &caller);
        let panic = lock(&self.shared.panic).take();
        drop(caller);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    fn run_shared(&self, n_tasks: usize, body: &(dyn Fn(usize) + Sync), _: &MutexGuard<'_, ()>) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; `Closing` ends every use before this function returns or unwinds.
        let body: Body =
            unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Body>(body) };
        shared.next_task.store(0, Ordering::Relaxed);
        // SAFETY: this thread holds `caller`, and the last job was closed with nobody inside.
        unsafe { *shared.job.get() = Some((body, n_tasks)) };
        let closing = Closing(shared);
        shared.state.fetch_add(JOB | OPEN, Ordering::SeqCst);
        if shared.n_sleeping.load(Ordering::SeqCst) > 0 {
            drop(lock(&shared.sleep));
            shared.wake.notify_all();
        }
        shared.take_tasks(body, n_tasks);
        drop(closing);
    }

    /// Cuts `out` into bands of rows that start at `row_starts` (the first at row 0 unless rows are to be left out) and
    /// these into tiles of `tile_cols`; calls `body(band, first_col, tile)` once for each.
    pub(crate) fn run_tiles(
        &self,
        out: MatrixMut<'_>,
        row_starts: &[usize],
        tile_cols: usize,
        body: &(dyn Fn(usize, usize, MatrixMut<'_>) + Sync),
    ) {
        let tiles = Tiles::new(out, row_starts, tile_cols);
        self.run(tiles.len(), &|idx| {
            // SAFETY: `run` hands out each number once, and `tiles` is dropped with this call.
            let (band, col, tile) = unsafe { tiles.tile(idx) };
            body(band, col, tile);
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.sleep));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // Tasks' panics are caught, so a worker ends normally.
            let _ = worker.join();
        }
    }
}

/// Closes the job and waits for the workers inside, however the caller leaves.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut n_spins = 0;
        while state & (OPEN - 1) != 0 {
            pause(&mut n_spins);
            state = self.0.state.load(Ordering::Acquire);
        }
    }
}

impl Shared {
    /// Life of a worker.
    fn work(&self) {
        let mut last_job = 0;
        while let Some(state) = self.wait_for_job(last_job) {
            let joined =
                self.state.compare_exchange(state, state + 1, Ordering::Acquire, Ordering::Relaxed);
            if joined.is_err() {
                continue;
            }
            last_job = state / JOB;
            // SAFETY: this worker is counted in, so the caller waits for it and does not write `job`.
            if let Some((body, n_tasks)) = unsafe { *self.job.get() } {
                self.take_tasks(body, n_tasks);
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// The state with an open job that is not `last_job`; none when the pool ends.
    fn wait_for_job(&self, last_job: u64) -> Option<u64> {
        for _ in 0..N_SPINS {
            if let Some(state) = self.joinable(last_job) {
                return Some(state);
            }
            std::hint::spin_loop();
        }
        let mut guard = lock(&self.sleep);
        self.n_sleeping.fetch_add(1, Ordering::SeqCst);
        let state = loop {
            if self.stop.load(Ordering::SeqCst) {
                break None;
            }
            if let Some(state) = self.joinable(last_job) {
                break Some(state);
            }
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        };
        self.n_sleeping.fetch_sub(1, Ordering::SeqCst);
        state
    }

    fn joinable(&self, last_job: u64) -> Option<u64> {
        let state = self.state.load(Ordering::SeqCst);
        (state & OPEN != 0 && state / JOB != last_job).then_some(state)
    }

    /// Draws tasks until none is left. A panic ends the job's remaining tasks and is kept for the caller.
    fn take_tasks(&self, body: Body, n_tasks: usize) {
        // SAFETY: the caller of this function is inside the job (see `Shared`), so the closure is alive.
        let body = unsafe { &*body };
        let done = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task = self.next_task.fetch_add(1, Ordering::Relaxed);
                if task >= n_tasks {
                    break;
                }
                body(task);
            }
        }));
        if let Err(payload) = done {
            self.next_task.store(n_tasks, Ordering::Relaxed);
            lock(&self.panic).get_or_insert(payload);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pause(n_spins: &mut usize) {
    *n_spins += 1;
    if *n_spins < N_SPINS {
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for n_threads in [1, 2, 3, 5] {
            let pool = Pool::new(n_threads, &[]).unwrap();
            for n_tasks in [0, 1, 2, 7, 100].into_iter().cycle().take(2000) {
                let counts: Vec<_> = (0..n_tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(n_tasks, &|task| {
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn sleeping_workers_wake() {
        let pool = Pool::new(2, &[]).unwrap();
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            let both = std::sync::Barrier::new(2);
            pool.run(2, &|_| {
                both.wait();
            });
        }
    }

    #[test]
    fn jobs_inside_jobs_and_from_other_threads_complete() {
        let pool = Pool::new(3, &[]).unwrap();
        let count = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(4, &|_| {
                            pool.run(3, &|_| {
                                count.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(count.into_inner(), 4 * 200 * 4 * 3);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2, &[]).unwrap();
        for bad in 0..8 {
            let run = || pool.run(8, &|task| assert_ne!(task, bad, "task {bad} fails"));
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        }
        pool.run(8, &|_| {});
    }

    #[test]
    fn tiles_cover_a_strided_matrix_and_nothing_else() {
        let pool = Pool::new(2, &[]).unwrap();
        let (rows, cols, stride) = (7, 11, 13);
        let mut data = vec![0.0; rows * stride];
        let out = MatrixMut::strided(&mut data, rows, cols, stride);
        pool.run_tiles(out, &[0, 3, 6], 4, &|band, col, mut tile| {
            let row = band * 3;
            for i in 0..tile.rows() {
                for (j, value) in tile.row_mut(i).iter_mut().enumerate() {
                    *value += ((row + i) * cols + col + j + 1) as f32;
                }
            }
        });
        for (i, row) in data.chunks(stride).enumerate() {
            for (j, &value) in row.iter().enumerate() {
                let expected = if j < cols { (i * cols + j + 1) as f32 } else { 0.0 };
                assert_eq!(value, expected);
            }
        }
    }
}
