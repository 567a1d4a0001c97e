//! Writes `tests/vectors/*.json` anew: `cargo run -p ossicle-tests --bin vectors`.

use std::path::Path;
use std::{fs, io};

fn main() -> io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors");
    for (name, text) in ossicle_tests::vectors::files() {
        let path = folder.join(name);
        fs::write(&path, text)?;
        println!("{}", path.display());
    }
    Ok(())
}
