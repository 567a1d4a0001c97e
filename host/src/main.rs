//! The binary: parse, run, exit.

use std::process::ExitCode;

use clap::Parser;
use ossicle::cli::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
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
