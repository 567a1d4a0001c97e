//! Names of a fleet: `sensor-{01..50}`, `{hall,roof}-{a..c}`, as a shell writes them.

use ossicle_core::MAX_ENROL_BATCH;

use crate::endpoint::Failure;
use crate::name::Name;

/// The longest pattern, in bytes.
const MAX_PATTERN_LEN: usize = 16 * 1024;
/// The longest number in a range, in digits.
const MAX_DIGITS: usize = 9;

/// The names that these patterns stand for, each in a shell's order. Each name is valid and there once.
///
/// In a pattern `{1..12}` stands for the numbers from 1 to 12, `{01..12}` for the same with two digits, `{a..f}` for
/// letters, `{hall,roof}` for either; several of them for all combinations.
///
/// # Errors
/// A usage failure, before anything large is made: there are more than 1,000, or a pattern, a name or a repetition is not
/// allowed.
pub(super) fn expand(patterns: &[String]) -> Result<Vec<Name>, Failure> {
    let patterns = patterns.iter().map(|pattern| parse(pattern)).collect::<Result<Vec<_>, _>>()?;
    let count = |parts: &Vec<Part<'_>>| parts.iter().fold(1_usize, |count, part| count.saturating_mul(part.count()));
    let all = patterns.iter().map(count).fold(0, usize::saturating_add);
    if all > MAX_ENROL_BATCH {
        return Err(Failure::usage(format!(
            "these are {all} names, and at most {MAX_ENROL_BATCH} devices are enrolled at once: enrol them in parts"
        )));
    }
    let mut names: Vec<Name> = Vec::with_capacity(all);
    for parts in &patterns {
        let mut texts = vec![String::new()];
        for part in parts {
            let choices = part.choices();
            texts = texts.iter().flat_map(|text| choices.iter().map(move |choice| format!("{text}{choice}"))).collect();
        }
        for text in texts {
            let name = Name::parse(&text).map_err(|error| Failure::usage(format!("{text:?}: {error}")))?;
            if names.contains(&name) {
                return Err(Failure::usage(format!("{name} is there twice: give each device a name of its own")));
            }
            names.push(name);
        }
    }
    Ok(names)
}

/// A piece of a pattern.
enum Part<'p> {
    Text(&'p str),
    List(Vec<&'p str>),
    Numbers { from: u32, to: u32, digits: usize },
    Letters { from: u8, to: u8 },
}

impl Part<'_> {
    fn count(&self) -> usize {
        match self {
            Self::Text(_) => 1,
            Self::List(choices) => choices.len(),
            Self::Numbers { from, to, .. } => {
                usize::try_from(from.abs_diff(*to)).unwrap_or(usize::MAX).saturating_add(1)
            }
            Self::Letters { from, to } => usize::from(from.abs_diff(*to)) + 1,
        }
    }

    fn choices(&self) -> Vec<String> {
        fn between<T: Copy + Ord, R: DoubleEndedIterator>(from: T, to: T, range: impl Fn(T, T) -> R) -> Vec<R::Item> {
            if from <= to { range(from, to).collect() } else { range(to, from).rev().collect() }
        }
        match self {
            Self::Text(text) => vec![(*text).to_owned()],
            Self::List(choices) => choices.iter().map(|choice| (*choice).to_owned()).collect(),
            Self::Numbers { from, to, digits } => between(*from, *to, |low, high| low..=high)
                .into_iter()
                .map(|number| format!("{number:0digits$}"))
                .collect(),
            Self::Letters { from, to } => between(*from, *to, |low, high| low..=high)
                .into_iter()
                .map(|letter| char::from(letter).into())
                .collect(),
        }
    }
}

fn parse(pattern: &str) -> Result<Vec<Part<'_>>, Failure> {
    if pattern.len() > MAX_PATTERN_LEN {
        return Err(Failure::usage(format!("a pattern of names has at most {MAX_PATTERN_LEN} bytes")));
    }
    let unpaired = || {
        Failure::usage(format!(
            "{pattern:?}: braces come in pairs and not inside each other, as in 'sensor-{{01..50}}' or '{{hall,roof}}-1'"
        ))
    };
    let mut parts = Vec::new();
    let mut rest = pattern;
    while let Some((text, behind)) = rest.split_once('{') {
        let (inside, behind) = behind.split_once('}').ok_or_else(unpaired)?;
        if text.contains('}') || inside.contains('{') {
            return Err(unpaired());
        }
        parts.push(Part::Text(text));
        parts.push(choice(inside)?);
        rest = behind;
    }
    if rest.contains('}') {
        return Err(unpaired());
    }
    parts.push(Part::Text(rest));
    Ok(parts)
}

