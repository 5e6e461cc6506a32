//! The visual-token cache as its users meet it: threads, programs that are killed, folders that
//! are full, broken or shared.
#![cfg(unix)]

#[path = "visual_cache/toy.rs"]
mod toy;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use flamingo_runtime::visual_cache::{
    Fingerprint, Found, MediaKey, VisualCache, VisualCacheOptions,
};
use toy::{ENTRY_BYTES, N_TOKENS, Toy, ask, ask_of, bytes_in, disk_cache, files};

/// Pictures that helpers ask for, and how many of them fit the folder.
const N_PICTURES: usize = 8;
const LIMIT: u64 = 5 * ENTRY_BYTES + 1000;

/// Tells a copy of this program what to do: words of [`act`].
const ROLE: &str = "VISUAL_CACHE_TEST_ROLE";
const FOLDER: &str = "VISUAL_CACHE_TEST_FOLDER";

/// A cache in memory with room for `n` media.
fn memory_cache(n: usize) -> VisualCache {
    let medium = (N_TOKENS + 8) * 4;
    let memory_bytes = n * medium + medium / 2;
    VisualCache::new(&VisualCacheOptions { memory_bytes, ..VisualCacheOptions::default() })
}

/// The part of a helper program; nothing where this is the test itself.
#[test]
fn act() {
    let (Ok(role), Some(folder)) = (std::env::var(ROLE), std::env::var_os(FOLDER)) else { return };
    let folder = Path::new(&folder);
    let toy = Toy::new();
    match role.as_str() {
        "write until killed" => {
            let cache = disk_cache(folder, LIMIT);
            std::io::stdout().write_all(b"ready\n").unwrap();
            let mut n = 0;
            loop {
                ask(&cache, &toy, n % N_PICTURES);
                n += 1;
            }
        }
        "ask often" => {
            let start = std::process::id() as usize;
            let caches = [disk_cache(folder, LIMIT), disk_cache(folder, LIMIT)];
            for n in 0..400 {
                ask(&caches[n % 2], &toy, (start + n * (1 + n / 100)) % N_PICTURES);
            }
            for cache in caches {
                assert_eq!(cache.take_warnings(), [""; 0]);
            }
        }
        "meet a full disk" => {
            let cache = disk_cache(folder, LIMIT);
            (0..3).for_each(|n| assert_eq!(ask(&cache, &toy, n).1, Found::Encoded));
            let warnings = cache.take_warnings();
            assert!(
                matches!(&warnings[..], [one] if one.contains("nothing more is kept")
                    && one.contains("\n\nhint: make room")),
                "{warnings:?}"
            );
            (0..3).for_each(|n| drop(ask(&cache, &toy, n)));
            assert_eq!(cache.take_warnings(), [""; 0], "told once");
        }
        other => panic!("no role `{other}`"),
    }
}

/// A copy of this program that acts, after the shell ran `setup`.
fn helper(role: &str, folder: &Path, setup: &str) -> Child {
    let script = format!("{setup}exec \"$0\" --exact act --nocapture");
    let mut command = Command::new("sh");
    command.args(["-c", &script]).arg(std::env::current_exe().unwrap());
    command.env(ROLE, role).env(FOLDER, folder).stdout(Stdio::piped());
    command.spawn().unwrap()
}

#[track_caller]
fn assert_success(child: Child) {
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
fn memory_forgets_what_was_used_least_recently_but_for_pins() {
    let (cache, toy) = (memory_cache(2), Toy::new());
    let found = |n| ask(&cache, &toy, n).1;
    assert_eq!([0, 0, 1].map(found), [Found::Encoded, Found::Memory, Found::Encoded]);
    assert_eq!([0, 2, 0].map(found), [Found::Memory, Found::Encoded, Found::Memory]);
    assert_eq!(found(1), Found::Encoded, "it left for 2");

    let key = MediaKey::new(&Fingerprint::of(&["a model"]), &[1.0; 3], 1);
    let (media, _) = ask(&cache, &toy, 1);
    cache.pin(key, &media);
    assert_eq!([3, 4, 5, 1].map(found)[3], Found::Memory, "it is pinned");
    cache.unpin(&key);
    assert_eq!([6, 7, 1].map(found)[2], Found::Encoded);

    let stats = cache.stats();
    assert_eq!((stats.memory_entries, stats.memory_bytes), (2, 2 * media.bytes()));
    assert_eq!(stats.misses, toy.n_encoded.load(Ordering::SeqCst) as u64);
    assert_eq!((stats.memory_hits, stats.memory_evictions, stats.disk_hits), (5, 8, 0));
}

#[test]
fn threads_that_want_one_picture_encode_it_once() {
    for cache in [memory_cache(9), VisualCache::new(&VisualCacheOptions::off())] {
        let toy = Toy { pause: Duration::from_millis(300), ..Toy::new() };
        let barrier = std::sync::Barrier::new(6);
        std::thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| {
                    barrier.wait();
                    ask(&cache, &toy, 7)
                });
            }
        });
        assert_eq!(toy.n_encoded.load(Ordering::SeqCst), 1);
        assert_eq!((cache.stats().misses, cache.stats().memory_hits), (1, 5));
    }
}

