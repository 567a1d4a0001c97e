//! The binary: parse, run, exit.

use std::process::ExitCode;
use std::thread::available_parallelism;

use clap::Parser;
use ossicle::cli::Cli;

/// Threads that serve connections, unless this variable of tokio's says how many.
const WORKERS: &str = "TOKIO_WORKER_THREADS";

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if std::env::var_os(WORKERS).is_none() {
        // One core is left to the threads that write, read and sign. A worker that was woken wakes the next to look for
        // more, so on a machine of two cores the second one costs more than it does.
        let cores = available_parallelism().map_or(1, usize::from);
        runtime.worker_threads(cores.saturating_sub(1).max(1));
    }
    let runtime = match runtime.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("ossicle: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(cli.run());
    // Threads that wait for a reader or for standard input would be waited for without end.
    runtime.shutdown_background();
    ExitCode::from(code)
}
