//! Names of clients, and the patterns that select among them.
//!
//! A name is shown as its owner wrote it and compared in a normalised form (NFKC and full case folding), so that nobody
//! can pass for another by case, width or composition. What cannot be seen, what would break a command line or an
//! address (`name@server`), and what mixes scripts is refused here, once: the rest of the house takes a [`Name`].
//! A [`Pattern`] is a glob over normalised names.

use core::fmt;

use ossicle_core::MAX_NAME_LEN;
use unicase::UniCase;
use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;
use unicode_properties::{GeneralCategory, UnicodeGeneralCategory};
use unicode_security::MixedScript;

/// The longest pattern, in bytes of UTF-8.
pub const MAX_PATTERN_LEN: usize = 256;

/// A client's name: 1 to 64 bytes of printable Unicode without spaces, `@`, `/` or control characters, in one script.
///
/// Two names are equal if their normalised forms are.
#[derive(Clone, Debug)]
pub struct Name {
    given: String,
    key: String,
}

impl Name {
    /// Takes a name as a person or a peer wrote it.
    ///
    /// # Errors
    /// [`NameError`] says in one sentence what is wrong with it.
    pub fn parse(given: &str) -> Result<Self, NameError> {
        if given.is_empty() {
            return Err(NameError::Empty);
        }
        if given.len() > MAX_NAME_LEN {
            return Err(NameError::Long { len: given.len() });
        }
        let key = fold(given);
        // Compatibility forms can hide what is forbidden: U+2100 becomes "a/c". So both forms are checked.
        for form in [given, &key] {
            if let Some(found) = form.chars().find(|&c| !is_allowed(c)) {
                return Err(NameError::Character { found });
            }
        }
        if given.chars().next().is_some_and(is_combining_mark) {
            return Err(NameError::Mark);
        }
        if !key.as_str().is_single_script() {
            return Err(NameError::Scripts);
        }
        Ok(Self { given: given.to_owned(), key })
    }

    /// The name as it was given, for people.
    pub fn as_str(&self) -> &str {
        &self.given
    }

    /// The normalised form, for comparing, indexing and sorting.
    pub fn key(&self) -> &str {
        &self.key
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.given)
    }
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key
    }
}

impl Eq for Name {}

impl core::hash::Hash for Name {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        self.key.hash(state);
    }
}

impl core::str::FromStr for Name {
    type Err = NameError;

    fn from_str(given: &str) -> Result<Self, NameError> {
        Self::parse(given)
    }
}

/// Why a text is not a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// It has a character that no name may have.
    #[error(
        "a name cannot contain {}: use printable characters without spaces, '@' and '/'",
        found.escape_unicode()
    )]
    Character {
        /// The first such character, possibly of the normalised form.
        found: char,
    },
    /// It is empty.
    #[error("a name needs at least one character")]
    Empty,
    /// It is too long.
    #[error("a name has at most {MAX_NAME_LEN} bytes, this one has {len}: shorten it")]
    Long {
        /// Its length in bytes.
        len: usize,
    },
    /// It begins with a mark that would be drawn over what stands before it.
    #[error("a name cannot begin with a combining mark: put a letter before it")]
    Mark,
    /// It mixes scripts, so that letters of one can pass for those of another.
    #[error("a name cannot mix scripts, such as Latin and Cyrillic: use the letters of one")]
    Scripts,
}

/// A glob over names: `*` is any run of characters, `?` any one, `[a-f]` one of a class, `[!a-f]` one outside it.
///
/// To match a character of these themselves, write it as a class: `[*]`. Patterns are compared in normalised form, so
/// case does not matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    glob: glob::Pattern,
}

impl Pattern {
    /// Takes a pattern as a person or a peer wrote it.
    ///
    /// # Errors
    /// [`PatternError`] says in one sentence what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        if text.is_empty() {
            return Err(PatternError::Empty);
        }
        if text.len() > MAX_PATTERN_LEN {
            return Err(PatternError::Long { len: text.len() });
        }
        let folded = fold(text);
        if let Some(found) = folded.chars().find(|&c| !is_allowed(c)) {
            return Err(PatternError::Character { found });
        }
        // A path glob gives `**` a meaning of its own; among names it is only a longer `*`.
        let mut single = String::with_capacity(folded.len());
        for c in folded.chars() {
            if c != '*' || !single.ends_with('*') {
                single.push(c);
            }
        }
        let glob = glob::Pattern::new(&single).map_err(|_| PatternError::Class)?;
        Ok(Self { text: text.to_owned(), glob })
    }

    /// Does this pattern select `name`?
    pub fn matches(&self, name: &Name) -> bool {
        self.glob.matches(name.key())
    }

    /// The pattern as it was given.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

