//! The model parts that `ggml-rpc-server` keeps on disk, so that a load need not send them again.
//!
//! The server (llama.cpp b11434, `rpc_server::set_tensor`, `get_cached_file`) writes each part into a file named by the
//! FNV-1a hash of its bytes, never deletes one, and never looks whether one is whole: after a full disk, or a server
//! that was killed as it wrote, half a part would silently become half of a model's weights. So files that are new are
//! read and checked against their names before a server can use them, and the oldest beyond the quota go.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use tokio_util::sync::CancellationToken;

use crate::config::Worker;

/// The server's folder inside of the one that it is given.
const PARTS: &str = "rpc";
/// Our file beside that folder: parts that are older than it are whole.
const CHECKED: &str = "checked";
const GIB: f64 = 1024.0 * 1024.0 * 1024.0;
/// More threads than this wait for the disk.
const MOST_THREADS: usize = 8;
/// Free space below which parts are likely to be cut off.
const SCARCE: u64 = 1024 * 1024 * 1024;
/// A file that is written after a moment may bear an earlier time, by so much: the clocks of file systems are coarse.
const GRAIN: Duration = Duration::from_secs(2);

/// The cache of a worker.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: Option<PathBuf>,
    quota_bytes: u64,
    seen: Arc<Seen>,
}

/// What is known of it without a look at the disk, which may be busy.
#[derive(Debug, Default)]
struct Seen {
    bytes: AtomicU64,
    checked: AtomicU64,
    to_check: AtomicU64,
}

/// How far a check has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that were read.
    pub checked: u64,
    /// Bytes to read, those included.
    pub of: u64,
}

/// The cache cannot be kept in order.
#[derive(Debug, thiserror::Error)]
#[error("the cache {} cannot be tidied ({source}); check its permissions and its disk, or set `cache_gb: 0`", .path.display())]
pub struct CacheError {
    path: PathBuf,
    source: io::Error,
}

/// One part.
#[derive(Debug)]
struct Part {
    path: PathBuf,
    bytes: u64,
    /// When it was last written or read, as far as the file system tells.
    used: SystemTime,
    written: SystemTime,
}

impl Cache {
    /// As the config says; none where nobody has a home.
    pub fn of(worker: &Worker) -> Self {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates, and is checked to be positive
        let quota_bytes = (worker.cache_gb * GIB) as u64;
        let folder = worker.cache_dir.clone().or_else(|| {
            let set = |name| {
                std::env::var_os(name)
                    .filter(|value| !value.is_empty())
                    .map(PathBuf::from)
            };
            // The home of a system user may be `/`.
            let home = || set("HOME").filter(|home| home.parent().is_some());
            let caches = set("XDG_CACHE_HOME").or_else(|| home().map(|home| home.join(".cache")));
            // Two workers of one host must not tidy each other's.
            let port = worker.rpc_endpoints().into_keys().next().unwrap_or_default();
            caches.map(|caches| caches.join(format!("tightwad/worker-{port}")))
        });
        Self {
            folder: folder.filter(|_| quota_bytes > 0),
            quota_bytes,
            seen: Arc::default(),
        }
    }

    /// Keeps nothing.
    pub fn none() -> Self {
        Self {
            folder: None,
            quota_bytes: 0,
            seen: Arc::default(),
        }
    }

    /// What `LLAMA_CACHE` is set to; `None`: nothing is kept.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// Most bytes that it keeps; 0: nothing is kept.
    pub fn quota_bytes(&self) -> u64 {
        self.folder.as_ref().map_or(0, |_| self.quota_bytes)
    }

    /// Bytes that it had when they were last counted.
    pub fn bytes(&self) -> u64 {
        self.seen.bytes.load(Ordering::Relaxed)
    }

    /// Counts its bytes.
    pub fn count(&self) -> u64 {
        let parts = self.folder.as_deref().map(parts);
        let bytes = sum(&parts.and_then(Result::ok).unwrap_or_default());
        self.seen.bytes.store(bytes, Ordering::Relaxed);
        bytes
    }

    /// How far the check of [`Self::tidy`] has come.
    pub fn progress(&self) -> Progress {
        Progress {
            checked: self.seen.checked.load(Ordering::Relaxed),
            of: self.seen.to_check.load(Ordering::Relaxed),
        }
    }

