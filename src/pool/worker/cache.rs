//! The cache of model parts that `ggml-rpc-server` keeps on disk, so that a load need not send them again.
//!
//! The server (llama.cpp b11434, `rpc_server::set_tensor`, `get_cached_file`) writes each part into a file named by the
//! FNV-1a hash of its bytes. It never deletes or checks a part. So an incomplete part, left by a full disk or a killed server,
//! would corrupt the model's weights. And FNV-1a collisions are easy to make, so anyone who reaches the RPC port can replace a
//! part.
//!
//! Invariant: a server uses only checked parts. The check reads each part: its FNV-1a hash must be its name, and the file
//! `digests`, beside the server's folder, records its SHA-256 digest. A part that has changed since is read again and removed
//! unless its digest is still the recorded one. A part without a record, as in a cache of an earlier version, is read and
//! recorded. The digests cannot tell whether the first bytes under a name were the right ones.
//!
//! Beyond the quota, the least recently used parts are removed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::SystemTime;

use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use crate::config::Worker;
use crate::failure::explain;

/// The server's folder inside of `LLAMA_CACHE`.
const PARTS: &str = "rpc";
/// Our file beside that folder, see [`Record`].
const DIGESTS: &str = "digests";
/// The file that earlier versions had instead.
const MARK: &str = "checked";
/// Largest file of digests that is read; room for more parts than any disk holds.
const MOST_DIGESTS: u64 = 64 << 20;
const GIB: f64 = 1024.0 * 1024.0 * 1024.0;
/// Most threads that read parts; more would only wait for the disk.
const MOST_THREADS: usize = 8;
/// Free space below which parts are likely to be incomplete.
const SCARCE: u64 = 1024 * 1024 * 1024;
/// The cache of a worker.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: Option<PathBuf>,
    quota_bytes: u64,
    counters: Arc<CacheCounters>,
}

/// Counts that are readable without access to the disk, which may be busy.
#[derive(Debug, Default)]
struct CacheCounters {
    bytes: AtomicU64,
    checked: AtomicU64,
    to_check: AtomicU64,
}

/// Progress of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that were read.
    pub checked: u64,
    /// Bytes to read, those included.
    pub of: u64,
}

/// The cache cannot be checked.
#[derive(Debug, thiserror::Error)]
#[error("the cache {} cannot be tidied ({}); check its permissions and its disk, or set `cache_gb: 0`", .path.display(), explain(.source))]
pub struct CacheError {
    path: PathBuf,
    source: io::Error,
}

/// One part.
#[derive(Debug)]
struct Part {
    path: PathBuf,
    name: u64,
    bytes: u64,
    /// When it was last written or read, according to the file system.
    used: SystemTime,
    stamp: Stamp,
}

/// Metadata that changes whenever a file is written, renamed or given other times. Only root can forge all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    bytes: u64,
    inode: u64,
    /// Time of the last change in seconds and nanoseconds.
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            bytes: metadata.len(),
            inode: metadata.ino(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

type Digest = [u8; 32];

/// A checked part: a line `NAME DIGEST BYTES INODE SECONDS NANOSECONDS` of the file `digests`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Record {
    digest: Digest,
    stamp: Stamp,
}

impl Record {
    fn parse(line: &str) -> Option<(u64, Self)> {
        let mut words = line.split(' ');
        let name = name(words.next()?)?;
        let digest = words.next()?;
        let bytes = (0..digest.len()).step_by(2).map(|at| digest.get(at..at + 2));
        let bytes: Option<Vec<u8>> = bytes.map(|pair| u8::from_str_radix(pair?, 16).ok()).collect();
        let record = Self {
            digest: bytes?.try_into().ok()?,
            stamp: Stamp {
                bytes: words.next()?.parse().ok()?,
                inode: words.next()?.parse().ok()?,
                changed: (words.next()?.parse().ok()?, words.next()?.parse().ok()?),
            },
        };
        words.next().is_none().then_some((name, record))
    }

    fn write(&self, name: u64, text: &mut String) {
        // Writing to a string cannot fail.
        let _ = write!(text, "{name:016x} ");
        for byte in self.digest {
            let _ = write!(text, "{byte:02x}");
        }
        let Stamp { bytes, inode, changed } = self.stamp;
        let _ = writeln!(text, " {bytes} {inode} {} {}", changed.0, changed.1);
    }
}

/// The records by the names of their parts.
type Records = BTreeMap<u64, Record>;

/// The records of a folder. A line that cannot be read is ignored, and its part is read again.
fn records(folder: &Path) -> Records {
    let mut text = String::new();
    let read = File::open(folder.join(DIGESTS)).and_then(|file| file.take(MOST_DIGESTS).read_to_string(&mut text));
    match read {
        Ok(_) => text.lines().filter_map(Record::parse).collect(),
        Err(_) => Records::new(),
    }
}

