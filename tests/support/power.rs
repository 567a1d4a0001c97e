//! Power cuts. A kill spares what was written and never flushed; here it is gone.
//!
//! A process runs with `power/shim.c` preloaded, which keeps each file as it was last flushed. After a kill, the directory
//! is made of these copies, or for some of the files of what was written last, as far as the disk may have got.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// A directory that loses its power.
#[derive(Debug)]
pub struct Power {
    folder: TempDir,
    /// Without links, as the system names open files.
    root: PathBuf,
}

impl Power {
    /// An empty directory. Compiles the shim with `cc`.
    pub fn new() -> Self {
        let folder = TempDir::new().expect("a temporary directory");
        let root = folder.path().canonicalize().expect("a temporary directory is there");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("support/power/shim.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"]).arg(root.join("shim.so"));
        let made = compiler.arg(source).args(["-ldl", "-lpthread"]).status().expect("cc is needed");
        assert!(made.success(), "the shim is compiled");
        for name in ["data", "shadow"] {
            fs::create_dir(root.join(name)).expect("a new directory");
        }
        Self { folder, root }
    }

    /// The directory. What lies deeper in it is not kept.
    pub fn data(&self) -> PathBuf {
        self.root.join("data")
    }

    /// A program whose flushes into the directory count.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env("LD_PRELOAD", self.root.join("shim.so"))
            .env("POWER_DATA", self.data())
            .env("POWER_SHADOW", self.root.join("shadow"));
        command
    }

    /// Makes the directory what a disk holds when the power goes: everything as last flushed, only of the files `written`
    /// what was written last. For when every process that used it was killed.
    pub fn cut(&self, written: &[&str]) {
        for name in written {
            let last = self.data().join(name);
            if last.exists() {
                fs::copy(last, self.root.join("shadow").join(name)).expect("a file is copied");
            }
        }
        fs::remove_dir_all(self.data()).expect("the directory is there");
        copy(&self.root.join("shadow"), &self.data());
    }

    /// From now on, what is there has been flushed. For when no process uses it.
    pub fn settle(&self) {
        fs::remove_dir_all(self.root.join("shadow")).expect("the directory is there");
        copy(&self.data(), &self.root.join("shadow"));
    }

    /// Where it lies.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

impl Default for Power {
    fn default() -> Self {
        Self::new()
    }
}

fn copy(from: &Path, to: &Path) {
    // As homes want it.
    DirBuilder::new().mode(0o700).create(to).expect("a new directory");
    for entry in fs::read_dir(from).expect("the directory is there") {
        let entry = entry.expect("the directory can be read");
        // What a copy was not finished of has never been flushed.
        let name = entry.file_name();
        let is_part = Path::new(&name).extension().is_some_and(|extension| extension == "part");
        if entry.file_type().expect("it is there").is_file() && !is_part {
            fs::copy(entry.path(), to.join(name)).expect("a file is copied");
        }
    }
}