    /// Removes new parts that are not whole, and the least recently used beyond the quota. To be called only while no
    /// server runs. Takes about a second per GiB of new parts and processor; `stop` cuts it short, and the next one goes on
    /// from there.
    pub fn tidy(&self, stop: &CancellationToken) -> Result<(), CacheError> {
        let Some(folder) = &self.folder else { return Ok(()) };
        let fail = |source| CacheError {
            path: folder.clone(),
            source,
        };
        fs::create_dir_all(folder.join(PARTS)).map_err(fail)?;
        let began = SystemTime::now() - GRAIN;
        let mark = folder.join(CHECKED);
        let since = fs::metadata(&mark).and_then(|mark| mark.modified()).ok();
        let all = parts(folder).map_err(fail)?;
        let (mut new, old): (Vec<Part>, Vec<Part>) = all
            .into_iter()
            .partition(|part| since.is_none_or(|since| part.written >= since));
        // The oldest first, so that the mark can follow.
        new.sort_by_key(|part| part.written);
        let checked = self.check(new, stop);
        for path in &checked.broken {
            tracing::warn!("removing {}, a part that is not whole", path.display());
            fs::remove_file(path).map_err(fail)?;
        }
        let until = checked.unread_since.map_or(began, |unread| unread.min(began));
        let touched = File::create(&mark).and_then(|mark| mark.set_modified(until));
        touched.map_err(fail)?;
        if stop.is_cancelled() {
            return Ok(());
        }
        let freed = self.enforce_quota(old.into_iter().chain(checked.parts)).map_err(fail)?;
        if freed > 0 {
            tracing::info!("removed {freed} bytes of old model parts from {}", folder.display());
        }
        self.count();
        self.tell_of_scarce_disk(folder);
        Ok(())
    }

    /// Reads the parts, on several threads.
    fn check(&self, new: Vec<Part>, stop: &CancellationToken) -> Checked {
        self.seen.checked.store(0, Ordering::Relaxed);
        self.seen.to_check.store(sum(&new), Ordering::Relaxed);
        let next = AtomicUsize::new(0);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let read = || {
            let mut verdicts = Vec::new();
            while !stop.is_cancelled()
                && let number = next.fetch_add(1, Ordering::Relaxed)
                && let Some(part) = new.get(number)
            {
                verdicts.push((number, is_whole(&part.path)));
                self.seen.checked.fetch_add(part.bytes, Ordering::Relaxed);
            }
            verdicts
        };
        let mut verdicts: BTreeMap<usize, io::Result<bool>> = std::thread::scope(|scope| {
            let readers: Vec<_> = (0..threads.min(MOST_THREADS).min(new.len()))
                .map(|_| scope.spawn(read))
                .collect();
            readers
                .into_iter()
                .filter_map(|reader| reader.join().ok())
                .flatten()
                .collect()
        });
        let mut checked = Checked::default();
        for (number, part) in new.into_iter().enumerate() {
            match verdicts.remove(&number) {
                // What cannot be read is no use to the server either.
                Some(Ok(false) | Err(_)) => checked.broken.push(part.path),
                Some(Ok(true)) => checked.parts.push(part),
                None => {
                    checked.unread_since.get_or_insert(part.written);
                    checked.parts.push(part);
                }
            }
        }
        checked
    }

    fn enforce_quota(&self, parts: impl Iterator<Item = Part>) -> io::Result<u64> {
        let mut parts: Vec<Part> = parts.collect();
        parts.sort_by_key(|part| part.used);
        let mut too_much = sum(&parts).saturating_sub(self.quota_bytes);
        let mut freed = 0;
        for part in parts {
            if too_much == 0 {
                break;
            }
            fs::remove_file(&part.path)?;
            freed += part.bytes;
            too_much = too_much.saturating_sub(part.bytes);
        }
        Ok(freed)
    }

    /// A server does not notice that a part does not fit on the disk.
    fn tell_of_scarce_disk(&self, folder: &Path) {
        if let Ok(disk) = rustix::fs::statvfs(folder) {
            let free = disk.f_bavail.saturating_mul(disk.f_frsize);
            if free < SCARCE && self.bytes() < self.quota_bytes {
                tracing::warn!(
                    "the disk of {} is nearly full ({free} bytes free); model parts that do not fit are sent again at \
                     each load: make room, or lower `cache_gb`",
                    folder.display()
                );
            }
        }
    }
}

fn sum(parts: &[Part]) -> u64 {
    parts.iter().map(|part| part.bytes).sum()
}

/// The files in the server's folder that bear a hash as name.
fn parts(folder: &Path) -> io::Result<Vec<Part>> {
    let entries = match fs::read_dir(folder.join(PARTS)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut parts = Vec::new();
    for entry in entries {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if hash_in_name(&entry.path()).is_none() || !metadata.is_file() {
            continue;
        }
        let written = metadata.modified()?;
        parts.push(Part {
            path: entry.path(),
            bytes: metadata.len(),
            used: metadata.accessed().map_or(written, |read| read.max(written)),
            written,
        });
    }
    Ok(parts)
}

fn hash_in_name(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    if name.len() != 16 {
        return None;
    }
    u64::from_str_radix(name, 16).ok()
}

/// What a check found. Parts that were not read are among the whole ones.
#[derive(Debug, Default)]
struct Checked {
    parts: Vec<Part>,
    broken: Vec<PathBuf>,
    /// When the oldest part that was not read was written.
    unread_since: Option<SystemTime>,
}

/// Whether a part holds what its name says.
fn is_whole(path: &Path) -> io::Result<bool> {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    let mut hash = OFFSET;
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(hash_in_name(path) == Some(hash));
        }
        for byte in &buffer[..read] {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(PRIME);
        }
    }
}

