//! What the kernel says that a process has used.

use core::time::Duration;
use std::collections::BTreeMap;
use std::fs;

use crate::Failure;

/// CPU time of each thread of a process, in nanoseconds.
#[derive(Clone, Debug, Default)]
pub struct Cpu(BTreeMap<u32, u64>);

impl Cpu {
    /// What the process has used so far, of its scheduler's statistics: exact where the ticks of `stat` are 10 ms.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn of(process: u32) -> Result<Self, Failure> {
        let mut threads = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{process}/task"))? {
            let entry = entry?;
            let Some(thread) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // A thread may have ended since it was listed.
            let Ok(line) = fs::read_to_string(entry.path().join("schedstat")) else { continue };
            let used = line.split_whitespace().next().and_then(|word| word.parse().ok());
            threads.insert(thread, used.ok_or("schedstat begins with a number")?);
        }
        Ok(Self(threads))
    }

    /// What was used since `earlier`. What a thread used that has ended is not in it: these servers keep theirs.
    pub fn since(&self, earlier: &Self) -> Duration {
        let used = |(thread, now): (&u32, &u64)| now.saturating_sub(earlier.0.get(thread).copied().unwrap_or_default());
        Duration::from_nanos(self.0.iter().map(used).sum())
    }
}

/// KiB of memory that the process has resident.
///
/// # Errors
/// If there is no such process.
pub fn resident(process: u32) -> Result<u64, Failure> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("status tells the memory")?;
    let kib = line.split_whitespace().next().and_then(|word| word.parse().ok());
    Ok(kib.ok_or("VmRSS is a number")?)
}