impl core::str::FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        Self::parse(text)
    }
}

/// Why a text is not a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PatternError {
    /// It has a character that no name has.
    #[error("no name contains {}: a pattern has printable characters, and '*', '?' and '[...]'", found.escape_unicode())]
    Character {
        /// The first such character, possibly of the normalised form.
        found: char,
    },
    /// A class is not closed.
    #[error("a '[' in a pattern needs its ']': write '[[]' for the character itself")]
    Class,
    /// It is empty.
    #[error("a pattern needs at least one character: '*' is every name")]
    Empty,
    /// It is too long.
    #[error("a pattern has at most {MAX_PATTERN_LEN} bytes, this one has {len}: shorten it")]
    Long {
        /// Its length in bytes.
        len: usize,
    },
}

/// NFKC and full case folding. Folding can undo the normalisation and the reverse, hence the second round, after which
/// nothing changes any more (tested over all of Unicode).
fn fold(text: &str) -> String {
    let once: String = UniCase::unicode(text.nfd().collect::<String>()).to_folded_case().nfkc().collect();
    UniCase::unicode(once).to_folded_case().nfkc().collect()
}

fn is_allowed(c: char) -> bool {
    // Letters and symbols that show nothing: they would let two names look the same.
    const INVISIBLE: [core::ops::RangeInclusive<char>; 9] = [
        '\u{34f}'..='\u{34f}',
        '\u{115f}'..='\u{1160}',
        '\u{17b4}'..='\u{17b5}',
        '\u{180b}'..='\u{180f}',
        '\u{2800}'..='\u{2800}',
        '\u{3164}'..='\u{3164}',
        '\u{fe00}'..='\u{fe0f}',
        '\u{ffa0}'..='\u{ffa0}',
        '\u{e0000}'..='\u{e0fff}',
    ];
    use GeneralCategory as G;
    !(matches!(c, '@' | '/')
        || matches!(
            c.general_category(),
            G::Control
                | G::Format
                | G::LineSeparator
                | G::ParagraphSeparator
                | G::PrivateUse
                | G::SpaceSeparator
                | G::Surrogate
                | G::Unassigned
        )
        || INVISIBLE.iter().any(|range| range.contains(&c)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn pattern(text: &str) -> Pattern {
        Pattern::parse(text).unwrap()
    }

    #[test]
    fn ordinary_names_are_kept_as_given() {
        for text in
            ["alice", "Alice", "sensor-01", "x", "Zoë", "Ольга", "田中さん", "김철수", "🦴", "a.b_c+d#e", "日本-5"]
        {
            assert_eq!(name(text).as_str(), text);
            assert_eq!(name(text).to_string(), text);
        }
        assert_eq!(name(&"x".repeat(64)).as_str().len(), 64);
        assert_eq!("alice".parse::<Name>(), Ok(name("ALICE")));
    }

    #[test]
    fn case_width_and_composition_do_not_distinguish() {
        for (a, b) in [
            ("Alice", "aLICE"),
            ("ａｌｉｃｅ", "alice"),
            ("Zoe\u{308}", "ZOË"),
            ("Maße", "MASSE"),
            ("ΣΑΣ", "σας"),
            ("ﬁn", "FIN"),
        ] {
            assert_eq!(name(a), name(b));
            assert_eq!(name(a).key(), name(b).key());
        }
        assert_ne!(name("alice"), name("alicf"));
    }

    #[test]
    fn what_breaks_a_line_or_an_address_is_refused() {
        for text in [
            "a b",
            "a@b",
            "a/b",
            "\0",
            "a\nb",
            "a\tb",
            "\u{1b}[31m",
            "a\u{7f}",
            "a\u{85}b",
            "a\u{a0}b",
            "a\u{2028}b",
            "a\u{200b}b",
            "a\u{200d}b",
            "\u{202e}abc",
            "a\u{feff}",
            "a\u{ad}b",
            "\u{2066}x",
            "\u{3000}",
            "a\u{3164}",
            "a\u{fe0f}",
            "a\u{34f}",
            "\u{e000}",
            "a\u{e0041}",
            "\u{378}",
            "\u{2800}",
            "a\u{ff0f}b",
            "\u{2100}",
            "\u{ff20}",
        ] {
            assert!(matches!(Name::parse(text), Err(NameError::Character { .. })), "{text:?}");
        }
        assert_eq!(Name::parse(""), Err(NameError::Empty));
        assert_eq!(Name::parse(&"x".repeat(65)), Err(NameError::Long { len: 65 }));
        assert_eq!(Name::parse("\u{301}a"), Err(NameError::Mark));
    }

    #[test]
    fn mixed_scripts_are_refused() {
        for text in ["p\u{430}ypal", "al\u{456}ce", "αlice", "аlice", "ab田"] {
            assert_eq!(Name::parse(text), Err(NameError::Scripts), "{text:?}");
        }
    }

    #[test]
    fn errors_are_sentences_without_raw_characters() {
        assert_eq!(
            Name::parse("a\u{1b}b").unwrap_err().to_string(),
            "a name cannot contain \\u{1b}: use printable characters without spaces, '@' and '/'"
        );
        assert_eq!(
            Name::parse(&"é".repeat(40)).unwrap_err().to_string(),
            "a name has at most 64 bytes, this one has 80: shorten it"
        );
    }

    #[test]
    fn folding_is_stable_over_all_of_unicode() {
        let mut buffer = [0; 4];
        for c in '\0'..=char::MAX {
            let once = fold(c.encode_utf8(&mut buffer));
            assert_eq!(fold(&once), once, "{c:?}");
        }
    }

    #[test]
    fn a_name_is_always_also_its_own_key() {
        for c in '!'..=char::MAX {
            if let Ok(name) = Name::parse(c.encode_utf8(&mut [0; 4])) {
                assert!(name.key().chars().all(is_allowed), "{c:?}");
                assert!(!name.key().is_empty(), "{c:?}");
            }
        }
    }

    #[test]
    fn patterns_select_by_glob() {
        let cases = [
            ("*", "anything", true),
            ("**", "anything", true),
            ("sensor-*", "sensor-01", true),
            ("Sensor-*", "SENSOR-01", true),
            ("sensor-*", "sensor", false),
            ("sensor-0?", "sensor-01", true),
            ("sensor-0?", "sensor-011", false),
            ("?", "é", true),
            ("?", "日", true),
            ("[a-c]x", "bx", true),
            ("[A-C]x", "bx", true),
            ("[!a-c]x", "bx", false),
            ("[éè]", "é", true),
            ("[éè]", "a", false),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-b-b-d", false),
            ("alice", "ALICE", true),
            ("alice", "alice2", false),
            ("[*]", "*", true),
            ("[*]", "a", false),
            ("*.hidden", ".hidden", true),
            ("a\\b", "a\\b", true),
        ];
        for (text, given, expected) in cases {
            assert_eq!(pattern(text).matches(&name(given)), expected, "{text} {given}");
        }
        assert_eq!(pattern("A*").as_str(), "A*");
    }

    #[test]
    fn broken_patterns_are_refused() {
        assert_eq!(Pattern::parse(""), Err(PatternError::Empty));
        assert_eq!(Pattern::parse("[abc"), Err(PatternError::Class));
        assert_eq!(Pattern::parse("a\nb"), Err(PatternError::Character { found: '\n' }));
        assert_eq!(Pattern::parse(&"*".repeat(257)), Err(PatternError::Long { len: 257 }));
    }

    #[test]
    fn a_hostile_pattern_ends() {
        let hostile = pattern(&"*a".repeat(128));
        assert!(!hostile.matches(&name(&"a".repeat(64))));
        assert!(!pattern(&format!("{}b", "a*".repeat(100))).matches(&name(&"a".repeat(64))));
        assert!(!pattern(&format!("{}b", "?*".repeat(60))).matches(&name(&"a".repeat(64))));
        assert!(pattern(&"*a".repeat(64)).matches(&name(&"a".repeat(64))));
    }
}
