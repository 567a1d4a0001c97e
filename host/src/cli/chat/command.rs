//! What a person types, as a command.

use super::super::send::{recipient, too_large};
use crate::endpoint::{Failure, MAX_TEXT_LEN};
use crate::name::{Name, Pattern};

/// Every command, with what it takes, in the order in which help shows them.
pub(super) const COMMANDS: [(&str, &str, &str); 15] = [
    ("tell", "NAME [TEXT]", "send TEXT to NAME, client or group: your partner then"),
    ("msg", "NAME [TEXT]", "the same"),
    ("all", "TEXT", "say TEXT to everybody: not end-to-end encrypted"),
    ("init", "GROUP @NAME ...", "found GROUP and invite these to it, for good"),
    ("accept", "GROUP", "join a group that you are invited to"),
    ("decline", "GROUP", "stay away from it"),
    ("members", "[GROUP]", "who is in GROUP, or your groups and invitations"),
    ("close", "GROUP", "end GROUP for everybody"),
    ("history", "[NAME [erase]]", "what was said with NAME, a group, or /all; erase it"),
    ("list", "", "who is online, and what was not answered yet"),
    ("who", "[PATTERN]", "everybody, or such names (* ? [...]), and when last seen"),
    ("status", "", "the connection, and who you are"),
    ("verify", "[NAME [accept]]", "your key, or the safety number with NAME; take a new key"),
    ("help", "", "this"),
    ("quit", "", "leave; Ctrl-D does, too"),
];

/// How different a word may be from the command that is suggested for it.
const NEAR: usize = 3;
/// Characters that are shown of a word that is no command.
const SHOWN: usize = 20;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// To everybody.
    All(String),
    /// An invitation to the group that is called so, and whether to accept it.
    Answer(String, bool),
    Close(String),
    Help,
    /// With whom, and whether to erase it.
    History(Option<String>, bool),
    /// Name and members of a group, as they were typed.
    Init(String, Vec<String>),
    List,
    Members(Option<String>),
    Nothing,
    Quit,
    Status,
    /// To a client or a group.
    Tell(String, Option<String>),
    /// To whom one talks at present.
    Text(String),
    Verify(Option<Name>, bool),
    Who(Option<Pattern>),
}

