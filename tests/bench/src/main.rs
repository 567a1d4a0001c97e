//! Ossicle beside its peers: one generator, interleaved rounds, the kernel's accounting. See README.md.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use ossicle_bench::people::people;
use ossicle_bench::rows::{About, Extent, ROWS, Row, Stage};
use ossicle_bench::server::{Peer, Site};
use ossicle_bench::{Failure, build, raise_file_limit};
use serde::Serialize;

/// Server CPU and memory of Ossicle, mosquitto and nats-server, each with RSA-2048 on both sides
///
/// Rounds of all servers alternate, so that what disturbs one disturbs the others. Peers that are not installed are left
/// out.
#[derive(Parser)]
#[command(name = "ossicle-bench", after_help = format!("Rows: {}", names()))]
struct Arguments {
    /// Shorter and fewer rounds, and fewer idle connections: less than five minutes
    #[arg(long)]
    quick: bool,
    /// Write the figures here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Rounds of each row [default: 5, with --quick 3]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: Option<u32>,
    /// These rows only
    #[arg(long, value_name = "ROW", value_delimiter = ',', value_parser = row)]
    only: Vec<&'static str>,
    /// These servers only
    #[arg(long, value_name = "PEER", value_delimiter = ',', value_parser = peer)]
    peers: Vec<Peer>,
    /// Connections of `rss_idle` [default: 5000, with --quick 1000]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(100..=20_000))]
    idle: Option<u32>,
    /// The binary to measure [default: it is built]
    #[arg(long, value_name = "FILE")]
    ossicle: Option<PathBuf>,
}

fn names() -> String {
    ROWS.map(|about| about.name).join(", ")
}

fn row(name: &str) -> Result<&'static str, String> {
    let found = ROWS.iter().find(|about| about.name == name);
    found.map(|about| about.name).ok_or_else(|| format!("there are {}", names()))
}

fn peer(name: &str) -> Result<Peer, String> {
    let found = Peer::ALL.into_iter().find(|peer| peer.name() == name);
    found.ok_or_else(|| format!("there are {}", Peer::ALL.map(Peer::name).join(", ")))
}

/// What is written.
#[derive(Serialize)]
struct Report {
    /// Whether rounds were short.
    quick: bool,
    cores: usize,
    versions: BTreeMap<Peer, String>,
    rows: Vec<Figures>,
    ratios: Vec<Ratio>,
    /// What was not measured, and why.
    left_out: Vec<String>,
}

#[derive(Serialize)]
struct Figures {
    metric: &'static str,
    peer: Peer,
    median: f64,
    min: f64,
    max: f64,
    unit: &'static str,
    /// Operations a second, for orientation: the generator had its share of the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    rate: Option<f64>,
    /// The most that ours may be, and whether the median or the best round is no more.
    #[serde(skip_serializing_if = "Option::is_none")]
    goal: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    met: Option<bool>,
}

/// Ours as a multiple of a peer's, round by round.
#[derive(Serialize)]
struct Ratio {
    metric: &'static str,
    peer: Peer,
    median: f64,
    min: f64,
    max: f64,
    goal: Option<f64>,
    /// False if neither the median nor the best round reaches the goal.
    met: Option<bool>,
}

