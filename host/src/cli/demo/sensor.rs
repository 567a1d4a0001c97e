//! A sensor of the story, and the account of it: what it says it has sent, and what its owner says to have opened.
//!
//! The two are held against each other by the number that each reading has in its chain. A reading may only be missing
//! while it is under way, or between the death of the server and everybody's return: nobody keeps messages yet.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Said;
use super::process::Process;
use crate::device::{Device, Ending, Happened, Led};

/// What runs it.
pub(super) enum Body {
    /// The firmware's application in a thread.
    Simulated(Device),
    /// The image in QEMU, known by what it says to others only.
    Qemu(Process),
}

pub(super) struct Sensor {
    pub(super) name: String,
    pub(super) body: Body,
    diary: Arc<Mutex<Diary>>,
    /// Of each chain that its owner has heard of, in this order, the numbers of the opened readings.
    opened: Vec<(String, BTreeSet<u64>)>,
    /// What the last opened reading said.
    pub(super) last: Option<String>,
    /// Readings that were opened.
    pub(super) readings: u64,
    /// How its LED has to be from now on, until its owner has commanded otherwise.
    pub(super) held: Option<bool>,
}

/// What a simulated sensor says of itself.
#[derive(Default)]
struct Diary {
    /// Chains begun.
    chains: usize,
    /// The chain and the number of each reading.
    sealed: Vec<(usize, u64)>,
    /// Of each connection, whether it resumed a channel.
    connections: Vec<bool>,
}

/// A place in the account, such as before or after the server's death.
#[derive(Clone, Copy, Default)]
pub(super) struct Mark {
    sealed: usize,
    connections: usize,
    /// The owner's last chain, and its last number.
    opened: Option<(usize, u64)>,
}

/// What the account says of the readings since a mark.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Balance {
    /// All were opened, or there were none.
    Even,
    /// Some are under way.
    UnderWay,
    /// This one was passed over: a later one was opened.
    Lost(u64),
}

impl Sensor {
    /// The account of a sensor, and what is to be told of all that happens to it.
    pub(super) fn observed(name: &str, said: &Said) -> (Account, impl FnMut(Happened) + Send + 'static) {
        let diary = Arc::<Mutex<Diary>>::default();
        let (written, said, who) = (Arc::clone(&diary), Arc::clone(said), name.to_owned());
        let observe = move |happened| {
            let mut diary = lock(&written);
            match happened {
                Happened::Connected { resumed, .. } => {
                    diary.connections.push(resumed);
                    said(&match resumed {
                        true => format!("    {who} resumed its channel"),
                        false => format!("    {who} connected, with a full handshake"),
                    });
                }
                Happened::Reported { n, .. } => {
                    diary.chains += usize::from(n == 0);
                    let chain = diary.chains.saturating_sub(1);
                    diary.sealed.push((chain, n.into()));
                }
                Happened::Obeyed { led } => said(&format!("    {who} switched its LED {}", word(led))),
                Happened::Ended(Ending::Stopped) => {}
                Happened::Ended(_) => said(&format!("    {who} has lost its connection")),
                _ => {}
            }
        };
        (Account { name: name.to_owned(), diary }, observe)
    }

    /// The LED, where anybody can stand beside it.
    pub(super) fn led(&self) -> Option<&Led> {
        match &self.body {
            Body::Simulated(device) => Some(device.led()),
            Body::Qemu(_) => None,
        }
    }

    /// Its owner has opened a reading; `id` is the chain and the number, as `listen --json` prints it.
    pub(super) fn hear(&mut self, id: &str, text: &str) {
        let Some((chain, n)) = id.split_once('-') else { return };
        let Ok(n) = n.parse() else { return };
        let at = self.opened.iter().position(|(known, _)| known == chain).unwrap_or_else(|| {
            self.opened.push((chain.to_owned(), BTreeSet::new()));
            self.opened.len() - 1
        });
        if let Some((_, numbers)) = self.opened.get_mut(at) {
            self.readings += u64::from(numbers.insert(n));
        }
        self.last = Some(text.to_owned());
    }

    /// How the last opened reading shows the LED.
    pub(super) fn shown(&self) -> Option<bool> {
        match self.last.as_ref()?.rsplit_once("led=")?.1 {
            "1" => Some(true),
            "0" => Some(false),
            _ => None,
        }
    }

    /// Here.
    pub(super) fn mark(&self) -> Mark {
        let diary = lock(&self.diary);
        let opened = self.opened.iter().enumerate().next_back().and_then(|(at, (_, numbers))| {
            let last = numbers.last()?;
            Some((at, *last))
        });
        Mark { sealed: diary.sealed.len(), connections: diary.connections.len(), opened }
    }

    /// The connections since `mark`, and whether each resumed a channel.
    pub(super) fn connections(&self, mark: Mark) -> Vec<bool> {
        lock(&self.diary).connections.get(mark.connections..).unwrap_or_default().to_vec()
    }

    /// What became of the readings between two marks.
    pub(super) fn balance(&self, from: Mark, to: Mark) -> Balance {
        // What the owner sees: a chain without gaps.
        for (at, (_, numbers)) in self.opened.iter().enumerate() {
            let first = match from.opened {
                Some((chain, _)) if at < chain => continue,
                Some((chain, last)) if at == chain => last + 1,
                _ => 0,
            };
            if let Some((lost, _)) = (first..).zip(numbers.range(first..)).find(|(next, n)| next != *n) {
                return Balance::Lost(lost);
            }
        }
        // What the sensor says it has sent.
        let diary = lock(&self.diary);
        let was_opened = |chain: usize, n: u64| self.opened.get(chain).is_some_and(|(_, opened)| opened.contains(&n));
        match diary.sealed.get(from.sealed..to.sealed).unwrap_or_default().iter().find(|(c, n)| !was_opened(*c, *n)) {
            None => Balance::Even,
            Some(&(chain, n)) => {
                let passed = self.opened.len() > chain + 1
                    || self.opened.get(chain).is_some_and(|(_, opened)| opened.range(n..).next().is_some());
                if passed { Balance::Lost(n) } else { Balance::UnderWay }
            }
        }
    }

    /// Has it end, and does not wait for that.
    pub(super) fn tell_to_stop(&mut self) {
        match &mut self.body {
            Body::Simulated(device) => device.tell_to_stop(),
            Body::Qemu(process) => process.kill(),
        }
    }
}

/// The account of a sensor that is about to start.
pub(super) struct Account {
    name: String,
    diary: Arc<Mutex<Diary>>,
}

impl Account {
    pub(super) fn open(self, body: Body) -> Sensor {
        let Self { name, diary } = self;
        Sensor { name, body, diary, opened: Vec::new(), last: None, readings: 0, held: None }
    }
}

pub(super) fn word(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

fn lock(diary: &Mutex<Diary>) -> MutexGuard<'_, Diary> {
    diary.lock().unwrap_or_else(PoisonError::into_inner)
}