impl Command {
    /// Reads a line.
    ///
    /// # Errors
    /// What is wrong with it, in one sentence for a person.
    pub(super) fn parse(line: &str) -> Result<Self, Failure> {
        let Some(command) = line.strip_prefix('/') else {
            return if line.trim().is_empty() { Ok(Self::Nothing) } else { text(line).map(Self::Text) };
        };
        if command.starts_with('/') {
            return text(command).map(Self::Text);
        }
        let (word, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim_start();
        let mut words = rest.split_whitespace();
        let mut group = || match words.next() {
            Some(group) => Ok(group.to_owned()),
            None => Err(Failure::usage(format!("which group? /{word} GROUP; /members shows what there is"))),
        };
        let parsed = match word {
            "accept" => Self::Answer(group()?, true),
            "close" => Self::Close(group()?),
            "decline" => Self::Answer(group()?, false),
            "init" => {
                let (Some(group), members) = (words.next(), words.by_ref().map(str::to_owned).collect::<Vec<_>>())
                else {
                    return Err(Failure::usage("what is it called, and who is in it? /init GROUP @NAME @NAME ..."));
                };
                Self::Init(group.to_owned(), members)
            }
            "members" => Self::Members(words.next().map(str::to_owned)),
            "history" => {
                let with = words.next().map(str::to_owned);
                let erase = match words.next() {
                    None => false,
                    Some("erase") => true,
                    Some(_) => return Err(Failure::usage("/history NAME shows, /history NAME erase erases")),
                };
                Self::History(with, erase)
            }
            "help" => Self::Help,
            "all" => {
                if rest.is_empty() {
                    return Err(Failure::usage(
                        "what? /all TEXT says it to everybody, signed and not end-to-end encrypted",
                    ));
                }
                return text(rest).map(Self::All);
            }
            "list" => Self::List,
            "quit" => Self::Quit,
            "status" => Self::Status,
            "msg" | "tell" => {
                let (to, said) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
                if to.is_empty() {
                    return Err(Failure::usage(format!("to whom? /{word} NAME TEXT")));
                }
                let said = said.trim_start();
                let said = if said.is_empty() { None } else { Some(text(said)?) };
                let to = recipient(to).map_err(|error| Failure::usage(error.to_string()))?;
                return Ok(Self::Tell(to, said));
            }
            "verify" => {
                let name = words.next().map(name).transpose()?;
                let accept = match words.next() {
                    None => false,
                    Some("accept") => true,
                    Some(_) => return Err(Failure::usage("/verify NAME shows, /verify NAME accept accepts")),
                };
                Self::Verify(name, accept)
            }
            "who" => {
                let pattern = words.next().map(Pattern::parse).transpose();
                Self::Who(pattern.map_err(|error| Failure::usage(error.to_string()))?)
            }
            _ => return Err(Failure::usage(unknown(word))),
        };
        match words.next() {
            Some(_) => {
                let takes = COMMANDS.iter().find(|(command, ..)| *command == word).map_or("", |(_, takes, _)| takes);
                Err(Failure::usage(format!("too many words: the command is /{word} {takes}").trim_end()))
            }
            None => Ok(parsed),
        }
    }
}

fn name(given: &str) -> Result<Name, Failure> {
    Name::parse(given).map_err(|error| Failure::usage(error.to_string()))
}

fn text(said: &str) -> Result<String, Failure> {
    if said.len() > MAX_TEXT_LEN { Err(too_large(said.len(), None)) } else { Ok(said.to_owned()) }
}

fn unknown(word: &str) -> String {
    let shown: String = word.chars().take(SHOWN).collect();
    let distance = |command: &str| strsim::damerau_levenshtein(command, &shown.to_lowercase());
    let nearest = COMMANDS.iter().map(|(command, ..)| (distance(command), command)).min();
    match nearest {
        Some((distance, command)) if distance <= NEAR && distance < command.len() => {
            format!("there is no /{shown}: did you mean /{command}? /help shows all")
        }
        _ => format!("there is no /{shown}: /help shows what there is; // sends a text that begins with a slash"),
    }
}

/// What can be typed, for a person.
pub(super) fn help() -> String {
    let mut help = String::new();
    for (command, takes, what) in COMMANDS {
        let usage = format!("/{command} {takes}");
        help.push_str(&format!("{usage:<23} {what}\n"));
    }
    help.push_str(
        "Without a slash a line goes to your partner, whom the prompt names; a text that\n\
         begins with a slash is typed with two. Tab completes commands and names, the\n\
         arrows bring former lines back: they are kept in memory only. Ctrl-C drops the\n\
         line, and leaves where there is none.",
    );
    help
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bob() -> Name {
        Name::parse("bob").unwrap()
    }

    #[test]
    fn lines_are_commands_or_text() {
        let parse = |line: &str| Command::parse(line).unwrap();
        assert_eq!(parse("/tell bob hello there"), Command::Tell("bob".into(), Some("hello there".into())));
        let to_bob = |text: &str| Command::Tell("BOB".into(), Some(text.into()));
        assert_eq!(parse("/tell BOB   hello  there "), to_bob("hello  there "));
        assert_eq!(parse("/msg BOB hi"), to_bob("hi"));
        for to in ["bob", "@bob", "plans~2", "~1"] {
            assert_eq!(parse(&format!("/msg {to}  ")), Command::Tell(to.into(), None));
        }
        assert_eq!(parse("/tell BOB /quit"), to_bob("/quit"));
        assert_eq!(parse("hello there"), Command::Text("hello there".into()));
        assert_eq!(parse(" /quit"), Command::Text(" /quit".into()));
        assert_eq!(parse("//quit"), Command::Text("/quit".into()));
        assert_eq!(parse(""), Command::Nothing);
        assert_eq!(parse(" \t"), Command::Nothing);
        assert_eq!(parse("/who"), Command::Who(None));
        assert_eq!(parse("/who s*"), Command::Who(Some(Pattern::parse("s*").unwrap())));
        assert_eq!(parse("/verify"), Command::Verify(None, false));
        assert_eq!(parse("/verify bob"), Command::Verify(Some(bob()), false));
        assert_eq!(parse("/verify bob accept"), Command::Verify(Some(bob()), true));
        let init = |group: &str, members: &[&str]| {
            Command::Init(group.into(), members.iter().map(|member| (*member).to_owned()).collect())
        };
        assert_eq!(parse("/init plans @bob  @carol"), init("plans", &["@bob", "@carol"]));
        assert_eq!(parse("/init plans"), init("plans", &[]));
        for (line, command) in [
            ("/accept plans~2", Command::Answer("plans~2".into(), true)),
            ("/decline plans", Command::Answer("plans".into(), false)),
            ("/close plans", Command::Close("plans".into())),
            ("/members", Command::Members(None)),
            ("/members plans", Command::Members(Some("plans".into()))),
            ("/history", Command::History(None, false)),
            ("/history bob", Command::History(Some("bob".into()), false)),
            ("/history bob erase", Command::History(Some("bob".into()), true)),
            ("/all hello  all ", Command::All("hello  all ".into())),
            ("/history /all", Command::History(Some("/all".into()), false)),
            ("/help", Command::Help),
            ("/list ", Command::List),
            ("/status", Command::Status),
            ("/quit", Command::Quit),
        ] {
            assert_eq!(parse(line), command);
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_the_nearest_command() {
        let wrong = |line: &str| Command::parse(line).unwrap_err().sentence;
        assert!(wrong("/lst").contains("/list?"), "{}", wrong("/lst"));
        assert!(wrong("/wohl bob").contains("/who?"));
        assert!(wrong("/TELL bob hi").contains("/tell?"));
        assert!(wrong("/exit").contains("/help"));
        assert!(wrong("/").contains("/help"));
        assert!(wrong("/usr/bin/env").contains("//"));
        assert!(wrong("/history bob now").contains("erase"));
        assert!(wrong("/tell").contains("NAME"));
        assert!(wrong("/all").contains("/all TEXT"));
        assert!(wrong("/init").contains("/init GROUP"));
        assert!(wrong("/accept").contains("/accept GROUP") && wrong("/close").contains("/close GROUP"));
        assert!(wrong("/decline a b").contains("too many words"));
        assert!(wrong("/tell a@b hi").contains("'@'"));
        assert!(wrong("/quit now").contains("/quit"));
        assert!(wrong("/verify bob yes").contains("accept"));
        assert!(wrong("/verify bob accept now").contains("[NAME [accept]]"));
        assert!(wrong("/who [").contains("']'"));
        assert!(wrong("/who a b").contains("[PATTERN]"));
    }

    #[test]
    fn odd_unicode_is_a_name_a_pattern_or_a_sentence() {
        for odd in
            ["\u{202e}bob", "b\u{200b}ob", "\u{301}", "p\u{430}ypal", "\u{1b}[2J", "\u{feff}", "\u{e0041}", "\u{0}"]
        {
            assert!(Command::parse(&format!("/tell {odd} hi")).is_err(), "{odd:?}");
            assert!(Command::parse(&format!("/verify {odd}")).is_err(), "{odd:?}");
        }
        for odd in ["\u{202e}*", "\u{1b}[2J", "*\u{200b}", "\u{e000}", "[\u{0}-z]"] {
            assert!(Command::parse(&format!("/who {odd}")).is_err(), "{odd:?}");
        }
        for fine in ["ｂｏｂ", "Ольга", "田中さん", "👩"] {
            assert!(Command::parse(&format!("/tell {fine} hi")).is_ok(), "{fine:?}");
            assert!(Command::parse(&format!("/who {fine}*")).is_ok(), "{fine:?}");
        }
        let long = "x".repeat(100_000);
        assert!(Command::parse(&format!("/{long}")).unwrap_err().sentence.len() < 200);
        assert!(Command::parse(&format!("/tell {long} hi")).unwrap_err().sentence.len() < 200);
        assert!(Command::parse(&format!("/who {long}")).unwrap_err().sentence.len() < 200);
    }

    #[test]
    fn what_is_too_long_is_refused_before_it_is_sent() {
        let longest = "x".repeat(MAX_TEXT_LEN);
        assert!(Command::parse(&longest).is_ok());
        assert!(Command::parse(&format!("/tell bob {longest}")).is_ok());
        for line in [format!("{longest}x"), format!("/tell bob {longest}x"), format!("//{longest}")] {
            assert!(Command::parse(&line).unwrap_err().sentence.starts_with("refused(too-large)"));
        }
    }

    #[test]
    fn help_names_every_command() {
        let help = help();
        for (command, ..) in COMMANDS {
            assert!(help.contains(&format!("/{command} ")), "{command}");
        }
        assert!(help.contains("in memory only"));
        assert!(help.lines().all(|line| line.len() <= 80), "{help}");
    }
}