/// Replaces the records of a folder atomically.
fn record(folder: &Path, records: &Records) -> io::Result<()> {
    let mut text = String::new();
    for (name, record) in records {
        record.write(*name, &mut text);
    }
    let new = folder.join(format!("{DIGESTS}.new"));
    fs::write(&new, text)?;
    fs::rename(new, folder.join(DIGESTS))
}

impl Cache {
    /// The cache that the config asks for; none if the user has no home.
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
            // Two workers on one host must not share a cache.
            let port = worker.rpc_endpoints().into_keys().next().unwrap_or_default();
            caches.map(|caches| caches.join(format!("tightwad/worker-{port}")))
        });
        Self {
            folder: folder.filter(|_| quota_bytes > 0),
            quota_bytes,
            counters: Arc::default(),
        }
    }

    /// Keeps nothing.
    pub fn none() -> Self {
        Self {
            folder: None,
            quota_bytes: 0,
            counters: Arc::default(),
        }
    }

    /// The value for `LLAMA_CACHE`; `None`: nothing is kept.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// Most bytes that it keeps; 0: nothing is kept.
    pub fn quota_bytes(&self) -> u64 {
        self.folder.as_ref().map_or(0, |_| self.quota_bytes)
    }

    /// Bytes at the last count.
    pub fn bytes(&self) -> u64 {
        self.counters.bytes.load(Ordering::Relaxed)
    }

    /// Counts its bytes.
    pub fn count(&self) -> u64 {
        let parts = self.folder.as_deref().map(parts);
        let bytes = sum(&parts.and_then(Result::ok).unwrap_or_default());
        self.counters.bytes.store(bytes, Ordering::Relaxed);
        bytes
    }

    /// Progress of the check in [`Self::tidy`].
    pub fn progress(&self) -> Progress {
        Progress {
            checked: self.counters.checked.load(Ordering::Relaxed),
            of: self.counters.to_check.load(Ordering::Relaxed),
        }
    }

    /// Removes incomplete and changed parts, and the least recently used parts beyond the quota. Call it only while no server
    /// runs. It takes some seconds per GiB of new parts and processor. `stop` interrupts it; the next call continues there.
    pub fn tidy(&self, stop: &CancellationToken) -> Result<(), CacheError> {
        let Some(folder) = &self.folder else { return Ok(()) };
        let fail = |source| CacheError {
            path: folder.clone(),
            source,
        };
        fs::create_dir_all(folder.join(PARTS)).map_err(fail)?;
        let mut records = records(folder);
        let mut parts = parts(folder).map_err(fail)?;
        let names: BTreeSet<u64> = parts.iter().map(|part| part.name).collect();
        records.retain(|name, _| names.contains(name));
        let known = |part: &Part| records.get(&part.name).is_some_and(|record| record.stamp == part.stamp);
        let new: Vec<&Part> = parts.iter().filter(|part| !known(part)).collect();
        let mut useless = Vec::new();
        for (part, read) in self.read(&new, stop) {
            let before = records.get(&part.name).map(|record| record.digest);
            let why = match read {
                Ok(Some(digest)) if before.is_none_or(|before| before == digest) => {
                    let stamp = part.stamp;
                    records.insert(part.name, Record { digest, stamp });
                    continue;
                }
                Ok(Some(_)) => "its bytes are others than when it was first checked, and only its name is the same",
                Ok(None) => "it is not whole",
                // The server cannot use it either.
                Err(_) => "it cannot be read",
            };
            tracing::warn!("removing the model part {}: {why}", part.path.display());
            useless.push(part.name);
        }
        parts.retain(|part| !useless.contains(&part.name));
        for name in useless {
            records.remove(&name);
            fs::remove_file(folder.join(PARTS).join(format!("{name:016x}"))).map_err(fail)?;
        }
        record(folder, &records).map_err(fail)?;
        let _ = fs::remove_file(folder.join(MARK));
        if stop.is_cancelled() {
            return Ok(());
        }
        let freed = self.enforce_quota(parts).map_err(fail)?;
        if freed > 0 {
            tracing::info!("removed {freed} bytes of old model parts from {}", folder.display());
        }
        self.count();
        self.tell_of_scarce_disk(folder);
        Ok(())
    }

    /// Reads the parts on several threads and returns the digest of each complete one. Parts that were not read before `stop`
    /// are left out.
    fn read<'a>(&self, new: &[&'a Part], stop: &CancellationToken) -> Vec<(&'a Part, io::Result<Option<Digest>>)> {
        self.counters.checked.store(0, Ordering::Relaxed);
        self.counters
            .to_check
            .store(new.iter().map(|part| part.bytes).sum(), Ordering::Relaxed);
        let next = AtomicUsize::new(0);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let read = || {
            let mut read = Vec::new();
            while !stop.is_cancelled()
                && let Some(part) = new.get(next.fetch_add(1, Ordering::Relaxed))
            {
                read.push((*part, digest_of_whole(part)));
                self.counters.checked.fetch_add(part.bytes, Ordering::Relaxed);
            }
            read
        };
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..threads.min(MOST_THREADS).min(new.len()))
                .map(|_| scope.spawn(read))
                .collect();
            readers
                .into_iter()
                .filter_map(|reader| reader.join().ok())
                .flatten()
                .collect()
        })
    }

    fn enforce_quota(&self, mut parts: Vec<Part>) -> io::Result<u64> {
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

    /// Warns about a full disk: a server does not notice a part that does not fit.
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

/// The files in the server's folder whose names are hashes.
fn parts(folder: &Path) -> io::Result<Vec<Part>> {
    let entries = match fs::read_dir(folder.join(PARTS)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut parts = Vec::new();
    for entry in entries {
        let entry = entry?;
        let metadata = entry.metadata()?;
        let Some(name) = entry.file_name().to_str().and_then(name) else {
            continue;
        };
        if !metadata.is_file() {
            continue;
        }
        let written = metadata.modified()?;
        parts.push(Part {
            path: entry.path(),
            name,
            bytes: metadata.len(),
            used: metadata.accessed().map_or(written, |read| read.max(written)),
            stamp: Stamp::of(&metadata),
        });
    }
    Ok(parts)
}

/// Reads the hash in the name of a part: 16 lower-case hexadecimal digits.
fn name(text: &str) -> Option<u64> {
    let digits = text.len() == 16 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    digits.then(|| u64::from_str_radix(text, 16).ok())?
}

/// The digest of a part whose hash is its name; `None` if it is not.
fn digest_of_whole(part: &Part) -> io::Result<Option<Digest>> {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    let mut file = File::open(&part.path)?;
    let mut buffer = vec![0; 1 << 20];
    let (mut hash, mut digest) = (OFFSET, Sha256::new());
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok((hash == part.name).then(|| digest.finalize().into()));
        }
        for byte in &buffer[..read] {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(PRIME);
        }
        digest.update(&buffer[..read]);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
            counters: Arc::default(),
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

    /// The bytes that are read to check the cache.
    fn read_by(cache: &Cache) -> u64 {
        cache.tidy(&CancellationToken::new()).unwrap();
        cache.progress().of
    }

    #[test]
    fn a_part_is_read_once_and_again_if_it_was_touched() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path(), 1000);
        let old = part(folder.path(), &[1; 100], 60);
        assert_eq!([read_by(&cache), read_by(&cache)], [100, 0]);
        let new = part(folder.path(), &[2; 50], 0);
        assert_eq!(read_by(&cache), 50);
        // Not even one who gives it its times back can change it unseen.
        let modified = fs::metadata(&old).unwrap().modified().unwrap();
        fs::write(&old, [9; 100]).unwrap();
        File::options()
            .write(true)
            .open(&old)
            .unwrap()
            .set_modified(modified)
            .unwrap();
        assert_eq!(read_by(&cache), 100);
        assert!(!old.exists() && new.exists());
    }

    #[test]
    fn other_bytes_with_the_hash_of_a_part_do_not_replace_it() {
        // Two texts with one FNV-1a hash; whatever follows both leaves it equal.
        let [first, forged] = ["7mohtcOFVz", "c1E51sSEyx"].map(|text| format!("{text} of a model").into_bytes());
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path(), 1000);
        let path = part(folder.path(), &first, 60);
        cache.tidy(&CancellationToken::new()).unwrap();
        assert_eq!(path, part(folder.path(), &forged, 0), "the hash is the same");
        cache.tidy(&CancellationToken::new()).unwrap();
        assert!(!path.exists());
        // The right bytes, which the coordinator sends again, are taken.
        part(folder.path(), &first, 0);
        cache.tidy(&CancellationToken::new()).unwrap();
        assert_eq!(fs::read(&path).unwrap(), first);
    }

    #[test]
    fn a_check_that_was_cut_short_is_made_up_for_and_goes_on_where_it_ended() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path(), 1 << 40);
        let whole = part(folder.path(), &[1; 100], 60);
        let stopped = CancellationToken::new();
        stopped.cancel();
        cache.tidy(&stopped).unwrap();
        assert_eq!(read_by(&cache), 100, "nothing was read");
        let broken = part(folder.path(), &[2; 100], 30);
        fs::write(&broken, [2; 10]).unwrap();
        cache.tidy(&stopped).unwrap();
        assert!(broken.exists());
        assert_eq!(read_by(&cache), 10, "the first part was read before");
        assert!(whole.exists() && !broken.exists());
        assert_eq!(cache.bytes(), 100);
    }

    #[test]
    fn a_cache_of_an_earlier_version_is_read_once_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path(), 1000);
        let old = part(folder.path(), &[1; 100], 60);
        let mark = folder.path().join(MARK);
        fs::write(&mark, "").unwrap();
        fs::write(folder.path().join(DIGESTS), "no record\n").unwrap();
        assert_eq!([read_by(&cache), read_by(&cache)], [100, 0]);
        assert!(old.exists() && !mark.exists());
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
