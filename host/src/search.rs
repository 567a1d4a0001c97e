//! The search for what must not be there: given texts, in everything that passes or lies somewhere.
//!
//! A text is found as it is, in hex of both cases, and in base64 at each of its three alignments. What passes is searched
//! while it passes, piece by piece, and not kept: only as much of it as a text that begins in one piece and ends in the
//! next. A search proves nothing unless it can find: whoever asks it also sends something to be found.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aho_corasick::AhoCorasick;
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};

/// Fewer letters than these are found in anything.
const SHORTEST_FORM: usize = 8;
/// How much of a file is in memory at once.
const PIECE: usize = 64 * 1024;

/// Looks for some texts in many places.
#[derive(Debug)]
pub struct Search {
    automaton: AhoCorasick,
    /// Each form's text.
    texts: Vec<String>,
    longest: usize,
    found: Mutex<Vec<Finding>>,
}

/// A text that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The text.
    pub text: String,
    /// Where, as [`Search::place`] or [`Search::folder`] name it.
    pub place: String,
}

impl Search {
    /// A search for each of `texts`, in all its forms.
    ///
    /// # Errors
    /// There are millions of texts.
    pub fn new(texts: &[&str]) -> io::Result<Arc<Self>> {
        let mut patterns = Vec::new();
        let mut of = Vec::new();
        for text in texts {
            for form in forms(text) {
                patterns.push(form);
                of.push((*text).to_owned());
            }
        }
        let longest = patterns.iter().map(Vec::len).max().unwrap_or(0);
        let automaton = AhoCorasick::new(&patterns).map_err(io::Error::other)?;
        Ok(Arc::new(Self { automaton, texts: of, longest, found: Mutex::default() }))
    }

    /// A place where something passes, such as one direction of a connection.
    pub fn place(self: &Arc<Self>, name: impl Into<String>) -> Place {
        Place { search: Arc::clone(self), name: name.into(), window: Vec::new() }
    }

    /// Searches every file below `folder`; a finding's place is the file's path within.
    ///
    /// # Errors
    /// What keeps a file from being read. One that is gone meanwhile is none.
    pub fn folder(self: &Arc<Self>, folder: &Path) -> io::Result<()> {
        let mut folders = vec![folder.to_owned()];
        while let Some(inner) = folders.pop() {
            for entry in std::fs::read_dir(&inner)? {
                let entry = entry?;
                let kind = entry.file_type()?;
                if kind.is_dir() {
                    folders.push(entry.path());
                } else if kind.is_file() {
                    let path = entry.path();
                    let name = path.strip_prefix(folder).unwrap_or(&path).display().to_string();
                    match File::open(&path) {
                        Ok(file) => self.place(name).read(file)?,
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        Ok(())
    }

    /// All that was found so far: each text once for each place.
    pub fn found(&self) -> Vec<Finding> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Finding>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place where something passes.
#[derive(Debug)]
pub struct Place {
    search: Arc<Search>,
    name: String,
    /// The end of what has passed: shorter than the longest form.
    window: Vec<u8>,
}

impl Place {
    /// Searches what passes now, and where it meets what passed before.
    pub fn pass(&mut self, bytes: &[u8]) {
        self.window.extend_from_slice(bytes);
        for found in self.search.automaton.find_overlapping_iter(&self.window) {
            let Some(text) = self.search.texts.get(found.pattern().as_usize()) else { continue };
            let finding = Finding { text: text.clone(), place: self.name.clone() };
            let mut all = self.search.lock();
            if !all.contains(&finding) {
                all.push(finding);
            }
        }
        let keep = self.window.len().min(self.search.longest.saturating_sub(1));
        self.window.drain(..self.window.len() - keep);
    }

    fn read(mut self, mut file: File) -> io::Result<()> {
        let mut piece = vec![0; PIECE];
        loop {
            match file.read(&mut piece)? {
                0 => return Ok(()),
                n => self.pass(piece.get(..n).unwrap_or_default()),
            }
        }
    }
}

/// The text, in hex of both cases, in base64 at each of its three alignments.
fn forms(text: &str) -> Vec<Vec<u8>> {
    let mut forms =
        vec![text.as_bytes().to_vec(), hex::encode(text).into_bytes(), hex::encode_upper(text).into_bytes()];
    for skip in 0..3 {
        let padded = [&[0; 2][..skip], text.as_bytes()].concat();
        for alphabet in [STANDARD, URL_SAFE] {
            let encoded = alphabet.encode(&padded).into_bytes();
            // Without its first and last groups, which depend on the neighbours.
            let inner = encoded.get(4..encoded.len().saturating_sub(4)).unwrap_or_default();
            if inner.len() >= SHORTEST_FORM {
                forms.push(inner.to_vec());
            }
        }
    }
    forms
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "the heron stands in the eastern reeds";

    #[test]
    fn every_form_is_found_however_it_is_cut() {
        for form in forms(TEXT) {
            let sent = [&b"before"[..], &form, b"after"].concat();
            for piece in [1, 7, sent.len()] {
                let search = Search::new(&["something else", TEXT]).unwrap();
                let mut place = search.place("here");
                for bytes in sent.chunks(piece) {
                    place.pass(bytes);
                }
                assert_eq!(search.found(), [Finding { text: TEXT.into(), place: "here".into() }]);
            }
        }
    }

    #[test]
    fn nothing_is_found_where_nothing_is() {
        let search = Search::new(&[TEXT, "led on"]).unwrap();
        let mut place = search.place("here");
        place.pass(&vec![0x6c; 100_000]);
        place.pass(TEXT.split_at(20).0.as_bytes());
        // The other half passes elsewhere.
        search.place("there").pass(TEXT.split_at(20).1.as_bytes());
        assert_eq!(search.found(), []);
    }

    #[test]
    fn files_are_found_by_their_path() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("inner")).unwrap();
        std::fs::write(folder.path().join("empty"), b"").unwrap();
        let long = [&vec![7; PIECE - 10][..], TEXT.as_bytes()].concat();
        std::fs::write(folder.path().join("inner/long"), long).unwrap();
        let search = Search::new(&[TEXT]).unwrap();
        search.folder(folder.path()).unwrap();
        assert_eq!(search.found(), [Finding { text: TEXT.into(), place: "inner/long".into() }]);
    }
}