#[test]
fn an_error_is_not_kept_and_nobody_waits_for_it() {
    let (cache, toy) = (memory_cache(2), Toy { format: None, ..Toy::new() });
    let model = Fingerprint::of(&["a model"]);
    let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        cache.medium(&toy, &model, &[], 1).map(drop)
    }));
    assert!(panics.is_err(), "the toy reads a pixel that is not there");
    let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        cache.medium(&toy, &model, &[], 1).map(drop)
    }));
    assert!(panics.is_err(), "it is tried again");
}

#[test]
fn entries_outlive_the_program_and_serve_no_other_model() {
    let (folder, toy) = (tempfile::tempdir().unwrap(), Toy::new());
    let dir = folder.path().join("made/when/missing");
    assert_eq!(ask(&disk_cache(&dir, LIMIT), &toy, 1).1, Found::Encoded);
    let cache = disk_cache(&dir, LIMIT);
    assert_eq!(ask(&cache, &toy, 1).1, Found::Disk);
    assert_eq!(ask_of(&cache, &toy, "another model", 1).1, Found::Encoded);
    let model = Fingerprint::of(&["a model"]);
    let frames = cache.medium(&toy, &model, &[1.0; 3], 3).unwrap().1;
    assert_eq!(frames, Found::Encoded, "the same pixels as other frames");
    assert_eq!(cache.stats().disk_hits, 1);
    assert_eq!(cache.take_warnings(), [""; 0]);
}

#[test]
fn broken_entries_are_misses_told_once_and_removed() {
    let (folder, toy) = (tempfile::tempdir().unwrap(), Toy::new());
    let dir = folder.path();
    let damages: [fn(&mut Vec<u8>); 9] = [
        |bytes| bytes[0] ^= 1,
        |bytes| bytes[20] ^= 1,
        |bytes| bytes[40] ^= 1,
        |bytes| bytes[49] ^= 0xff,
        |bytes| bytes[5000] ^= 0x80,
        |bytes| *bytes.last_mut().unwrap() ^= 1,
        |bytes| bytes.truncate(bytes.len() - 1),
        |bytes| bytes.push(0),
        Vec::clear,
    ];
    for (index, damage) in damages.into_iter().enumerate() {
        ask(&disk_cache(dir, LIMIT), &toy, 1);
        ask(&disk_cache(dir, LIMIT), &toy, 2);
        for (path, _) in files(dir, ".tokens") {
            let mut bytes = fs::read(&path).unwrap();
            damage(&mut bytes);
            fs::write(&path, bytes).unwrap();
        }
        let cache = disk_cache(dir, LIMIT);
        assert_eq!([1, 2].map(|n| ask(&cache, &toy, n).1), [Found::Encoded; 2], "damage {index}");
        let warnings = cache.take_warnings();
        assert!(
            matches!(&warnings[..], [one] if one.contains("a broken cache entry, removed")),
            "damage {index}: {warnings:?}"
        );
        assert_eq!([1, 2].map(|n| ask(&cache, &toy, n).1), [Found::Disk; 2], "damage {index}");
    }
    // What is no file is left alone.
    let (path, _) = files(dir, ".tokens").remove(0);
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    let cache = disk_cache(dir, LIMIT);
    (1..3).for_each(|n| drop(ask(&cache, &toy, n)));
}