fn main() -> Result<(), Failure> {
    let arguments = Arguments::parse();
    raise_file_limit()?;
    let begun = Instant::now();
    let ossicle = match &arguments.ossicle {
        Some(path) => path.clone(),
        None => build()?,
    };
    let site = Site::new(ossicle)?;
    let wanted = |about: &&About| arguments.only.is_empty() || arguments.only.contains(&about.name);
    let rows: Vec<&About> = ROWS.iter().filter(wanted).collect();
    let mut extent = if arguments.quick { Extent::QUICK } else { Extent::FULL };
    if let Some(idle) = arguments.idle {
        extent.idle = idle as usize;
    }
    let rounds = arguments.rounds.unwrap_or(if arguments.quick { 3 } else { 5 });

    let mut left_out = Vec::new();
    let mut peers = Peer::ALL.to_vec();
    peers.retain(|peer| {
        let is_wanted = arguments.peers.is_empty() || arguments.peers.contains(peer);
        if is_wanted && !site.has(*peer) {
            left_out.push(format!("{peer}: not installed"));
        }
        is_wanted && site.has(*peer)
    });
    say(&format!("keys for {} clients", extent.people(rows.iter().any(|about| about.row == Row::Idle))));
    let people = people(extent.people(rows.iter().any(|about| about.row == Row::Idle)))?;
    let mut stages = peers.iter().map(|peer| Stage::new(&site, *peer, &people)).collect::<Result<Vec<_>, _>>()?;
    let versions = peers.iter().map(|peer| (*peer, site.version(*peer))).collect();

    let mut figures = Vec::new();
    let mut ratios = Vec::new();
    for about in rows {
        let mut results: BTreeMap<Peer, Vec<(f64, f64)>> = BTreeMap::new();
        // Memory hardly varies, and takes long.
        let is_memory = matches!(about.row, Row::Idle | Row::Member);
        let rounds = if is_memory { rounds.div_ceil(3) } else { rounds };
        for round in 0..rounds as usize {
            for turn in 0..stages.len() {
                // Nobody always comes first.
                let count = stages.len();
                let stage = &mut stages[(turn + round) % count];
                let peer = stage.server.peer;
                if results.get(&peer).map_or(0, Vec::len) < round {
                    continue;
                }
                let measured = stage.round(&site, about.row, &people, &extent);
                match measured.map_err(|error| format!("{} at {peer}: {error}\n{}", about.name, stage.server.log()))? {
                    Some(result) => results.entry(peer).or_default().push(result),
                    None => left_out.push(format!("{} of {peer}: it does not do that", about.name)),
                }
            }
        }
        report(about, &results, &mut figures, &mut ratios);
    }
    for sentence in &left_out {
        say(&format!("left out: {sentence}"));
    }
    say(&format!("took {:.0} s", begun.elapsed().as_secs_f64()));
    if let Some(file) = &arguments.json {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let report = Report { quick: arguments.quick, cores, versions, rows: figures, ratios, left_out };
        std::fs::write(file, serde_json::to_vec_pretty(&report)?)?;
    }
    Ok(())
}

fn say(sentence: &str) {
    println!("{sentence}");
}

/// Prints a row and keeps it.
fn report(
    about: &About,
    results: &BTreeMap<Peer, Vec<(f64, f64)>>,
    figures: &mut Vec<Figures>,
    ratios: &mut Vec<Ratio>,
) {
    let metric = about.name;
    for (peer, rounds) in results {
        let (median, min, max) = spread(rounds.iter().map(|(value, _)| *value));
        let (rate, ..) = spread(rounds.iter().map(|(_, rate)| *rate));
        let is_memory = matches!(about.row, Row::Idle | Row::Member);
        let whole = is_memory.then(|| format!(", {rate:.0} MiB the whole server"));
        let rate = (!is_memory).then_some(rate);
        let mut shown = whole.or_else(|| rate.map(|rate| format!(", {rate:.0}/s"))).unwrap_or_default();
        let goal = about.bound.filter(|_| *peer == Peer::Ossicle);
        let met = goal.map(|goal| median <= goal || min <= goal);
        shown += &verdict(goal, met);
        let (name, unit) = (peer.name(), about.unit);
        say(&format!("{metric:17} {name:10} {median:10.2} {unit} ({min:.2}..{max:.2}){shown}"));
        figures.push(Figures { metric, peer: *peer, median, min, max, unit, rate, goal, met });
    }
    let Some(ours) = results.get(&Peer::Ossicle) else { return };
    for (peer, theirs) in results.iter().filter(|(peer, _)| **peer != Peer::Ossicle) {
        let (median, min, max) = spread(ours.iter().zip(theirs).map(|((ours, _), (theirs, _))| ours / theirs));
        let goal = about.goals.iter().find(|(held, _)| held == peer).map(|(_, goal)| *goal);
        let met = goal.map(|goal| median <= goal || min <= goal);
        let verdict = verdict(goal, met);
        say(&format!("{metric:17} / {:8} {median:10.2} x ({min:.2}..{max:.2}){verdict}", peer.name()));
        ratios.push(Ratio { metric, peer: *peer, median, min, max, goal, met });
    }
}

fn verdict(goal: Option<f64>, met: Option<bool>) -> String {
    match (goal, met) {
        (Some(goal), Some(true)) => format!(", goal {goal:.2} met"),
        (Some(goal), _) => format!(", goal {goal:.2} MISSED"),
        _ => String::new(),
    }
}

/// Median, least and greatest.
fn spread(values: impl Iterator<Item = f64>) -> (f64, f64, f64) {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match (values.get(values.len() / 2), values.first(), values.last()) {
        (Some(median), Some(min), Some(max)) => (*median, *min, *max),
        _ => (0.0, 0.0, 0.0),
    }
}
