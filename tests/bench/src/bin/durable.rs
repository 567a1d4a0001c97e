//! Messages a second that are stored after an fsync, a restart with all of them waiting, and messages a second delivered.
//!
//! `cargo run --release -p ossicle-bench --bin durable -- [--messages COUNT] [--ossicle FILE]`

use std::path::PathBuf;

use clap::Parser;
use ossicle_bench::Failure;
use ossicle_bench::durable::{EACH, run};
use ossicle_bench::people::people;
use ossicle_bench::server::Site;

/// How much can wait at a server, and how soon it is there again
///
/// Messages of 256 bytes for clients that are away are sent by as many others; each is acknowledged after an fsync. Then
/// the server is killed and started again, and the clients come and take everything. Every message has to arrive once.
#[derive(Parser)]
#[command(name = "durable")]
struct Arguments {
    /// Messages
    #[arg(long, default_value_t = 1_000_000)]
    messages: u64,
    /// The binary to measure [default: beside this one]
    #[arg(long, value_name = "FILE")]
    ossicle: Option<PathBuf>,
}

fn main() -> Result<(), Failure> {
    let arguments = Arguments::parse();
    let ossicle = match arguments.ossicle {
        Some(path) => path,
        None => std::env::current_exe()?.with_file_name("ossicle"),
    };
    let pairs = usize::try_from(arguments.messages.div_ceil(EACH).max(1))?;
    let measured = run(&Site::new(ossicle)?, &people(2 * pairs)?)?;
    let rate = |time: core::time::Duration| measured.messages as f64 / time.as_secs_f64();
    println!("{} messages of 256 bytes for {pairs} clients", measured.messages);
    println!("stored     {:9.0}/s (goal 10000 or more)", rate(measured.stored));
    println!("restarted  {:9.2} s (goal 2.00 or less)", measured.restarted.as_secs_f64());
    println!("resident   {:9.1} MiB then", measured.resident as f64 / 1024.0);
    println!("delivered  {:9.0}/s (goal 100000 or more)", rate(measured.drained));
    Ok(())
}
