//! `ossicle completions`: what a shell needs to complete the command line.

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, print};
use crate::endpoint::Failure;

/// Print completions for a shell
///
/// Commands, options and paths, from the same description that --help prints.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle completions bash > ~/.local/share/bash-completion/completions/ossicle
  ossicle completions zsh > ~/.zfunc/_ossicle     with `fpath+=~/.zfunc` in ~/.zshrc, before compinit
  ossicle completions fish > ~/.config/fish/completions/ossicle.fish")]
pub struct Completions {
    /// Which shell
    pub shell: Shell,
}

impl Completions {
    pub(super) fn run(&self) -> Result<(), Failure> {
        // Into memory first: the generator does not expect a reader that goes away.
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "ossicle", &mut script);
        print(String::from_utf8_lossy(&script).trim_end())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;

    #[test]
    fn every_shell_gets_every_command() {
        for shell in Shell::value_variants() {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "ossicle", &mut script);
            let script = String::from_utf8(script).unwrap();
            for command in Cli::command().get_subcommands() {
                assert!(script.contains(command.get_name()), "{shell}: {}", command.get_name());
            }
        }
    }
}