#[cfg(test)]
mod tests {

    use super::*;

    /// A part as the server writes it, used so many seconds ago.
    fn part(folder: &Path, content: &[u8], age: u64) -> PathBuf {
        let hash = content.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
        fs::create_dir_all(folder.join(PARTS)).unwrap();
        let path = folder.join(PARTS).join(format!("{hash:016x}"));
        fs::write(&path, content).unwrap();
        let then = SystemTime::now() - Duration::from_secs(age);
        let times = fs::FileTimes::new().set_modified(then).set_accessed(then);
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_times(times)
            .unwrap();
        path
    }

    fn cache(folder: &Path, quota_bytes: u64) -> Cache {
        Cache {
            folder: Some(folder.to_owned()),
            quota_bytes,
            seen: Arc::default(),
        }
    }

    #[test]
    fn the_least_recently_used_parts_beyond_the_quota_go() {
        let folder = tempfile::tempdir().unwrap();
        let paths = [
            part(folder.path(), &[1; 100], 30),
            part(folder.path(), &[2; 100], 10),
            part(folder.path(), &[3; 100], 20),
        ];
        let cache = cache(folder.path(), 250);
        cache.tidy(&CancellationToken::new()).unwrap();
        assert_eq!(paths.map(|path| path.exists()), [false, true, true]);
        assert_eq!(cache.bytes(), 200);
    }

    #[test]
    fn a_part_that_was_cut_off_is_removed_and_whole_ones_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let whole = part(folder.path(), &[1; 100], 0);
        let broken = part(folder.path(), &[2; 100], 0);
        fs::write(&broken, [2; 60]).unwrap();
        let foreign = folder.path().join(PARTS).join("README");
        fs::write(&foreign, "mine").unwrap();
        cache(folder.path(), 1000).tidy(&CancellationToken::new()).unwrap();
        assert!(whole.exists() && foreign.exists() && !broken.exists());
    }

    #[test]
    fn parts_are_read_once_and_new_ones_again() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path(), 1000);
        let old = part(folder.path(), &[1; 100], 60);
        cache.tidy(&CancellationToken::new()).unwrap();
        // A change that leaves its age alone is not seen, which shows that it is not read again.
        let modified = fs::metadata(&old).unwrap().modified().unwrap();
        fs::write(&old, [9; 100]).unwrap();
        File::options()
            .write(true)
            .open(&old)
            .unwrap()
            .set_modified(modified)
            .unwrap();
        let new = part(folder.path(), &[2; 100], 0);
        fs::write(&new, [3; 10]).unwrap();
        cache.tidy(&CancellationToken::new()).unwrap();
        assert!(old.exists() && !new.exists());
    }

    #[test]
    fn a_check_that_was_cut_short_is_made_up_for() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path(), 1000);
        let broken = part(folder.path(), &[1; 100], 60);
        fs::write(&broken, [1; 10]).unwrap();
        let stopped = CancellationToken::new();
        stopped.cancel();
        cache.tidy(&stopped).unwrap();
        assert!(broken.exists());
        cache.tidy(&CancellationToken::new()).unwrap();
        assert!(!broken.exists());
    }

    #[test]
    fn a_check_that_was_cut_short_goes_on_where_it_ended() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path(), 1 << 40);
        let read = part(folder.path(), &[1; 100], 60);
        let unread = part(folder.path(), &[2; 100], 30);
        let parts = parts(folder.path()).unwrap();
        let until = parts.iter().map(|part| part.written).max().unwrap();
        // What a check leaves that was cut short between the two.
        let mark = File::create(folder.path().join(CHECKED)).unwrap();
        mark.set_modified(until).unwrap();
        for path in [&read, &unread] {
            let written = fs::metadata(path).unwrap().modified().unwrap();
            fs::write(path, [9; 50]).unwrap();
            File::options()
                .write(true)
                .open(path)
                .unwrap()
                .set_modified(written)
                .unwrap();
        }
        let stopped = CancellationToken::new();
        stopped.cancel();
        cache.tidy(&stopped).unwrap();
        let marked = fs::metadata(folder.path().join(CHECKED)).unwrap().modified().unwrap();
        assert_eq!(marked, until);
        cache.tidy(&CancellationToken::new()).unwrap();
        assert!(read.exists() && !unread.exists());
        assert_eq!(cache.progress(), Progress { checked: 50, of: 50 });
        assert_eq!(cache.bytes(), 50);
    }

    #[test]
    fn a_cache_that_cannot_be_written_says_where() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let error = cache(&file, 1).tidy(&CancellationToken::new()).unwrap_err();
        assert!(
            error.to_string().contains("/file") && error.to_string().contains("cache_gb"),
            "{error}"
        );
    }

    #[test]
    fn nothing_is_kept_without_a_quota() {
        let worker = Worker {
            cache_gb: 0.0,
            cache_dir: Some("/c".into()),
            ..Worker::at("a")
        };
        assert_eq!(Cache::of(&worker).folder(), None);
    }
}