fn choice(inside: &str) -> Result<Part<'_>, Failure> {
    let wrong = || {
        Failure::usage(format!(
            "{{{inside}}} is neither a list like {{hall,roof}} nor a range like {{01..50}} or {{a..f}}"
        ))
    };
    if inside.contains(',') {
        return Ok(Part::List(inside.split(',').collect()));
    }
    let (from, to) = inside.split_once("..").ok_or_else(wrong)?;
    let is_number =
        |text: &str| (1..=MAX_DIGITS).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    if is_number(from) && is_number(to) {
        let padded = [from, to].iter().any(|text| text.len() > 1 && text.starts_with('0'));
        let digits = if padded { from.len().max(to.len()) } else { 0 };
        let number = |text: &str| text.parse().map_err(|_| wrong());
        return Ok(Part::Numbers { from: number(from)?, to: number(to)?, digits });
    }
    match (from.as_bytes(), to.as_bytes()) {
        ([from], [to])
            if (from.is_ascii_lowercase() && to.is_ascii_lowercase())
                || (from.is_ascii_uppercase() && to.is_ascii_uppercase()) =>
        {
            Ok(Part::Letters { from: *from, to: *to })
        }
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(patterns: &[&str]) -> Result<Vec<String>, String> {
        let patterns: Vec<String> = patterns.iter().map(|&pattern| pattern.to_owned()).collect();
        let names = expand(&patterns).map_err(|failure| {
            assert_eq!(failure.code, 2);
            failure.sentence
        })?;
        Ok(names.iter().map(|name| name.as_str().to_owned()).collect())
    }

    #[test]
    fn patterns_stand_for_what_a_shell_makes_of_them() {
        for (pattern, names) in [
            ("sensor", "sensor"),
            ("sensor-{8..11}", "sensor-8 sensor-9 sensor-10 sensor-11"),
            ("sensor-{08..11}", "sensor-08 sensor-09 sensor-10 sensor-11"),
            ("s{0..2}", "s0 s1 s2"),
            ("s{1..003}", "s001 s002 s003"),
            ("s{3..1}x", "s3x s2x s1x"),
            ("{a..c}", "a b c"),
            ("Z{C..A}", "ZC ZB ZA"),
            ("{hall,roof}-{1..2}", "hall-1 hall-2 roof-1 roof-2"),
            ("s{,-spare}", "s s-spare"),
            ("s{7..7}", "s7"),
            ("灯{1..2}", "灯1 灯2"),
            ("s{000000001..000000002}", "s000000001 s000000002"),
        ] {
            assert_eq!(expanded(&[pattern]).unwrap().join(" "), names, "{pattern}");
        }
        assert_eq!(expanded(&["a{1..2}", "b"]).unwrap(), ["a1", "a2", "b"]);
        assert_eq!(expanded(&["s-{001..1000}"]).unwrap().len(), 1000);
        assert_eq!(expanded(&["{0..9}{0..9}{0..9}"]).unwrap().last().unwrap(), "999");
    }

    #[test]
    fn what_is_too_much_or_makes_no_sense_is_refused_at_once() {
        for (patterns, said) in [
            (&["s{1..1001}"][..], "these are 1001 names"),
            (&["s{0..999999999}"], "these are 1000000000 names"),
            (&["{0..999999999}{0..999999999}{0..999999999}"], "at most 1000 devices"),
            (&["s{1..600}", "t{1..600}"], "these are 1200 names"),
            (&["s{0..9999999999}"], "neither a list"),
            (&["s{1..}"], "neither a list"),
            (&["s{..}"], "neither a list"),
            (&["s{}"], "neither a list"),
            (&["s{1}"], "neither a list"),
            (&["s{-1..3}"], "neither a list"),
            (&["s{+1..3}"], "neither a list"),
            (&["s{1..9..2}"], "neither a list"),
            (&["s{a..Z}"], "neither a list"),
            (&["s{a..3}"], "neither a list"),
            (&["s{é..ü}"], "neither a list"),
            (&["s{1..3"], "braces come in pairs"),
            (&["s1..3}"], "braces come in pairs"),
            (&["}{"], "braces come in pairs"),
            (&["s{a,{b,c}}"], "braces come in pairs"),
            (&["s 1"], "\"s 1\": "),
            (&["../{1..3}"], "\"../1\": "),
            (&[""], "\"\": "),
            (&["{a,}"], "\"\": "),
            (&["s{1..3}", "S2"], "S2 is there twice"),
            (&["s{1,01,1}"], "s1 is there twice"),
        ] {
            let refused = expanded(patterns).unwrap_err();
            assert!(refused.contains(said), "{patterns:?}: {refused}");
        }
        let long = "{a,".repeat(10_000);
        assert!(expanded(&[&long]).unwrap_err().contains("at most 16384 bytes"));
        let long = format!("{}{{1..2}}", "a".repeat(64));
        expanded(&[&long]).unwrap_err();
    }
}