#[test]
fn the_folder_stays_below_its_limit_and_keeps_what_was_used_last() {
    let (folder, toy) = (tempfile::tempdir().unwrap(), Toy::new());
    let dir = folder.path();
    let other = dir.join("notes.txt");
    fs::write(&other, vec![0; 1_000_000]).unwrap();
    let cache = disk_cache(dir, 3 * ENTRY_BYTES);
    for n in 0..12 {
        assert_eq!(ask(&cache, &toy, n).1, Found::Encoded);
        // Time stamps may be coarse.
        std::thread::sleep(Duration::from_millis(5));
        if n > 0 {
            assert_eq!(ask(&cache, &toy, 0).1, Found::Disk, "0 is used all the time");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(bytes_in(dir) <= 1_000_000 + 3 * ENTRY_BYTES);
    }
    assert_eq!([11, 10].map(|n| ask(&cache, &toy, n).1), [Found::Disk; 2]);
    assert_eq!(cache.stats().disk_evictions, 9);
    assert!(other.is_file(), "a file of someone else");

    disk_cache(dir, ENTRY_BYTES);
    assert_eq!(files(dir, ".tokens").len(), 1, "a smaller limit holds when the folder is opened");
    let cache = disk_cache(dir, ENTRY_BYTES - 1);
    assert_eq!(ask(&cache, &toy, 1).1, Found::Encoded);
    assert!(cache.take_warnings()[0].contains("pass a larger `--cache-limit`"));
    assert_eq!(files(dir, ".tokens"), []);
}

#[test]
fn programs_killed_while_they_write_leave_a_whole_cache() {
    let (folder, toy) = (tempfile::tempdir().unwrap(), Toy::new());
    let dir = folder.path();
    let (mut n_found, mut n_left) = (0, 0);
    for round in 0..200u64 {
        let mut child = helper("write until killed", dir, "");
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("ready")));
        std::thread::sleep(Duration::from_micros(round * 7919 % 3000));
        child.kill().unwrap();
        child.wait().unwrap();
        n_left = n_left.max(files(dir, ".tmp").len());
        let cache = disk_cache(dir, LIMIT);
        let found = (0..N_PICTURES).map(|n| ask(&cache, &toy, n).1);
        n_found += found.filter(|found| *found == Found::Disk).count();
        assert_eq!(cache.take_warnings(), [""; 0], "round {round}");
        assert!(files(dir, ".tokens").iter().all(|(_, bytes)| *bytes == ENTRY_BYTES));
        // As if the next program came much later.
        for (path, _) in files(dir, ".tmp") {
            let old = SystemTime::now() - Duration::from_secs(3600);
            fs::File::open(path).unwrap().set_modified(old).unwrap();
        }
    }
    assert!(n_found > 0 && n_left > 0, "{n_found} found, {n_left} killed while writing");
    disk_cache(dir, LIMIT);
    assert_eq!(files(dir, ".tmp"), []);
}

#[test]
fn programs_share_a_folder() {
    let (folder, toy) = (tempfile::tempdir().unwrap(), Toy::new());
    let dir = folder.path();
    let helpers = [(); 2].map(|()| helper("ask often", dir, ""));
    let cache = Arc::new(disk_cache(dir, LIMIT));
    for n in 0..200 {
        ask(&cache, &toy, n % N_PICTURES);
    }
    helpers.into_iter().for_each(assert_success);
    assert_eq!(cache.take_warnings(), [""; 0]);
    assert_eq!(files(dir, ".tmp"), []);
    disk_cache(dir, LIMIT);
    assert!(bytes_in(dir) <= LIMIT);
}

#[test]
fn a_full_disk_costs_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    // No file can grow: what a write to a full disk meets, with another number.
    assert_success(helper("meet a full disk", folder.path(), "trap '' XFSZ; ulimit -f 0; "));
    assert_eq!(files(folder.path(), ""), []);
}

#[test]
fn folders_and_engines_that_cannot_be_used_cost_a_warning() {
    let (folder, toy) = (tempfile::tempdir().unwrap(), Toy::new());
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let cache = disk_cache(&file.join("below"), LIMIT);
    assert_eq!(ask(&cache, &toy, 1).1, Found::Encoded);
    let warnings = cache.take_warnings();
    assert!(matches!(&warnings[..], [one] if one.contains("`--cache-dir`")), "{warnings:?}");

    let toy = Toy { format: None, ..Toy::new() };
    let cache = disk_cache(folder.path(), LIMIT);
    assert_eq!([1, 1].map(|n| ask(&cache, &toy, n).1), [Found::Encoded; 2]);
    let warnings = cache.take_warnings();
    assert!(matches!(&warnings[..], [one] if one.contains("backend `toy`")), "{warnings:?}");
    assert_eq!(files(folder.path(), ".tokens"), []);
}
